"""Whether images keep as many tokens as those of calibration did."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

_log = logging.getLogger("dymu")

FEWEST = 50
"""Pictures, before anything is said."""
FAR = 0.15
"""By which a mean differs that is worth a warning, if chance does not explain it."""
SURE = 4.0
"""Standard errors that chance does not explain."""
USUAL_SD = 0.5
"""Standard deviation of a picture's tokens over their mean, where calibration does not say."""


class Drift:
    """What pictures keep over what those of calibration kept, for all threads; from a budget's setting on.

    Args:
        part: of a picture's tokens that stayed on average at calibration.
        sd: standard deviation of that of one picture, over the mean.
    """

    def __init__(self, part: float, sd: float | None) -> None:
        self._part, self._sd = part, USUAL_SD if sd is None else sd
        self._pictures, self._total, self._said = 0, 0.0, False
        self._lock = threading.Lock()

    def add(self, kept: Sequence[int], tokens: Sequence[int]) -> float:
        """The mean so far, with these pictures. A mean far from 1 is logged as a warning, once."""
        with self._lock:
            self._pictures += len(kept)
            self._total += sum(left / (self._part * all_) for left, all_ in zip(kept, tokens, strict=True))
            mean = self._total / self._pictures
            far = abs(mean - 1) > max(FAR, SURE * self._sd / self._pictures**0.5)
            if self._pictures >= FEWEST and far and not self._said:
                self._said = True
                _log.warning(
                    "the %d pictures since the budget was set keep %.2f times what those of calibration kept: they are "
                    "of another kind; calibrate on pictures like these.",
                    self._pictures,
                    mean,
                )
            return mean
