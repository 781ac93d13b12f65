"""weighted_batch_norm against torch's batch norm of the expanded rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from roo_rewrite.ops.norm import weighted_batch_norm

counts = st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(lambda n: sum(n) > 1)


def both(shape: tuple[int, ...], number: list[int], outer: int, inner: int, affine: bool) -> None:
    torch.manual_seed(len(number))
    rows = len(number)
    x = torch.randn(outer * rows * inner, *shape, dtype=torch.float64, requires_grad=True)
    norm = nn.BatchNorm1d(shape[0], affine=affine, momentum=0.3).double()
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    picks = torch.tensor([r for r, n in enumerate(number) for _ in range(n)])
    blocks = x.unflatten(0, (outer, rows, inner))
    want = norm(blocks[:, picks].flatten(0, 2))
    made = weighted_batch_norm(x, norm.weight, norm.bias, mean, var, 0.3, norm.eps, torch.tensor(number), outer, inner)
    got = made.unflatten(0, (outer, rows, inner))[:, picks].flatten(0, 2)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(var, norm.running_var)
    weights = torch.randn_like(want)
    wanted = [x, *norm.parameters()]
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), wanted), torch.autograd.grad((want * weights).sum(), wanted)
    ):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@settings(max_examples=30, deadline=None)
@given(counts, st.integers(1, 2), st.integers(1, 3), st.booleans(), st.booleans())
def test_equal_to_batch_norm_of_the_expanded_rows(
    number: list[int], outer: int, inner: int, affine: bool, spatial: bool
) -> None:
    both((3, 4) if spatial else (3,), number, outer, inner, affine)


def test_a_request_without_impressions_reaches_nothing() -> None:
    x = torch.tensor([[1.0], [float("nan")], [3.0]], requires_grad=True)
    y = weighted_batch_norm(x, None, None, None, None, 0.1, 1e-5, torch.tensor([1, 0, 2]))
    assert torch.isfinite(y[[0, 2]]).all()
    y[[0, 2]].square().sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_takes_its_statistics_in_float32(dtype: torch.dtype) -> None:
    x = (torch.arange(600).reshape(300, 2) % 7 + 100).to(dtype)
    got = weighted_batch_norm(x, None, None, None, None, 0.1, 1e-5, torch.ones(300, dtype=torch.long))
    want = torch.nn.functional.batch_norm(x, None, None, training=True)
    assert got.dtype is dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
