"""Rows kept by masked_select and by a mask made twice, entries marked one a row, masks cut out of a joined input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import roo_rewrite as roo
from roo_rewrite.facts import Provenance
from roo_rewrite.flags import Flags
from roo_rewrite.ops.kept import FewRowsError, marked_entries

ROWS, T, D = 8, 5, 4
SPEC = roo.FeatureSpec(request=["steps", "lengths"], impression=["item"])
Region = Callable[["Kept", Tensor, Tensor, Tensor], Tensor]


class Kept(nn.Module):
    """A score of what `region` makes of steps `[B, 5, 4]`, lengths `[B]` and items `[B, 4]`."""

    def __init__(self, region: Region):
        super().__init__()
        torch.manual_seed(0)
        self.gru, self.state = nn.GRU(D, D, batch_first=True), nn.Linear(D, D)
        self.both, self.region = nn.Linear(2 * D, 1), region

    def forward(self, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
        made = self.region(self, steps, lengths, item)
        return self.both(torch.cat([made, item], 1)).squeeze(1)


def example() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    steps, item = torch.randn(ROWS, T, D, generator=generator), torch.randn(ROWS, D, generator=generator)
    return steps, torch.tensor([0, 3, 5, 0, 1, 2, 4, 5]), item


def put(mask: Tensor, values: Tensor) -> Tensor:
    out = torch.zeros(mask.shape[0], *values.shape[1:])
    out[mask] = values
    return out


def states(model: Kept, steps: Tensor, lengths: Tensor) -> Tensor:
    packed = pack_padded_sequence(steps, lengths.cpu(), batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(model.gru(packed)[0], batch_first=True, total_length=T)[0]


def selected(steps: Tensor, mask: Tensor) -> Tensor:
    return torch.masked_select(steps, mask.view(-1, *[1] * (steps.ndim - 1))).view(-1, *steps.shape[1:])


def by_select(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask = lengths > 0
    return put(mask, states(model, selected(steps, mask), lengths[mask]).sum(1))


def made_twice(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    first = lengths > 0
    if lengths[first].shape[0] == 0:
        return torch.zeros(lengths.shape[0], D)
    read = states(model, selected(steps, first), lengths[first])
    again = lengths > 0
    near = torch.softmax((read * selected(item, again).unsqueeze(1)).sum(2), 1)
    return put(again, (near.unsqueeze(2) * read).sum(1))


def last_marked(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    mask = lengths > 0
    kept = lengths[mask]
    at = torch.arange(T).repeat(kept.shape[0], 1) == kept.view(-1, 1) - 1
    return put(mask, states(model, steps[mask], kept)[at])


@pytest.mark.parametrize("region", [by_select, made_twice, last_marked])
def test_kept_rows_run_once_per_request(region: Region) -> None:
    model = Kept(region).eval()
    rewritten = roo.rewrite(model, example(), spec=SPEC, fanout=10, check=True)
    program = rewritten._whole_program()
    assert program.captured is not None
    assert program.captured.kept
    assert any("gru" in str(n.target) for n in program.plan.request)
    roo.verify(model, rewritten, batches=2)


def written_between(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    lengths = lengths.clone()
    first = lengths > 0
    kept = steps[first].sum(1)
    lengths.copy_(lengths.roll(1))  # as many rows, others
    return put(lengths > 0, kept)


def written_through_a_view(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    both = torch.stack([lengths, lengths], 1)
    lengths = both[:, 0]
    kept = steps[lengths > 0].sum(1)
    both.copy_(both.roll(1, 0))
    return put(lengths > 0, kept)


def by_keyword(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    kept = steps[torch.ne(lengths, other=0)].sum(1)
    return put(torch.ne(lengths, other=5), kept)


def of_another_number(model: Kept, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
    return put((5 - lengths) > 0, steps[lengths > 0].sum(1))


@pytest.mark.parametrize("region", [written_between, written_through_a_view, by_keyword, of_another_number])
def test_other_masks_are_others(region: Region) -> None:
    model = Kept(region).eval()
    steps, lengths, item = example()
    rewritten = roo.rewrite(model, (steps, lengths, item), spec=SPEC, fanout=10)
    program = rewritten._whole_program()
    assert program.captured is None or not program.captured.kept
    counts = torch.ones(ROWS, dtype=torch.long)
    torch.testing.assert_close(rewritten(steps, lengths, item, num_impressions=counts), model(steps, lengths, item))


def test_the_same_comparison_is_the_same_mask() -> None:
    flags, lengths, other = Flags(), torch.tensor([0, 1]), torch.tensor([0, 1])

    def made(x: Tensor, value: int) -> Tensor:
        result = x > value
        flags.note("gt", (x, value), result)
        return result

    first, again, of_one, of_other = made(lengths, 0), made(lengths, 0), made(lengths, 1), made(other, 0)
    assert flags.first(again) is first
    assert flags.first(of_one) is of_one
    assert flags.first(of_other) is of_other
    column = again.view(-1, 1)
    flags.note("view", (again, -1, 1), column)
    assert flags.first(column) is first
    lengths += 1
    after = made(lengths, 0)
    assert flags.first(after) is after
    first[0] = True
    assert flags.first(again) is again
    assert flags.first(column) is not first


class Marked(nn.Module):
    """The entries that `steps == wanted` marks, one a row in the example."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(D, D)

    def forward(self, steps: Tensor, wanted: Tensor, item: Tensor) -> Tensor:
        found = self.net(steps)[torch.arange(T) == wanted.unsqueeze(1)]
        return (found * item).sum(1) if found.shape[0] == item.shape[0] else item.sum(1)


def test_a_batch_of_which_a_row_has_no_entry_is_the_originals() -> None:
    model, spec = Marked().eval(), roo.FeatureSpec(request=["steps", "wanted"], impression=["item"])
    steps, _, item = example()
    rewritten = roo.rewrite(model, (steps, torch.arange(ROWS) % T, item), spec=spec, fanout=10)
    program = rewritten._whole_program()
    assert any(n.target is marked_entries for n in program.plan.request)
    counts = torch.tensor([2, 0, 1, 1, 3, 1, 0, 1])
    item = torch.randn(9, D)
    for wanted in (torch.zeros(ROWS, dtype=torch.long), torch.tensor([0, 9, 1, 1, 2, 4, 9, 0]), torch.arange(ROWS)):
        rows = [t.repeat_interleave(counts, 0) for t in (steps, wanted)]
        found = rewritten(steps, wanted, item, num_impressions=counts)
        torch.testing.assert_close(found, model(*rows, item))


@pytest.mark.parametrize("region", [by_select, last_marked])
def test_compiled_rows_kept_are_the_originals(region: Region) -> None:
    """Compiled code does not look at how many rows there are."""
    model = Kept(region).eval()
    steps, lengths, item = example()
    made = roo.rewrite(model, (steps, lengths, item), spec=SPEC, check=True)
    assert not made.report.fallback
    atoms, statics = made._inputs.flatten((steps, lengths, item), {}, Provenance.REQUEST)
    assert made._program(atoms, statics).emitted is not None
    assert made._inlined(atoms, statics).emitted is None


def test_several_entries_a_row_are_not_marked_one_a_row() -> None:
    model, spec = Marked().eval(), roo.FeatureSpec(request=["steps", "wanted"], impression=["item"])
    steps, _, item = example()
    rewritten = roo.rewrite(model, (steps, torch.arange(ROWS), item), spec=spec, fanout=10)
    program = rewritten._whole_program()
    assert program.captured is None or not any(n.target is marked_entries for n in program.captured.graph.nodes)


def test_marked_entries() -> None:
    steps = torch.randn(3, T, D, requires_grad=True)
    mask = torch.arange(T) == torch.tensor([[4], [0], [2]])
    assert torch.equal(marked_entries(steps, mask), steps[mask])
    assert torch.equal(marked_entries(steps[..., 0], mask), steps[..., 0][mask])
    assert marked_entries(steps[:0], mask[:0]).shape == (0, D)
    for wrong in (mask | (torch.arange(T) == 1), mask & (torch.arange(T) != 0)):
        with pytest.raises(FewRowsError):
            marked_entries(steps, wrong)


class Joined(nn.Module):
    """Everything comes in one row, and what is marked is cut out of it again."""

    def __init__(self, cut: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.cut = nn.Linear(D, D), cut

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        row = torch.cat([user, item], 1)
        mask = self.cut(row).sum(1) > 0
        return put(mask, self.net(row[:, :D][mask]).tanh()).sum(1) * item.sum(1)


CUTS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "of the user": (lambda row: row[:, D : D + 1], True),
    "of the item": (lambda row: row[:, D + 1 : D + 2], False),
    "of both": (lambda row: row[:, D : D + 2], False),
    "of every other column": (lambda row: row[:, :D:2], False),
    "of the row turned round": (lambda row: row.flip(1)[:, :1], False),
    "of the middle of three": (lambda row: torch.cat([row[:, D + 1 :], row[:, :D], row], 1)[:, 3:5], True),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_mask_cut_out_of_a_joined_row_is_of_its_own_side(name: str) -> None:
    cut, kept = CUTS[name]
    model, spec = Joined(cut).eval(), roo.FeatureSpec(request=["user"], impression=["item"])
    rewritten = roo.rewrite(model, (torch.randn(ROWS, D + 1), torch.randn(ROWS, 3)), spec=spec, fanout=10)
    program = rewritten._whole_program()
    assert program.captured is not None
    assert program.captured.kept is kept
    roo.verify(model, rewritten, batches=2)
