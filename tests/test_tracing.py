"""tracing: what a trace has no way to say is said in ops it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import roo_rewrite as roo
from roo_rewrite.tracing import Traceable


def instead(function: Callable[..., Tensor], *args: Any) -> Tensor:
    with Traceable():
        return function(*args)


@settings(derandomize=True, deadline=None)
@given(st.data())
def test_entries_taken_along_a_dim_are_those_torch_takes(data: st.DataObject) -> None:
    dim = data.draw(st.integers(-3, 2))
    sizes = [(n, data.draw(st.sampled_from([n, 1])), data.draw(st.sampled_from([n, 1]))) for n in (2, 3, 4)]
    first, second = [a for _, a, _ in sizes], [b for _, _, b in sizes]
    second[dim] = data.draw(st.integers(0, 5))
    x = torch.randn(first, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(first[dim], second)
    expected, found = torch.take_along_dim(x, indices, dim), instead(torch.take_along_dim, x, indices, dim)
    assert torch.equal(found, expected)
    assert torch.equal(instead(Tensor.take_along_dim, x, indices, dim), expected)
    weight = torch.randn_like(expected)
    for a, b in zip(torch.autograd.grad((found * weight).sum(), x), torch.autograd.grad((expected * weight).sum(), x)):
        torch.testing.assert_close(a, b)


def test_entries_taken_without_a_dim_are_torchs_own() -> None:
    x, indices = torch.randn(2, 3), torch.tensor([[0, 5], [3, 1]])
    assert torch.equal(instead(torch.take_along_dim, x, indices), torch.take_along_dim(x, indices))


@pytest.mark.parametrize("dim", [3, -4])
def test_a_dim_out_of_range_is_torchs_own_error(dim: int) -> None:
    with pytest.raises(IndexError, match="out of range"):
        instead(torch.take_along_dim, torch.randn(2, 3, 4), torch.zeros(2, 3, 4, dtype=torch.int64), dim)


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 5), st.integers(1, 4), st.booleans())
def test_combinations_are_those_of_torch(n: int, r: int, again: bool) -> None:
    x = torch.arange(n) * 3
    found, expected = instead(torch.combinations, x, r, again), torch.combinations(x, r, again)
    assert torch.equal(found, expected)
    assert found.shape == expected.shape


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Linear(4, 6)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.scores(u)
        best = torch.take_along_dim(h, h.argsort(1)[:, :3], 1)
        first, second = torch.combinations(torch.arange(3)).T
        return (best[:, first] * best[:, second] * x[:, :3]).sum(1)


class Crossing(nn.Module):
    """Takes rows of others, and pairs of rows."""

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        pairs = torch.combinations(u[:, 0])
        return torch.take_along_dim(u, u.argsort(0), 0).sum(1) + x.sum(1) + pairs.sum()


@pytest.mark.parametrize("model", [Sorted(), Crossing()])
def test_models_that_take_and_combine(model: nn.Module) -> None:
    spec = roo.FeatureSpec(request=["u"], impression=["x"])
    found = roo.rewrite(model, (torch.randn(12, 4), torch.randn(12, 4)), spec=spec, fanout=10, check=True)
    roo.verify(model, found, batches=6)
    assert ("on broadcast inputs" in str(found.report)) == isinstance(model, Crossing)
