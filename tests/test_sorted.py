"""Rows sorted and put back: the order is dropped where every row is treated by itself, and always equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import roo_rewrite as roo

ROWS, WIDTH = 8, 4
Region = Callable[["Sorted", Tensor, Tensor, Tensor], Tensor]


class Sorted(nn.Module):
    """A score of what `region` makes of steps `[B, 5, 4]`, lengths `[B]` and items `[B, 4]`."""

    def __init__(self, region: Region):
        super().__init__()
        torch.manual_seed(0)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.state = nn.Linear(WIDTH, WIDTH)
        self.both = nn.Linear(2 * WIDTH, 1)
        self.region = region

    def forward(self, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
        made = self.region(self, steps, lengths, item)
        return self.both(torch.cat([made, item], 1)).squeeze(1)


def rewritten(region: Region) -> tuple[Sorted, roo.RequestModel]:
    generator = torch.Generator().manual_seed(0)
    steps, item = torch.randn(ROWS, 5, WIDTH, generator=generator), torch.randn(ROWS, WIDTH, generator=generator)
    lengths, model = torch.tensor([1, 3, 5, 2, 1, 2, 4, 5]), Sorted(region).eval()
    spec = roo.FeatureSpec(request=["steps", "lengths"], impression=["item"])
    return model, roo.rewrite(model, (steps, lengths, item), spec=spec, fanout=10)


def packed(model: Sorted, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    known, order = torch.topk(lengths, k=len(lengths))
    out, state = model.gru(pack_padded_sequence(steps.index_select(0, order), known.cpu(), batch_first=True))
    back = torch.topk(order, k=len(order), largest=False)[1]
    return pad_packed_sequence(out, batch_first=True)[0].sum(1)[back] + state[-1].index_select(0, back)


def with_argsort(model: Sorted, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    known, order = lengths.sort(descending=True)
    return (model.state(steps[order].sum(1)) / known.unsqueeze(1))[order.argsort()]


def with_inverse(model: Sorted, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    order = torch.argsort(lengths, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    return model.state(steps[order].sum(1))[inverse]


def with_scatter(model: Sorted, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    order = torch.argsort(lengths, stable=True)
    inverse = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    return model.state(steps[order].sum(1))[inverse]


def of_both_sides(model: Sorted, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    order = lengths.sort(stable=True)[1]
    kept = model.state(steps[order]).tanh() * item[order].unsqueeze(1)
    return kept.sum(1)[order.sort()[1]]


@pytest.mark.parametrize("region", [packed, with_argsort, with_inverse, with_scatter, of_both_sides])
def test_the_order_is_dropped(region: Region) -> None:
    model, made = rewritten(region)
    assert not any(word in made.code for word in ("sort", "topk", "descending"))
    assert made._whole_program().plan.residuals
    roo.verify(model, made, batches=5)


def another(model: Sorted, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    order = lengths.sort()[1]
    return steps[order].sum(1)[lengths.roll(1).argsort().argsort()]


def downward(model: Sorted, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    order = lengths.sort()[1]
    return steps[order].sum(1)[order.argsort(descending=True)]


def over_rows(model: Sorted, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    order = lengths.sort()[1]
    return steps[order].sum(1).cumsum(0)[order.argsort()]


def with_unsorted(model: Sorted, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    order = lengths.sort()[1]
    return (steps[order].sum(1) + steps.sum(1))[order.argsort()]


def left_sorted(model: Sorted, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    order = lengths.sort()[1]
    kept = model.state(steps[order].sum(1))
    return kept[order.argsort()] + kept


def never_sorted(model: Sorted, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    order = lengths.sort()[1]
    return (steps[order].sum(1))[order.argsort()] + steps.sum(1)[order.argsort()]


def accumulated(model: Sorted, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    order = lengths.sort()[1]
    one_less = torch.full_like(order, -1).index_put((order,), torch.arange(len(order)), accumulate=True)
    return steps[order].sum(1)[one_less]


def of_entries(model: Sorted, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    entries = steps[..., 0].flatten()
    order = entries.sort()[1]
    return entries[order].view(-1, 5).cumsum(1).flatten()[order.argsort()].view(-1, 5)[:, :WIDTH]


MATTERS = [another, downward, over_rows, with_unsorted, left_sorted, never_sorted, accumulated, of_entries]


@pytest.mark.parametrize("region", MATTERS)
def test_an_order_that_matters_stays(region: Region) -> None:
    model, made = rewritten(region)
    assert "sort" in made.code
    roo.verify(model, made, batches=3)


def test_lengths_out_of_order_raise() -> None:
    def unchecked(model: Sorted, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
        return model.gru(pack_padded_sequence(steps, lengths.flip(0).flip(0), batch_first=True))[1][-1]

    generator = torch.Generator().manual_seed(0)
    steps, lengths = torch.randn(ROWS, 5, WIDTH, generator=generator), torch.full((ROWS,), 3)
    spec = roo.FeatureSpec(request=["steps", "lengths"], impression=["item"])
    model = Sorted(unchecked).eval()
    made = roo.rewrite(model, (steps, lengths, steps[:, 0]), spec=spec, fanout=10)
    with pytest.raises(RuntimeError, match="sorted in decreasing order"):
        made(steps, torch.tensor([3, 5] * 4), steps[:, 0], num_impressions=torch.ones(ROWS, dtype=torch.long))
