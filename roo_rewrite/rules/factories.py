"""New values of the batch size, with the same contents for every row; and the row numbers."""

from __future__ import annotations

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Lengths, Offsets, Ragged, Replicated, RowIndex, Rows
from roo_rewrite.rules.registry import Call, Extent, case, rule

_SPECIAL = (RowIndex, Lengths, Offsets, Ragged)


@rule(
    "aten.zeros.default",
    "aten.ones.default",
    sizes=("size",),
    special=_SPECIAL,
    cases=[
        case(call=lambda n: ([n, 3],)),
        case(call=lambda n: ([2, n * 3],)),
        case(call=lambda n: ([n],)),
        case(call=lambda n: ([n, n],), declines=True),
        case(call=lambda n: ([n + 1],), declines=True),
    ],
)
@rule("aten.full.default", sizes=("size",), special=_SPECIAL, cases=[case(call=lambda n: ([3, n], 2.5))])
@rule(
    "aten.new_zeros.default",
    "aten.new_ones.default",
    sizes=("size",),
    special=_SPECIAL,
    cases=[case("B 2", call=lambda n, x: (x, [n, 3])), case("B 2", call=lambda n, x: (x, [3]))],
)
@rule(
    "aten.new_full.default",
    sizes=("size",),
    special=_SPECIAL,
    cases=[case("B 2", call=lambda n, x: (x, [n, 3], 2.5))],
)
def filled(call: Call) -> Batching:
    """A constant for every entry; the sizes say where the batch is."""
    return sized(call)


def sized(call: Call) -> Batching:
    """The batch of a value whose `size` may depend on it."""
    batched = [(dim, size) for dim, size in enumerate(call["size"]) if isinstance(size, Extent)]
    if not batched:
        return Replicated()
    if len(batched) > 1:
        raise NotRowWise("several sizes depend on the batch")
    dim, size = batched[0]
    if not size or size % call.batch:
        raise NotRowWise("the size is no multiple of the batch size")
    return Rows(dim, inner=int(size) // call.batch)


@rule("aten.empty.memory_format", sizes=("size",), cases=[case(call=lambda n: ([n, 0],))])
@rule("aten.new_empty.default", sizes=("size",), special=_SPECIAL, cases=[case("B 2", call=lambda n, x: (x, [n, 0]))])
def empty(call: Call) -> Batching:
    """Memory to be overwritten: any contents will do."""
    return sized(call)


@rule("aten.arange.default", sizes=("end",), cases=[case(call=lambda n: (n,))])
@rule(
    "aten.arange.start",
    sizes=("end",),
    cases=[case(call=lambda n: (0, n)), case(call=lambda n: (1, n), declines=True)],
)
@rule(
    "aten.arange.start_step",
    sizes=("end",),
    cases=[case(call=lambda n: (0, n * 3, 3)), case(call=lambda n: (0, n))],
)
def arange(call: Call) -> Batching:
    """The row numbers, or every `step`-th number, one for each row."""
    start, step = call.args.get("start", 0), call.args.get("step", 1)
    if (
        start == 0
        and isinstance(step, int)
        and step > 0
        and isinstance(call["end"], Extent)
        and call["end"] == step * call.batch
    ):
        return RowIndex(0, step)
    raise NotRowWise("a range over the batch that does not number its rows")


@rule("aten.empty_like.default", special=_SPECIAL, cases=[case("B 0")])
@rule(
    "aten.zeros_like.default",
    "aten.ones_like.default",
    special=_SPECIAL,
    cases=[case("B 3"), case("3 B"), case("#B"), case("R 2"), case("offsets", declines=True)],
)
@rule("aten.full_like.default", special=_SPECIAL, cases=[case("B 3", call=lambda n, x: (x, 2.0))])
def filled_like(call: Call) -> Batching:
    """A constant for every entry, in the shape of the operand."""
    kind = call.operand("self").batching
    if isinstance(kind, Offsets):
        raise NotRowWise("offsets have no rows of their own")
    if isinstance(kind, RowIndex):
        return Rows(kind.dim)
    return kind if isinstance(kind, Ragged) else call.operand("self").rows or Replicated()
