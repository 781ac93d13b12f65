"""Views: ops that only renumber entries. The batch moves with its dim, or merges with a neighbour."""

from __future__ import annotations

import math
from dataclasses import replace

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Replicated, Rows, Several
from roo_rewrite.rules.families import along, batched, reshaped, shifted, unary, wrap
from roo_rewrite.rules.registry import Call, Extent, Operand, case, rule

_SIZES = ("size", "shape", "sizes")


def _x(call: Call) -> Operand:
    return call.operand("self")


@rule(
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    sizes=_SIZES,
    cases=[
        case("B 2 3", call=lambda n, x: (x, [n, 6])),
        case("B 2 3", call=lambda n, x: (x, [n * 2, 3])),
        case("B*2 3", call=lambda n, x: (x, [n, 6])),
        case("B*6", call=lambda n, x: (x, [n, 2, 3])),
        case("2 B 3", call=lambda n, x: (x, [2 * n, 3])),
        case("2 B 3", call=lambda n, x: (x, [2, n, 1, 3])),
        case("2*B 3", call=lambda n, x: (x, [2, n, 3])),
        case("B 4", call=lambda n, x: (x, [2 * n, 2])),
        case("B 4", call=lambda n, x: (x, [4, n]), declines=True),
        case("2 B 3", call=lambda n, x: (x, [n, 6]), declines=True),
    ],
)
def reshape(call: Call) -> Batching:
    """Row-major renumbering: see `reshaped`."""
    return reshaped(_x(call), call.out[0], call.batch)


@rule("aten.view_as.default", "aten.reshape_as.default", cases=[case("B 6", "B 2 3")])
def view_as(call: Call) -> Batching:
    """Row-major renumbering to the shape of `other`, whose batch size is the same."""
    return reshaped(_x(call), call.out[0], call.batch)


@rule(
    "aten.flatten.using_ints",
    cases=[
        case("B 2 3", call=lambda n, x: (x, 1, -1)),
        case("B 2 3", call=lambda n, x: (x, 0, 1)),
        case("2 B 3", call=lambda n, x: (x, 0, 1)),
    ],
)
@rule(
    "aten.unflatten.int",
    sizes=("sizes",),
    cases=[
        case("B 6", call=lambda n, x: (x, 1, [2, 3])),
        case("B*2 3", call=lambda n, x: (x, 0, [n, 2])),
        case("2*B 3", call=lambda n, x: (x, 0, [2, n])),
    ],
)
def flatten(call: Call) -> Batching:
    """Merging or splitting dims is a row-major renumbering."""
    return reshaped(_x(call), call.out[0], call.batch)


@rule(
    "aten.unsqueeze.default",
    cases=[
        case("B 3", call=lambda n, x: (x, 0)),
        case("B 3", call=lambda n, x: (x, -1)),
        case("3 B", call=lambda n, x: (x, 1)),
    ],
)
def unsqueeze(call: Call) -> Batching:
    """A new dim of size 1."""
    rows = _x(call).rows
    at = wrap(call["dim"], _x(call).ndim + 1)
    return Replicated() if rows is None else shifted(rows, int(at <= rows.dim))


@rule(
    "aten.squeeze.dim",
    cases=[
        case("B 1 3", call=lambda n, x: (x, 1)),
        case("1 B 3", call=lambda n, x: (x, 0)),
        case("B 3", call=lambda n, x: (x, 1)),
        case("B 3", call=lambda n, x: (x, 0), declines=True),
    ],
)
@rule(
    "aten.squeeze.dims",
    cases=[case("B 1 3 1", call=lambda n, x: (x, [1, -1])), case("B 1", call=lambda n, x: (x, [0, 1]), declines=True)],
)
def squeeze(call: Call) -> Batching:
    """Drops dims of size 1. Squeezing the batch dim would make a batch of one lose it."""
    x = _x(call)
    dims = call["dim"] if isinstance(call["dim"], (list, tuple)) else [call["dim"]]
    gone = {wrap(d, x.ndim) for d in dims}
    if x.rows is None:
        return Replicated()
    if x.rows.dim in gone:
        raise NotRowWise("squeezes the batch dim")
    return shifted(x.rows, -sum(d < x.rows.dim and x.shape[d] == 1 for d in gone))


def _permuted(x: Operand, order: list[int]) -> Batching:
    """The batch after dim `order[i]` has become dim i."""
    rows = x.rows
    dims = [wrap(d, x.ndim) for d in order]
    return Replicated() if rows is None else Rows(dims.index(rows.dim), rows.outer, rows.inner)


@rule("aten.permute.default", cases=[case("B 2 3", call=lambda n, x: (x, [2, 0, 1]))])
def permute(call: Call) -> Batching:
    """Dims in another order."""
    return _permuted(_x(call), list(call["dims"]))


@rule(
    "aten.transpose.int",
    "aten.swapaxes.default",
    "aten.swapdims.default",
    cases=[case("B 2 3", call=lambda n, x: (x, 0, 1)), case("2 B 3", call=lambda n, x: (x, -1, 1))],
)
def transpose(call: Call) -> Batching:
    """Two dims change places."""
    x = _x(call)
    first, second = [wrap(d, x.ndim) for d in list(call.args.values())[1:3]]
    order = list(range(x.ndim))
    order[first], order[second] = order[second], order[first]
    return _permuted(x, order)


@rule("aten.t.default", "aten.numpy_T.default", cases=[case("B 3"), case("3 B")])
def reverse_dims(call: Call) -> Batching:
    """All dims in reverse order."""
    return _permuted(_x(call), list(reversed(range(_x(call).ndim))))


@rule("aten.mT.default", "aten.adjoint.default", cases=[case("B 2 3"), case("2 B 3")])
def matrix_transpose(call: Call) -> Batching:
    """The last two dims change places."""
    n = _x(call).ndim
    return _permuted(_x(call), [*range(n - 2), n - 1, n - 2])


@rule(
    "aten.movedim.int",
    "aten.moveaxis.int",
    cases=[case("B 2 3", call=lambda n, x: (x, 0, 2)), case("2 B 3", call=lambda n, x: (x, -1, 0))],
)
@rule(
    "aten.movedim.intlist",
    "aten.moveaxis.intlist",
    cases=[case("B 2 3", call=lambda n, x: (x, [0, 2], [1, 0])), case("2 B 3", call=lambda n, x: (x, [-1], [0]))],
)
def movedim(call: Call) -> Batching:
    """Some dims go to given places, the others keep their order."""
    x = _x(call)
    ends = [call["source"], call["destination"]]
    source, target = ([wrap(d, x.ndim) for d in (e if isinstance(e, (list, tuple)) else [e])] for e in ends)
    rest = iter(d for d in range(x.ndim) if d not in source)
    return _permuted(x, [source[target.index(i)] if i in target else next(rest) for i in range(x.ndim)])


@rule(
    "aten.expand.default",
    sizes=_SIZES,
    cases=[
        case("B 1", call=lambda n, x: (x, [n, 3])),
        case("B 3", call=lambda n, x: (x, [2, -1, 3])),
        case("B 3", call=lambda n, x: (x, [2, n, 3])),
        case("B*2 1", call=lambda n, x: (x, [2 * n, 3])),
        case("3", call=lambda n, x: (x, [n, 3])),
        case("1 3", call=lambda n, x: (x, [n, -1])),
    ],
)
def expand(call: Call) -> Batching:
    """Repeats dims of size 1; a value without a batch may be repeated for every row."""
    return expanded(call, _x(call), call.out[0], [s == -1 for s in call["size"]])


def expanded(call: Call, x: Operand, out: tuple[int, ...], kept: list[bool]) -> Batching:
    """The batch after x is expanded to `out`; dims marked kept are not repeated."""
    if x.rows is not None:
        return shifted(x.rows, len(out) - x.ndim)
    new = len(out) - x.ndim
    repeated = [i for i, size in enumerate(out) if not kept[i] and (i < new or (x.shape[i - new] == 1 and size != 1))]
    batch = [i for i in repeated if out[i] % call.batch == 0]
    return Rows(batch[0], inner=out[batch[0]] // call.batch) if len(batch) == 1 else Replicated()


@rule("aten.expand_as.default", cases=[case("B 1", "B 3"), case("1", "B 3"), case("3", "B 3"), case("3 1", "3 4")])
def expand_as(call: Call) -> Batching:
    """Expand to the shape of `other`, whose batch is the same or the only one."""
    other = call.operand("other").rows
    found = expanded(call, _x(call), call.out[0], [False] * len(call.out[0]))
    if _x(call).rows is None and other is not None:
        return other
    if _x(call).rows is not None and other is not None and found != other:
        raise NotRowWise("the batch lies in different dims of the operands")
    return found


@rule(
    "aten.slice.Tensor",
    sizes=("end",),
    cases=[
        case("B 4", call=lambda n, x: (x, 1, 1, 3)),
        case("B 4", call=lambda n, x: (x, 0, 0, 2**63 - 1)),
        case("B 4", call=lambda n, x: (x, 0, 0, n)),
        case("B 4", call=lambda n, x: (x, 0, 1, 2**63 - 1), declines=True),
    ],
)
@rule(
    "aten.narrow.default",
    sizes=("length",),
    cases=[
        case("B 4", call=lambda n, x: (x, 1, 1, 3)),
        case("B 4", call=lambda n, x: (x, 0, 0, n)),
        case("B 4", call=lambda n, x: (x, 0, 0, 2), declines=True),
    ],
)
def slice_(call: Call) -> Batching:
    """A range of a dim. Of the batch dim only all of it."""
    x = _x(call)
    dim = wrap(call["dim"], x.ndim)
    if x.rows is not None and x.rows.dim == dim and (call.out[0] != x.shape or call.args.get("step", 1) != 1):
        raise NotRowWise("takes some rows of the batch")
    return batched(x.rows)


@rule(
    "aten.select.int",
    cases=[
        case("B 4", call=lambda n, x: (x, 1, -1)),
        case("4 B", call=lambda n, x: (x, 0, 2)),
        case("B 4", call=lambda n, x: (x, 0, 0), declines=True),
    ],
)
def select(call: Call) -> Batching:
    """One entry of a dim, which goes."""
    x = _x(call)
    dim = wrap(call["dim"], x.ndim)
    if x.rows is None:
        return Replicated()
    if x.rows.dim == dim:
        raise NotRowWise("takes one row of the batch")
    return shifted(x.rows, -int(dim < x.rows.dim))


@rule(
    "aten.split.Tensor",
    "aten.chunk.default",
    "aten.tensor_split.sections",
    cases=[
        case("B 4", call=lambda n, x: (x, 2, 1)),
        case("B 4", call=lambda n, x: (x, 2, 0), declines=True),
    ],
)
@rule(
    "aten.split_with_sizes.default",
    "aten.split.sizes",
    "aten.tensor_split.indices",
    cases=[
        case("B 4", call=lambda n, x: (x, [1, 3], 1)),
        case("4 B", call=lambda n, x: (x, [1, 3], 0)),
    ],
)
def split(call: Call) -> Batching:
    """Ranges of a dim that is not the batch."""
    kept = along(call, call["dim"], what="splits the batch")
    return Several((kept,) * len(call.out))


@rule("aten.unbind.int", cases=[case("B 3", call=lambda n, x: (x, 1)), case("3 B", call=lambda n, x: (x, 0))])
def unbind(call: Call) -> Batching:
    """Every entry of a dim, which goes."""
    return Several((select(call),) * len(call.out))


@rule(
    "aten.repeat.default",
    sizes=("repeats",),
    cases=[
        case("B 3", call=lambda n, x: (x, [1, 2])),
        case("B 3", call=lambda n, x: (x, [2, 1, 1])),
        case("1 3", call=lambda n, x: (x, [n, 2])),
        case("B 3", call=lambda n, x: (x, [2, 1])),
        case("B*2 3", call=lambda n, x: (x, [3, 1])),
        case("B", call=lambda n, x: (x, [n]), declines=True),
    ],
)
def repeat(call: Call) -> Batching:
    """Whole copies along dims; of the batch dim they are an outer dim of the merged one."""
    x, repeats = _x(call), list(call["repeats"])
    new = len(repeats) - x.ndim
    if x.rows is None:
        grown = [i for i, r in enumerate(repeats) if r % call.batch == 0 and r and (i < new or x.shape[i - new] == 1)]
        return Rows(grown[0], inner=repeats[grown[0]] // call.batch) if len(grown) == 1 else Replicated()
    if any(isinstance(r, Extent) for r in repeats):
        raise NotRowWise("repeats the batch as often as it has rows")
    rows = shifted(x.rows, new)
    return replace(rows, outer=rows.outer * repeats[rows.dim])


@rule(
    "aten.repeat_interleave.self_int",
    cases=[
        case("B 3", call=lambda n, x: (x, 2, 1)),
        case("B 3", call=lambda n, x: (x, 2, 0)),
        case("B*2 3", call=lambda n, x: (x, 3, 0)),
        case("B", call=lambda n, x: (x, 2)),
    ],
)
def repeat_interleave(call: Call) -> Batching:
    """Each entry of a dim several times in a row: an inner dim merged into it."""
    x = _x(call)
    if x.rows is None:
        return Replicated()
    if call["dim"] is None:
        inner = math.prod(x.shape[x.rows.dim + 1 :]) * call["repeats"]
        return Rows(0, x.rows.outer * math.prod(x.shape[: x.rows.dim]), x.rows.inner * inner)
    inner = call["repeats"] if wrap(call["dim"], x.ndim) == x.rows.dim else 1
    return Rows(x.rows.dim, x.rows.outer, x.rows.inner * inner)


@rule(
    "aten.flip.default",
    cases=[
        case("B 3", call=lambda n, x: (x, [1])),
        case("B 3", call=lambda n, x: (x, [0]), declines=True),
    ],
)
@rule("aten.fliplr.default", cases=[case("B 3"), case("3 B", declines=True)])
@rule("aten.flipud.default", cases=[case("3 B"), case("B 3", declines=True)])
def flip(call: Call) -> Batching:
    """Reverses dims that are not the batch."""
    return along(call, *call.args.get("dims", [call.name == "aten.fliplr.default"]), what="reverses the batch")


@rule(
    "aten.roll.default",
    cases=[
        case("B 3", call=lambda n, x: (x, [1], [1])),
        case("B 3", call=lambda n, x: (x, [1], [0]), declines=True),
        case("B 3", call=lambda n, x: (x, [1]), declines=True),
    ],
)
def roll(call: Call) -> Batching:
    """Rotates dims that are not the batch; without dims it rotates all entries as one."""
    dims = call["dims"] or range(_x(call).ndim)
    return along(call, *dims, what="rotates the batch")


@rule(
    "aten.unfold.default",
    cases=[
        case("B 4", call=lambda n, x: (x, 1, 2, 1)),
        case("B 4", call=lambda n, x: (x, 0, 2, 1), declines=True),
    ],
)
def unfold(call: Call) -> Batching:
    """Windows along a dim that is not the batch."""
    return along(call, call["dimension"], what="takes windows over the batch")


@rule(
    "aten.diagonal.default",
    cases=[
        case("B 3 3", call=lambda n, x: (x, 0, 1, 2)),
        case("3 3 B"),
        case("3 B 3", call=lambda n, x: (x, 0, 0, 2)),
    ],
)
def diagonal(call: Call) -> Batching:
    """The diagonal of two dims, which go; it becomes the last dim."""
    x = _x(call)
    pair = {wrap(call["dim1"], x.ndim), wrap(call["dim2"], x.ndim)}
    if x.rows is None:
        return Replicated()
    if x.rows.dim in pair:
        raise NotRowWise("takes the diagonal over the batch")
    return shifted(x.rows, -sum(d < x.rows.dim for d in pair))


@rule("aten.tril.default", "aten.triu.default", cases=[case("B 3 3"), case("B 3", declines=True)])
def triangle(call: Call) -> Batching:
    """Zeroes a triangle of the last two dims."""
    return along(call, -1, -2, what="takes a triangle over the batch")


rule("aten.view_as_complex.default", cases=[case("B 3 2")])(unary)
rule("aten.view_as_real.default", cases=[case("c:B 3")])(unary)
