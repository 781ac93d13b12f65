"""Rows removed by a mask and put back: once per request where nothing else is done to them, and always equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import roo_rewrite as roo
from roo_rewrite.program import Program

ROWS, WIDTH = 8, 4
SPEC = roo.FeatureSpec(request=["steps", "lengths"], impression=["item"])
Region = Callable[["Kept", Tensor, Tensor, Tensor], Tensor]


class Kept(nn.Module):
    """A score of what `region` makes of steps `[B, 5, 4]`, lengths `[B]` and items `[B, 4]`."""

    def __init__(self, region: Region):
        super().__init__()
        torch.manual_seed(0)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.state = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.both = nn.Linear(2 * WIDTH, 1)
        self.region = region

    def forward(self, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
        made = self.region(self, steps, lengths, item)
        return self.both(torch.cat([made, item], 1)).squeeze(1)


def example() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    steps, item = torch.randn(ROWS, 5, WIDTH, generator=generator), torch.randn(ROWS, WIDTH, generator=generator)
    return steps, torch.tensor([0, 3, 5, 0, 1, 2, 4, 5]), item


def put_back(rows: Tensor, mask: Tensor, values: Tensor) -> Tensor:
    out = torch.zeros(rows.shape[0], *values.shape[1:])
    out[mask] = values
    return out


def last_state(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask = lengths > 0
    packed = pack_padded_sequence(steps[mask], lengths[mask], batch_first=True, enforce_sorted=False)
    return put_back(steps, mask, model.gru(packed)[1].squeeze())


def padded(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask = lengths > 0
    packed = pack_padded_sequence(steps[mask], lengths[mask], batch_first=True, enforce_sorted=False)
    out, _ = pad_packed_sequence(model.gru(packed)[0], batch_first=True)
    return put_back(steps, mask, out.sum(1))


def of_both_sides(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask = lengths > 0
    kept, target = model.state(steps[mask]).tanh(), item[mask]
    weights = torch.softmax((kept * target.unsqueeze(1)).sum(2), 1)
    return put_back(steps, mask, (weights.unsqueeze(2) * kept).sum(1))


def of_its_size(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask = lengths > 0
    kept = steps[mask]
    state = kept.new_ones(1, kept.size(0), WIDTH)
    return put_back(steps, mask, model.gru(kept, state)[0].mean(1))


def logarithm(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask = lengths > 0  # a row that is not kept has no logarithm, nor a gradient
    return put_back(steps, mask, lengths[mask].log().unsqueeze(1) * model.state(steps[mask].sum(1)))


def if_any(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask, out = lengths > 0, torch.ones(steps.shape[0], WIDTH)
    if mask.any():
        out[mask] = model.state(steps[mask, 1, :]).tanh() + steps[mask, None].sum((1, 2))
    return out


@pytest.mark.parametrize("region", [last_state, padded, of_both_sides, of_its_size, logarithm, if_any])
def test_kept_rows_run_once_per_request(region: Region) -> None:
    model = Kept(region).eval()
    rewritten = roo.rewrite(model, example(), spec=SPEC, fanout=10, check=True)
    program = rewritten._whole_program()
    assert program.captured is not None
    assert program.captured.kept
    assert any("kept_rows" in n.name for n in program.plan.request)
    assert "aten.index.Tensor" not in rewritten.code
    roo.verify(model, rewritten, batches=6)
    if region in (padded, logarithm):
        model.train(), rewritten.train()
        roo.verify(model, rewritten, batches=4)


def by_item(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask = item[:, 0] > 0
    return put_back(steps, mask, model.state(steps[mask].sum(1)))


def two_masks(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask, other = lengths > 0, lengths.roll(1) > 0  # as many rows, others
    return put_back(steps, mask, steps[mask].sum(1) + steps[other].sum(1))


def mean_of_rows(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask = lengths > 0
    kept = steps[mask].sum(1)
    return put_back(steps, mask, kept - kept.mean(0))


def any_else(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    state = model.state(item)  # no row is kept by the mask
    return state if (lengths > 4).any() else -state


def any_kept_in_vain(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask, state = lengths > 4, model.state(item)
    if mask.any():
        model.state(steps[mask])
        state = state + 1
    return state


def any_outside(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask, state = lengths > 0, model.state(item)
    if not (lengths > 0).any():
        state = -state
    return put_back(steps, mask, steps[mask].sum(1)) + state


def any_before_it_is_written(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask, out = lengths > 4, torch.ones(steps.shape[0], WIDTH)
    some = mask.any()
    mask |= lengths > 0
    if some:
        out[mask] = model.state(steps[mask].sum(1))
    return out


def how_many(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask = lengths > 0
    kept = steps[mask].sum(1)
    return put_back(steps, mask, kept / kept.size(0))


def how_many_outside(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    return model.state(item) * steps[lengths > 0].size(0)


def normalized(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask = lengths > 0
    return put_back(steps, mask, model.norm(steps[mask].sum(1)))


def left_outside(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    return model.state(item) + steps[lengths > 0].sum(1).amax(0)


def within_another(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask = lengths > 0
    kept, longer = steps[mask].sum(1), lengths[mask] > 2
    inner = torch.zeros(kept.shape[0], WIDTH)
    inner[longer] = kept[longer]
    return put_back(steps, mask, inner)


def by_another(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask, other = lengths > 0, lengths.roll(1) > 0
    return put_back(steps, other, steps[mask].sum(1))


def shifted(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask = lengths > 0
    return put_back(steps, mask, steps[mask].sum(1).flip(0))


def numbered(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask = lengths > 0
    kept = steps[mask].sum(1)
    return put_back(steps, mask, kept * torch.arange(kept.size(0)).unsqueeze(1))


DECLINED = [
    any_else,
    any_before_it_is_written,
    by_item,
    two_masks,
    mean_of_rows,
    how_many,
    how_many_outside,
    normalized,
    left_outside,
    within_another,
    by_another,
    shifted,
    numbered,
]


@pytest.mark.parametrize("region", DECLINED)
def test_what_is_no_row_by_itself_stays(region: Region) -> None:
    model = Kept(region).train(region is normalized)
    rewritten = roo.rewrite(model, example(), spec=SPEC, fanout=10)
    program = rewritten._whole_program()
    assert program.captured is None or not program.captured.kept
    for counts in ([2, 0, 3, 1, 1, 1, 2, 1], [1] * ROWS):
        same(model, rewritten, counts)


def ones_summed(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask = lengths > 0
    kept = steps[mask].sum(1)
    return put_back(steps, mask, kept) / torch.ones(kept.shape[0]).sum()


@pytest.mark.parametrize("region", [how_many, how_many_outside, numbered, ones_summed])
def test_the_number_of_kept_rows_is_no_value_where_the_example_keeps_all(region: Region) -> None:
    model = Kept(region).eval()
    steps, lengths, item = example()
    rewritten = roo.rewrite(model, (steps, lengths.clamp(min=1), item), spec=SPEC, fanout=10)
    same(model, rewritten, [2, 0, 3, 1, 1, 1, 2, 1])


def same(model: nn.Module, rewritten: roo.RequestModel, counts: list[int], lengths: Tensor | None = None) -> None:
    steps, known, _ = example()
    number = torch.tensor(counts)
    item = torch.randn(int(number.sum()), WIDTH, generator=torch.Generator().manual_seed(5))
    given = (steps, known if lengths is None else lengths)
    expected: Tensor | str
    try:
        expected = model(*(t.repeat_interleave(number, 0) for t in given), item)
    except RuntimeError as e:
        expected = str(e)
    if isinstance(expected, str):
        with pytest.raises(RuntimeError, match=expected[:20].replace("(", ".").replace("[", ".")):
            rewritten(*given, item, num_impressions=number)
    else:
        found = rewritten(*given, item, num_impressions=number)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("region", [last_state, of_both_sides, logarithm, if_any, any_kept_in_vain, any_outside])
def test_few_rows_are_the_originals(region: Region) -> None:
    model = Kept(region).eval()
    rewritten = roo.rewrite(model, example(), spec=SPEC, fanout=10)
    program: Program = rewritten._whole_program()
    assert program.captured is not None
    assert program.captured.kept
    none, one = torch.zeros(ROWS, dtype=torch.long), torch.tensor([0, 0, 3, 0, 0, 0, 0, 0])
    for lengths in (none, one):
        for counts in ([2] * ROWS, [1] * ROWS, [2, 0, 0, 0, 1, 0, 0, 0]):
            same(model, rewritten, counts, lengths)
    rewritten.train(), model.train()
    same(model, rewritten, [1] * ROWS, one)
