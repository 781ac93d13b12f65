"""Reshapes that are not carried out: a view that hides a cut, or copies, waits for the view that shows it again.

    relu(x.view(B * T, D)).view(B, T, D)  =  relu(x)          x: cut or expanded along T
    q.repeat(1, T).view(B, T, D)          =  q.unsqueeze(1).expand(B, T, D)

An op that treats every row of the merged dim alike is applied before the merge. One that does not gets what
the view gives: parts where the cuts allow it, else a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from passes.forms import Blocks, Expanded, Form, Reshaped, Sum, Whole, is_static, same_shape, same_size
from passes.split import Application, Splitter
from roo_rewrite.rules.families import broadcasting
from roo_rewrite.rules.registry import find

aten = torch.ops.aten


def kept_apart(x: Form, shape: Sequence[Any]) -> bool:
    """Whether a reshape of `x` to `shape` merges its first dims, the batch's among them, and nothing else."""
    gone = x.ndim - len(shape)
    if gone < 1 or not shape or not isinstance(x, (Blocks, Expanded, Sum)) or is_static(shape[0]):
        return False
    return same_shape(shape[1:], x.shape[gone + 1 :])


def later_view(s: Splitter, inner: Form, shape: Sequence[Any]) -> Reshaped:
    """`inner` in another shape of as many entries, not carried out."""
    build = s.builder
    return Reshaped(
        inner, tuple(shape), lambda: build.call(aten.reshape.default, build.whole(inner), build.sizes(shape))
    )


def side_by_side(s: Splitter, x: Form, repeats: Sequence[int]) -> Form | None:
    """`x.repeat(repeats)`: for each dim that is copied, an expanded one before it, merged with it."""
    if any(r == 0 or (r != 1 and not is_static(n)) for r, n in zip(repeats, x.shape)):
        return None
    shape, copies = tuple(r * n if r != 1 else n for r, n in zip(repeats, x.shape)), list[Any]()
    for dim, (r, n) in reversed(list(enumerate(zip(repeats, x.shape)))):
        copies = [r, n, *copies] if r != 1 else [n, *copies]
        x = s.op(aten.unsqueeze.default, x, dim) if r != 1 else x
    return later_view(s, Expanded(x, tuple(copies)), shape)


def through(s: Splitter, app: Application) -> Form | None:
    """The op below the reshape of its operands, where it treats every row of the merged dim alike."""
    merged = [f for f in _forms(app) if isinstance(f, Reshaped)]
    lead = _lead(merged[0])
    if lead is None or any(f.ndim != merged[0].ndim or _lead(f) is None for f in merged):
        return None
    if any(not same_shape(f.inner.shape[: len(lead)], lead) for f in merged):
        return None
    changed = _changed(s, app, lead)
    if changed is None:
        return None
    result = s.apply(changed)
    return later_view(s, result, (merged[0].shape[0], *result.shape[len(lead) :]))


def settled(app: Application, to_shape: Callable[[Form, tuple[Any, ...]], Form | None]) -> Application:
    """The op on what the views of its operands give."""

    def settle(value: Any) -> Any:
        if isinstance(value, Reshaped):
            found = to_shape(value.inner, value.shape)
            return found if found is not None and not isinstance(found, Reshaped) else Whole(value.carry())
        return [settle(v) for v in value] if isinstance(value, list) else value

    return Application(app.target, {k: settle(v) for k, v in app.named.items()})


def _forms(app: Application) -> list[Form]:
    return [f for v in app.named.values() for f in (v if isinstance(v, list) else [v]) if isinstance(f, Form)]


def _lead(x: Reshaped) -> tuple[Any, ...] | None:
    """The dims of the inner form that the first dim of `x` is made of."""
    gone = x.inner.ndim - x.ndim
    if gone < 1 or is_static(x.shape[0]) or not same_shape(x.inner.shape[gone + 1 :], x.shape[1:]):
        return None
    return x.inner.shape[: gone + 1]


def _changed(s: Splitter, app: Application, lead: Sequence[Any]) -> Application | None:
    name = str(app.target)
    rule = find(name)
    if torch.Tag.pointwise in app.target.tags or (rule is not None and rule.function is broadcasting):
        return _pointwise(s, app, lead)
    key = _FIRST.get(name)
    if key is None or not isinstance(app[key], Reshaped) or sum(isinstance(f, Reshaped) for f in _forms(app)) > 1:
        return None
    x: Reshaped = app[key]
    changes: dict[str, Any] = {key: x.inner}
    if "dim" in app.named:
        dims = app["dim"] if isinstance(app["dim"], list) else [app["dim"]]
        if any(not isinstance(d, int) or d % x.ndim == 0 for d in dims):
            return None
        back = [d % x.ndim - x.ndim for d in dims]
        changes["dim"] = back if isinstance(app["dim"], list) else back[0]
    if "normalized_shape" in app.named and len(app["normalized_shape"]) >= x.ndim:
        return None
    return app.replaced(**changes)


# Ops on one row each, by the operand whose rows they are; `dim` is one that is not merged.
_FIRST = {
    "aten.embedding.default": "indices",
    "aten.linear.default": "input",
    "aten.softmax.int": "self",
    "aten.log_softmax.int": "self",
    "aten.sum.dim_IntList": "self",
    "aten.mean.dim": "self",
    "aten.layer_norm.default": "input",
}


def _pointwise(s: Splitter, app: Application, lead: Sequence[Any]) -> Application | None:
    """Operands without the merged dim, or of size 1 there, are as they were; those with it are taken apart."""
    forms = _forms(app)
    ndim = max(f.ndim for f in forms)
    if any(isinstance(f, Reshaped) and f.ndim != ndim for f in forms):
        return None
    whole = next(f.shape[0] for f in forms if isinstance(f, Reshaped))

    def apart(value: Any) -> Any:
        if not isinstance(value, Form):
            return [apart(v) for v in value] if isinstance(value, list) else value
        if isinstance(value, Reshaped):
            return value.inner
        if value.ndim < ndim or not same_size(value.shape[0], whole):
            return value
        shape = (*lead, *value.shape[1:])
        return Whole(s.builder.call(aten.reshape.default, s.builder.whole(value), s.builder.sizes(shape)))

    if any(f.ndim == ndim and is_static(f.shape[0]) and f.shape[0] != 1 for f in forms):
        return None
    return Application(app.target, {k: apart(v) for k, v in app.named.items()})
