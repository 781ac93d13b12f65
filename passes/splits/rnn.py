"""Recurrent nets over history and target: the state after the history is the request's.

gru(cat[E h, t], s)  =  cat[y, z]     y, s' = gru(E h, s),  z, s'' = gru(t, s')
"""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from passes.forms import Blocks, Form, Whole
from passes.split import Application, Splitter, handles
from passes.splits.blocks import has_early
from roo_rewrite.facts import Provenance

aten = torch.ops.aten


@handles("aten.gru.input", "aten.lstm.input", "aten.rnn_tanh.input", "aten.rnn_relu.input")
def recurrent(s: Splitter, app: Application) -> list[Form] | None:
    """x in blocks along time, those of the request first; one direction."""
    x = app.form("input")
    time = 1 if app["batch_first"] else 0
    if not isinstance(x, Blocks) or x.dim != time or app["bidirectional"] or (app["train"] and app["dropout"]):
        return None
    first = 0
    while first < len(x.parts) and has_early(x.parts[first]):
        first += 1
    if not 0 < first < len(x.parts) or not _pays(s, x, first):
        return None
    nodes = [s.builder.whole(p) for p in x.parts]
    state, outputs = app["hx"], list[Form]()
    for run in (nodes[:first], nodes[first:]):
        part = Whole(s.builder.cat(run, time))
        args, kwargs = app.replaced(input=part, hx=state).arguments(s.carry_out)
        made = s.builder.call(app.target, *args, **kwargs)
        output, *states = [_entry(s, made, i) for i in range(len(made.meta["val"]))]
        outputs.append(output)
        state = states if isinstance(app["hx"], list) else states[0]
    return [Blocks(time, tuple(outputs)), *states]


def _entry(s: Splitter, made: Node, index: int) -> Form:
    return Whole(s.builder.call(operator.getitem, made, index))


def _pays(s: Splitter, x: Blocks, first: int) -> bool:
    """Steps are what a recurrent net costs; each moves its state a few times at the least."""
    steps = [int(p.shape[x.dim]) for p in x.parts]
    side = Provenance.IMPRESSION
    before = s.price.move(x.shape, side, 8.0)
    parts = [(p, Provenance.REQUEST if i < first else side) for i, p in enumerate(x.parts)]
    after = sum(s.price.move(p.shape, where, 8.0) for p, where in parts) + s.price.start(10)
    return s.take(f"recurrence: {sum(steps[:first])} of {sum(steps)} steps per request", before, after)
