"""Forwards that keep results with a gradient: read by a later call, or by none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hazard_parts import Plain
from torch import Tensor, nn

import roo_rewrite as roo


def test_equal_or_refused(hazard: type, sound: Callable[[type], None]) -> None:
    sound(hazard)


class CachesWeights(Plain):
    """What the first call made of a weight is read by the next: values are the same, the gradient is not."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.cache: Tensor | None = None

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.tanh(self.a.weight)
        return self.mix(u @ self.cache, x)


class CachesInList(Plain):
    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.cache: list[Tensor] = []

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        if not self.cache:
            self.cache.append(torch.tanh(self.a.weight))
        return self.mix(u @ self.cache[0], x)


class LeftOverUnread(Plain):
    """What a call in training left is nothing to a call in eval."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.penalty = torch.zeros(())
        self.penalty = (self.a.weight**2).sum()

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        if self.training:
            self.penalty = (self.a.weight**2).sum()
        return self.mix(self.user(u), x)


class CachesMask(Plain):
    """A constant made by the first call for those that follow."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.mask: Tensor | None = None

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
        return self.mix(self.user(u) * self.mask.to(u), x)


class CachesTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(20, 8), nn.Embedding(20, 8)
        self.cache: Tensor | None = None

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.tanh(self.user.weight)
        return (self.cache[user] * self.item(item)).sum(1)


def test_a_cached_result_keeps_its_gradient_unchecked() -> None:
    model = CachesTable().eval()
    example = (torch.randint(0, 20, (6,)), torch.randint(0, 20, (6,)))
    rewritten = roo.rewrite(model, example, spec=roo.FeatureSpec(["user"], ["item"]), fanout=10)
    users, items, counts = torch.tensor([1, 2]), torch.randint(0, 20, (5,)), torch.tensor([2, 3])
    for scores in (model(users.repeat_interleave(counts), items), rewritten(users, items, num_impressions=counts)):
        model.user.weight.grad = None
        scores.sum().backward(retain_graph=True)
        grad = model.user.weight.grad
        assert grad is not None
        assert grad[users].abs().sum() > 0
