"""What the arguments of methods may be, by how their classes annotate them."""

from __future__ import annotations

from dataclasses import fields
from numbers import Integral
from typing import Any, get_args

from dymu.choices import Fill

SEEDS = 2**32
"""What a seed is below: what every generator takes."""


def whole_numbers(owner: Any, name: str) -> tuple[int, ...]:
    """The numbers that a field holds, as Python's own; one for several of one.

    Raises:
        ValueError: it holds something else.
    """
    given = getattr(owner, name)
    several = (given,) if isinstance(given, Integral) else given
    try:
        numbers = tuple(several)
    except TypeError:
        numbers = (None,)
    if any(isinstance(each, bool) or not isinstance(each, Integral) for each in numbers):
        raise ValueError(f"{type(owner).__name__} takes whole numbers for {name}, such as (2, 4), not {given!r}.")
    return tuple(map(int, numbers))


def check_fields(owner: Any) -> None:
    """Refuse what a dataclass was given for fields that are annotated `bool`, `int` or `Fill`, and is none, and for a
    `seed`; make whole numbers Python's own.

    Annotations are strings where a module asks for that (`from __future__ import annotations`).

    Raises:
        ValueError: naming the field.
    """
    for field in fields(owner):
        value, wanted = getattr(owner, field.name), ""
        if field.type in (bool, "bool") and not isinstance(value, bool):
            wanted = "True or False"
        elif field.type in (int, "int") and (isinstance(value, bool) or not isinstance(value, Integral)):
            wanted = "a whole number"
        elif field.type in (Fill, "Fill") and value not in get_args(Fill):
            wanted = f"one of {', '.join(get_args(Fill))}"
        elif field.name == "seed" and not 0 <= value < SEEDS:
            wanted = f"a whole number from 0 to {SEEDS - 1}"
        elif field.type in (int, "int"):
            object.__setattr__(owner, field.name, int(value))
        if wanted:
            raise ValueError(f"{type(owner).__name__} takes {wanted} for {field.name}, not {value!r}.")
