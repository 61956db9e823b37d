"""What `dymu families` and docs/families.md say of each family: from the descriptions alone, without torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dymu.families.decoders import PLAIN
from dymu.families.family import Decoder, Family, Tower
from dymu.families.known import FAMILIES

HEADER = (
    "model type", "transformers", "pictures", "videos", "unit: 1 patch, or what says how many", "vision encoders",
    "language models",
)  # fmt: skip


def listed(version: str | None = None) -> list[list[str]]:
    """The lines of a table, in the order of the names.

    Args:
        version: of transformers; where a family does not work with it, its line says so. None: no line does.
    """
    return [_line(family, version) for family in _sorted()]


def data(version: str) -> list[dict[str, Any]]:
    """The same for programs, and whether each family works with this version of transformers."""
    return [
        {
            "model_type": family.model_type,
            "since": family.since,
            "usable": family.works_with(version),
            "images": _pictures(family),
            "tiles": family.cuts_images,
            "native_resolution": _any_size(family),
            "videos": family.video_token is not None,
            "unit": family.unit,
            "towers": _names(family.towers),
            "decoders": _names(family.decoders),
            "limits": list(_limits(family)),
        }
        for family in _sorted()
    ]


def limits() -> dict[str, list[str]]:
    """What is not supported, or may surprise, and in which families."""
    phrases = dict.fromkeys(phrase for family in FAMILIES.values() for phrase in _limits(family))
    return {phrase: [family.model_type for family in _sorted() if phrase in _limits(family)] for phrase in phrases}


def plain_decoders() -> str:
    """The language models that lines call plain."""
    return ", ".join(PLAIN.model_types)


def _limits(family: Family) -> tuple[str, ...]:
    return (*family.limits, *(f"the argument {name} is refused" for name in family.refuses))


def _sorted() -> list[Family]:
    return [family for _, family in sorted(FAMILIES.items())]


def _line(family: Family, version: str | None) -> list[str]:
    unusable = version is not None and not family.works_with(version)
    return [
        family.model_type,
        f"≥ {family.since}" + (f", so not with {version}" if unusable else ""),
        _pictures(family),
        "yes" if family.video_token is not None else "–",
        "1" if family.unit is None else family.unit.rpartition(".")[2].format(modality="image"),
        ", ".join(_names(family.towers)),
        _decoders(family),
    ]


def _pictures(family: Family) -> str:
    any_size = _any_size(family)
    rest = "tiles of one size" if family.cuts_images else "one size"
    if len(any_size) == len(_names(family.towers)):
        return "any size"
    return f"{rest}, or any with {', '.join(any_size)}" if any_size else rest


def _any_size(family: Family) -> list[str]:
    """The vision encoders that get pictures of sizes of their own."""
    return _names(tower for tower in family.towers if tower.arrangement != "batch")


def _decoders(family: Family) -> str:
    names = _names(family.decoders)
    missing = [name for name in PLAIN.model_types if name not in names]
    if len(missing) > len(PLAIN.model_types) // 2:
        return ", ".join(names)
    return "any plain one" + (f" but {', '.join(missing)}" if missing else "")


def _names(kinds: Iterable[Tower | Decoder]) -> list[str]:
    return [name for kind in kinds for name in kind.model_types]
