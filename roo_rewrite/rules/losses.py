"""Losses: a value per row without reduction, a value of the batch with it."""

from __future__ import annotations

from dataclasses import replace

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Replicated, Rows
from roo_rewrite.rules.concat import common
from roo_rewrite.rules.families import aligned, batched, broadcast_shape, reduced, shifted
from roo_rewrite.rules.registry import Call, Operand, case, rule

_NONE, _MEAN = 0, 1


def _unreduced(call: Call) -> None:
    """Declines where the loss is reduced over the batch."""
    if call["reduction"] != _NONE and any(o.rows is not None for o in call.operands()):
        raise NotRowWise("the loss is reduced over the batch")


@rule(
    "aten.mse_loss.default",
    "aten.l1_loss.default",
    "aten.smooth_l1_loss.default",
    "aten.huber_loss.default",
    "aten.soft_margin_loss.default",
    "aten.kl_div.default",
    cases=[
        case("u:B 3", "u:B 3", call=lambda n, x, y: (x, y, _NONE)),
        case("u:3 B", "u:3 B", call=lambda n, x, y: (x, y, _NONE)),
        case("u:B 3", "u:B 3", call=lambda n, x, y: (x, y, _MEAN), declines=True),
    ],
)
@rule(
    "aten.binary_cross_entropy.default",
    cases=[
        case("u:B", "u:B", call=lambda n, x, y: (x, y, None, _NONE)),
        case("u:B 3", "u:B 3", "u:3", call=lambda n, x, y, w: (x, y, w, _NONE)),
        case("u:B", "u:B", declines=True),
    ],
)
@rule(
    "aten.binary_cross_entropy_with_logits.default",
    cases=[
        case("B 3", "u:B 3", "u:3", "p:3", call=lambda n, x, y, w, p: (x, y, w, p, _NONE)),
        case("B", "u:B", declines=True),
    ],
)
@rule(
    "aten.poisson_nll_loss.default",
    cases=[case("B 3", "B 3", call=lambda n, x, y: (x, y, True, False, 1e-8, _NONE))],
)
@rule(
    "aten.hinge_embedding_loss.default",
    cases=[case("B 3", "B 3", call=lambda n, x, y: (x, y, 1.0, _NONE))],
)
@rule(
    "aten.margin_ranking_loss.default",
    cases=[case("B", "B", "B", call=lambda n, x, y, t: (x, y, t, 0.5, _NONE)), case("B", "B", "B", declines=True)],
)
def pointwise_loss(call: Call) -> Batching:
    """A loss for every entry."""
    _unreduced(call)
    return batched(aligned(call.operands()))


@rule(
    "aten.cosine_embedding_loss.default",
    cases=[case("p:B 3", "p:B 3", "B", call=lambda n, x, y, t: (x, y, t, 0.5, _NONE))],
)
def cosine_embedding_loss(call: Call) -> Batching:
    """A loss for every vector, the last dim, and its target."""
    _unreduced(call)
    pair = [call.operand("input1"), call.operand("input2")]
    left = reduced(Operand(broadcast_shape(pair), batched(aligned(pair))), [-1], keepdim=False)
    shape = broadcast_shape(pair)[:-1]
    return batched(aligned([Operand(shape, left), call.operand("target")]))


@rule(
    "aten.triplet_margin_loss.default",
    cases=[case("B 3", "B 3", "B 3", call=lambda n, a, p, m: (a, p, m, {"reduction": _NONE}))],
)
def triplet_margin_loss(call: Call) -> Batching:
    """A loss for every vector, the last dim."""
    _unreduced(call)
    operands = call.operands()
    return reduced(Operand(broadcast_shape(operands), batched(aligned(operands))), [-1], keepdim=False)


@rule(
    "aten.cross_entropy_loss.default",
    "aten.nll_loss_nd.default",
    cases=[
        case("B 4", "i:B", call=lambda n, x, t: (x, t, None, _NONE)),
        case("B 4 2", "i:B 2", "p:4", call=lambda n, x, t, w: (x, t, w, _NONE)),
        case("2 4 B", "i:2 B", call=lambda n, x, t: (x, t, None, _NONE)),
        case("B 4", "i:B", declines=True),
        case("B 4", "i:7", call=lambda n, x, t: (x, t, None, _NONE), declines=True),
    ],
)
@rule("aten.nll_loss.default", cases=[case("B 4", "i:B", call=lambda n, x, t: (x, t, None, _NONE))])
def class_loss(call: Call) -> Batching:
    """A loss for every entry of `[B, ...]`, the classes being dim 1 of self (and of a target of probabilities)."""
    _unreduced(call)
    call.replicated("weight")
    x, target = call.operand("self"), call.operand("target")
    if x.rows is None and target.rows is None:
        return Replicated()
    if x.ndim < 2:
        raise NotRowWise("the batch is the class dim")
    given = [_without_classes(o) if o.ndim == x.ndim else o for o in (x, target)]
    return batched(common(given))


def _without_classes(x: Operand) -> Operand:
    rows: Rows | None = x.rows
    if rows is not None and rows.dim == 1:
        raise NotRowWise("the batch is the class dim")
    return replace(x, batching=batched(rows and shifted(rows, -int(rows.dim > 1))))
