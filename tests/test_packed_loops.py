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
from roo_rewrite.capture import _capture, trace_batch, trace_rows
from roo_rewrite.errors import CaptureError
from roo_rewrite.facts import Provenance
from roo_rewrite.inputs import bind_inputs
from roo_rewrite.kept import Masked
from roo_rewrite.loops import Loops

ROWS, T, D = 5, 2, 2
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
    """Steps `[B, 2, 2]` are read by a loop with the item's weights, twice the same lengths."""

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
            found = (
                pad_packed_sequence(found[0], batch_first=True, padding_value=-1.0, total_length=T)[0].sum(1) + found[1]
            )
        return self.top(torch.cat([found, item], 1)).squeeze(1)


def packed(x: Tensor, lengths: Tensor) -> PackedSequence:
    return pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)


def example() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    steps, item = torch.randn(ROWS, T, D, generator=generator), torch.randn(ROWS, D, generator=generator)
    return steps, torch.tensor([1, 2, 1, 2, 1]), item


def states(net: Stepped, sequence: PackedSequence, weights: PackedSequence) -> tuple[PackedSequence, Tensor]:
    """The state at each step, and each row's last."""
    data, sizes, order, places = sequence
    weight, _, _, _ = weights
    h = torch.zeros(net.rows(sizes), D, dtype=data.dtype, device=data.device)
    last = torch.zeros(sizes[0], D, dtype=data.dtype)
    out = torch.zeros(data.size(0), D, dtype=data.dtype, device=data.device)
    begin = 0
    for size in sizes:
        new = net.cell(data[begin : begin + size], h[0:size], weight[begin : begin + size])
        out[begin : begin + size] = new
        last[:size] = new
        h = new
        begin += size
    return PackedSequence(out, sizes, order, places), last[places]


def test_a_loop_over_packed_steps_is_traced() -> None:
    model = Model(states).eval()
    rewritten = roo.rewrite(model, example(), spec=SPEC, fanout=10)
    program = rewritten._whole_program()
    assert program.captured is not None
    assert not program.captured.sites
    assert not program.notes
    assert sum("linear" in str(n.target) for n in program.plan.request) >= T  # what the cell makes of the steps alone
    roo.verify(model, rewritten, batches=2)


def changed(**by: Callable[..., Any]) -> Loop:
    """A loop that gives each row's last state, with something else done at one place."""

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
    "how many entries there are, as a sum": changed(
        out=lambda out, count: out, read=lambda data, begin, size: data[begin : begin + size] / torch.ones(size).sum()
    ),
    "whether one row has a step": changed(new=lambda new, h, size: new if size > 1 else new * 2),
    "the other rows of a step": changed(new=lambda new, h, size: new - new.mean(0)),
    "rows in one dim, if there is one": changed(new=lambda new, h, size: new.squeeze()),
    "rows in their order": changed(back=lambda out: out),
    "what it has written since": changed(new=written_into),
    "entries of other lengths": changed(),
}


def traced(model: nn.Module) -> bool:
    """Whether the model's loop is traced, and proved to be what it is on rows alone."""
    inputs = bind_inputs(model.forward, example(), {}, SPEC)
    atoms, statics = inputs.flatten(example(), {}, Provenance.IMPRESSION)
    batch = trace_batch(model, atoms)
    given = (model, inputs, trace_rows(inputs, atoms, batch), statics, (), batch, Masked(True), 0, frozenset[Any]())
    try:
        captured = _capture(*given, Loops(True))
    except CaptureError:
        return False
    assert captured.looped
    captured.shorter = lambda steps: _capture(*given, Loops(True, steps))
    normalize(captured)
    return written_out(captured, lambda: annotate(captured, inputs, model, Policy()))


@pytest.mark.parametrize("asked", ASKING)
def test_a_loop_that_asks_for_more_is_a_leaf(asked: str) -> None:
    assert not traced(Model(ASKING[asked], across=asked == "entries of other lengths"))


def test_another_loop_is_traced() -> None:
    assert traced(Model(changed(new=lambda new, h, size: torch.relu(new) + torch.zeros(size, D))))
