"""The nesting of a call whose leaves are all plain tensors, so that the usual call is taken apart in one walk.

paths  (user, u0) (user, u1) (dense)      nest  (("user", (("u0", None), ("u1", None))), ("dense", None))

At request level packed columns are a pair of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from roo_rewrite.facts import Provenance
from roo_rewrite.parameters import Path

Nest = tuple[tuple[Any, Any], ...]  # key and nest, None for a tensor; in the order of the leaves
_PAIR: tuple[Path, ...] = ((("item", 0),), (("item", 1),))


def call_nests(paths: Sequence[Path], packed: Sequence[bool]) -> dict[Provenance, Nest | None]:
    """The nest of a call at each level; `packed` says which leaves are columns of both sides."""
    sides = (_PAIR if columns else ((),) for columns in packed)
    pairs = [(*path, *side) for path, both in zip(paths, sides) for side in both]
    wide = None if any(packed) else nest_of(paths)
    return {Provenance.IMPRESSION: wide, Provenance.REQUEST: nest_of(pairs)}


def nest_of(paths: Sequence[Path]) -> Nest | None:
    """The nest of paths in the order of their leaves; None where one goes through attributes."""
    groups: dict[Any, list[Path]] = {}
    for (how, key), *rest in paths:
        if how != "item":
            return None
        groups.setdefault(key, []).append(tuple(rest))
    entries: list[tuple[Any, Any]] = []
    for key, inner in groups.items():
        below = None if inner == [()] else nest_of(inner)
        if below is None and inner != [()]:
            return None
        entries.append((key, below))
    return tuple(entries)


def gather(value: Any, nest: Nest, found: list[Tensor]) -> bool:
    """Appends the tensors of `value`; False where it does not have this nesting to the letter."""
    if type(value) not in (dict, list, tuple) or len(value) != len(nest):
        return False
    for key, below in nest:
        try:
            entry = value[key]
        except (KeyError, IndexError, TypeError):
            return False
        if below is not None:
            if not gather(entry, below, found):
                return False
        elif isinstance(entry, Tensor):
            found.append(entry)
        else:
            return False
    return True
