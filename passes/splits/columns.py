"""Linear maps over a dim that is not the last, however they are said.

W z                           z: [B, K, ...]
einsum("nk,bkd->bnd", W, z)   =  sum of W's columns times the parts of z, as in `splits.linear`
linear(t(z), W)               =  t(W z)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from passes.forms import Form, Whole, hint, is_static, provenance
from passes.split import Splitter
from passes.splits.linear import in_parts, product
from roo_rewrite.facts import Provenance
from roo_rewrite.ops.conv import WIDE

aten = torch.ops.aten
_REST = "xyzvw"


def over_columns(s: Splitter, x: Form, weight: Node, bias: Node | None = None) -> Form | None:
    """sum_k W[n, k] x[:, k, ...], if that pays. weight: [N, K].

    Either is a product that copies z in rows of what follows k; of short rows `W z` copies entry by entry.
    """
    if x.ndim < 3 or not in_parts(x, 1):
        return None
    rest = _REST[: x.ndim - 2]

    def emit(x: Node, w: Node, b: Node | None) -> Node:
        made = s.builder.call(aten.einsum.default, f"nk,bk{rest}->bn{rest}", [w, x])
        if b is None:
            return made
        return s.builder.call(aten.add.Tensor, made, s.builder.call(aten.reshape.default, b, [-1] + [1] * len(rest)))

    together = math.prod(hint(n) for n in x.shape[2:])
    spelled = s.builder.origin is not None and s.builder.origin.target is aten.einsum.default
    return product(s, x, 1, weight, bias, emit, runs=(together if spelled or together >= WIDE else 1, together))


def constant_matrix(form: Any) -> bool:
    """Whether a form is a matrix of weights."""
    static = isinstance(form, Whole) and form.ndim == 2 and all(is_static(n) for n in form.shape)
    return static and provenance(form) is Provenance.CONSTANT


def of_letters(s: Splitter, x: Form, y: Form, letters: tuple[str, str, str]) -> Form | None:
    """An einsum of a matrix of weights and parts of x over one of its later dims."""
    first, second, out = letters
    if constant_matrix(x) and not constant_matrix(y):
        x, y, first, second = y, x, second, first
    shared = [c for c in second if c in first]
    if not constant_matrix(y) or len(shared) != 1 or shared[0] in out or x.ndim < 3:
        return None
    (k,) = shared
    (n,) = (c for c in second if c != k)
    if n in first or set(out) != {*first, n} - {k}:
        return None
    assert isinstance(y, Whole)
    weight = y.node if second == n + k else s.builder.call(aten.t.default, y.node)
    at, last = first.index(k), x.ndim - 1
    if at not in (1, last) or not in_parts(x, at):
        return None
    made = over_columns(s, x, weight) if at == 1 else product(s, x, last, weight, None, aten.linear.default)
    if made is None:
        return None
    names = first.replace(k, n)
    return made if names == out else s.op(aten.permute.default, made, [names.index(c) for c in out])
