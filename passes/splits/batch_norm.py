"""Batch norm of blocks: every channel has its own statistics, so each side has its own batch norm.

batch_norm(cat[E a, c])  =  cat[batch_norm(E a), batch_norm(c)]

with the channels' share of weight, bias and running statistics. In training the request's part becomes the
count-weighted batch norm at R rows; running statistics are updated through slices, so a part is a run of channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from passes.forms import PROVENANCE, Blocks, Form, Whole, is_mixed
from passes.split import Application, Splitter, handles
from passes.splits.blocks import pick_form
from passes.splits.scaled import runs_of, sides_of
from roo_rewrite.facts import Provenance

_OF_CHANNELS = ("weight", "bias", "running_mean", "running_var")


@handles("aten.batch_norm.default")
def batch_norm(s: Splitter, app: Application) -> Form | None:
    """x [B, C, ...] in blocks of channels; blocks of another dim are left to the row rule."""
    x = app.form("input")
    if not isinstance(x, Blocks) or x.dim != 1 or not is_mixed(x):
        return None
    if not all(app[name] is None or isinstance(app[name], Whole) for name in _OF_CHANNELS):
        return None
    pieces = runs_of(s, x) if app["training"] else sides_of(s, x)
    if len(pieces) < 2 or not _pays(s, x, pieces):
        return None
    place: dict[int, tuple[Node, int]] = {}
    for node, places in pieces:
        normed = _of_piece(s, app, node, places)
        place |= {channel: (normed, i) for i, channel in enumerate(places)}
    parts, start = list[Form](), 0
    for size in x.sizes:
        mine = [place[i] for i in range(start, start + size)]
        parts.append(pick_form(s, Whole(mine[0][0]), 1, [i for _, i in mine]))
        start += size
    return Blocks(1, tuple(parts))


def _of_piece(s: Splitter, app: Application, node: Node, places: Sequence[int]) -> Node:
    """The batch norm of some channels, with their share of everything that goes by channel."""
    mine = {n: f and Whole(s.builder.pick(f.node, 0, places)) for n in _OF_CHANNELS for f in [app[n]]}
    args = [s.carry_out(v) for v in app.replaced(input=Whole(node), **mine).named.values()]
    return (s.builder.again if app["training"] else s.builder.call)(app.target, *args)


def _pays(s: Splitter, x: Blocks, pieces: Sequence[tuple[Node, tuple[int, ...]]]) -> bool:
    """Whether the request's share saves more than the other ops take to start."""
    shapes = [(n.meta["val"].shape, n.meta[PROVENANCE]) for n, _ in pieces]
    before = s.price.move(x.shape)
    after = sum(s.price.move(shape, side) for shape, side in shapes) + s.price.start(3 * (len(pieces) - 2))
    channels = sum(int(shape[1]) for shape, side in shapes if side is not Provenance.IMPRESSION)
    return s.take(f"batch norm: {channels} of {x.shape[1]} channels per request", before, after)
