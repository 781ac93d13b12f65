"""Chains of one associative and commutative op, regrouped by side.

(E a * c) * E b  =  E(a * b) * c          likewise & | and, of integers and flags, maximum and minimum

A chain of maximum over floats is left alone: its gradient at a tie goes by halves, in the order of the chain.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from passes.forms import PROVENANCE, Form, Whole, dtype_of, numel
from passes.split import Application, Splitter, handles
from passes.splits.blocks import broadcast
from roo_rewrite.facts import Provenance

aten = torch.ops.aten
_FLAGS = ("aten.logical_and.default", "aten.logical_or.default")


@handles(
    *_FLAGS,
    "aten.bitwise_and.Tensor",
    "aten.bitwise_or.Tensor",
    "aten.__and__.Tensor",
    "aten.__or__.Tensor",
    "aten.maximum.default",
    "aten.minimum.default",
)
def chain(s: Splitter, app: Application) -> Form | None:
    """An op on flags or integers."""
    x = app["self"]
    return None if not isinstance(x, Form) or dtype_of(x).is_floating_point else regrouped(s, app)


def regrouped(s: Splitter, app: Application) -> Form | None:
    """What does not depend on the impression first, then the rest; None where there is one of each at most."""
    x, y = app["self"], app["other"]
    if not isinstance(x, Whole) or not isinstance(y, Whole) or dtype_of(x) != dtype_of(y):
        return None
    if dtype_of(x) == torch.float16 or (str(app.target) in _FLAGS and dtype_of(x) != torch.bool):
        return None
    members = [*_members(s, app, x), *_members(s, app, y)]
    sides = [
        [n for n in members if (n.meta[PROVENANCE] is not Provenance.IMPRESSION) == early] for early in (True, False)
    ]
    if not all(sides):
        return None
    early, late = (_combined(s, app, side) for side in sides)
    if early is None or late is None:
        return None
    made = s.builder.call(app.target, *((x.node, y.node) if len(members) == 2 else (early, late)))
    s.chains[made] = (app.target, members)
    return Whole(made)


def _members(s: Splitter, app: Application, form: Whole) -> list[Node]:
    """The members of a chain that nothing else reads, or the value itself."""
    target, members = s.chains.get(form.node, (None, []))
    origin = s.builder.origin
    olds = [n for n in origin.all_input_nodes if s.forms.get(n) is form] if origin is not None else []
    return members if target is app.target and olds and all(len(n.users) == 1 for n in olds) else [form.node]


def _combined(s: Splitter, app: Application, nodes: list[Node]) -> Node | None:
    """The op over all of them; None where that would be larger than the largest."""
    shapes = [n.meta["val"].shape for n in nodes]
    if numel(broadcast(shapes)) > max(numel(shape) for shape in shapes):
        return None
    total = nodes[0]
    for node in nodes[1:]:
        total = s.builder.call(app.target, total, node)
    return total
