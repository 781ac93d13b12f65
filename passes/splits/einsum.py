"""An einsum of more than two operands, two at a time; a bilinear map as the linear map of an outer product.

einsum("bfd,bgd,fg->b", T, T, w)  =  einsum("bfg,fg->b", einsum("bfd,bgd->bfg", T, T), w)
einsum("bi,eij,bj->bei", x, w, x) =  einsum("bei,bi->bei", einsum("eij,bj->bei", w, x), x)
einsum("bfd,ofo->bd", T, w)       =  einsum("bfd,fo->bd", T, diagonal(w))
einsum("bfd,ofx->bod", T, w)      =  einsum("bfd,of->bod", T, sum(w, 2))
einsum("bi,nij,bj->bn", c, w, E a)  =  einsum("bi,bni->bn", c, E einsum("nij,bj->bni", w, a))
bilinear(x, y, W)                 =  linear(flatten(x outer y), W)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import torch

from passes.forms import Blocks, Expanded, Form, Sum, Whole, dtype_of, hint, is_mixed, is_static, provenance, same_size
from passes.split import Application, Splitter, handles
from passes.splits.products import bilinear, moves
from passes.splits.views import reshaped
from roo_rewrite.facts import Provenance
from roo_rewrite.rules.matmul import spelled_out

aten = torch.ops.aten
_MANY = 4


@handles("aten.einsum.default")
def einsum(s: Splitter, app: Application) -> Form | None:
    """Two operands are a product of forms; more are products of products."""
    app = _constants_alone(s, app)
    tensors = app["tensors"]
    if len(tensors) == 2:
        return bilinear(s, app, *tensors)
    if len(tensors) < 3 or app["path"] is not None:
        return None
    left, out = spelled_out(app["equation"], [f.ndim for f in tensors]).split("->")
    names = left.split(",")
    if not _plain(tensors, names):
        return None
    if all(isinstance(f, Whole) for f in tensors):
        return _in_turn(s, list(zip(tensors, names)), out)
    left_over, moved = list(zip(tensors, names)), False
    while len(left_over) > 1:
        first, second, kept = _next_pair(left_over, out)
        made = s.op(aten.einsum.default, f"{first[1]},{second[1]}->{kept}", [first[0], second[0]])
        moved = moved or (isinstance(made, (Blocks, Sum, Expanded)) and moves(made))
        left_over = [pair for pair in left_over if pair is not first and pair is not second] + [(made, kept)]
    return left_over[0][0] if moved else None


def _next_pair(operands: Sequence[tuple[Form, str]], out: str) -> tuple[tuple[Form, str], tuple[Form, str], str]:
    """The first two operands that share what no other has, and the letters of their product: outer products wait."""
    found = []
    for first, second in combinations(operands, 2):
        rest = [pair[1] for pair in operands if pair is not first and pair is not second]
        both = sorted(dict.fromkeys(first[1] + second[1]), key=lambda c: out.index(c) if c in out else len(out))
        needed = set(out).union(*rest)
        kept = "".join(c for c in both if c in needed) if rest else out
        if any(c not in needed for c in both):
            return first, second, kept
        found.append((first, second, kept))
    return found[0]


Named = tuple[str, Provenance]


def _in_turn(s: Splitter, operands: list[tuple[Form, str]], out: str) -> Form | None:
    """Whole operands in the cheapest order, where that is cheaper than all of them from left to right."""
    sizes = {c: n for f, letters in operands for c, n in zip(letters, f.shape)}
    named = [(letters, provenance(f)) for f, letters in operands]
    if len(named) > _MANY or not {Provenance.REQUEST, Provenance.IMPRESSION} <= {side for _, side in named}:
        return None
    before = _spent(s, sizes, [(c, Provenance.IMPRESSION) for c, _ in named], out, [(0, 1)] * (len(named) - 1))
    after, steps = min((_spent(s, sizes, named, out, steps), steps) for steps in _orders(len(named)))
    if not s.take("einsum: two at a time", before, after + s.price.start(len(steps) - 1)):
        return None
    for step in steps:
        rest, (first, second) = _rest(operands, step), (operands[i] for i in step)
        kept = _kept(first[1], second[1], [letters for _, letters in rest], out)
        kept = "".join(sorted(kept, key=lambda c: is_static(sizes[c])))  # the batch first, as products are read
        made = s.op(aten.einsum.default, f"{first[1]},{second[1]}->{kept}", [first[0], second[0]])
        operands = [(made, kept), *rest]
    ((result, names),) = operands
    return result if names == out else s.op(aten.permute.default, result, [names.index(c) for c in out])


def _orders(count: int) -> list[list[tuple[int, int]]]:
    """All orders of taking operands in pairs; the product of a pair comes first among those left."""
    if count == 1:
        return [[]]
    return [[pair, *rest] for pair in combinations(range(count), 2) for rest in _orders(count - 1)]


def _rest(operands: Sequence[Any], step: tuple[int, int]) -> list[Any]:
    return [operand for i, operand in enumerate(operands) if i not in step]


def _kept(first: str, second: str, others: Sequence[str], out: str) -> str:
    """Letters of the product of two operands: those of the result, in its order, then what others read."""
    both = dict.fromkeys(first + second)
    last = [c for c in out if c in both] + [c for c in both if c not in out and any(c in o for o in others)]
    return "".join(last)


def _spent(s: Splitter, sizes: dict[str, Any], named: list[Named], out: str, steps: Sequence[tuple[int, int]]) -> float:
    """Time of the products of these steps, each at the rate of its side."""
    total = 0.0
    for i, j in steps:
        (first, one), (second, other) = named[i], named[j]
        rest, side = _rest(named, (i, j)), max(one, other)
        kept = _kept(first, second, [letters for letters, _ in rest], out)
        inner = math.prod(hint(sizes[c]) for c in {*first, *second} - set(kept))
        total += s.price.product(tuple(sizes[c] for c in kept) or (1,), inner, side)
        named = [(kept, side), *rest]
    return total


@handles("aten.bilinear.default")
def bilinear_map(s: Splitter, app: Application) -> Form | None:
    """x [..., i] and y [..., j] by a weight [N, i, j], where parts of either belong to the request."""
    x, y, weight, bias = (app[name] for name in ("input1", "input2", "weight", "bias"))
    sides = {provenance(x), provenance(y)}
    mixed = is_mixed(x) or is_mixed(y) or sides == {Provenance.REQUEST, Provenance.IMPRESSION}
    if not mixed or not isinstance(weight, Whole) or not (dtype_of(x) is dtype_of(y) is dtype_of(weight)):
        return None
    n, i, j = weight.shape
    rows = s.builder.call(aten.reshape.default, weight.node, [n, i * j])
    pairs = s.op(aten.mul.Tensor, s.op(aten.unsqueeze.default, x, x.ndim), s.op(aten.unsqueeze.default, y, y.ndim - 1))
    return s.op(aten.linear.default, reshaped(s, pairs, (*x.shape[:-1], i * j)), Whole(rows), bias)


def _constants_alone(s: Splitter, app: Application) -> Application:
    """The einsum with the diagonals of its constants taken first, and what they alone have summed."""
    tensors = list(app["tensors"])
    if all(isinstance(f, Whole) for f in tensors):
        return app
    left, out = spelled_out(app["equation"], [f.ndim for f in tensors]).split("->")
    names = left.split(",")
    for i, form in enumerate(tensors):
        for c in names[i]:
            if names[i].count(c) == 2 and provenance(form) is Provenance.CONSTANT:
                first, second = names[i].index(c), names[i].rindex(c)
                form = tensors[i] = s.op(aten.diagonal.default, form, 0, first, second)
                names[i] = names[i].replace(c, "") + c
        lone = [c for c in names[i] if c not in out and not any(c in n for j, n in enumerate(names) if j != i)]
        rest = "".join(c for c in names[i] if c not in lone)
        if lone and rest and provenance(form) is Provenance.CONSTANT and dtype_of(form).is_floating_point:
            tensors[i] = s.op(aten.sum.dim_IntList, form, [names[i].index(c) for c in lone])
            names[i] = rest
    return app.replaced(equation=f"{','.join(names)}->{out}", tensors=tensors)


def _plain(tensors: Sequence[Form], names: Sequence[str]) -> bool:
    """Whether no operand repeats a letter, and a letter is one size everywhere."""
    sizes = {c: n for f, letters in zip(tensors, names) for c, n in zip(letters, f.shape)}
    same = all(same_size(sizes[c], n) for f, letters in zip(tensors, names) for c, n in zip(letters, f.shape))
    return same and all(len(set(letters)) == len(letters) for letters in names)
