"""Copies of what a module may hold: also of values that `copy.deepcopy` refuses and that no call of a model changes.

Views of dicts and read-only mappings become those of a copied dict; modules and locks are shared.
"""

from __future__ import annotations

import copy
import copyreg
import threading
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


def deep(value: T, memo: dict[int, Any] | None = None) -> T:
    """`copy.deepcopy(value, memo)`, whatever views, read-only mappings, modules and locks are in it.

    A module that torch.export made holds what warns when it is copied.
    """
    with _reduced(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.deepcopy(value, memo)


def _keys(names: Iterable[Any]) -> Any:
    return dict.fromkeys(names).keys()


def _values(values: Iterable[Any]) -> Any:
    return dict(enumerate(values)).values()


def _items(pairs: Iterable[Any]) -> Any:
    return dict(pairs).items()


def _shared(value: Any) -> str:
    return "shared"  # a name in place of a recipe: deepcopy keeps the value itself


_RECIPES: dict[type, Callable[[Any], Any]] = {
    types.MappingProxyType: lambda m: (types.MappingProxyType, (dict(m),)),
    types.ModuleType: _shared,
    type(threading.Lock()): _shared,
    type(threading.RLock()): _shared,
}
for _kind in (dict, OrderedDict):
    _RECIPES |= {
        type(_kind().keys()): lambda v: (_keys, (list(v),)),
        type(_kind().values()): lambda v: (_values, (list(v),)),
        type(_kind().items()): lambda v: (_items, (list(v),)),
    }


@contextmanager
def _reduced() -> Iterator[None]:
    """The recipes where copy looks for them, but for those that somebody has put there."""
    table: dict[type, Any] = copyreg.dispatch_table
    added = {kind: recipe for kind, recipe in _RECIPES.items() if kind not in table}
    table.update(added)
    try:
        yield
    finally:
        for kind in added:
            del table[kind]
