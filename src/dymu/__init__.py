"""dymu: fewer image tokens for simple images, in a vision-language model that was never retrained.

Importing this package costs nothing: each name is loaded when it is first asked for.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "apply": "dymu.apply",
    "Handle": "dymu.apply",
    "calibrate": "dymu.calibrate",
    "calibrate_videos": "dymu.calibrate",
    "evaluate": "dymu.evaluate",
    "FixedMerge": "dymu.merging",
    "Report": "dymu.report",
    "Thresholds": "dymu.thresholds",
    "TokenMap": "dymu.token_map",
    "DymuError": "dymu.errors",
    "AlreadyApplied": "dymu.errors",
    "BadBudget": "dymu.errors",
    "BadImage": "dymu.errors",
    "BadPrompt": "dymu.errors",
    "BadThresholds": "dymu.errors",
    "BadVideo": "dymu.errors",
    "UnsupportedCache": "dymu.errors",
    "UnsupportedModel": "dymu.errors",
}

if TYPE_CHECKING:
    from dymu.apply import Handle, apply
    from dymu.calibrate import calibrate, calibrate_videos
    from dymu.errors import (
        AlreadyApplied,
        BadBudget,
        BadImage,
        BadPrompt,
        BadThresholds,
        BadVideo,
        DymuError,
        UnsupportedCache,
        UnsupportedModel,
    )
    from dymu.evaluate import evaluate
    from dymu.merging import FixedMerge
    from dymu.report import Report
    from dymu.thresholds import Thresholds
    from dymu.token_map import TokenMap

__all__ = [
    "AlreadyApplied",
    "BadBudget",
    "BadImage",
    "BadPrompt",
    "BadThresholds",
    "BadVideo",
    "DymuError",
    "FixedMerge",
    "Handle",
    "Report",
    "Thresholds",
    "TokenMap",
    "UnsupportedCache",
    "UnsupportedModel",
    "__version__",
    "apply",
    "calibrate",
    "calibrate_videos",
    "evaluate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dymu' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `dymu.apply`, `dymu.calibrate` and `dymu.evaluate` the functions.

    Importing a submodule sets it as an attribute of its package, which would put the module
    `dymu.apply` in the place of the function that it defines. Here the function takes that place,
    whichever was asked for first; `from dymu.apply import Handle` works as ever.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == value.__name__:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
