"""Loops over the steps of packed sequences: hoisted where they are row by row, leaves where anything else is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import roo_rewrite as roo
from passes.annotate import Policy, annotate
from passes.normalize import normalize
from passes.packed_loops import written_out
from roo_rewrite.capture import capture
from roo_rewrite.facts import Provenance
from roo_rewrite.inputs import bind_inputs

ROWS, T, D = 6, 3, 2
SPEC = roo.FeatureSpec(["steps", "lengths"], ["item"])
Loop = Callable[..., Any]


class Stepped(nn.Module):
    """A recurrent net of its own: what `loop` makes of packed steps and packed weights."""

    def __init__(self, loop: Loop):
        super().__init__()
        self.loop, self.read, self.keep, self.drop = loop, nn.Linear(D, D), nn.Linear(D, D), nn.Dropout(0.0)

    def rows(self, sizes: Tensor) -> int:
        return int(sizes[0])

    def cell(self, x: Tensor, h: Tensor, weight: Tensor) -> Tensor:
        new = torch.tanh(self.read(x) + self.keep(h))
        return h + weight.view(-1, 1) * (new - h)

    def forward(self, sequence: PackedSequence, weights: PackedSequence) -> Any:
        return self.loop(self, sequence, weights)


class Model(nn.Module):
    """Steps `[B, 3, 2]` are read by a loop with the item's weights, twice the same lengths."""

    def __init__(self, loop: Loop, across: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.net, self.top = nn.GRU(D, D, batch_first=True), Stepped(loop), nn.Linear(2 * D, 1)
        self.across = across

    def forward(self, steps: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
        sequence, _ = self.first(packed(steps, lengths))
        states, _ = pad_packed_sequence(sequence, batch_first=True, total_length=T)
        weights = torch.softmax((states * item.unsqueeze(1)).sum(2), 1)
        found = self.net(sequence, packed(weights, lengths.flip(0) if self.across else lengths))
        if not isinstance(found, Tensor):
            found = pad_packed_sequence(found, batch_first=True, padding_value=-1.0, total_length=T)[0].sum(1)
        return self.top(torch.cat([found, item], 1)).squeeze(1)


def packed(x: Tensor, lengths: Tensor) -> PackedSequence:
    return pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)


def example() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    steps, item = torch.randn(ROWS, T, D, generator=generator), torch.randn(ROWS, D, generator=generator)
    return steps, torch.tensor([3, 1, 2, 3, 2, 1]), item


def states(net: Stepped, sequence: PackedSequence, weights: PackedSequence) -> PackedSequence:
    data, sizes, order, places = sequence
    weight, _, _, _ = weights
    h = torch.zeros(net.rows(sizes), D, dtype=data.dtype, device=data.device)
    out = torch.zeros(data.size(0), D, dtype=data.dtype, device=data.device)
    begin = 0
    for size in sizes:
        new = net.cell(data[begin : begin + size], h[0:size], weight[begin : begin + size])
        out[begin : begin + size] = new
        h = new
        begin += size
    return PackedSequence(out, sizes, order, places)


def last(net: Stepped, sequence: PackedSequence, weights: PackedSequence) -> Tensor:
    data, sizes = sequence.data, sequence.batch_sizes
    h = torch.zeros(sizes[0], D, dtype=data.dtype)
    out = torch.zeros(sizes[0], D, dtype=data.dtype)
    begin = 0
    for size in sizes:
        h = net.cell(data[begin : begin + size], h[:size], weights.data[begin : begin + size])
        out[:size] = h
        begin = begin + size
    return out[sequence.unsorted_indices]


@pytest.mark.parametrize(("loop", "training"), [(states, True), (last, False)])
def test_a_loop_over_packed_steps_is_traced(loop: Loop, training: bool) -> None:
    model = Model(loop).train(training)
    rewritten = roo.rewrite(model, example(), spec=SPEC, fanout=10, check=True)
    program = rewritten._whole_program()
    assert program.captured is not None
    assert not program.captured.sites
    assert not program.notes
    assert sum("linear" in str(n.target) for n in program.plan.request) >= T  # what the cell makes of the steps alone
    roo.verify(model, rewritten, batches=2)


def changed(**by: Callable[..., Any]) -> Loop:
    """A loop as `last`, with something else done at one place."""

    def loop(net: Stepped, sequence: PackedSequence, weights: PackedSequence) -> Tensor:
        data, sizes = sequence.data, sequence.batch_sizes
        h = torch.zeros(sizes[0], D, dtype=data.dtype)
        out = torch.zeros(sizes[0], D, dtype=data.dtype)
        begin = count = 0
        for size in sizes:
            x = by.get("read", lambda data, begin, size: data[begin : begin + size])(data, begin, size)
            new = net.cell(x, h[:size], weights.data[begin : begin + size])
            h = by.get("new", lambda new, h, size: new)(new, h, size)
            out[:size] = h
            begin, count = begin + size, count + 1
        found = by.get("out", lambda out, count: out)(out, count)
        return by.get("back", lambda out: out[sequence.unsorted_indices])(found)

    return loop


def written_into(new: Tensor, h: Tensor, size: Any) -> Tensor:
    h[:size].mul_(2)
    return new + h[:size]


ASKING: dict[str, Loop] = {
    "how many steps there are": changed(out=lambda out, count: out / count),
    "how many rows have a step": changed(new=lambda new, h, size: new / size),
    "how many entries there are": changed(read=lambda data, begin, size: data[begin : begin + size] / data.size(0)),
    "whether one row has a step": changed(new=lambda new, h, size: new if size > 1 else new * 2),
    "the other rows of a step": changed(new=lambda new, h, size: new - new.mean(0)),
    "rows in one dim, if there is one": changed(new=lambda new, h, size: new.squeeze()),
    "other entries": changed(read=lambda data, begin, size: data[:size]),
    "all entries": changed(out=lambda out, count: out * count, read=lambda data, begin, size: data.cumsum(0)[:size]),
    "rows in their order": changed(back=lambda out: out),
    "what it has written since": changed(new=written_into),
}


def traced(model: nn.Module) -> bool:
    inputs = bind_inputs(model.forward, example(), {}, SPEC)
    atoms, statics = inputs.flatten(example(), {}, Provenance.IMPRESSION)
    captured = capture(model, inputs, atoms, statics, ())
    normalize(captured)
    return captured.looped and written_out(captured, lambda: annotate(captured, inputs, model, Policy()))


@pytest.mark.parametrize("asked", ASKING)
def test_a_loop_that_asks_for_more_is_a_leaf(asked: str) -> None:
    assert not traced(Model(ASKING[asked]))


def test_loops_of_other_lengths_and_dropout_are_leaves() -> None:
    assert traced(Model(changed()))
    assert traced(Model(changed(new=lambda new, h, size: torch.relu(new))))
    assert not traced(Model(states, across=True))
    assert not traced(Model(changed(new=lambda new, h, size: nn.functional.dropout(new, 0.5))))


def test_a_loop_that_counts_its_steps_is_not_used() -> None:
    model = Model(ASKING["how many steps there are"])
    rewritten = roo.rewrite(model, (example()[0], torch.full((ROWS,), T), example()[2]), spec=SPEC, fanout=10)
    steps, _, item = example()
    counts = torch.ones(ROWS, dtype=torch.long)
    short = torch.tensor([1, 2, 1, 2, 2, 1])
    torch.testing.assert_close(rewritten(steps, short, item, num_impressions=counts), model(steps, short, item))
