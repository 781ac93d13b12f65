"""Linear maps of both sides.

    linear(cat[E a, c], W)       =  E linear(a, Wa) + linear(c, Wc)
    linear(E a - c, W)           =  E linear(a, W) - linear(c, W)
    linear(cat[q, k, q-k, q*k])  =  q(W1 + W3) + k(W2 - W3) + (q*k)W4

The input falls apart into atoms: coefficient times columns of one node, and the columns of the weight
they meet. Atoms of one node share a product (their weights are added); atoms of one side and shape are
put side by side, so that each side has one contiguous block. Weight slices are taken in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from passes.forms import Blocks, Form, Lazy, Picked, Scaled, Sum, Turned, Whole, dtype_of, is_static, with_size
from passes.price import Price
from passes.split import Application, Splitter, handles
from passes.splits import outer, weighted
from passes.splits.atoms import Atom, Group, Meets, added, atoms_of, grouped, joined
from passes.splits.scaled import Centred
from roo_rewrite.cost import is_view
from roo_rewrite.facts import Provenance, annotation

aten = torch.ops.aten
Emit = Callable[[Node, Node, Node | None], Node]

# Products written onto one another, up to which neither operands nor the weight are put together for one: 2.6x at one
# row, 1.3x at 64, no slower at 1024 (two runs of 800 and 1332 columns, forward, CPU); of eight runs it is slower.
FEW = 3


@handles("aten.linear.default")
def linear(s: Splitter, app: Application) -> Form | None:
    """x [..., K] with weight [N, K], x in blocks or terms over K."""
    from passes.splits.columns import over_columns

    x, weight, bias = app.form("input"), app.form("weight"), app["bias"]
    if not isinstance(weight, Whole) or weight.ndim != 2 or not (bias is None or isinstance(bias, Whole)):
        return None
    if isinstance(x, Turned):
        made = over_columns(s, x.source, weight.node, None if bias is None else bias.node)
        return None if made is None else s.op(aten.transpose.int, made, 1, 2)
    if not in_parts(x, x.ndim - 1):
        return None
    return product(s, x, x.ndim - 1, weight.node, None if bias is None else bias.node, aten.linear.default)


def in_parts(x: Form, dim: int) -> bool:
    """Whether a contraction over `dim` sees parts of x."""
    return isinstance(x, (Sum, Lazy)) or (isinstance(x, (Blocks, Scaled, Centred)) and x.dim == dim)


def product(
    s: Splitter,
    x: Form,
    dim: int,
    weight: Node,
    bias: Node | None,
    emit: Emit | OpOverload,
    shape: tuple[Any, ...] | None = None,
    runs: tuple[int, int] | None = None,
) -> Form | None:
    """The linear map of x over `dim` by groups, if that pays.

    weight: [N, K, ...]; emit: an op on (x, weight, bias), or what builds it; shape: of the result, where it differs
    from x in more than `dim`; runs: where operands are copied first, the entries that lie together in the op as it is
    and in that of a group.
    """
    if dtype_of(x) != weight.meta["val"].dtype:
        return None
    n, k = (int(v) for v in weight.meta["val"].shape[:2])
    atoms = joined(atoms_of(s, x, dim, Meets(tuple(range(k)), weight)))
    means = [a for a in atoms if dim == x.ndim - 1 and emit is aten.linear.default and weighted.inside(s, a, n)]
    atoms = added(s, [a for a in atoms if a not in means])
    products = {a: f for a in atoms if shape is None and (f := _factored(a, weight, dim)) is not None}
    shape = shape or with_size(x.shape, dim, n)
    groups = grouped([a for a in atoms if a not in products], dim - x.ndim)
    cells = outer.cells(s, [(f, a.columns, a.index) for a, f in products.items()])
    if not _pays(s, x, groups, cells, shape, n, k, emit is aten.linear.default, runs):
        return None
    terms: list[tuple[float, Form]] = []
    scaled: dict[Node, list[tuple[float, Form]]] = {}
    for group in groups:
        if group.factor is not None:
            scaled.setdefault(group.factor, []).append((1.0, Whole(_multiply(s, group, dim - x.ndim, None, emit))))
        else:
            terms.append((1.0, Whole(_multiply(s, group, dim - x.ndim, None if terms else bias, emit))))
    if bias is not None and not terms:
        terms.append((1.0, Whole(s.builder.call(aten.reshape.default, bias, [n] + [1] * (len(shape) - 1 - dim)))))
    for factor, parts in scaled.items():
        whole = s.builder.whole(Sum(tuple(parts), shape))
        terms.append((1.0, Whole(s.builder.call(aten.mul.Tensor, whole, factor))))
    terms += [(1.0, Whole(outer.multiply(s, cell, weight))) for cell in cells]
    terms += [(a.coefficient, Whole(weighted.mapped(s, a))) for a in means]
    return Sum(tuple(terms), shape) if terms else None


def _factored(atom: Atom, weight: Node, dim: int) -> outer.Factors | None:
    """The factors of an atom that is a whole outer product of both sides, flattened to `dim`."""
    if atom.coefficient != 1 or atom.factor is not None or atom.weight is not weight:
        return None
    found = outer.factors(atom.node, dim)
    return found if found is not None and outer.covers(found, atom.index) else None


def _pays(
    s: Splitter,
    x: Form,
    groups: Sequence[Group],
    cells: Sequence[outer.Cell],
    shape: tuple[object, ...],
    n: int,
    k: int,
    onto: bool,
    runs: tuple[int, int] | None,
) -> bool:
    """Whether the groups are faster. onto: a product is written onto the other terms (`fuse`), not beside them."""
    price, impression = s.price, Provenance.IMPRESSION
    factors = {g.factor for g in groups if g.factor is not None}
    before = price.product(shape, k, impression, n) + 3 * price.move(x.shape) * len(factors)
    before += 0.0 if isinstance(x, Sum) and read_whole(s, x) else price.joined(x)
    before += price.move(shape) if _shifted(s) else 0.0
    products = list({g.products: g for g in groups}.values())  # scaled in several ways, multiplied once
    after = sum(price.product((*g.lead, n), g.inner, g.side) + _operands(price, g) for g in products)
    after += sum(price.move((*g.lead, n)) for g in products if g.side is not impression)
    after += price.move(shape, times=1.0 if onto else 2.0) * max(len(groups) - 1, 0)
    after += price.start(2 * max(len(groups) - 1, 0))
    after += sum(outer.price(s, c, n) for c in cells)
    if runs is not None:
        before += price.gathered(x.shape, impression, runs[0])
        after += sum(price.gathered((*g.lead, g.inner), g.side, runs[1]) for g in products)
        after += price.gathered(shape, impression, runs[1])  # what they give lies as what they read
    if any(_is_statistic(f) for f in factors):  # of each side, in place of those of the whole rows
        after += sum(3 * price.move((*g.lead, g.inner), g.side) for g in products) + price.start(12)
    after += 2 * price.move(shape) * len(factors)
    sides = ", ".join(f"{g.inner} of {k} columns per {_unit(g.side)}" for g in products)
    sides += "".join(f", {len(c[1])} with the request's factor in the weight" for cell in cells for c in cell.terms)
    return s.take(f"linear: {sides}", before, after)


def read_whole(s: Splitter, x: Sum) -> bool:
    """Whether something beside the op at hand reads a sum whole, which is then carried out whatever is done here."""
    assert s.builder.origin is not None
    users = [u for n in s.builder.origin.all_input_nodes if s.forms.get(n) is x for u in n.users]
    return any(not _takes_terms(u) for u in users if u is not s.builder.origin)


def _takes_terms(node: Node) -> bool:
    """Whether an op may leave a sum that it reads as terms; of a view, whether all that read it may."""
    if is_view(node):
        return all(_takes_terms(u) for u in node.users)
    if node.target in _OF_WEIGHTS:
        weight: Any = node.args[1]
        return all(is_static(n) for n in weight.meta["val"].shape)
    return node.target in _OF_TERMS or (node.target in _OF_NUMBERS and not isinstance(node.args[1], Node))


_OF_WEIGHTS = {aten.linear.default, aten.matmul.default, aten.mm.default}
_OF_TERMS = {aten.add.Tensor, aten.sub.Tensor, aten.sum.dim_IntList, aten.mean.dim, aten.neg.default}
_OF_NUMBERS = {aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar}


def _is_statistic(factor: Node) -> bool:
    """Whether a factor of the rows is the inverse root of their variance."""
    parts = factor.all_input_nodes if factor.target is aten.mul.Tensor else [factor]
    return any(p.target is aten.rsqrt.default for p in parts)


def _shifted(s: Splitter) -> bool:
    """Whether all that reads the op adds to it what no impression has: of a sum, that goes to the request's term."""
    origin = s.builder.origin
    users = list(origin.users) if origin is not None else []
    sides = [annotation(n).provenance for u in users for n in u.all_input_nodes if n is not origin]
    adds = all(u.target is aten.add.Tensor and len(u.all_input_nodes) == 2 for u in users)
    return bool(users) and adds and all(side is not Provenance.IMPRESSION for side in sides)


def _operands(price: Price, group: Group) -> float:
    """Time to bring what a group multiplies side by side."""
    first, *others = (node for node, _ in group.operands())
    return price.move((*group.lead, group.inner), group.side) if others else price.copied(first, group.side)


def _unit(side: Provenance) -> str:
    return "impression" if side is Provenance.IMPRESSION else "request"


def _multiply(s: Splitter, group: Group, back: int, bias: Node | None, emit: Emit | OpOverload) -> Node:
    """One product: operands side by side, their weights likewise."""
    merged = list(group.operands().items())
    dim = len(group.lead) + 1 + back
    if group.single and back == -1 and bias is None:
        rows = [(node, s.builder.call(aten.t.default, _weight(s, atoms))) for (node, _), atoms in merged]
        products = [(1.0, Whole(s.builder.call(aten.mul.Tensor, node, row))) for node, row in rows]
        return s.builder.whole(Sum(tuple(products), tuple(products[0][1].shape)))
    weight = group.atoms[0].weight
    if all(len(atoms) == 1 and atoms[0].coefficient == 1 and atoms[0].weight is weight for _, atoms in merged):
        if emit is aten.linear.default and 1 < len(runs := _runs(group.atoms)) <= FEW:
            apart = [_multiply(s, replace(group, atoms=r), back, None if i else bias, emit) for i, r in enumerate(runs)]
            return s.builder.whole(Sum(tuple((1.0, Whole(p)) for p in apart), tuple(apart[0].meta["val"].shape)))
        # Nothing is added: the columns of the weight, each once, in the order of the operands.
        w = s.builder.pick(weight, 1, [c for a in group.atoms for c in a.columns])
    else:
        w = s.builder.cat([_weight(s, atoms) for _, atoms in merged], 1)
    x = s.builder.cat([node if i is None else s.builder.pick(node, dim, i) for (node, i), _ in merged], dim)
    if isinstance(emit, OpOverload):
        return s.builder.call(emit, x, w, *([] if bias is None else [bias]))
    return emit(x, w, bias)


def _runs(atoms: Sequence[Atom]) -> list[tuple[Atom, ...]]:
    """Atoms by neighbouring columns of the weight; none where the columns of one do not lie in a row."""
    runs: list[tuple[Atom, ...]] = []
    for atom in sorted(atoms, key=lambda a: a.columns[0]):
        if atom.columns != tuple(range(atom.columns[0], atom.columns[-1] + 1)):
            return []
        if runs and runs[-1][-1].columns[-1] + 1 == atom.columns[0]:
            runs[-1] += (atom,)
        else:
            runs.append((atom,))
    return runs


def _weight(s: Splitter, atoms: Sequence[Atom]) -> Node:
    """The sum of the weight columns the atoms of one operand meet."""
    terms = tuple((a.coefficient, Picked(Whole(a.weight), 1, a.columns)) for a in atoms)
    shape = with_size(tuple(atoms[0].weight.meta["val"].shape), 1, len(atoms[0].columns))
    return s.builder.whole(Sum(terms, shape))


@handles("aten.tensordot.default")
def tensordot(s: Splitter, app: Application) -> Form | None:
    """Dims of x against those of weights: a linear map of x, what is contracted flattened."""
    from passes.splits.views import reshaped, to_shape

    x, y, dims, others = app.form("self"), app.form("other"), app["dims_self"], app["dims_other"]
    swapped = isinstance(x, Whole) and all(is_static(v) for v in x.shape)
    if swapped:
        x, y, dims, others = y, x, others, dims
    if not dims or not isinstance(y, Whole) or not all(is_static(v) for v in y.shape):
        return None
    dims, others = [d % x.ndim for d in dims], [d % y.ndim for d in others]
    rest, free = ([d for d in range(f.ndim) if d not in gone] for f, gone in ((x, dims), (y, others)))
    lead, many = tuple(x.shape[d] for d in rest), tuple(y.shape[d] for d in free)
    last = x if [*rest, *dims] == list(range(x.ndim)) else s.op(aten.permute.default, x, [*rest, *dims])
    flat = to_shape(s, last, (*lead, math.prod(x.shape[d] for d in dims)))
    if flat is None or not in_parts(flat, len(lead)):
        return None
    turned = s.builder.call(aten.permute.default, y.node, [*free, *others])
    weight = s.builder.call(aten.reshape.default, turned, [math.prod(many), flat.shape[-1]])
    made = product(s, flat, len(lead), weight, None, aten.linear.default)
    if made is None:
        return None
    whole = reshaped(s, made, (*lead, *many))
    order = [*range(len(lead), whole.ndim), *range(len(lead))]
    return s.op(aten.permute.default, whole, order) if swapped else whole


def _one_row(s: Splitter, x: Form, y: Whole) -> Form | None:
    """The last dim of x, in parts, against a vector."""
    row = s.builder.call(aten.unsqueeze.default, y.node, 0)
    made = product(s, x, x.ndim - 1, row, None, aten.linear.default)
    return None if made is None else s.op(aten.squeeze.dim, made, x.ndim - 1)


@handles("aten.mm.default", "aten.matmul.default")
def matmul(s: Splitter, app: Application) -> Form | None:
    """x @ matrix is a linear map, x @ vector one of one row; other products are in `splits.products`."""
    from passes.splits.columns import constant_matrix, over_columns
    from passes.splits.products import bilinear

    x, y = app.form("self"), app.form("mat2" if str(app.target) == "aten.mm.default" else "other")
    matrix = isinstance(y, Whole) and y.ndim == 2 and all(is_static(v) for v in y.shape)
    if x.ndim > 1 and in_parts(x, x.ndim - 1) and matrix:
        assert isinstance(y, Whole)
        return product(s, x, x.ndim - 1, s.builder.call(aten.t.default, y.node), None, aten.linear.default)
    if x.ndim > 1 and in_parts(x, x.ndim - 1) and isinstance(y, Whole) and y.ndim == 1 and is_static(y.shape[0]):
        return _one_row(s, x, y)
    if constant_matrix(x) and y.ndim == 3 and in_parts(y, 1):
        assert isinstance(x, Whole)
        return over_columns(s, y, x.node)
    return bilinear(s, app, x, y)
