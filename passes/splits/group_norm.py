"""Group and instance norm of blocks: every group of channels has its own statistics.

group_norm(cat[E a, c])  =  cat[E group_norm(a), group_norm(c)]          cut between groups

A group of both sides is normalised as a whole, with those beside it that the impression has.
"""

from __future__ import annotations

from itertools import groupby

import torch

from passes.forms import Blocks, Form, Whole, is_mixed, provenance
from passes.split import Application, Splitter, handles
from passes.splits.blocks import cut_form
from roo_rewrite.facts import Provenance

aten = torch.ops.aten


@handles("aten.group_norm.default", "aten.instance_norm.default")
def group_norm(s: Splitter, app: Application) -> Form | None:
    """x [B, C, ...] in blocks of channels."""
    x = app.form("input")
    groups = app["num_groups"] if "num_groups" in app.named else None
    if groups is None and (app["running_mean"] is not None or not app["use_input_stats"]):
        return None
    affine = ("weight", "bias")
    if not isinstance(x, Blocks) or x.dim != 1 or not is_mixed(x):
        return None
    if not all(app[name] is None or isinstance(app[name], Whole) for name in affine):
        return None
    each = int(x.shape[1]) // groups if groups else 1
    early = [provenance(p) is not Provenance.IMPRESSION for p, size in zip(x.parts, x.sizes) for _ in range(size)]
    moved = [all(early[i : i + each]) for i in range(0, len(early), each)]
    runs = [list(run) for _, run in groupby(range(len(moved)), key=lambda i: moved[i])]
    if len(runs) < 2 or not _pays(s, x, sum(moved) * each, len(runs)):
        return None
    parts = []
    for run in runs:
        start, stop = run[0] * each, (run[-1] + 1) * each
        mine = {n: app[n] and Whole(s.builder.pick(app[n].node, 0, range(start, stop))) for n in affine}
        mine |= {"input": Whole(s.builder.whole(cut_form(s, x, 1, start, stop)))}
        parts.append(s.plain(app.replaced(**mine, **({"num_groups": len(run)} if groups else {}))))
    return Blocks(1, tuple(parts))


def _pays(s: Splitter, x: Blocks, channels: int, runs: int) -> bool:
    """Whether the request's groups save more than the other ops take to start."""
    price, whole = s.price, int(x.shape[1])
    before = 3 * price.move(x.shape)
    after = before * (whole - channels * (1 - 1 / price.fanout)) / whole + price.start(2 * (runs - 1))
    return s.take(f"group norm: {channels} of {whole} channels per request", before, after)
