"""Forwards that cannot be traced as they are: sizes made plain ints, NumPy, vmap, TorchScript."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hazard_parts import Plain
from torch import Tensor, nn

MODES = (False, True)


class LengthOfABatch(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.a(u)[torch.arange(len(u))].view(len(u), -1), x)


class IntOfASize(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.a(u) + torch.zeros(int(x.size(0)), 1, dtype=u.dtype), x)


class PositionsTiledInNumPy(Plain):
    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(9, 4)

    def forward(self, u_ids: Tensor, x: Tensor) -> Tensor:
        steps = np.tile(np.arange(1, u_ids.shape[1] + 1), [u_ids.shape[0], 1])
        steps *= u_ids.numpy() != 0
        return self.mix(self.a(self.positions(torch.from_numpy(steps).long()).sum(1)), x)


class NumPyOfValues(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        seen = torch.from_numpy(np.array(u.detach().numpy() > 0))
        return self.mix(self.a(u * seen), x)


class TheLengthItself(Plain):
    """A size that is returned is no constant of the batch that was traced."""

    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Any:
        return {"score": self.mix(self.a(u)[: len(x)], x), "rows": len(u)}


class HookBesideALength(Plain):
    """An interpreter of bytecode drops the hook without a word."""

    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.a(u)[: len(x)]
        if h.requires_grad:
            h.register_hook(lambda g: 2 * g)
        return self.mix(h, x)


class DataWrittenBesideAnInt(Plain):
    hoists = False
    caught = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.a(u) * torch.ones(int(u.size(0)), 1, dtype=u.dtype)
        h.data.mul_(3)
        return self.mix(h, x)


class LengthBeforeACumulativeSum(Plain):
    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(torch.cumsum(u, 0)[torch.arange(len(u))], x)


class MappedOverRows(Plain):
    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(torch.vmap(lambda row: torch.relu(self.a(row)))(u), x)


class MappedWithinRows(Plain):
    hoists = False

    def forward(self, u_seq: Tensor, x: Tensor) -> Tensor:
        return self.mix(torch.vmap(self.user, in_dims=1, out_dims=1)(u_seq).sum(1), x)


class MappedBesideAWrite(Plain):
    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        self.seen += 1
        return self.mix(torch.vmap(self.user)(u), x)


class Scripted(Plain):
    hoists = False

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.c = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.c(u), x)


def test_equal_or_refused(hazard: type, sound: Callable[[type], None]) -> None:
    sound(hazard)
