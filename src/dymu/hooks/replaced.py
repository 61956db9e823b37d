"""What stands in the place of a module's own method or config while DyMU is applied."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch import nn

from dymu.errors import DymuError

Method = Callable[..., Any]

Around = Callable[..., Any]
"""Called with the method that it replaces, and its arguments."""


COPIED = (
    "a model cannot be copied or pickled while DyMU is applied to it: the copy would run this model's layers; call "
    "handle.remove() first, or copy it, also for adapters that copy modules, before dymu.apply (save_pretrained and "
    "state_dict work as ever)."
)


class Replaced:
    """Calls `around(method, ...)` where a module's own `method(...)` is called.

    In place of hooks: what `around` does in `finally` is done after every kind of interruption, where torch runs the
    hooks of a call that ended in an error for `Exception` only.
    """

    def __init__(self, method: Method, around: Around) -> None:
        functools.update_wrapper(self, method)
        self._method, self._around = method, around
        self.retired = False
        """Whether it does nothing any more; somebody may have put it into something of theirs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._method(*args, **kwargs) if self.retired else self._around(self._method, *args, **kwargs)

    @property
    def __func__(self) -> Method:
        """As bound methods have, for what wraps those, such as accelerate's mixed precision."""
        return lambda _module, *args, **kwargs: self(*args, **kwargs)

    def __reduce_ex__(self, _protocol: object) -> Any:
        if self.retired:
            return functools.partial, (self._method,)
        refuse_copy()


def refuse_copy() -> NoReturn:
    """In place of a module's `__getstate__`, which copies and pickles ask for first."""
    raise DymuError(COPIED)


def by_thread(module: nn.Module, names: Sequence[str], apart: Callable[[], bool]) -> Callable[[], None]:
    """Let every thread have values of its own of some attributes of a module. Returns what undoes it.

    The module itself has the newest of any thread, which is also that of a thread that has none.

    Args:
        apart: whether they are this thread's own now, or the module's.
    """
    kind, values = type(module), threading.local()

    def own(name: str) -> property:
        def read(module: nn.Module) -> Any:
            newest = module.__dict__.get(name)
            return getattr(values, name, newest) if apart() else newest

        def write(module: nn.Module, value: Any) -> None:
            module.__dict__[name] = value
            setattr(values, name, value)

        return property(read, write)

    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    view = type(kind.__name__, (kind,), named | {name: own(name) for name in names})
    module.__class__ = view

    def undo() -> None:
        if type(module) is view:
            module.__class__ = kind

    return undo


def config_view(config: Any, attention: Callable[[], str | None], text: Any = None) -> Any:
    """The same config, all values shared, but for the attention implementation, which `attention` names; None: it is as
    set. A copy of the view is an ordinary config.

    Args:
        text: what stands in for the config of the language model within it.
    """
    kind: Any = type(config)
    stock = kind._attn_implementation

    class View(kind):
        @property
        def _attn_implementation(self) -> Any:
            return attention() or stock.fget(self)

        @_attn_implementation.setter
        def _attn_implementation(self, name: Any) -> None:
            stock.fset(self, name)

        def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
            return super().get_text_config(*args, **kwargs) if text is None else text

        def __reduce_ex__(self, _protocol: Any) -> Any:
            return copy.copy, (config,)

    View.__name__, View.__qualname__ = kind.__name__, kind.__qualname__
    view = object.__new__(View)
    object.__setattr__(view, "__dict__", config.__dict__)
    return view
