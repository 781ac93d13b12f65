"""Calls of functions, caught however they are written.

`apply = MyFunction.apply`, kept in a module or an attribute, is a bound method: it holds on to the function object
of `Function.apply`, so putting another in its place is not seen there. The code of that object is replaced instead.
So it is for functions of the user's own, which may have been imported by name.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
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


Call = Callable[[types.FunctionType, Callable[..., Any], Any, Any], Any]
_CALLS: list[Callable[[Any, Any], Any]] = []
_WHICH = "roo_rewrite: which of them"


def _called(*args: Any, **kwargs: Any) -> Any:
    from roo_rewrite import functions  # it runs with the globals of the function it stands for

    return functions._CALLS["roo_rewrite: which of them"](args, kwargs)  # type: ignore[call-overload]


@contextlib.contextmanager
def calls_intercepted(which: Sequence[types.FunctionType], handle: Call) -> Iterator[None]:
    """While active, `function(*args, **kwargs)` is `handle(function, real, args, kwargs)` for each of `which`."""
    before, codes = len(_CALLS), [f.__code__ for f in which]
    try:
        for function, code in zip(which, codes):
            real = types.FunctionType(
                code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
            )
            real.__kwdefaults__ = function.__kwdefaults__
            _CALLS.append(lambda args, kwargs, f=function, r=real: handle(f, r, args, kwargs))  # type: ignore[misc]
            constants = tuple(len(_CALLS) - 1 if c == _WHICH else c for c in _called.__code__.co_consts)
            function.__code__ = _called.__code__.replace(co_consts=constants, co_freevars=code.co_freevars)
        yield
    finally:
        for function, code in zip(which, codes):
            function.__code__ = code
        del _CALLS[before:]
