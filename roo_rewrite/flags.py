"""Masks that are the same by the way they are made.

    mask = lengths > 0          in one module
    mask = lengths > 0          in another: the first
    mask.view(-1, 1, 1)         the same again, for rows of two dims

Two comparisons of the same tensors, neither written to between, have the same entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_COMPARED = {"gt", "ge", "lt", "le", "eq", "ne"}
_VIEWED = {"view", "reshape", "unsqueeze"}


class Flags:
    """The masks met in one trace, `[B]` or views of such as `[B, 1, ...]`."""

    def __init__(self) -> None:
        self._compared: dict[Any, Tensor] = {}
        self._firsts: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._held: list[Any] = []  # an id is that of one tensor while it lives

    def note(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """A call of a function by this name, all arguments by place."""
        if not isinstance(result, Tensor) or result.dtype != torch.bool:
            return
        name = name.strip("_")
        if name in _COMPARED and all(isinstance(a, (Tensor, bool, int, float)) for a in args):
            key = (name, *((id(a), a._version) if isinstance(a, Tensor) else (type(a), a) for a in args))
            self._held.append(args)
            self._firsts[id(result)] = (result, result._version, self._compared.setdefault(key, result))
        elif name in _VIEWED and result.ndim > 1 and args[0].ndim == 1 and column(result):
            self._firsts[id(result)] = (result, result._version, self.first(args[0]))

    def first(self, mask: Tensor) -> Tensor:
        """The first mask with the same entries, itself where none is known."""
        _, version, first = self._firsts.get(id(mask), (mask, -1, mask))
        same = (
            version == mask._version
            and self._firsts.get(id(first), (first, first._version, first))[1] == first._version
        )
        return first if same else mask


def column(mask: Tensor) -> bool:
    """Whether a mask of several dims is one of the first dim alone."""
    return all(isinstance(s, int) and s == 1 for s in mask.shape[1:])
