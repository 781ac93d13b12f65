"""Part by part: ops that a row rule shows to work on every entry of the cut dim by itself.

    op(cat[a, c])  =  cat[op(a), op(c)]        where op(x[idx]) == op(x)[idx] along the cut dim
    op(a.expand)   =  op(a).expand             likewise along the expanded dim

The rule is the one that hoisting uses, asked about another dim than the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch.fx import Node

from passes.coalesce import coalesced, picked, source
from passes.forms import (
    Blocks,
    Expanded,
    Filled,
    Form,
    Lazy,
    Picked,
    Sum,
    Whole,
    dtype_of,
    hint,
    is_static,
    provenance,
    same_shape,
    same_size,
    with_size,
)
from passes.split import Application, Splitter
from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Provenance, Replicated, Rows
from roo_rewrite.rules.families import broadcasting
from roo_rewrite.rules.registry import Operand, find, infer, make_call

aten = torch.ops.aten


def blockwise(s: Splitter, app: Application) -> Form | None:
    """The op on parts. Raises NotRowWise, or returns None, where it needs its operands whole."""
    rule = find(str(app.target))
    if rule is None or rule.sizes or [str(r.type) for r in app.target._schema.returns] != ["Tensor"]:
        return None
    pointwise = torch.Tag.pointwise in app.target.tags or rule.function is broadcasting
    if pointwise and [type(f) for f in operands(app)] == [Filled]:
        return _of_constant(s, app)
    if pointwise:
        app = mapped(app, _opened)
    simple = (Whole, Blocks, Expanded)
    if not all(isinstance(f, simple) for f in operands(app)):
        app = mapped(app, lambda f: f if isinstance(f, simple) else Whole(s.builder.whole(f)))
    if pointwise:
        return _pointwise(s, app)
    if any(isinstance(f, Expanded) for f in operands(app)):
        return _unexpanded(s, app)
    return _by_rule(s, app)


def _of_constant(s: Splitter, app: Application) -> Form | None:
    """What an op makes of one number everywhere."""
    (x,) = operands(app)
    assert isinstance(x, Filled)
    if torch.Tag.nondeterministic_seeded in app.target.tags:
        return None
    args, kwargs = app.arguments(lambda v: torch.full((), v.value, dtype=dtype_of(v)) if isinstance(v, Filled) else v)
    if any(isinstance(v, Node) for v in (*args, *kwargs.values())):
        return None
    found = app.target(*args, **kwargs)
    like = x.like
    if found.dtype != dtype_of(x):
        like = s.builder.call(aten.new_full.default, x.like, [], 0, dtype=found.dtype)
    return Filled(found.item(), x.shape, like)


def _opened(form: Form) -> Form:
    """The cells of an outer product, where some do not depend on the impression."""
    return form.inner if isinstance(form, Lazy) and isinstance(form.inner, Blocks) and has_early(form.inner) else form


def operands(app: Application) -> list[Form]:
    """The tensor operands, those in lists too."""
    return [f for v in app.named.values() for f in (v if isinstance(v, list) else [v]) if isinstance(f, Form)]


def mapped(app: Application, change: Any) -> Application:
    """The op with each tensor operand changed."""

    def convert(value: Any) -> Any:
        if isinstance(value, Form):
            return change(value)
        return [convert(v) for v in value] if isinstance(value, list) else value

    return Application(app.target, {k: convert(v) for k, v in app.named.items()})


# -- pointwise


def _pointwise(s: Splitter, app: Application) -> Form | None:
    shape = broadcast([f.shape for f in operands(app)])
    bare = mapped(app, lambda f: f.form if isinstance(f, Expanded) else f)
    small = broadcast([f.shape for f in operands(bare)])
    cut = next((f for f in operands(bare) if isinstance(f, Blocks)), None)
    if cut is None:
        if all(isinstance(f, Whole) for f in operands(app)):
            return None
        result: Form = s.plain(bare)
        return result if same_shape(small, shape) else Expanded(result, shape)
    back = cut.dim - cut.ndim
    bare = mapped(bare, lambda f: coalesced(s, f) if isinstance(f, Blocks) and f.dim - f.ndim == back else f)
    if not any(isinstance(f, Blocks) and f.dim - f.ndim == back for f in operands(bare)):
        result = s.apply(bare)
        return result if same_shape(small, shape) else Expanded(result, shape)
    pieces = cut_operands(s, bare, back)
    if not any(all(has_early(f) for f in operands(p)) for p in pieces):
        return None
    total = hint(cut.shape[cut.dim])
    cut_dims = [f.ndim + back if is_cut(f, f.ndim + back, total) else -1 for f in operands(bare)]
    made = Blocks(len(small) + back, tuple(together(s, pieces, len(small) + back, cut_dims)))
    return made if same_shape(small, shape) else Expanded(made, shape)


def together(s: Splitter, pieces: Sequence[Application], dim: int, cut_dims: Sequence[int]) -> list[Form]:
    """The op on each piece; pieces that differ only in what they pick of the same tensors run as one.

    A thousand pairs of fields are then three products, user-user, user-item and item-item.
    cut_dims: where the cut lies in each operand, -1 where it is broadcast; dim: in the result.
    """
    groups: dict[Any, dict[Any, list[int]]] = {}
    for i, piece in enumerate(pieces):
        cut = list(zip(operands(piece), cut_dims))
        picks = tuple(tuple(picked(f, c)) for f, c in cut if c >= 0)
        joinable = all(c < 0 or isinstance(source(f, c), tuple) for f, c in cut)
        key = (*(source(f, c) for f, c in cut), None if joinable else picks)
        groups.setdefault(key, {}).setdefault(picks, []).append(i)
    results: dict[int, Form] = {}
    for members in groups.values():
        alike = [pieces[same[0]] for same in members.values()]
        whole = s.apply(alike[0] if len(alike) == 1 else _joined(alike, cut_dims))
        start = 0
        for picks, same in members.items():
            stop = start + len(picks[0])
            results |= dict.fromkeys(same, whole if len(alike) == 1 else pick_form(s, whole, dim, range(start, stop)))
            start = stop
    return [results[i] for i in range(len(pieces))]


def _joined(pieces: Sequence[Application], cut_dims: Sequence[int]) -> Application:
    """One application whose picks are those of all pieces, in order."""
    stock = iter(zip(cut_dims, zip(*(operands(p) for p in pieces))))

    def join(form: Form) -> Form:
        cut, forms = next(stock)
        if cut < 0:
            return form
        base = form.base if isinstance(form, Picked) else form
        assert isinstance(base, Whole)
        return Picked(base, cut, tuple(i for f in forms for i in picked(f, cut)))

    return mapped(pieces[0], join)


def has_early(form: Form) -> bool:
    """Whether some part of a form does not depend on the impression."""
    if isinstance(form, Blocks):
        return any(has_early(p) for p in form.parts)
    return provenance(form) is not Provenance.IMPRESSION


def cut_operands(s: Splitter, app: Application, back: int) -> list[Application]:
    """The op once for each piece of dim `back` (from the end), operands of size 1 there left as they are."""
    forms = operands(app)
    sizes = refined([f.sizes for f in forms if isinstance(f, Blocks) and f.dim - f.ndim == back])
    total = sum(sizes)
    made: list[Application] = []
    start = 0
    for size in sizes:
        span = (start, start + size)

        def piece(f: Form, span: tuple[int, int] = span) -> Form:
            at = f.ndim + back
            return cut_form(s, f, at, *span) if is_cut(f, at, total) else f

        made.append(mapped(app, piece))
        start += size
    return made


def is_cut(form: Form, dim: int, total: int) -> bool:
    """Whether a cut into pieces of `total` entries goes through the form, which may be broadcast along it."""
    return dim >= 0 and total != 1 and is_static(form.shape[dim]) and bool(form.shape[dim] == total)


def refined(cuts: Sequence[Sequence[int]]) -> list[int]:
    """Sizes of the coarsest pieces that every one of `cuts` is made of."""
    ends = sorted({end for sizes in cuts for end in running(sizes)})
    return [b - a for a, b in zip([0, *ends], ends)]


def running(sizes: Sequence[int]) -> list[int]:
    """Running totals."""
    total, out = 0, []
    for size in sizes:
        total += size
        out.append(total)
    return out


def cut_form(s: Splitter, form: Form, dim: int, start: int, stop: int) -> Form:
    """Entries [start, stop) of a form along `dim`, without carrying it out."""
    return pick_form(s, form, dim, range(start, stop))


def pick_form(s: Splitter, form: Form, dim: int, index: Sequence[int]) -> Form:
    """Entries `index` of a form along a static `dim`."""
    if list(index) == list(range(hint(form.shape[dim]))):
        return form
    match form:
        case Whole():
            return Picked(form, dim, tuple(index))
        case Picked(base, at, chosen) if at == dim:
            return Picked(base, dim, tuple(chosen[i] for i in index))
        case Picked():
            return Picked(Whole(s.builder.whole(form)), dim, tuple(index))
        case Filled(value, shape, like):
            return Filled(value, with_size(shape, dim, len(index)), like)
        case Expanded(inner, shape):
            kept = inner if hint(inner.shape[dim]) == 1 else pick_form(s, inner, dim, index)
            return Expanded(kept, with_size(shape, dim, len(index)))
        case Sum(terms, shape):
            back = dim - len(shape)
            broadcast_there = [t.ndim + back < 0 or same_size(t.shape[back], 1) for _, t in terms]
            picked = tuple(
                (c, t if wide else pick_form(s, t, t.ndim + back, index))
                for (c, t), wide in zip(terms, broadcast_there)
            )
            return Sum(picked, with_size(shape, dim, len(index)))
        case Blocks(at, parts) if at != dim:
            return Blocks(at, tuple(pick_form(s, p, dim, index) for p in parts))
        case Blocks():
            return _pick_blocks(s, form, index)
    return Picked(Whole(s.builder.whole(form)), dim, tuple(index))


def _pick_blocks(s: Splitter, form: Blocks, index: Sequence[int]) -> Form:
    """Runs of the index within one part each."""
    if not index:
        return pick_form(s, form.parts[0], form.dim, index)
    starts = [0, *running(form.sizes)]
    owner = [p for p, size in enumerate(form.sizes) for _ in range(size)]
    runs: list[tuple[int, list[int]]] = []
    for i in index:
        if runs and runs[-1][0] == owner[i]:
            runs[-1][1].append(i - starts[owner[i]])
        else:
            runs.append((owner[i], [i - starts[owner[i]]]))
    parts = [pick_form(s, form.parts[p], form.dim, run) for p, run in runs]
    return parts[0] if len(parts) == 1 else Blocks(form.dim, tuple(parts))


def broadcast(shapes: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """The shape of operands broadcast together."""
    ndim = max(len(shape) for shape in shapes)
    out: list[Any] = [1] * ndim
    for shape in shapes:
        for i, size in enumerate(shape, ndim - len(shape)):
            if not (is_static(size) and size == 1):
                out[i] = size
    return tuple(out)


# -- by rule


def placed(app: Application, marks: dict[int, int], size: int) -> Rows:
    """Where the dim marked in some operands (by identity) goes, by the op's row rule. Raises NotRowWise."""

    def operand_of(value: Any) -> Any:
        if isinstance(value, Form):
            shape = tuple(hint(x) for x in value.shape)
            batching = Rows(marks[id(value)]) if id(value) in marks else Replicated()
            return Operand(shape, batching, dtype_of(value))
        if isinstance(value, Node):
            size = value.meta.get("val")
            if isinstance(size, torch.SymInt) and not size.node.has_hint():
                raise NotRowWise("a size is known only at run time")
            return int(size.node.hint) if isinstance(size, torch.SymInt) else value
        return value

    args, kwargs = app.arguments(lambda v: v)
    try:
        found = infer(make_call(app.target, args, kwargs, operand_of, size, ()))
    except (IndexError, AssertionError, AttributeError) as e:
        raise NotRowWise(f"the rule needs the result's shape: {e}") from e
    if type(found) is not Rows or found.outer != 1:
        raise NotRowWise("the cut dim does not stay a cut dim")
    return found


def _by_rule(s: Splitter, app: Application) -> Form | None:
    if not any(isinstance(f, Blocks) for f in operands(app)):
        return None
    app = mapped(app, lambda f: coalesced(s, f) if isinstance(f, Blocks) else f)
    blocks = [f for f in operands(app) if isinstance(f, Blocks)]
    if not blocks:
        return s.apply(app)
    sizes = refined([b.sizes for b in blocks])
    if any(sum(b.sizes) != sum(sizes) for b in blocks):
        return None
    found = placed(app, {id(b): b.dim for b in blocks}, sum(sizes))
    pieces, start = [], 0
    for size in sizes:
        chosen = {id(b): cut_form(s, b, b.dim, start, start + size) for b in blocks}
        pieces.append(mapped(app, lambda f, chosen=chosen: chosen.get(id(f), f)))
        start += size
    if found.inner != 1:
        return Blocks(found.dim, tuple(s.apply(p) for p in pieces))
    cut_dims = [f.dim if isinstance(f, Blocks) else -1 for f in operands(app)]
    return Blocks(found.dim, tuple(together(s, pieces, found.dim, cut_dims)))


def _unexpanded(s: Splitter, app: Application) -> Form | None:
    """The op on the unexpanded operand, its result expanded."""
    expanded = [f for f in operands(app) if isinstance(f, Expanded)]
    if len(expanded) != 1:
        return s.apply(mapped(app, lambda f: Whole(s.builder.whole(f)) if isinstance(f, Expanded) else f))
    form = expanded[0]
    dims = [d for d in range(form.ndim) if not same_size(form.shape[d], form.form.shape[d])]
    places = []
    for dim in dims:
        if not is_static(form.shape[dim]):
            raise NotRowWise("expanded over the batch")
        places.append(placed(app, {id(form): dim}, form.shape[dim]))
    if any(p.inner != 1 for p in places):
        return s.apply(mapped(app, lambda f: Whole(s.builder.whole(f)) if f is form else f))
    result = s.apply(mapped(app, lambda f: form.form if f is form else f))
    shape = result.shape
    for dim, place in zip(dims, places):
        shape = with_size(shape, place.dim, form.shape[dim])
    return Expanded(result, shape)
