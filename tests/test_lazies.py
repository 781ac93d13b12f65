"""Lazy modules get their shapes from the example."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo
from roo_rewrite.errors import CaptureError

SPEC = roo.FeatureSpec(request=["user"], impression=["item"])


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.layers = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(1))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.layers(torch.cat([self.embedding(user), self.embedding(item)], 1))


def test_a_lazy_model_is_called_once() -> None:
    original = Lazy()
    original.layers[0].eval()
    model = roo.rewrite(original, (torch.arange(6), torch.arange(6)), spec=SPEC, fanout=10)
    assert original.layers[0].weight.shape == (6, 8)
    assert [m.training for m in original.layers] == [False, True, True, True]
    assert original.layers[1].num_batches_tracked == 0
    roo.verify(original, model, batches=2)


class Built(nn.Module):
    """Makes its layers in its first call; `again`: in every call."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.layers = nn.ModuleList()
        self.again = again

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        x = torch.cat([self.embedding(user), self.embedding(item)], 1)
        if self.again or not len(self.layers):
            self.layers.append(nn.Linear(x.shape[1], 6))
        return self.layers[0](x).relu()


@pytest.mark.parametrize("train", [False, True])
def test_a_model_that_makes_its_parameters_in_its_first_call_is_called_once(train: bool) -> None:
    original = Built().train(train)
    model = roo.rewrite(original, (torch.arange(6), torch.arange(6)), spec=SPEC, fanout=10)
    assert [n for n, _ in original.named_parameters()] == ["embedding.weight", "layers.0.weight", "layers.0.bias"]
    assert model._whole_program().emitted is not None
    roo.verify(original, model, batches=2)


def test_a_model_that_makes_parameters_in_every_call_is_refused() -> None:
    with pytest.raises(CaptureError, match="in every call"):
        roo.rewrite(Built(again=True), (torch.arange(6), torch.arange(6)), spec=SPEC)


def test_a_lazy_model_that_does_not_fit_the_example_is_refused() -> None:
    with pytest.raises(CaptureError, match="cannot be called with the example"):
        roo.rewrite(Lazy(), (torch.arange(6), torch.full((6,), 99)), spec=SPEC)
