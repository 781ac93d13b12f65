"""Calls of `autograd.Function`s, caught however they are written.

`apply = MyFunction.apply`, kept in a module or an attribute, is a bound method: it holds on to the function object
of `Function.apply`, so putting another in its place is not seen there. The code of that object is replaced instead.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

Apply = Callable[[Callable[..., Any], type, Any, Any], Any]
_HANDLERS: list[Callable[[type, Any, Any], Any]] = []


class _StandIn:
    @classmethod
    def apply(cls, *args: Any, **kwargs: Any) -> Any:
        from roo_rewrite import functions  # it runs with torch's globals

        __class__  # type: ignore[name-defined]  # noqa: B018 - as many free variables as the code it stands for
        return functions._HANDLERS[-1](cls, args, kwargs)


@contextlib.contextmanager
def functions_intercepted(handle: Apply) -> Iterator[None]:
    """While active, `cls.apply(*args, **kwargs)` is `handle(real, cls, args, kwargs)`; `real` is torch's."""
    target = torch.autograd.Function.__dict__["apply"].__func__
    code = target.__code__
    real = types.FunctionType(code, target.__globals__, target.__name__, target.__defaults__, target.__closure__)
    _HANDLERS.append(lambda cls, args, kwargs: handle(real, cls, args, kwargs))
    target.__code__ = _StandIn.__dict__["apply"].__func__.__code__
    try:
        yield
    finally:
        target.__code__ = code
        _HANDLERS.pop()
