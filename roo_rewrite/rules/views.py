"""Views: ops that only renumber entries. The batch moves with its dim, or merges with a neighbour."""

from __future__ import annotations

from functools import partial

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching, Replicated, Rows
from roo_rewrite.rules.families import aligned, along, batched, reshaped, shifted, unary, wrap
from roo_rewrite.rules.registry import Call, Extent, Operand, case, rule

_SIZES = ("size", "shape", "sizes")
_view = partial(rule, places=True)


def _x(call: Call) -> Operand:
    return call.operand("self")


@_view(
    "aten.view.default",
    "aten.reshape.default",
    "aten._unsafe_view.default",
    "aten.view_copy.default",
    "aten._reshape_copy.default",
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
    sizes = call["size"] if "size" in call.args else call["shape"]
    return _sized(reshaped(_x(call), call.out[0], call.batch), sizes, 0)


def _sized(found: Batching, sizes: list[int], first: int) -> Batching:
    """The batch, held against the sizes asked for from dim `first` on: only its own may depend on it, or be -1."""
    at = found.dim - first if isinstance(found, Rows) else -1
    for i, size in enumerate(sizes):
        if isinstance(size, Extent) != (i == at) and not (i == at and size == -1):
            raise NotRowWise("the sizes asked for are not those of the batch")
    return found


@_view("aten.view_as.default", "aten.reshape_as.default", cases=[case("B 6", "B 2 3")])
def view_as(call: Call) -> Batching:
    """Row-major renumbering to the shape of `other`, whose batch is in the same place."""
    found = reshaped(_x(call), call.out[0], call.batch)
    if found != batched(call.operand("other").rows):
        raise NotRowWise("the batch lies in different dims of the operands")
    return found


@_view(
    "aten.flatten.using_ints",
    cases=[
        case("B 2 3", call=lambda n, x: (x, 1, -1)),
        case("B 2 3", call=lambda n, x: (x, 0, 1)),
        case("2 B 3", call=lambda n, x: (x, 0, 1)),
    ],
)
@_view(
    "aten.unflatten.int",
    sizes=("sizes",),
    cases=[
        case("B 6", call=lambda n, x: (x, 1, [2, 3])),
        case("B*2 3", call=lambda n, x: (x, 0, [n, 2])),
        case("2*B 3", call=lambda n, x: (x, 0, [2, n])),
    ],
)
@_view("aten.ravel.default", cases=[case("B 2"), case("2 B 3")])
def flatten(call: Call) -> Batching:
    """Merging or splitting dims is a row-major renumbering."""
    found = reshaped(_x(call), call.out[0], call.batch)
    sizes = call.args.get("sizes")
    if sizes is None:
        return found
    first = wrap(call["dim"], _x(call).ndim)
    inside = isinstance(found, Rows) and first <= found.dim < first + len(sizes)
    _sized(found if inside else Replicated(), sizes, first)
    return found


@_view(
    "aten.unsqueeze.default",
    "aten.unsqueeze_copy.default",
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


@_view(
    "aten.squeeze.dim",
    "aten.squeeze_copy.dim",
    cases=[
        case("B 1 3", call=lambda n, x: (x, 1)),
        case("1 B 3", call=lambda n, x: (x, 0)),
        case("B 3", call=lambda n, x: (x, 1)),
        case("B 3", call=lambda n, x: (x, 0), declines=True),
    ],
)
@_view(
    "aten.squeeze.dims",
    "aten.squeeze_copy.dims",
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


@_view("aten.permute.default", "aten.permute_copy.default", cases=[case("B 2 3", call=lambda n, x: (x, [2, 0, 1]))])
def permute(call: Call) -> Batching:
    """Dims in another order."""
    return _permuted(_x(call), list(call["dims"]))


@_view(
    "aten.transpose.int",
    "aten.transpose_copy.int",
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


@_view("aten.t.default", "aten.t_copy.default", "aten.numpy_T.default", cases=[case("B 3"), case("3 B")])
def reverse_dims(call: Call) -> Batching:
    """All dims in reverse order."""
    return _permuted(_x(call), list(reversed(range(_x(call).ndim))))


@_view("aten.mT.default", "aten.adjoint.default", "aten.mH.default", cases=[case("B 2 3"), case("2 B 3")])
def matrix_transpose(call: Call) -> Batching:
    """The last two dims change places."""
    n = _x(call).ndim
    return _permuted(_x(call), [*range(n - 2), n - 1, n - 2])


@rule(
    "aten.rot90.default",
    cases=[case("B 2 3", call=lambda n, x: (x, 1, [1, 2])), case("B 2", call=lambda n, x: (x, 2), declines=True)],
)
def rot90(call: Call) -> Batching:
    """Turns a plane by quarters."""
    x = _x(call)
    first, second = (wrap(d, x.ndim) for d in call["dims"])
    if x.rows is not None and x.rows.dim in (first, second):
        raise NotRowWise("turns the batch around")
    return batched(x.rows)


@_view(
    "aten.movedim.int",
    "aten.moveaxis.int",
    cases=[case("B 2 3", call=lambda n, x: (x, 0, 2)), case("2 B 3", call=lambda n, x: (x, -1, 0))],
)
@_view(
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


@_view(
    "aten.expand.default",
    "aten.expand_copy.default",
    "aten.broadcast_to.default",
    sizes=_SIZES,
    cases=[
        case("B 1", call=lambda n, x: (x, [n, 3])),
        case("B 3", call=lambda n, x: (x, [2, -1, 3])),
        case("B 3", call=lambda n, x: (x, [2, n, 3])),
        case("B*2 1", call=lambda n, x: (x, [2 * n, 3])),
        case("3", call=lambda n, x: (x, [n, 3])),
        case("1 3", call=lambda n, x: (x, [n, -1])),
        case("1 B", call=lambda n, x: (x, [n, -1]), declines=True),
        case("B 1", call=lambda n, x: (x, [-1, n]), declines=True),
    ],
)
def expand(call: Call) -> Batching:
    """Repeats dims of size 1; a value without a batch may be repeated for every row."""
    return expanded(call, _x(call), call["size"])


def expanded(call: Call, x: Operand, size: list[int]) -> Batching:
    """The batch after x is expanded to `size`, -1 for the dims that are kept."""
    grown = [i for i, s in enumerate(size) if isinstance(s, Extent)]
    rows = x.rows and shifted(x.rows, len(size) - x.ndim)
    if rows is not None and grown != [rows.dim] and size[rows.dim] != -1:
        raise NotRowWise("the sizes asked for are not those of the batch")
    if rows is None and len(grown) == 1 and size[grown[0]] % call.batch == 0:
        return Rows(grown[0], inner=size[grown[0]] // call.batch)
    if any(rows is None or i != rows.dim for i in grown):
        raise NotRowWise("several sizes depend on the batch")
    return batched(rows)


@_view("aten.expand_as.default", cases=[case("B 1", "B 3"), case("1", "B 3"), case("3", "B 3")])
def expand_as(call: Call) -> Batching:
    """Expand to the shape of `other`, whose batch is the same or the only one."""
    return batched(aligned([_x(call), call.operand("other")]))


@rule("aten.view_as_complex.default", "aten.view_as_complex_copy.default", cases=[case("B 3 2"), case("3 B 2")])
def view_as_complex(call: Call) -> Batching:
    """The last dim, of a real and an imaginary part, goes."""
    return along(call, -1, what="the batch is the pair of real and imaginary part")


rule("aten.view_as_real.default", cases=[case("c:B 3")])(unary)
