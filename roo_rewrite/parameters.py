"""The parameters of a model's forward, and where in them a value lies."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from roo_rewrite.errors import InputError

Path = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Parameters:
    """The parameters of `forward`: names of the positional ones, of `*args`, and those the example gave."""

    names: tuple[str, ...]
    rest: str
    roots: tuple[str, ...] = ()

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any], partial: bool = False) -> dict[str, Any]:
        """Values by parameter. Raises InputError for too many positional or for doubly given ones."""
        given = dict(zip(self.names, args))
        if len(args) > len(self.names):
            if not self.rest:
                raise InputError(f"{len(args)} positional arguments given; the parameters are {list(self.names)}")
            given[self.rest] = tuple(args[len(self.names) :])
        for name, value in kwargs.items():
            if name in given:
                raise InputError(f"argument {name!r} is given twice, by place and by name")
            given[name] = value
        extra = [name for name in given if name not in self.roots]
        if extra and not partial:
            raise InputError(f"arguments {extra} are not in the example; its arguments are {list(self.roots)}")
        return given


def follow(given: Mapping[str, Any], path: Path, name: str) -> Any:
    """The value at `path`. Raises InputError where the call lacks it."""
    value: Any = given
    try:
        for kind, key in path:
            if isinstance(value, Tensor):
                raise KeyError(key)
            value = getattr(value, key) if kind == "attribute" else value[key]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise InputError(f"the call lacks input {name!r}, which the example has") from None
    return value


def parameters_of(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Parameters:
    """The parameters of `forward` as this example gives them. Raises InputError where it does not fit."""
    try:
        signature = inspect.signature(forward)
        bound = signature.bind(*args, **kwargs)
    except ValueError:
        return Parameters((), "args", ("args", *kwargs))
    except TypeError as e:
        raise InputError(f"the example does not fit forward: {e}") from e
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(p.name for p in signature.parameters.values() if p.kind in positional)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_POSITIONAL), "")
    open_ended = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    roots = [n for n in bound.arguments if n != open_ended]
    return Parameters(names, rest, (*roots, *bound.arguments.get(open_ended or "", ())))
