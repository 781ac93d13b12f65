"""Joining values along a dim, new or not, and padding."""

from __future__ import annotations

from collections.abc import Sequence

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Offsets, Replicated, Rows, Several
from roo_rewrite.rules.families import aligned, batched, each, reshaped, shifted, unary, wrap
from roo_rewrite.rules.registry import Call, Operand, case, rule


def common(operands: Sequence[Operand]) -> Rows | None:
    """The batch that all operands have in the same place; None when none has one."""
    found = {o.rows for o in operands}
    if len(found) > 1:
        mixed = None in found
        raise NotRowWise(
            "a value without a batch has an entry per row"
            if mixed
            else "the batch lies in different dims of the operands"
        )
    return found.pop()


def joined(operands: Sequence[Operand], dim: int) -> Batching:
    """A concatenation. Along the batch dim, batches one after the other are an outer dim of the merged one."""
    operands = [o for o in operands if o.shape != (0,)] or list(operands)
    dim = wrap(dim, operands[0].ndim)
    if all(o.rows is not None and o.rows.dim == dim for o in operands):
        rows = [o.rows for o in operands if o.rows is not None]
        if len({r.inner for r in rows}) > 1:
            raise NotRowWise("joins batches merged with different inner dims")
        return Rows(dim, sum(r.outer for r in rows), rows[0].inner)
    return batched(common(operands))


@rule(
    "aten.cat.default",
    "aten.concat.default",
    "aten.concatenate.default",
    cases=[
        case("B 2", "B 3", call=lambda n, x, y: ([x, y], 1)),
        case("B 2", "0", "B 3", call=lambda n, x, e, y: ([x, e, y], -1)),
        case("2 B", "1 B", call=lambda n, x, y: ([x, y], 0)),
        case("B 2", "B 2", call=lambda n, x, y: ([x, y], 0)),
        case("B*2 3", "B*2 3", "B*2 3", call=lambda n, *xs: (list(xs), 0)),
        case("B*2 3", "B*3 3", call=lambda n, x, y: ([x, y], 0), declines=True),
        case("B 3", "2 3", call=lambda n, x, y: ([x, y], 0), declines=True),
        case("B 3", "7 3", call=lambda n, x, y: ([x, y], 1), declines=True),
    ],
)
def cat(call: Call) -> Batching:
    """Joined along a dim there is."""
    return joined(call.operands(), call["dim"])


@rule(
    "aten.stack.default",
    cases=[
        case("B 2", "B 2", call=lambda n, x, y: ([x, y], 0)),
        case("B 2", "B 2", call=lambda n, x, y: ([x, y], 1)),
        case("2 B", "2 B", call=lambda n, x, y: ([x, y], -1)),
        case("B", "B", call=lambda n, x, y: ([x, y], 1)),
        case("B 2", "7 2", call=lambda n, x, y: ([x, y], 1), declines=True),
    ],
)
def stack(call: Call) -> Batching:
    """Joined along a new dim."""
    operands = call.operands()
    rows = common(operands)
    at = wrap(call["dim"], operands[0].ndim + 1)
    return Replicated() if rows is None else shifted(rows, int(at <= rows.dim))


def _at_least(x: Operand, ndim: int, call: Call) -> Operand:
    """x with leading (and for three dims one last) dims of size 1, as `atleast_2d` and `atleast_3d` have it."""
    shape = x.shape
    if ndim >= 2 and len(shape) == 1:
        shape = (1, *shape)
    if ndim == 3 and len(shape) == 2:
        shape = (*shape, 1)
    shape = shape or (1,) * ndim
    return Operand(shape, reshaped(x, shape, call.batch), x.dtype)


@rule(
    "aten.hstack.default",
    "aten.vstack.default",
    "aten.row_stack.default",
    "aten.dstack.default",
    "aten.column_stack.default",
    cases=[
        case("B 2", "B 2", call=lambda n, x, y: ([x, y],)),
        case("B", "B", call=lambda n, x, y: ([x, y],)),
        case("2 B", "2 B", call=lambda n, x, y: ([x, y],)),
        case("2 B 3", "2 B 3", call=lambda n, x, y: ([x, y],)),
        case("2 3 B", "2 3 B", call=lambda n, x, y: ([x, y],)),
        case("3 B", "3 B", "3 B", call=lambda n, *xs: (list(xs),)),
    ],
)
def joined_at_least(call: Call) -> Batching:
    """Joined after small operands have been given more dims."""
    operands, name = call.operands(), call.name.split(".")[1]
    if name == "hstack":
        return joined(operands, 0 if operands[0].ndim < 2 else 1)
    if name == "column_stack":
        columns = [o if o.ndim > 1 else Operand((*(o.shape or (1,)), 1), o.batching) for o in operands]
        return joined(columns, 1)
    wide = [_at_least(o, 3 if name == "dstack" else 2, call) for o in operands]
    return joined(wide, 2 if name == "dstack" else 0)


@rule(
    "aten.pad.default",
    "aten.constant_pad_nd.default",
    special=(Offsets,),
    cases=[
        case("ends", call=lambda n, x: (x, [1, 0])),
        case("B 3", call=lambda n, x: (x, [1, 2])),
        case("3 B", call=lambda n, x: (x, [0, 0, 1, 0])),
        case("B 3", call=lambda n, x: (x, [0, 0, 1, 0]), declines=True),
    ],
)
@rule(
    "aten.reflection_pad1d.default",
    "aten.replication_pad1d.default",
    cases=[case("B 2 3", call=lambda n, x: (x, [1, 2])), case("2 3 B", call=lambda n, x: (x, [1, 1]), declines=True)],
)
@rule(
    "aten.reflection_pad2d.default",
    "aten.replication_pad2d.default",
    cases=[case("B 2 3 3", call=lambda n, x: (x, [1, 2, 0, 1]))],
)
@rule(
    "aten.reflection_pad3d.default",
    "aten.replication_pad3d.default",
    cases=[case("B 2 3 3 3", call=lambda n, x: (x, [1, 2, 0, 1, 1, 1]))],
)
def pad(call: Call) -> Batching:
    """New entries at the ends of dims, the last dim first; none along the batch. A 0 before the ends makes offsets."""
    x, widths = call.operand("self"), list(call.args.get("pad") or call.args.get("padding") or ())
    kind = x.batching
    zeros = call.args.get("mode", "constant") == "constant" and not call.args.get("value")
    if isinstance(kind, Offsets) and zeros and kind == Offsets(kind.lengths, first=False) and widths == [1, 0]:
        return Offsets(kind.lengths)
    padded = {x.ndim - 1 - i // 2 for i, width in enumerate(widths) if width != 0}
    if x.rows is not None and x.rows.dim in padded:
        raise NotRowWise("pads the batch")
    return unary(call)


@rule(
    "aten.atleast_1d.default",
    "aten.atleast_2d.default",
    "aten.atleast_3d.default",
    cases=[case("B"), case("B 3"), case("2 B 3")],
)
def at_least(call: Call) -> Batching:
    """More dims of size 1, where there are too few."""
    return _at_least(call.operand("self"), _dims_of(call), call).batching


def _dims_of(call: Call) -> int:
    return int(call.name[len("aten.atleast_")])


@rule(
    "aten.atleast_1d.Sequence",
    "aten.atleast_2d.Sequence",
    "aten.atleast_3d.Sequence",
    cases=[case("B", "B 3", call=lambda n, *xs: (list(xs),))],
)
def all_at_least(call: Call) -> Batching:
    """Every operand with more dims of size 1, where there are too few."""
    return Several(tuple(_at_least(x, _dims_of(call), call).batching for x in call.operands()))


@rule(
    "aten.broadcast_tensors.default",
    cases=[case("B 3", "3", call=lambda n, x, y: ([x, y],)), case("2 B", "B", call=lambda n, x, y: ([x, y],))],
)
def broadcast_tensors(call: Call) -> Batching:
    """Every operand at the common shape."""
    return each(batched(aligned(call.operands())), len(call.out))


@rule(
    "aten.meshgrid.default",
    cases=[
        case("B", "3", call=lambda n, x, y: ([x, y],)),
        case("B", "B", call=lambda n, x, y: ([x, y],), declines=True),
    ],
)
@rule(
    "aten.meshgrid.indexing",
    cases=[
        case("B", "3", call=lambda n, x, y: ([x, y], {"indexing": "xy"})),
        case("2", "3", "B", call=lambda n, *xs: (list(xs), {"indexing": "ij"})),
        case("2", "3", "B", call=lambda n, *xs: (list(xs), {"indexing": "xy"})),
        case("2", "B", "3", call=lambda n, *xs: (list(xs), {"indexing": "xy"})),
    ],
)
def meshgrid(call: Call) -> Batching:
    """Operand i is laid along dim i, and repeated along the others."""
    places = [i for i, o in enumerate(call.operands()) if o.rows is not None]
    if len(places) > 1:
        raise NotRowWise("pairs every row with every row")
    rows = call.operands()[places[0]].rows if places else None
    if rows is None:
        return each(Replicated(), len(call.out))
    swapped = call.args.get("indexing") == "xy" and places[0] < 2
    return each(shifted(rows, 1 - places[0] if swapped else places[0]), len(call.out))
