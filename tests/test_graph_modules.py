"""Models that are traces already: of torch.fx, and of torch.export."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo
from roo_rewrite.noise import shaken
from roo_rewrite.purity import duplicate, untraceable

ARGS = (torch.randn(5, 4, generator=torch.Generator().manual_seed(0)),) * 2


class Scaled(nn.Module):
    """A constant of forward, and a batch norm: of one request it is nothing but rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.score = nn.BatchNorm1d(4), nn.Linear(8, 1)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.score(torch.cat([self.norm(u * torch.tensor([1.0, 2.0, 3.0, 4.0])), x], 1))


def exported(model: nn.Module) -> nn.Module:
    batch = torch.export.Dim("batch")
    return torch.export.export(model, ARGS, dynamic_shapes=({0: batch}, {0: batch})).module()


@pytest.mark.parametrize("form", [torch.fx.symbolic_trace, exported])
@pytest.mark.filterwarnings("ignore:.*guard.*:UserWarning")
def test_a_trace_is_rewritten_like_its_model(form: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = form(Scaled().train())
    made = roo.rewrite(model, ARGS, spec=roo.FeatureSpec(request=["u"], impression=["x"]), check=True)
    assert "per request" in str(made.report)
    assert "broadcast inputs" not in str(made.report)
    roo.verify(model, made)


def test_a_copy_of_a_trace_has_what_its_code_does_not_read() -> None:
    model = torch.fx.symbolic_trace(Scaled())
    model.extra = nn.Linear(2, 2)
    model.extra.root = model  # torch.fx would leave it out
    for copied in (duplicate(model), shaken(model)):
        assert isinstance(copied.extra, nn.Linear)
        assert copied.extra is not model.extra
        assert copied.extra.root is copied


class Keeps(nn.Module):
    """Adds a buffer in its first call."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "mean"):
            self.register_buffer("mean", x.mean(0))
        return x - self.mean


def test_a_buffer_made_by_a_call_is_still_seen() -> None:
    why, _ = untraceable(Keeps(), lambda m: m(ARGS[0]), lambda m: m(2 * ARGS[0]))
    assert why is not None
    assert "'mean'" in why
