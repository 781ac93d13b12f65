"""Products of tensors, each an einsum: the batch may be any letter that is not contracted."""

from __future__ import annotations

from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Batching
from roo_rewrite.rules.families import aligned, batched, einsum
from roo_rewrite.rules.registry import Call, Operand, case, rule

_LETTERS = "abcdefgh"


@rule(
    "aten.linear.default",
    cases=[case("B 3", "2 3", "2"), case("B 4 3", "2 3"), case("4 B 3", "2 3"), case("3 B", "2 B", declines=True)],
)
def linear(call: Call) -> Batching:
    """x [..., k] with weight [o, k]."""
    call.replicated("weight", "bias")
    lead = _LETTERS[: call.operand("input").ndim - 1]
    weight = call.operand("weight")
    return einsum(
        f"{lead}x,{'ox' if weight.ndim == 2 else 'x'}->{lead}{'o' * (weight.ndim - 1)}", _two(call, "input", "weight")
    )


def _two(call: Call, first: str, second: str) -> list[Operand]:
    return [call.operand(first), call.operand(second)]


@rule("aten.mm.default", cases=[case("B 3", "3 2"), case("2 3", "3 B"), case("3 B", "B 2", declines=True)])
def mm(call: Call) -> Batching:
    """Matrix times matrix."""
    return einsum("ik,kj->ij", _two(call, "self", "mat2"))


@rule(
    "aten.bmm.default",
    cases=[
        case("B 2 3", "B 3 4"),
        case("2 B 3", "2 3 4"),
        case("2 3 B", "2 B 4", declines=True),
        case("B 2 3", "7 3 4", declines=True),
    ],
)
def bmm(call: Call) -> Batching:
    """A batch of matrix products."""
    return einsum("bik,bkj->bij", _two(call, "self", "mat2"))


@rule("aten.mv.default", cases=[case("B 3", "3")])
def mv(call: Call) -> Batching:
    """Matrix times vector."""
    return einsum("ik,k->i", _two(call, "self", "vec"))


@rule("aten.outer.default", "aten.ger.default", cases=[case("B", "3"), case("3", "B")])
def outer(call: Call) -> Batching:
    """The product of every pair."""
    return einsum("i,j->ij", _two(call, "self", "vec2"))


@rule(
    "aten.matmul.default",
    cases=[
        case("B 3", "3 2"),
        case("B 2 3", "3 4"),
        case("B 2 3", "B 3 4"),
        case("2 3", "B 3 4"),
        case("B 1 2 3", "5 3 4"),
        case("B 3", "3"),
        case("3", "B 3 2"),
        case("3", "3 B"),
        case("B 2 3", "3 1"),
        case("3 B", "B 2", declines=True),
        case("B 2 3", "7 3 4", declines=True),
    ],
)
def matmul(call: Call) -> Batching:
    """Matrix product of the last two dims, the others broadcast; a vector is a matrix with one side."""
    x, y = _two(call, "self", "other")
    lead = max(x.ndim, y.ndim, 2) - 2
    left = _LETTERS[lead - max(x.ndim - 2, 0) : lead] + ("ik" if x.ndim > 1 else "k")
    right = _LETTERS[lead - max(y.ndim - 2, 0) : lead] + ("kj" if y.ndim > 1 else "k")
    return einsum(f"{left},{right}->{_LETTERS[:lead]}{'i' * (x.ndim > 1)}{'j' * (y.ndim > 1)}", [x, y])


@rule(
    "aten.einsum.default",
    cases=[
        case("B 2 3", "B 3", call=lambda n, x, y: ("bij,bj->bi", [x, y])),
        case("B 2 3", "4 3", call=lambda n, x, y: ("...j,oj->...o", [x, y])),
        case("B 2 3", "3 3", call=lambda n, x, y: ("bij,jj->bij", [x, y])),
        case("B 3 3", "B 3", call=lambda n, x, y: ("bii,bi->bi", [x, y])),
        case("B 2", "B 3", call=lambda n, x, y: ("bi,bj", [x, y]), declines=True),
        case("B 2", "B 3", call=lambda n, x, y: ("bi,bj->ij", [x, y]), declines=True),
    ],
)
def einsum_op(call: Call) -> Batching:
    """An einsum as written; dots become letters, and a result left out is the letters that occur once."""
    operands = call.operands()
    equation = spelled_out(call["equation"], [o.ndim for o in operands])
    terms = equation.split("->")[0].split(",")
    if any(o.rows and term.count(term[o.rows.dim]) > 1 for term, o in zip(terms, operands)):
        raise NotRowWise("an einsum that takes a diagonal of the batch")
    return einsum(equation, operands)


def spelled_out(equation: str, ndims: list[int]) -> str:
    """An einsum equation with explicit letters for dots, and an explicit result."""
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    used = set(equation) - set(".,->")
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" if c not in used]
    spans = [n - len(t.replace("...", "")) for t, n in zip(terms, ndims) if "..." in t]
    dots = "".join(free[: max(spans, default=0)])
    if not arrow:
        letters = left.replace(",", "").replace("...", "")
        right = ("..." if "..." in left else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    spelled = []
    for term, n in zip(terms, ndims):
        span = n - len(term.replace("...", ""))
        spelled.append(term.replace("...", dots[len(dots) - span :]) if "..." in term else term)
    return f"{','.join(spelled)}->{right.replace('...', dots)}"


@rule(
    "aten.addmm.default",
    cases=[case("2", "B 3", "3 2"), case("B 2", "B 3", "3 2"), case("2", "3 B", "B 2", declines=True)],
)
@rule(
    "aten.addbmm.default",
    cases=[
        case("2 4", "3 2 3", "3 3 4"),
        case("B 4", "3 B 2", "3 2 4"),
        case("2 B", "3 2 4", "3 4 B"),
        case("2 4", "B 2 3", "B 3 4", declines=True),
        case("2 4", "3 2 B", "3 B 4", declines=True),
    ],
)
@rule(
    "aten.baddbmm.default",
    cases=[case("B 2 4", "B 2 3", "B 3 4"), case("4", "B 2 3", "B 3 4"), case("1 2 4", "B 2 3", "B 3 4")],
)
def add_product(call: Call) -> Batching:
    """A sum of a tensor, broadcast, and a product."""
    first, x, y = call.operands()
    batches = call.name.startswith("aten.baddbmm")
    product = einsum("bik,bkj->bij" if batches else "bik,bkj->ij" if x.ndim == 3 else "ik,kj->ij", [x, y])
    return batched(aligned([first, Operand(call.out[0], product)]))


@rule(
    "aten.inner.default",
    cases=[case("B 3", "4 3"), case("2 3", "B 3"), case("B 2 3", "3"), case("3 B", "2 B", declines=True)],
)
def inner(call: Call) -> Batching:
    """A contraction of the last dims; the others of self come first."""
    x, y = _two(call, "self", "other")
    left, right = _LETTERS[: x.ndim - 1], "stuvwxy"[: y.ndim - 1]
    return einsum(f"{left}z,{right}z->{left}{right}", [x, y])


@rule(
    "aten.addmv.default",
    cases=[case("B", "B 3", "3"), case("1", "B 3", "3", empty=False), case("2", "2 B", "B", declines=True)],
)
@rule("aten.addr.default", cases=[case("B 3", "B", "3"), case("3", "B", "3"), case("2 B", "2", "B")])
def add_vectors(call: Call) -> Batching:
    """A sum of a tensor, broadcast, and a product with vectors."""
    first, x, y = call.operands()
    product = einsum("i,j->ij" if call.name == "aten.addr.default" else "ik,k->i", [x, y])
    return batched(aligned([first, Operand(call.out[0], product)]))


@rule(
    "aten.bilinear.default",
    cases=[
        case("B 2", "B 3", "4 2 3"),
        case("B 5 2", "B 5 3", "4 2 3", "4"),
        case("5 B 2", "5 B 3", "4 2 3"),
        case("2 B", "2 3", "4 B 3", declines=True),
    ],
)
def bilinear(call: Call) -> Batching:
    """x1ᵀ W x2 for every vector of the last dims."""
    call.replicated("weight", "bias")
    x, y = _two(call, "input1", "input2")
    lead = _LETTERS[: x.ndim - 1]
    return einsum(f"{lead}x,{lead}y->{lead}o", [x, y])


@rule("aten.dot.default", "aten.vdot.default", cases=[case("3", "3")])
def dot(call: Call) -> Batching:
    """The inner product of two vectors."""
    return einsum("k,k->", call.operands())


@rule(
    "aten.tensordot.default",
    cases=[
        case("B 2 3", "3 4", call=lambda n, x, y: (x, y, [2], [0])),
        case("B 2 3", "2 3", call=lambda n, x, y: (x, y, [1, 2], [0, 1])),
        case("4 3", "B 3", call=lambda n, x, y: (x, y, [1], [1])),
        case("B 2", "B 3", call=lambda n, x, y: (x, y, [0], [0]), declines=True),
    ],
)
def tensordot(call: Call) -> Batching:
    """A contraction over given dims; the others of `self` come first, then those of `other`."""
    x, y = _two(call, "self", "other")
    left = list(_LETTERS[: x.ndim])
    right = list("stuvwxyz"[: y.ndim])
    gone = []
    for a, b in zip(call["dims_self"], call["dims_other"]):
        right[b] = left[a]
        gone.append(left[a])
    out = "".join(c for c in left + right if c not in gone)
    return einsum(f"{''.join(left)},{''.join(right)}->{out}", [x, y])
