"""bmm(T, T') of both sides: the products below the diagonal are those above it, transposed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo

Pairs = Callable[[Tensor, Tensor], Tensor]
ONCE: dict[str, Pairs] = {
    "bmm": lambda t, w: torch.bmm(t, t.transpose(1, 2)),
    "matmul": lambda t, w: t @ t.transpose(-1, -2),
}
TWICE: dict[str, Pairs] = {
    "of two tensors": lambda t, w: torch.bmm(t, (t * w).transpose(1, 2)),
    "not transposed": lambda t, w: torch.bmm(t[:, :, :5], t[:, :5, :]),
}


class Net(nn.Module):
    def __init__(self, pairs: Pairs):
        super().__init__()
        torch.manual_seed(0)
        self.pairs, self.w = pairs, nn.Parameter(torch.randn(6))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.pairs(torch.cat([u, x], 1), self.w)).flatten(1)


def rewritten(pairs: Pairs) -> tuple[roo.RequestModel, int]:
    """The model, and how many products read both sides."""
    model = Net(pairs)
    example = (torch.randn(8, 3, 6), torch.randn(8, 2, 6))
    spec = roo.FeatureSpec(request=["u"], impression=["x"])
    made = roo.rewrite(model, example, spec=spec, fanout=16, check=True, split="always")
    roo.verify(model, made, batches=6)
    return made, made.code.count("jagged_einsum(")


@pytest.mark.parametrize("name", ONCE)
def test_once(name: str) -> None:
    assert rewritten(ONCE[name])[1] == 1


@pytest.mark.parametrize("name", TWICE)
def test_two_products_stay_two(name: str) -> None:
    made, mixed = rewritten(TWICE[name])
    assert mixed != 1, made.code
