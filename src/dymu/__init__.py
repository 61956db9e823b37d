"""dymu: fewer image tokens for simple images, in a vision-language model that was never retrained.

Importing this package costs nothing: each name is loaded when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dymu.version import __version__

_NAMES = {
    "calibration.images": ("calibrate",),
    "calibration.videos": ("calibrate_videos",),
    "errors": (
        *("AlreadyApplied", "BadBudget", "BadImage", "BadOutput", "BadPrompt", "BadThresholds", "BadVideo"),
        *("DymuError", "UnsupportedCache", "UnsupportedModel"),
    ),
    "evaluation.run": ("evaluate",),
    "forecast": ("Forecast",),
    "handle": ("Handle", "apply", "handle_of"),
    "reducers": ("FixedMerge", "Reducer"),
    "report": ("Report",),
    "thresholds": ("Thresholds",),
    "measure.check": ("ModelCheck", "check"),
    "media.tiles": ("tiles_for",),
    "token_map": ("TokenMap",),
}
"""The public names of each module."""
_HOME = {name: f"dymu.{module}" for module, names in _NAMES.items() for name in names}

if TYPE_CHECKING:
    from dymu import pruning as pruning
    from dymu import reducers as reducers
    from dymu.calibration.images import calibrate
    from dymu.calibration.videos import calibrate_videos
    from dymu.errors import (
        AlreadyApplied,
        BadBudget,
        BadImage,
        BadOutput,
        BadPrompt,
        BadThresholds,
        BadVideo,
        DymuError,
        UnsupportedCache,
        UnsupportedModel,
    )
    from dymu.evaluation.run import evaluate
    from dymu.forecast import Forecast
    from dymu.handle import Handle, apply, handle_of
    from dymu.measure.check import ModelCheck, check
    from dymu.media.tiles import tiles_for
    from dymu.reducers import FixedMerge, Reducer
    from dymu.report import Report
    from dymu.thresholds import Thresholds
    from dymu.token_map import TokenMap

__all__ = [
    "AlreadyApplied",
    "BadBudget",
    "BadImage",
    "BadOutput",
    "BadPrompt",
    "BadThresholds",
    "BadVideo",
    "DymuError",
    "FixedMerge",
    "Forecast",
    "Handle",
    "ModelCheck",
    "Reducer",
    "Report",
    "Thresholds",
    "TokenMap",
    "UnsupportedCache",
    "UnsupportedModel",
    "__version__",
    "apply",
    "calibrate",
    "calibrate_videos",
    "check",
    "evaluate",
    "handle_of",
    "tiles_for",
]


def __getattr__(name: str) -> Any:
    if name in ("pruning", "reducers"):
        return import_module(f"dymu.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'dymu' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
