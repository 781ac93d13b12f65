"""Forwards that take gradients themselves: they run where gradients are recorded, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hazard_parts import Plain
from torch import Tensor

import roo_rewrite as roo

SPEC = roo.FeatureSpec(request=["u"], impression=["x"])


def test_equal_or_refused(hazard: type, sound: Callable[[type], None]) -> None:
    sound(hazard)


class Sensitivity(Plain):
    """The score's own gradient is a feature."""

    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        (slope,) = torch.autograd.grad(self.mix(h, x).tanh().sum(), h, create_graph=True)
        return (slope * x).sum(-1)


class SensitivityOfUser(Plain):
    """The slope of one request does not depend on the others, yet a trace loses the call."""

    hoists = False

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            h = self.user(u)
            h = h if h.requires_grad else h.requires_grad_()
            (slope,) = torch.autograd.grad(h.pow(3).sum(), h, create_graph=True)
        return self.mix(slope, x)


class NeverRuns(Plain):
    """Negative: it fails with gradients and without."""

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return torch.autograd.grad(u.sum(), x)[0]


def test_a_forward_that_takes_gradients_is_verified() -> None:
    model, example = Sensitivity().double(), (torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4).double())
    roo.verify(model, roo.rewrite(model, example, spec=SPEC, fanout=64))


def test_a_forward_that_fails_either_way_is_refused() -> None:
    with pytest.raises(roo.CaptureError, match="cannot be called with the example"):
        roo.rewrite(NeverRuns(), (torch.randn(6, 4), torch.randn(6, 4)), spec=SPEC)
