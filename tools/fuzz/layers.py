"""Steps that are layers of recommenders: what mixes both sides, and what the passes split."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from tools.fuzz.drawer import Drawer, floating, integral, shape_of, step
from tools.fuzz.recorder import F64, val


def linear(d: Drawer, x: Node, width: int) -> Node:
    """A linear layer, in one of the ways it is written."""
    have = int(shape_of(x)[-1])
    bias = d.r.weight(width) if d.maybe() else None
    match d.number(0, 5):
        case 0 if val(x).ndim == 2 and bias is not None:
            return d.r("addmm.default", bias, x, d.r("t.default", d.r.weight(width, have)))
        case 1 if val(x).ndim == 2:
            made = d.r("mm.default", x, d.r.weight(have, width))
        case 2:
            made = d.r("matmul.default", x, d.r.weight(have, width))
        case 3 if val(x).ndim == 3:
            made = d.r("einsum.default", d.one("btd,dk->btk", "btd,dk->bkt"), [x, d.r.weight(have, width)])
            return made
        case _:
            return d.r("linear.default", x, d.r.weight(width, have), bias)
    return d.r("add.Tensor", made, bias) if bias is not None else made


def activated(d: Drawer, x: Node) -> Node:
    """An activation, or none."""
    name = d.one("relu.default", "tanh.default", "sigmoid.default", "gelu.default", "silu.default", "", "", "")
    return d.r(name, x) if name else x


def joined(d: Drawer, low: int = 2, high: int = 4) -> Node:
    """`[B, K]`: both sides side by side."""
    parts = [d.matrix(x) for x in d.some(low, high)]
    made = d.r("cat.default", parts, d.one(1, -1))
    return d.matrix(made, 24) if int(shape_of(made)[1]) > 40 else made


def stacked(d: Drawer, width: int = 0, low: int = 2, high: int = 4) -> Node:
    """`[B, T, D]`: a token for each of several values of both sides."""
    width = width or d.number(1, 4)
    parts = [d.matrix(x, width) for x in d.some(low, high)]
    if d.maybe(0.7):
        return d.r("stack.default", parts, d.one(1, -2))
    rows = [d.cube(p, 1, width) if d.maybe() else d.r("unsqueeze.default", p, 1) for p in parts]
    return d.r("cat.default", rows, 1)


@step(4.0)
def dense(d: Drawer) -> Any:
    return activated(d, linear(d, joined(d), d.number(1, 6)))


@step(2.0)
def tower(d: Drawer) -> Any:
    return activated(d, linear(d, d.matrix(d.pick(floating)), d.number(1, 6)))


@step(3.0)
def reduced(d: Drawer) -> Any:
    x = stacked(d)
    if d.maybe(0.3):
        x = d.r("transpose.int", x, 1, 2)
    dim = d.one(1, 2, -1, -2)
    op = d.one("sum.dim_IntList", "mean.dim", "amax.default", "amin.default", "logsumexp.default", "var.correction")
    if op == "var.correction":
        return d.r(op, x, [dim], correction=d.one(0, 0.5))
    return d.r(op, x, [dim], d.maybe(0.3)) if d.maybe() else d.r(op, d.r("mul.Tensor", x, x), [dim])


@step(2.0)
def factor_square(d: Drawer) -> Any:
    x = stacked(d)
    one, two = d.r("sum.dim_IntList", x, [1]), d.r("sum.dim_IntList", d.r("pow.Tensor_Scalar", x, 2), [1])
    made = d.r("sub.Tensor", d.r("pow.Tensor_Scalar", one, 2), two)
    return d.r("mul.Tensor", d.r("sum.dim_IntList", made, [1], d.maybe()) if d.maybe() else made, 0.5)


@step(2.0)
def pairs(d: Drawer) -> Any:
    x = stacked(d)
    other = x if d.maybe(0.6) else d.r("matmul.default", x, d.r.weight(int(shape_of(x)[2]), int(shape_of(x)[2])))
    made = d.r(d.one("bmm.default", "matmul.default"), other, d.r("transpose.int", x, 1, 2))
    count = int(shape_of(made)[1])
    one, two = torch.tril_indices(count, count, -1)
    if d.maybe(0.4):
        return d.r("index.Tensor", made, [None, d.r.tensor(one), d.r.tensor(two)])
    if d.maybe(0.4):
        return d.r("flatten.using_ints", made, 1)
    return d.r(d.one("triu.default", "tril.default"), made)


@step(1.5)
def chosen_pairs(d: Drawer) -> Any:
    x = stacked(d, low=3)
    one, two = torch.triu_indices(int(shape_of(x)[1]), int(shape_of(x)[1]), 1)
    left, right = d.r("index_select.default", x, 1, one), d.r("index_select.default", x, 1, two)
    made = d.r("mul.Tensor", left, right)
    return d.r("sum.dim_IntList", made, [d.one(1, 2)]) if d.maybe() else linear(d, made, d.number(1, 3))


@step(2.0)
def target_attention(d: Drawer) -> Any:
    """DIN: a history and its target, the target expanded."""
    width, steps = d.number(1, 3), d.number(2, 4)
    history = d.cube(d.pick(floating, "request" if d.maybe(0.7) else ""), steps, width)
    target = d.r("unsqueeze.default", d.matrix(d.pick(floating), width), 1)
    wide = d.r("expand.default", target, [-1, steps, -1]) if d.maybe() else d.r("repeat.default", target, [1, steps, 1])
    parts = [history, wide]
    if d.maybe():
        parts += [d.r("sub.Tensor", history, wide), d.r("mul.Tensor", history, wide)]
    d.chance.shuffle(parts)
    hidden = activated(d, linear(d, d.r("cat.default", parts, -1), d.number(1, 3)))
    scores = linear(d, hidden, 1) if val(hidden).ndim == 3 and int(shape_of(hidden)[1]) == steps else hidden
    if d.maybe(0.6):
        scores = d.r("softmax.int", scores, 1)
    if shape_of(scores)[1:] != [steps, 1]:
        return scores
    if d.maybe():
        return d.r("sum.dim_IntList", d.r("mul.Tensor", scores, history), [1])
    return d.r("squeeze.dim", d.r("bmm.default", d.r("transpose.int", scores, 1, 2), history), 1)


def _mask(d: Drawer, queries: int, keys: int) -> Node:
    allowed = (
        torch.ones(queries, keys).tril() > 0 if d.maybe() else torch.rand(queries, keys, generator=d.r.generator) > 0.4
    )
    allowed[:, 0] = True
    kind = d.one("buffer", "constant")
    if d.maybe():
        return d.r.tensor(allowed, kind)
    return d.r.tensor(torch.zeros(queries, keys, dtype=F64).masked_fill(~allowed, float("-inf")), kind)


@step(2.5)
def self_attention(d: Drawer) -> Any:
    """Over a sequence whose last tokens are the target: causal, masked or full."""
    x = stacked(d, d.one(2, 4), 2, 4)
    if d.maybe(0.6):
        width = int(shape_of(x)[2])
        history = d.cube(d.pick(floating, "request" if d.maybe() else ""), d.number(1, 3), width)
        x = d.r("cat.default", [history, x], 1)
    _, steps, width = shape_of(x)
    heads = d.one(1, 2)
    q, k, v = (d.r("linear.default", x, d.r.weight(width, width)) for _ in range(3))
    if d.maybe():
        q, k, v = (
            d.r("transpose.int", d.r("view.default", n, [-1, steps, heads, width // heads]), 1, 2) for n in (q, k, v)
        )
    if d.maybe(0.3):
        q = d.r("slice.Tensor", q, -2, steps - 1, steps)
    queries = int(shape_of(q)[-2])
    match d.number(0, 3):
        case 0 if queries == steps:
            made = d.r("scaled_dot_product_attention.default", q, k, v, None, 0.0, True)
        case 1:
            made = d.r("scaled_dot_product_attention.default", q, k, v, _mask(d, queries, steps))
        case 2:
            made = d.r("scaled_dot_product_attention.default", q, k, v)
        case _:
            scores = d.r("mul.Tensor", d.r("matmul.default", q, d.r("transpose.int", k, -2, -1)), 0.5)
            mask = _mask(d, queries, steps)
            if val(mask).dtype is torch.bool:
                banned = d.r("logical_not.default", mask)
                scores = d.r("masked_fill.Scalar", scores, banned, d.one(float("-inf"), -1e9))
            elif d.maybe(0.7):
                scores = d.r("add.Tensor", scores, mask)
            made = d.r("matmul.default", d.r("softmax.int", scores, -1), v)
    if val(made).ndim == 4:
        made = d.r("flatten.using_ints", d.r("transpose.int", made, 1, 2), 2)
    return d.r("select.int", made, 1, d.one(0, -1)) if d.maybe(0.4) else made


@step(2.0)
def normed(d: Drawer) -> Any:
    x = joined(d) if d.maybe(0.7) else stacked(d)
    width = int(shape_of(x)[-1])
    weights = (d.r.weight(width), d.r.weight(width)) if d.maybe() else (None, None)
    if d.maybe(0.7):
        made = d.r("layer_norm.default", x, [width], *weights, d.one(1e-5, 1e-3))
    else:
        made = d.r("rms_norm.default", x, [width], weights[0], d.one(1e-5, 1e-3))
    return linear(d, made, d.number(1, 4)) if d.maybe(0.6) else made


@step(1.5)
def batch_normed(d: Drawer) -> Any:
    x = joined(d) if d.maybe() else d.matrix(d.pick(floating))
    width = int(shape_of(x)[1])
    mean, var = d.r.tensor(torch.zeros(width, dtype=F64), "buffer"), d.r.tensor(torch.ones(width, dtype=F64), "buffer")
    weights = (d.r.weight(width), d.r.weight(width)) if d.maybe() else (None, None)
    return d.r("batch_norm.default", x, *weights, mean, var, d.maybe(0.4), 0.1, 1e-3, False)


@step(2.0)
def outer_product(d: Drawer) -> Any:
    x, y = (d.matrix(v, d.number(1, 4)) for v in d.some(2, 2))
    if d.maybe(0.3):
        made = d.r("einsum.default", "bi,bj->bij", [x, y])
    else:
        made = d.r("mul.Tensor", d.r("unsqueeze.default", x, 2), d.r("unsqueeze.default", y, 1))
    if d.maybe(0.7):
        made = linear(d, d.matrix(made), d.number(1, 4))
    return made


@step(1.0)
def compressed(d: Drawer) -> Any:
    """xDeepFM's cross: outer products of fields, per embedding dim, then a convolution."""
    width = d.number(1, 3)
    x, y = stacked(d, width, 2, 3), stacked(d, width, 2, 2)
    made = d.r("einsum.default", "bhd,bmd->bhmd", [x, y])
    a, b = int(shape_of(x)[1]), int(shape_of(y)[1])
    made = d.r("reshape.default", made, [val(made).shape[0], a * b, width])
    made = d.r("conv1d.default", made, d.r.weight(3, a * b, 1))
    return d.r("sum.dim_IntList", made, [d.one(1, 2)]) if d.maybe() else made


@step(1.5)
def crossed(d: Drawer) -> Any:
    """DCN, both kinds."""
    x0 = joined(d)
    width = int(shape_of(x0)[1])
    xl = x0 if d.maybe() else d.matrix(d.pick(floating), width)
    inner = linear(d, xl, d.one(1, width))
    made = d.r("mul.Tensor", x0, inner)
    return d.r("add.Tensor", made, xl) if d.maybe(0.8) else made


@step(1.5)
def gated(d: Drawer) -> Any:
    experts = stacked(d, low=2, high=3)
    gate = d.r("softmax.int", linear(d, d.matrix(d.pick(floating)), int(shape_of(experts)[1])), -1)
    if d.maybe(0.3):
        return d.r("einsum.default", "bt,btd->bd", [gate, experts])
    if d.maybe():
        return d.r("squeeze.dims", d.r("bmm.default", d.r("unsqueeze.default", gate, 1), experts), [1])
    weighted = d.r("mul.Tensor", d.r("unsqueeze.default", gate, -1), experts)
    return d.r("sum.dim_IntList", weighted, [1])


@step(2.0)
def looked_up(d: Drawer) -> Any:
    """Embeddings of ids, pooled or not."""
    ids = d.rows(d.pick(integral))
    rows = 9
    if d.maybe(0.7):
        ids = d.r("remainder.Scalar", ids, rows)
    else:
        ids = d.r("clamp.default", ids, 0, rows - 1)
    table = d.r.weight(rows, d.number(1, 3))
    if d.maybe(0.2):
        return d.r("index.Tensor", table, [ids])
    made = d.r("embedding.default", table, ids)
    if val(made).ndim == 3 and d.maybe():
        return d.r(d.one("mean.dim", "sum.dim_IntList", "amax.default"), made, [1])
    return made


@step(1.0)
def convolved(d: Drawer) -> Any:
    x = stacked(d, d.number(2, 4), 2, 4)
    if d.maybe():
        return d.r("conv1d.default", x, d.r.weight(2, int(shape_of(x)[1]), d.one(1, 2)), None, [1], [1])
    x = d.r("unsqueeze.default", x, 1)
    made = d.r("conv2d.default", x, d.r.weight(2, 1, 2, 1), d.r.weight(2))
    return d.r("flatten.using_ints", made, d.one(1, 2))


@step(1.0)
def recurrent(d: Drawer) -> Any:
    width, hidden = d.number(1, 2), d.number(1, 3)
    x = d.cube(d.pick(floating), d.number(2, 3), width)
    start = d.r("zeros.default", [1, val(x).shape[0], hidden], dtype=F64)
    weights = [d.r.weight(3 * hidden, width), d.r.weight(3 * hidden, hidden)]
    out, last = d.r("gru.input", x, start, weights, False, 1, 0.0, False, False, True)
    return out if d.maybe() else d.r("squeeze.dim", last, 0)


@step(1.0)
def similar(d: Drawer) -> Any:
    width = d.number(2, 4)
    x, y = (d.matrix(v, width) for v in d.some(2, 2))
    match d.number(0, 3):
        case 0:
            return d.r("cosine_similarity.default", x, y, 1)
        case 1:
            x, y = d.cube(d.pick(floating), 2, width), d.cube(d.pick(floating), 3, width)
            return d.r("cdist.default", x, y, d.one(1.0, 2.0))
        case 2:
            return d.r("pairwise_distance.default", x, y)
        case _:
            size = d.r("linalg_vector_norm.default", d.r("cat.default", [x, y], 1), 2, [1], True)
            return d.r("div.Tensor", x, d.r("clamp_min.default", size, 1e-3))
