"""Steps that are cases of registered rules, those included that a rule must decline."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

import roo_rewrite.rules  # noqa: F401 - registers the rules
from roo_rewrite.rules.law import draw, operator
from roo_rewrite.rules.registry import Case, registered
from tools.fuzz.drawer import Drawer, step
from tools.fuzz.recorder import Size, UnusableError, Value, val

PREFIXES = ("", "i", "b", "p", "u", "s", "f")
NOISE = ("aten.std.", "aten.std_mean.")  # the gradient of rows that are all equal is nothing but rounding
MEDIANS = ("aten.median.", "aten.nanmedian.")  # torch 2.13 reads past the end of a dim that is expanded
WORDS = ("R", "lengths", "offsets", "starts", "ends")


def tokens(shape: str) -> tuple[str, list[str]]:
    """`"i:B 3"` -> its prefix and dims."""
    prefix, _, dims = shape.rpartition(":")
    return prefix, dims.split()


def usable(case: Case) -> bool:
    """Whether a step can make the call: no jagged pairs, no row numbers, no special matrices."""
    words = [tokens(s) for s in case.shapes]
    return all(p in PREFIXES for p, _ in words) and not any(t in WORDS or "#" in t for _, dims in words for t in dims)


@functools.cache
def choices() -> tuple[tuple[str, int], ...]:
    """Every (op, case) a step can be."""
    found = [(op, i) for op, rule in sorted(registered().items()) for i, c in enumerate(rule.cases) if usable(c)]
    return tuple((op, i) for op, i in found if op.startswith("aten.") and not op.startswith(NOISE) and _batched(op, i))


def _batched(op: str, index: int) -> bool:
    return any("B" in s for s in registered()[op].cases[index].shapes)


@functools.cache
def wild(op: str, index: int) -> bool | None:
    """Whether results of a case may be large or infinite; None where the op fails in float64, or its gradient does."""
    case = registered()[op].cases[index]
    generator = torch.Generator().manual_seed(0)
    tensors = [draw(s, torch.ones(5, dtype=torch.long), generator).value for s in case.shapes]
    tensors = [torch.rand_like(t).requires_grad_() if t.is_floating_point() else t for t in tensors]
    args = case.call(5, *tensors)
    kwargs = args[-1] if args and isinstance(args[-1], dict) else {}
    try:
        outs = operator(op)(*(args[:-1] if kwargs else args), **kwargs)
        outs = [t for t in pytree.tree_leaves(outs) if isinstance(t, Tensor)]
        loss: Any = sum(t.real.double().sum() for t in outs if t.requires_grad)
        if isinstance(loss, Tensor):
            loss.backward()
    except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
        return None
    floats = [t for t in outs if t.is_floating_point()]
    return any(not bool(torch.isfinite(t).all()) or bool((t.abs() > 20).any()) for t in floats)


def fitted(d: Drawer, x: Node, shape: str) -> Node:
    """A pool value as the operand a case asks for."""
    prefix, dims = tokens(shape)
    at = next(i for i, t in enumerate(dims) if "B" in t)
    left, _, right = dims[at].partition("*")
    outer, inner = (1, int(right or 1)) if left == "B" else (int(left), 1)
    before, after = [int(t) for t in dims[:at]], [int(t) for t in dims[at + 1 :]]
    sizes = [*before, *([outer] if outer > 1 else []), *([inner] if inner > 1 else []), *after]
    number = 1
    for size in sizes:
        number *= size
    if number == 0:
        raise UnusableError("an empty operand")
    x = d.matrix(x, number)
    if not sizes:
        x = d.r("squeeze.dim", x, 1)
    elif sizes != [number]:
        x = d.r("view.default" if d.maybe() else "reshape.default", x, [val(x).shape[0], *sizes])
    ahead = len(before) + (outer > 1)
    if ahead:
        x = d.r("permute.default", x, [*range(1, ahead + 1), 0, *range(ahead + 1, len(sizes) + 1)])
    if outer > 1 or inner > 1:
        x = d.r("flatten.using_ints", x, at, at + 1)
    return typed(d, x, prefix)


def typed(d: Drawer, x: Node, prefix: str) -> Node:
    """What a prefix of a case asks for."""
    match prefix:
        case "i":
            return d.r("remainder.Scalar", d.r("to.dtype", d.r("mul.Tensor", d.r("abs.default", x), 4), torch.int64), 4)
        case "b":
            return d.r("gt.Scalar", x, 0)
        case "p":
            return d.r("add.Tensor", d.r("abs.default", x), 1.0)
        case "u":
            return d.r("add.Tensor", d.r("mul.Tensor", d.r("sigmoid.default", x), 0.9), 0.05)
        case "s":
            return d.r("sort.default", x, -1)[0]
        case "f":
            return d.r("to.dtype", x, torch.float32)
    return x


@step(12.0)
def rule_case(d: Drawer) -> Any:
    """An op of the registry, as one of its cases calls it."""
    op, index = d.chance.choice(choices())
    case = registered()[op].cases[index]
    if any(s.startswith("f:") for s in case.shapes) and not d.low:
        raise UnusableError("computes in float32")
    untamed = wild(op, index)
    if untamed is None:
        raise UnusableError("fails in float64")
    picks = d.some(len(case.shapes), len(case.shapes))
    tensors = []
    for shape in case.shapes:
        if "B" in shape:
            x = fitted(d, picks.pop(), shape)
            x = d.r("contiguous.default", x) if op.startswith(MEDIANS) else x
            tensors.append(x.meta["meta"][0])
        else:
            value = draw(shape, torch.ones(3, dtype=torch.long), d.r.generator).value
            kind = d.one("parameter", "parameter", "buffer", "constant") if value.dtype is torch.float64 else "buffer"
            tensors.append(d.r.tensor(value, kind).meta["meta"][0])
    try:
        args = case.call(Size(1), *tensors)
    except Exception as e:  # a case that computes with its operands
        raise UnusableError(str(e)) from e
    kwargs = args[-1] if args and isinstance(args[-1], dict) else {}
    made = d.r(op, *(args[:-1] if kwargs else args), **kwargs)
    outs = [m for m in (made if isinstance(made, list) else [made]) if isinstance(m.meta["value"], Value)]
    outs = [m for m in outs if 0 not in [s for s in val(m).shape if isinstance(s, int)]]
    if not outs:
        raise UnusableError("no result")
    return [d.tame(m) if untamed and val(m).dtype.is_floating_point else m for m in outs[:2]]
