"""The file of counts: a header, and a line for each picture, appended as they come."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from dymu.files import Amount, Count
from dymu.measure.results import BadResults
from dymu.measure.rows import RowFile

FORMAT: Literal[1] = 1
PROGRAM = "dymu stats"


class Header(msgspec.Struct, forbid_unknown_fields=True):
    """The first line: what the counts depend on.

    Attributes:
        sources: the folders and images.
        weights, processor, thresholds, forecasts: hashes; of no forecasts "".
        budgets: in image tokens.
    """

    dymu_stats: Literal[1]
    date: str
    sources: list[str]
    model: str
    weights: str
    dtype: str
    processor: str
    thresholds: str
    forecasts: str
    budgets: Annotated[list[Amount], msgspec.Meta(min_length=1)]
    versions: dict[str, str]


class Row(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The line of a picture; where one has an error, a later line of the same picture counts.

    Attributes:
        image: its name.
        tokens: of the untouched picture, as budgets count them.
        kept: at each budget.
        jpeg: bytes per pixel of a JPEG of the picture at one small size, see `dymu.media.features`.
        expected, reserve: at each budget what was told beforehand, see `Forecast`; empty without forecasts.
        error: why there are no counts.

    Raises:
        ValueError: neither counts nor an error, or both.
    """

    image: str
    tokens: Count = 0
    kept: list[Count] = []
    jpeg: Amount = 0.0
    expected: list[Amount] = []
    reserve: list[Count] = []
    error: str | None = None

    def __post_init__(self) -> None:
        if (self.tokens == 0 or not self.kept) == (self.error is None):
            raise ValueError("it needs `tokens` and `kept`, or an `error`")


class StatsFile(RowFile[Header, Row]):
    """A file of counts, see `RowFile`; pictures whose row has an error are looked at again.

    Raises:
        BadResults: also where a row does not have a number for each budget.
    """

    def __init__(self, path: Path, header: Header) -> None:
        super().__init__(path, header, Row, PROGRAM)
        count = len(header.budgets)
        for row in self.rows.values():
            if row.error is None and (len(row.kept), len(row.expected), len(row.reserve)) not in (
                (count, count, count),
                (count, 0, 0),
            ):
                self.__exit__()
                raise BadResults(
                    f"the line of {row.image} in {path} does not have {count} numbers, one for each budget; delete it, "
                    f"and {PROGRAM} looks at that image again."
                )
