"""Reductions over dims that are not the batch; and softmax, scans and sorts along them."""

from __future__ import annotations

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Rows
from roo_rewrite.rules.families import (
    aligned,
    along,
    batched,
    broadcast_shape,
    each,
    einsum,
    listed,
    reduced,
    shifted,
    wrap,
)
from roo_rewrite.rules.registry import Call, Operand, case, no_rule, rule

_DIM_CASES = [
    case("B 3 2", call=lambda n, x: (x, 1)),
    case("B 3 2", call=lambda n, x: (x, -1, True)),
    case("3 B 2", call=lambda n, x: (x, 0)),
    case("2 B*3", call=lambda n, x: (x, 0)),
    case("B 3", call=lambda n, x: (x, 0), declines=True),
]
_DIMS_CASES = [
    *_DIM_CASES[:-1],
    case("2 B 3", call=lambda n, x: (x, [0, -1])),
    case("2 B 3", call=lambda n, x: (x, [0, 2], True)),
    case("2 B 3", call=lambda n, x: (x, [1, 2]), declines=True),
]


@rule(
    "aten.sum.dim_IntList",
    "aten.mean.dim",
    "aten.amax.default",
    "aten.amin.default",
    "aten.nansum.default",
    "aten.logsumexp.default",
    "aten.special_logsumexp.default",
    "aten.nanmean.default",
    cases=_DIMS_CASES,
)
@rule(
    "aten.prod.dim_int",
    "aten.any.dim",
    "aten.all.dim",
    "aten.argmax.default",
    "aten.argmin.default",
    "aten.max.dim",
    "aten.min.dim",
    "aten.median.dim",
    "aten.nanmedian.dim",
    "aten.mode.default",
    cases=_DIM_CASES,
)
@rule(
    "aten.std.correction",
    "aten.var.correction",
    "aten.std_mean.correction",
    "aten.var_mean.correction",
    cases=[
        case("B 3 2", call=lambda n, x: (x, [1])),
        case("3 B 2", call=lambda n, x: (x, [0, 2], {"correction": 0, "keepdim": True})),
        case("B 3 2", call=lambda n, x: (x, None), declines=True),
    ],
)
@rule(
    "aten.std.dim",
    "aten.var.dim",
    "aten.std_mean.dim",
    "aten.var_mean.dim",
    cases=[
        case("B 3 2", call=lambda n, x: (x, [1])),
        case("3 B 2", call=lambda n, x: (x, [0, 2], False, True)),
        case("B 3", call=lambda n, x: (x, [0], False), declines=True),
    ],
)
@rule("aten.any.dims", "aten.all.dims", cases=_DIMS_CASES[-3:])
@rule("aten.count_nonzero.default", cases=[case("B 3", call=lambda n, x: (x, 1)), case("B 3", declines=True)])
@rule("aten.count_nonzero.dim_IntList", cases=[case("2 B 3", call=lambda n, x: (x, [0, 2]))])
@rule("aten.aminmax.default", cases=[case("B 3", call=lambda n, x: (x, {"dim": 1})), case("B 3", declines=True)])
@rule(
    "aten.kthvalue.default",
    cases=[case("B 3 2", call=lambda n, x: (x, 2, 1)), case("3 B", call=lambda n, x: (x, 2, 0, True))],
)
@rule(
    "aten.linalg_vector_norm.default",
    cases=[
        case("B 3 2", call=lambda n, x: (x, 2, [1])),
        case("B 3 2", call=lambda n, x: (x, 1, [1, 2], True)),
        case("B 3 2", declines=True),
    ],
)
@rule(
    "aten.linalg_norm.default",
    cases=[
        case("B 3", call=lambda n, x: (x, 2, [1])),
        case("B 3 2", call=lambda n, x: (x, None, [1, 2], True)),
        case("B 3", declines=True),
    ],
)
@rule("aten.linalg_norm.ord_str", cases=[case("B 3 2", call=lambda n, x: (x, "fro", [1, 2]))])
@rule("aten.linalg_matrix_norm.default", cases=[case("B 3 2", call=lambda n, x: (x, 1))])
@rule("aten.linalg_matrix_norm.str_ord", cases=[case("B 3 2", call=lambda n, x: (x, "fro", [-2, -1], True))])
@rule(
    "aten.norm.ScalarOpt_dim",
    cases=[case("B 3 2", call=lambda n, x: (x, 2, [1])), case("B 3", call=lambda n, x: (x, 2, [0]), declines=True)],
)
@rule(
    "aten.norm.ScalarOpt_dim_dtype",
    cases=[case("B 3", call=lambda n, x: (x, 2, [1], True, {"dtype": x.dtype}))],
)
@rule("aten.frobenius_norm.dim", cases=[case("B 3 2", call=lambda n, x: (x, [1, 2]))])
@rule("aten.nuclear_norm.dim", cases=[case("B 3 2", call=lambda n, x: (x, [1, 2]))])
@rule(
    "aten.sum.default",
    "aten.mean.default",
    "aten.prod.default",
    "aten.max.default",
    "aten.min.default",
    "aten.any.default",
    "aten.all.default",
    "aten.std.default",
    "aten.var.default",
    "aten.std_mean.default",
    "aten.var_mean.default",
    "aten.median.default",
    "aten.nanmedian.default",
    "aten.norm.Scalar",
    "aten.nuclear_norm.default",
    cases=[case("B 3", declines=True)],
)
def reduction(call: Call) -> Batching:
    """Reduces over `dim`; over everything where there is none."""
    found = reduced(call.operand("self"), listed(call.args.get("dim")), bool(call.args.get("keepdim", False)))
    return each(found, len(call.out)) if call.several else found


@rule(
    "aten.cosine_similarity.default",
    cases=[
        case("p:B 3", "p:B 3"),
        case("p:B 2 3", "p:1 3", call=lambda n, x, y: (x, y, -1)),
        case("p:B 3", "p:B 3", call=lambda n, x, y: (x, y, 0), declines=True),
    ],
)
def cosine_similarity(call: Call) -> Batching:
    """Broadcast, then reduced over `dim`."""
    operands = [call.operand("x1"), call.operand("x2")]
    both = Operand(broadcast_shape(operands), batched(aligned(operands)))
    return reduced(both, [call["dim"]], keepdim=False)


@rule(
    "aten.pairwise_distance.default",
    cases=[case("B 3", "B 3"), case("B 2 3", "3"), case("3 B", "3 B", declines=True)],
)
def pairwise_distance(call: Call) -> Batching:
    """Broadcast, then reduced over the last dim."""
    operands = [call.operand("x1"), call.operand("x2")]
    both = Operand(broadcast_shape(operands), batched(aligned(operands)))
    return reduced(both, [-1], call["keepdim"])


@rule(
    "aten.cdist.default",
    cases=[
        case("B 2 3", "B 4 3"),
        case("B 3", "4 3"),
        case("B 5 2 3", "B 5 4 3"),
        case("B 2 3", "4 3"),
        case("2 3", "B 4 3"),
        case("3 B", "4 B", declines=True),
    ],
)
def cdist(call: Call) -> Batching:
    """The distance of every row of x1 to every row of x2, the dims before them broadcast."""
    x, y = call.operand("x1"), call.operand("x2")
    lead = "abcdefgh"[: max(x.ndim, y.ndim) - 2]
    left, right = lead[len(lead) - (x.ndim - 2) :], lead[len(lead) - (y.ndim - 2) :]
    return einsum(f"{left}ik,{right}jk->{lead}ij", [x, y])


_SCAN_CASES = [
    case("B 3", call=lambda n, x: (x, -1)),
    case("3 B", call=lambda n, x: (x, 0)),
    case("2 B*3", call=lambda n, x: (x, 0)),
    case("B 3", call=lambda n, x: (x, 0), declines=True),
]


@rule(
    "aten.softmax.int",
    "aten.log_softmax.int",
    "aten.special_softmax.default",
    "aten._safe_softmax.default",
    "aten.cumprod.default",
    "aten.logcumsumexp.default",
    "aten.cummax.default",
    "aten.cummin.default",
    cases=_SCAN_CASES,
)
@rule("aten.sort.default", "aten.argsort.default", cases=_SCAN_CASES)
@rule("aten.sort.stable", cases=[case("B 3", call=lambda n, x: (x, {"stable": True, "dim": 1}))])
@rule("aten.argsort.stable", cases=[case("B 3", call=lambda n, x: (x, {"stable": True, "dim": 1}))])
@rule(
    "aten._softmax.default",
    "aten._log_softmax.default",
    cases=[case("B 3", call=lambda n, x: (x, 1, False)), case("B 3", call=lambda n, x: (x, 0, False), declines=True)],
)
@rule(
    "aten.topk.default",
    cases=[
        case("B 3", call=lambda n, x: (x, 2)),
        case("3 B", call=lambda n, x: (x, 2, 0)),
        case("B 3", call=lambda n, x: (x, 1, 0), declines=True),
    ],
)
@rule(
    "aten.special_log_softmax.default",
    cases=[case("B 3", call=lambda n, x: (x, -1)), case("B 3", call=lambda n, x: (x, 0), declines=True)],
)
@rule("aten.glu.default", cases=[case("B 4"), case("4 B", call=lambda n, x: (x, 0))])
def scan(call: Call) -> Batching:
    """Mixes the entries of one dim, which must not be the batch."""
    found = along(call, call["dim"], what=f"{call.name.split('.')[1].strip('_')} along the batch dim")
    return each(found, len(call.out)) if call.several else found


@rule(
    "aten.renorm.default",
    cases=[
        case("B 3", call=lambda n, x: (x, 2, 0, 1.0)),
        case("3 B", call=lambda n, x: (x, 2, 0, 1.0), declines=True),
    ],
)
def renorm(call: Call) -> Batching:
    """Scales every entry of `dim` by its own norm, over all other dims."""
    x = call.operand("self")
    if x.rows is not None and x.rows.dim != wrap(call["dim"], x.ndim):
        raise NotRowWise("normalises over the batch dim")
    return batched(x.rows)


@rule(
    "aten.trapezoid.dx",
    "aten.trapz.dx",
    cases=[case("B 3"), case("3 B", call=lambda n, y: (y, {"dim": 0})), case("3 B", declines=True)],
)
def trapezoid(call: Call) -> Batching:
    """The integral along one dim, which goes."""
    return reduced(call.operand("y"), [call["dim"]], keepdim=False)


@rule("aten.cumulative_trapezoid.dx", cases=[case("B 3"), case("3 B", declines=True)])
def cumulative_trapezoid(call: Call) -> Batching:
    """The integral so far along one dim."""
    return along(call, call["dim"], what="integrates over the batch")


@rule(
    "aten.quantile.scalar",
    "aten.nanquantile.scalar",
    cases=[
        case("B 3", call=lambda n, x: (x, 0.5, 1), empty=False),
        case("B 3", call=lambda n, x: (x, 0.5), declines=True),
    ],
)
@rule(
    "aten.quantile.default",
    "aten.nanquantile.default",
    cases=[
        case("B 3", "u:2", call=lambda n, x, q: (x, q, 1, True), empty=False),
        case("3 B", "u:", call=lambda n, x, q: (x, q, 0), empty=False),
        case("B 3", "u:2", call=lambda n, x, q: (x, q, 0), declines=True),
    ],
)
def quantile(call: Call) -> Batching:
    """A reduction; several quantiles are a new first dim."""
    dims = listed(call["dim"])
    found = reduced(call.operand("self"), dims, call["keepdim"])
    if not isinstance(call["q"], Operand):
        return found
    call.replicated("q")
    return shifted(found, call["q"].ndim) if isinstance(found, Rows) else found


@rule(
    "aten.linalg_cross.default",
    cases=[case("B 3", "B 3"), case("B 2 3", "3", call=lambda n, x, y: (x, y.expand(1, 1, 3)))],
)
@rule(
    "aten.cross.default",
    cases=[case("B 3", "B 3", call=lambda n, x, y: (x, y, 1)), case("B 3 3", "B 3 3", declines=True)],
)
def cross(call: Call) -> Batching:
    """The cross product along a dim of 3; without one, along the first such dim, which may be the batch."""
    operands = [call.operand("self"), call.operand("other")]
    both = Operand(broadcast_shape(operands), batched(aligned(operands)))
    if both.rows is not None and (call["dim"] is None or wrap(call["dim"], both.ndim) == both.rows.dim):
        raise NotRowWise("a cross product along the batch dim")
    return batched(both.rows)


@rule("aten.linalg_vecdot.default", cases=[case("B 3", "B 3"), case("B 2 3", "3"), case("3 B", "3 B", declines=True)])
def vecdot(call: Call) -> Batching:
    """The inner product along one dim, which goes."""
    operands = [call.operand("x"), call.operand("y")]
    return reduced(Operand(broadcast_shape(operands), batched(aligned(operands))), [call["dim"]], keepdim=False)


@rule("aten.msort.default", cases=[case("3 B"), case("B 3", declines=True)])
def msort(call: Call) -> Batching:
    """Sorts along dim 0."""
    return along(call, 0, what="sorts the batch")


no_rule("the distance of every pair of rows", "aten.pdist.default")
