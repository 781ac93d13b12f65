"""Reshapes that are not carried out: a view that hides a cut, or copies, waits for the view that shows it again.

    relu(x.view(B * T, D)).view(B, T, D)  =  relu(x)          x: cut or expanded along T
    q.repeat(1, T).view(B, T, D)          =  q.unsqueeze(1).expand(B, T, D)

An op that treats every row of the merged dim alike is applied before the merge. One that does not gets what
the view gives: parts where the cuts allow it, else a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from passes.forms import Blocks, Expanded, Form, Reshaped, Sum, Whole, hint, is_static, same_shape, same_size, with_size
from passes.split import Application, Splitter
from passes.splits.blocks import mapped, pick_form, placed, refined
from roo_rewrite.errors import NotRowWise
from roo_rewrite.rules.families import broadcasting
from roo_rewrite.rules.registry import find

aten = torch.ops.aten


def kept_apart(x: Form, shape: Sequence[Any]) -> bool:
    """Whether a reshape of `x` to `shape` merges its first dims, the batch's among them, and nothing else.

    Dims of size 1 merge with the batch in name only: `[B, 1, D]` to `[B, D]` keeps every cut.
    """
    gone = x.ndim - len(shape)
    if gone < 1 or not shape or not isinstance(x, (Blocks, Expanded, Sum)) or is_static(shape[0]):
        return False
    if same_size(shape[0], x.shape[0]):
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
        return _by_rows(s, app, lead)
    result = s.apply(changed)
    return later_view(s, result, (merged[0].shape[0], *result.shape[len(lead) :]))


def _by_rows(s: Splitter, app: Application, lead: tuple[Any, ...]) -> Form | None:
    """An op on rows of any kind, on the rows of each part by themselves; None where a row reads others, or none moves.

    op(cat[E a, c].view(B * T, D))  =  the rows of op(a.view(B * Ta, D)) and of op(c.view(B * Tc, D)), as they stood
    """
    from passes.splits.products import moves
    from passes.splits.views import reshaped

    merged = [f for f in _forms(app) if isinstance(f, Reshaped)]
    dims = {f.inner.dim if isinstance(f.inner, Blocks) else -1 for f in merged}
    (dim, *others) = dims
    rows = merged[0].shape[0]
    if others or not 0 <= dim < len(lead):
        return None
    opened: dict[int, Form] = {id(f): f.inner for f in merged}
    for form in _forms(app):
        if id(form) not in opened and form.ndim and same_size(form.shape[0], rows):
            opened[id(form)] = reshaped(s, form, (*lead, *form.shape[1:]))
    if not _row_by_row(app, opened, rows):
        return None
    parts, start = [], 0
    for size in refined([f.inner.sizes for f in merged if isinstance(f.inner, Blocks)]):
        few = with_size(lead, dim, size)
        made = s.apply(mapped(app, _rows_of(s, opened, dim, range(start, start + size), few)))
        parts.append(reshaped(s, made, (*few, *made.shape[1:])))
        start += size
    if not any(moves(p) for p in parts):
        return None
    whole = Blocks(dim, tuple(parts))
    return later_view(s, whole, (rows, *whole.shape[len(lead) :]))


def _row_by_row(app: Application, opened: dict[int, Form], rows: Any) -> bool:
    rule = find(str(app.target))
    if rule is None or rule.sizes:
        return False
    try:
        found = placed(app, dict.fromkeys(opened, 0), hint(rows))
    except NotRowWise:
        return False
    return found.dim == 0 and found.inner == 1


def _rows_of(
    s: Splitter, opened: dict[int, Form], dim: int, index: range, lead: tuple[Any, ...]
) -> Callable[[Form], Form]:
    """Operand -> its rows from the entries `index` of `dim`; `lead` are the dims these are merged from."""
    from passes.splits.views import reshaped

    def piece(form: Form) -> Form:
        if id(form) not in opened:
            return form
        return reshaped(s, pick_form(s, opened[id(form)], dim, index), (math.prod(lead), *form.shape[1:]))

    return piece


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
    if name == "aten.cat.default":
        return _side_by_side(s, app, lead)
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


def _side_by_side(s: Splitter, app: Application, lead: Sequence[Any]) -> Application | None:
    """A concatenation along a dim that is not merged."""
    forms = app["tensors"]
    ndim = forms[0].ndim
    if app["dim"] % ndim == 0 or any(f.ndim != ndim for f in forms):
        return None
    return app.replaced(tensors=[_apart(s, f, lead) for f in forms], dim=app["dim"] % ndim - ndim)


def _apart(s: Splitter, form: Form, lead: Sequence[Any]) -> Form:
    """A form whose first dim is merged from `lead`, with these dims."""
    if isinstance(form, Reshaped):
        return form.inner
    shape = (*lead, *form.shape[1:])
    return Whole(s.builder.call(aten.reshape.default, s.builder.whole(form), s.builder.sizes(shape)))


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
        kept = not isinstance(value, Reshaped) and (value.ndim < ndim or not same_size(value.shape[0], whole))
        return value if kept else _apart(s, value, lead)

    if any(f.ndim == ndim and is_static(f.shape[0]) and f.shape[0] != 1 for f in forms):
        return None
    return Application(app.target, {k: apart(v) for k, v in app.named.items()})
