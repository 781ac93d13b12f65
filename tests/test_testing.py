"""The strategies a user's own tests draw batches with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import find, given, settings
from torch import Tensor, nn

import roo_rewrite as roo
from roo_rewrite import testing


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return (torch.tanh(self.a(u)) * x).sum(-1)  # no dead unit: other weights, other scores


MODEL = Model()
REWRITTEN = roo.rewrite(MODEL, (torch.randn(4, 3), torch.randn(4, 3)), spec=roo.FeatureSpec(["u"], ["x"]))


@settings(max_examples=25, deadline=None)
@given(testing.batches(REWRITTEN))
def test_a_batch_is_a_call_at_both_levels(batch: testing.RequestCall) -> None:
    rows = int(batch.num_impressions.sum())
    assert len(batch.args[0]) == len(batch.num_impressions)
    assert len(batch.args[1]) == len(batch.expanded_args[0]) == rows
    testing.assert_same(MODEL, REWRITTEN, batch)


@pytest.mark.parametrize("wanted", [[], [0], [1], [0, 2], [3, 0]])
def test_every_kind_of_counts_is_drawn(wanted: list[int]) -> None:
    found = find(
        testing.counts(), lambda n: len(n) == len(wanted) and all((a > 0) == (b > 0) for a, b in zip(n, wanted))
    )
    assert len(found) == len(wanted)


def test_another_model_is_told_apart() -> None:
    batch = find(testing.batches(REWRITTEN), lambda b: int(b.num_impressions.sum()) > 2)
    with pytest.raises(roo.EquivalenceError, match="num_impressions"):
        testing.assert_same(Model(), REWRITTEN, batch)
