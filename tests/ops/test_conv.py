"""pointwise_conv against conv1d, weight_times against matmul, and where they take their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import roo_rewrite as roo
from roo_rewrite.ops.conv import pointwise_conv, weight_times


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 4), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_equals_the_convolution(rows: int, k: int, n: int, length: int, biased: bool) -> None:
    x = torch.randn(rows, k, length, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(n, k, 1, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(n, dtype=torch.float64, requires_grad=True) if biased else None
    got, want = pointwise_conv(x, weight, bias), F.conv1d(x, weight, bias)
    torch.testing.assert_close(got, want)
    wanted = [t for t in (x, weight, bias) if t is not None]
    for a, b in zip(torch.autograd.grad((got**2).sum(), wanted), torch.autograd.grad((want**2).sum(), wanted)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("trains", "runs"), [(True, "aten.convolution.default"), (False, "aten.bmm.default")])
def test_a_weight_that_takes_a_gradient_is_convolved(trains: bool, runs: str) -> None:
    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    calls: list[str] = []
    with Calls():
        pointwise_conv(torch.randn(2, 3, 4), torch.randn(5, 3, 1, requires_grad=trains))
    assert runs in calls


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, True),
        ({"bias": False}, True),
        ({"stride": 2}, False),
        ({"padding": 1}, False),
        ({"groups": 2}, False),
        ({"kernel_size": 3}, False),
    ],
)
def test_only_windows_of_one_entry(options: dict[str, Any], taken: bool) -> None:
    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, **{"kernel_size": 1, **options})

        def forward(self, u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) * u

    model = Conv()
    spec = roo.FeatureSpec(request=["u"], impression=["x"])
    made = roo.rewrite(model, (torch.randn(8, 1, 1), torch.randn(8, 4, 6)), spec=spec, check=True)
    roo.verify(model, made, batches=5)
    assert ("pointwise_conv" in made.code) == taken


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 4), st.integers(1, 9), st.integers(1, 3), st.integers(1, 5))
def test_equals_the_matmul(rows: int, k: int, n: int, length: int) -> None:
    x = torch.randn(rows, k, length, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(n, k, dtype=torch.float64, requires_grad=True)
    got, want = weight_times(weight, x), weight @ x
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad((got**2).sum(), [x, weight]), torch.autograd.grad((want**2).sum(), [x, weight])
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("width", "turned", "taken"), [(6, False, True), (2, False, False), (6, True, False)])
def test_only_a_matrix_times_a_batch_of_wide_ones(width: int, turned: bool, taken: bool) -> None:
    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, u: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            mixed = (x.transpose(1, 2) @ self.w).transpose(1, 2) if turned else self.w @ x
            return mixed.transpose(1, 2).reshape(len(x), -1) * u

    example = (torch.randn(8, 1), torch.randn(8, 4, width))
    model = Mix()
    made = roo.rewrite(model, example, spec=roo.FeatureSpec(request=["u"], impression=["x"]), check=True)
    roo.verify(model, made, batches=5)
    assert ("weight_times" in made.code) == taken
