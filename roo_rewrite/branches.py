"""`if mask.any():` in forward. A trace goes one way; which way others would have gone is looked at with another trace.

    if empty.any():                              the trace goes in: `mask.clone()`, `index_put(mask, [empty], False)`
        mask = mask.clone()
        mask[empty] = False

Going in is the general way of `any`, staying out that of `all`. Where `passes.branches` proves that going in changes
nothing on a batch that stays out, the one trace stands for both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from roo_rewrite.swallowed import asking

# File, line, and how often forward has been there before.
Place = tuple[str, int, int]
MOST = 3
_GENERAL = {"any": True, "all": False}
_ASKED = ("__bool__", "item")


class Branches(TorchFunctionMode):
    """Answers whether any, or all, of a mask is true: as is general, and at the places of `against` the other way.

    asked: the conditions in order, each with its place.
    """

    def __init__(self, against: Set[Place] = frozenset()):
        super().__init__()
        self.against = against
        self.asked: dict[Place, Tensor] = {}
        self._made: dict[int, tuple[Tensor, str]] = {}
        self._visits = Counter[tuple[str, int]]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _ASKED and args and id(args[0]) in self._made:
            return self._answer(args[0])
        result = func(*args, **(kwargs or {}))
        if name in _GENERAL and isinstance(result, Tensor) and result.ndim == 0 and result.dtype == torch.bool:
            self._made[id(result)] = (result, name)
        return result

    def _answer(self, condition: Tensor) -> bool:
        file, line = asking()
        place = (file, line, self._visits[file, line])
        self._visits[file, line] += 1
        self.asked[place] = condition
        general = _GENERAL[self._made[id(condition)][1]]
        return general is not (place in self.against)


def on_data(error: BaseException) -> bool:
    """Whether the trace met a condition on values."""
    return "data-dependent" in str(error)
