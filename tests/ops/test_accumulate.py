"""linear_onto against a sum, with and without gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from roo_rewrite.ops.accumulate import linear_onto


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=3), st.booleans(), st.booleans())
def test_equals_the_sum(lead: list[int], gradients: bool, transposed: bool) -> None:
    base = torch.randn(*lead, 5, dtype=torch.float64)
    if transposed:
        base = base.transpose(0, -1).contiguous().transpose(0, -1)
    x = torch.randn(*lead, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    start = torch.ones((), dtype=torch.float64, requires_grad=True)
    want = base * start + F.linear(x, weight)
    with torch.set_grad_enabled(gradients):
        got = linear_onto(base * start, x, weight)
    torch.testing.assert_close(got, want)
    if gradients:
        wanted = (x, weight, start)
        for a, b in zip(torch.autograd.grad((got**2).sum(), wanted), torch.autograd.grad((want**2).sum(), wanted)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("lead", [(4,), (4, 2)])
def test_it_compiles_and_exports(lead: tuple[int, ...]) -> None:
    class Sum(torch.nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return linear_onto(F.linear(x, weight), x, weight)

    args = (torch.randn(*lead, 3), torch.randn(5, 3))
    exported = torch.export.export(Sum(), args).module()
    torch.testing.assert_close(exported(*args), 2 * F.linear(*args))
