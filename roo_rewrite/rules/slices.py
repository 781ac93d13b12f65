"""Parts, copies and orders of the entries of a dim."""

from __future__ import annotations

import sys
from dataclasses import replace

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Offsets, Replicated, Rows, Several
from roo_rewrite.rules.families import along, batched, each, shifted, wrap
from roo_rewrite.rules.registry import Call, Extent, Operand, case, rule


def _x(call: Call) -> Operand:
    return call.operand("self")


@rule(
    "aten.slice.Tensor",
    "aten.slice_copy.Tensor",
    places=True,
    special=(Offsets,),
    sizes=("start", "end"),
    cases=[
        case("2*B 3", call=lambda n, x: (x, 0, 0, n)),
        case("offsets", call=lambda n, x: (x, 0, 0, -1)),
        case("offsets", call=lambda n, x: (x, 0, 1, sys.maxsize)),
        case("3*B 3", call=lambda n, x: (x, 0, n, 3 * n)),
        case("3*B 3", call=lambda n, x: (x, 0, n, 2**63 - 1)),
        case("2*B 3", call=lambda n, x: (x, 0, 1, n + 1), declines=True),
        case("B 4", call=lambda n, x: (x, 1, 1, 3)),
        case("B 4", call=lambda n, x: (x, 0, 0, 2**63 - 1)),
        case("B 4", call=lambda n, x: (x, 0, 0, n)),
        case("B 4", call=lambda n, x: (x, 0, 1, 2**63 - 1), declines=True),
    ],
)
@rule(
    "aten.narrow.default",
    "aten.narrow_copy.default",
    places=True,
    sizes=("start", "length"),
    cases=[
        case("2*B 3", call=lambda n, x: (x, 0, n, n)),
        case("B 4", call=lambda n, x: (x, 1, 1, 3)),
        case("B 4", call=lambda n, x: (x, 0, 0, n)),
        case("B 4", call=lambda n, x: (x, 0, 0, 2), declines=True),
    ],
)
def slice_(call: Call) -> Batching:
    """A range of a dim. Of the batch dim all of it, or some of the blocks it is an inner dim of."""
    x = _x(call)
    if isinstance(x.batching, Offsets):
        return _some_offsets(call, x.batching)
    dim = wrap(call["dim"], x.ndim)
    end = call.args.get("end", call.args.get("length"))
    if x.rows is None or x.rows.dim != dim:
        return _fixed(x, call["start"], end)
    if call.args.get("step", 1) != 1 or not (end is None or isinstance(end, Extent) or end == sys.maxsize):
        raise NotRowWise("takes some rows of the batch")
    return _blocks(call, x.rows, call["start"] or 0, call.out[0][dim])


def _fixed(x: Operand, *sizes: object) -> Batching:
    """x, in a dim that is not the batch, by sizes that do not depend on it."""
    if any(isinstance(s, Extent) for s in sizes):
        raise NotRowWise("a range of a dim depends on the batch size")
    return batched(x.rows)


def _some_offsets(call: Call, offsets: Offsets) -> Batching:
    """Offsets without the first or the last: `[1:]` and `[:-1]`."""
    start, end, step = call["start"] or 0, call.args.get("end"), call.args.get("step", 1)
    if "narrow" not in call.name and step == 1 and offsets == Offsets(offsets.lengths):
        if (start, end) == (0, -1):
            return replace(offsets, last=False)
        if start == 1 and end in (None, sys.maxsize):
            return replace(offsets, first=False)
    raise NotRowWise("takes some of the offsets")


def _blocks(call: Call, rows: Rows, start: int, size: int) -> Batching:
    """Of the merged batch dim, entries `[start, start + size)`: whole blocks, each of all rows."""
    block = call.batch * rows.inner
    if size % block or start % block or (start and not isinstance(start, Extent)):
        raise NotRowWise("takes some rows of the batch")
    return replace(rows, outer=size // block)


@rule(
    "aten.select.int",
    "aten.select_copy.int",
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
    "aten.split_copy.Tensor",
    "aten.unsafe_split.Tensor",
    sizes=("split_size",),
    cases=[
        case("B 4", call=lambda n, x: (x, 2, 1)),
        case("2*B 4", call=lambda n, x: (x, n, 0)),
        case("B 4", call=lambda n, x: (x, 2, 0), declines=True),
    ],
)
@rule(
    "aten.chunk.default",
    "aten.unsafe_chunk.default",
    "aten.tensor_split.sections",
    cases=[
        case("B 4", call=lambda n, x: (x, 2, 1)),
        case("4*B 4", call=lambda n, x: (x, 2, 0)),
        case("B 4", call=lambda n, x: (x, 2, 0), declines=True),
    ],
)
@rule(
    "aten.split_with_sizes.default",
    "aten.unsafe_split_with_sizes.default",
    "aten.split_with_sizes_copy.default",
    "aten.split.sizes",
    sizes=("split_sizes", "split_size"),
    cases=[
        case("B 4", call=lambda n, x: (x, [1, 3], 1)),
        case("4 B", call=lambda n, x: (x, [1, 3], 0)),
        case("3*B 4", call=lambda n, x: (x, [n, 2 * n], 0)),
    ],
)
@rule("aten.tensor_split.indices", cases=[case("B 4", call=lambda n, x: (x, [1, 3], 1))])
def split(call: Call) -> Batching:
    """Ranges of a dim. Of the batch dim blocks of all rows."""
    x, dim = _x(call), wrap(call["dim"], _x(call).ndim)
    given = list(call.args.values())[1]
    sizes = given if isinstance(given, list) else [given]
    if x.rows is None or x.rows.dim != dim:
        return each(_fixed(x, *sizes), len(call.out))
    if any(isinstance(s, Operand) for s in sizes):
        raise NotRowWise("splits the batch")
    whole = x.rows.outer % sizes[0] == 0 if _counted(call) else all(isinstance(s, Extent) for s in sizes)
    if not whole:
        raise NotRowWise("splits the batch")
    return Several(tuple(_blocks(call, x.rows, 0, shape[dim]) for shape in call.out))


@rule("aten.vsplit.int", cases=[case("4*B 2", call=lambda n, x: (x, 2)), case("B 4", call=lambda n, x: (x, 1))])
@rule("aten.hsplit.int", cases=[case("B 4", call=lambda n, x: (x, 2)), case("4*B", call=lambda n, x: (x, 2))])
@rule("aten.dsplit.int", cases=[case("B 2 4", call=lambda n, x: (x, 2))])
@rule("aten.vsplit.array", cases=[case("4 B", call=lambda n, x: (x, [1, 3]))])
@rule("aten.hsplit.array", cases=[case("B 4", call=lambda n, x: (x, [1, 3]))])
@rule("aten.dsplit.array", cases=[case("B 2 4", call=lambda n, x: (x, [1, 3]))])
def split_named(call: Call) -> Batching:
    """Ranges of the first, second or third dim; of a vector its only one."""
    dim = min("vhd".index(call.name[len("aten.")]), _x(call).ndim - 1)
    return split(replace(call, args={**call.args, "dim": dim}))


def _counted(call: Call) -> bool:
    """Whether the op is told how many parts to make, not of what size."""
    return "chunk" in call.name or "sections" in call.args


@rule(
    "aten.unbind.int",
    "aten.unbind_copy.int",
    cases=[case("B 3", call=lambda n, x: (x, 1)), case("3 B", call=lambda n, x: (x, 0))],
)
def unbind(call: Call) -> Batching:
    """Every entry of a dim, which goes."""
    return Several((select(call),) * len(call.out))


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
    "aten.unfold_copy.default",
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
    "aten.diagonal_copy.default",
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


@rule(
    "aten.diag_embed.default",
    cases=[
        case("B 3"),
        case("B 3", call=lambda n, x: (x, 1, 0, 2)),
        case("B 3", call=lambda n, x: (x, 0, 0, 1)),
        case("3 B", declines=True),
    ],
)
def diag_embed(call: Call) -> Batching:
    """The last dim laid along the diagonal of two new ones."""
    x = _x(call)
    first, second = sorted(wrap(call[name], x.ndim + 1) for name in ("dim1", "dim2"))
    if x.rows is None:
        return Replicated()
    if x.rows.dim == x.ndim - 1:
        raise NotRowWise("lays the batch along a diagonal")
    rows = shifted(x.rows, int(first <= x.rows.dim))
    return shifted(rows, int(second <= rows.dim))


@rule("aten.tril.default", "aten.triu.default", cases=[case("B 3 3"), case("B 3", declines=True)])
def triangle(call: Call) -> Batching:
    """Zeroes a triangle of the last two dims."""
    return along(call, -1, -2, what="takes a triangle over the batch")
