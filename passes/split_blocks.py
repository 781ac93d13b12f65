"""Part by part: ops that a row rule shows to work on every entry of the cut dim by itself.

    op(cat[a, c])  =  cat[op(a), op(c)]        where op(x[idx]) == op(x)[idx] along the cut dim
    op(a.expand)   =  op(a).expand             likewise along the expanded dim

The rule is the one that hoisting uses, asked about another dim than the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.fx
from torch.fx import Node

from passes.forms import (
    Blocks,
    Expanded,
    Filled,
    Form,
    Picked,
    Sum,
    Whole,
    dtype_of,
    hint,
    is_mixed,
    is_static,
    provenance,
    same_size,
    with_size,
)
from passes.split import Application, Splitter, handles
from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import Provenance, Replicated, Rows
from roo_rewrite.rules.families import broadcasting
from roo_rewrite.rules.registry import Operand, find, infer, make_call

aten = torch.ops.aten


_MANY = 4


def blockwise(s: Splitter, app: Application) -> Form | None:
    """The op on parts. Raises NotRowWise, or returns None, where it needs its operands whole."""
    rule = find(str(app.target))
    if rule is None or rule.sizes:
        return None
    simple = (Whole, Blocks, Expanded)
    if not all(isinstance(f, simple) for f in operands(app)):
        app = _mapped(app, lambda f: f if isinstance(f, simple) else Whole(s.builder.whole(f)))
    if torch.Tag.pointwise in app.target.tags or rule.function is broadcasting:
        return _pointwise(s, app)
    if any(isinstance(f, Expanded) for f in operands(app)):
        return _unexpanded(s, app)
    return _by_rule(s, app)


def operands(app: Application) -> list[Form]:
    """The tensor operands, those in lists too."""
    return [f for v in app.named.values() for f in (v if isinstance(v, list) else [v]) if isinstance(f, Form)]


def _mapped(app: Application, change: Any) -> Application:
    def convert(value: Any) -> Any:
        if isinstance(value, Form):
            return change(value)
        return [convert(v) for v in value] if isinstance(value, list) else value

    return Application(app.target, {k: convert(v) for k, v in app.named.items()})


# -- pointwise


def _pointwise(s: Splitter, app: Application) -> Form | None:
    shape = broadcast([f.shape for f in operands(app)])
    bare = _mapped(app, lambda f: f.form if isinstance(f, Expanded) else f)
    small = broadcast([f.shape for f in operands(bare)])
    cut = next((f for f in operands(bare) if isinstance(f, Blocks)), None)
    if cut is None:
        if all(isinstance(f, Whole) for f in operands(app)):
            return None
        result: Form = s.plain(bare)
        return result if _equal(small, shape) else Expanded(result, shape)
    back = cut.dim - cut.ndim
    if len(cut.parts) > _MANY:
        bare = _mapped(bare, lambda f: coalesced(s, f) if isinstance(f, Blocks) and f.dim - f.ndim == back else f)
    pieces = cut_operands(s, bare, back)
    if not any(all(has_early(f) for f in operands(p)) for p in pieces):
        return None
    cut_dims = [f.ndim + back for f in operands(bare)]
    made = Blocks(len(small) + back, tuple(together(s, pieces, len(small) + back, cut_dims)))
    return made if _equal(small, shape) else Expanded(made, shape)


def together(s: Splitter, pieces: Sequence[Application], dim: int, cut_dims: Sequence[int]) -> list[Form]:
    """The op on each piece; pieces that differ only in what they pick of the same tensors run as one.

    A thousand pairs of fields are then three products, user-user, user-item and item-item.
    cut_dims: where the cut lies in each operand; dim: in the result.
    """
    groups: dict[Any, list[int]] = {}
    for i, piece in enumerate(pieces):
        groups.setdefault(tuple(_source(f, c) for f, c in zip(operands(piece), cut_dims)), []).append(i)
    results: dict[int, Form] = {}
    for key, members in groups.items():
        if len(members) == 1 or not any(isinstance(part, tuple) for part in key):
            results |= dict.fromkeys(members, s.apply(pieces[members[0]]))
            continue
        whole = s.apply(_joined([pieces[i] for i in members], cut_dims))
        start = 0
        for i in members:
            size = next(len(f.index) for f, part in zip(operands(pieces[i]), key) if isinstance(part, tuple))  # type: ignore[attr-defined]
            results[i] = pick_form(s, whole, dim, range(start, start + size))
            start += size
    return [results[i] for i in range(len(pieces))]


def _source(form: Form, cut: int) -> Any:
    """What pieces must share to run as one: the tensor picked from along the cut, or the very form."""
    return (form.base.node, form.dim) if isinstance(form, Picked) and form.dim == cut else id(form)


def _joined(pieces: Sequence[Application], cut_dims: Sequence[int]) -> Application:
    """One application whose picks are those of all pieces, in order."""
    stock = iter(zip(cut_dims, zip(*(operands(p) for p in pieces))))

    def join(form: Form) -> Form:
        cut, forms = next(stock)
        if not isinstance(form, Picked) or form.dim != cut:
            return form
        return Picked(form.base, form.dim, tuple(i for f in forms if isinstance(f, Picked) for i in f.index))

    return _mapped(pieces[0], join)


def coalesced(s: Splitter, form: Blocks) -> Blocks:
    """Blocks whose plain parts of each side are picks of one tensor."""
    for early in (True, False):
        mine = [
            p
            for p in form.parts
            if isinstance(p, (Whole, Picked)) and (provenance(p) is not Provenance.IMPRESSION) == early
        ]
        nodes = list(dict.fromkeys(s.builder.whole(p) for p in mine))
        if len(mine) < 2 or len({p.base.node for p in mine if isinstance(p, Picked)}) == 1 == len(nodes):
            continue
        base, starts, total = Whole(s.builder.cat(nodes, form.dim)), dict[Node, int](), 0
        for node in nodes:
            starts[node] = total
            total += int(node.meta["val"].shape[form.dim])
        places = {id(p): (starts[s.builder.whole(p)], hint(p.shape[form.dim])) for p in mine}
        form = Blocks(
            form.dim,
            tuple(
                Picked(base, form.dim, tuple(range(places[id(p)][0], sum(places[id(p)])))) if id(p) in places else p
                for p in form.parts
            ),
        )
    return form


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
            if at < 0 or not is_static(f.shape[at]) or f.shape[at] != total or total == 1:
                return f
            return cut_form(s, f, at, *span)

        made.append(_mapped(app, piece))
        start += size
    return made


def refined(cuts: Sequence[Sequence[int]]) -> list[int]:
    """Sizes of the coarsest pieces that every one of `cuts` is made of."""
    ends = sorted({end for sizes in cuts for end in _running(sizes)})
    return [b - a for a, b in zip([0, *ends], ends)]


def _running(sizes: Sequence[int]) -> list[int]:
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
            picked = tuple(
                (c, t if same_size(t.shape[dim - len(shape)], 1) else pick_form(s, t, t.ndim + dim - len(shape), index))
                for c, t in terms
            )
            return Sum(picked, with_size(shape, dim, len(index)))
        case Blocks(at, parts) if at != dim:
            return Blocks(at, tuple(pick_form(s, p, dim, index) for p in parts))
        case Blocks():
            return _pick_blocks(s, form, index)
    return Picked(Whole(s.builder.whole(form)), dim, tuple(index))


def _pick_blocks(s: Splitter, form: Blocks, index: Sequence[int]) -> Form:
    """Runs of the index within one part each."""
    starts = [0, *_running(form.sizes)]
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


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b))


# -- by rule


def placed(app: Application, marks: dict[int, int], size: int) -> Rows:
    """Where the dim marked in some operands (by identity) goes, by the op's row rule. Raises NotRowWise."""

    def operand_of(value: Any) -> Any:
        if isinstance(value, Form):
            shape = tuple(hint(x) for x in value.shape)
            batching = Rows(marks[id(value)]) if id(value) in marks else Replicated()
            return Operand(shape, batching, dtype_of(value))
        if isinstance(value, Node):
            return int(value.meta["val"].node.hint) if isinstance(value.meta.get("val"), torch.SymInt) else value
        return value

    args, kwargs = app.arguments(lambda v: v)
    try:
        found = infer(make_call(app.target, args, kwargs, operand_of, size, ((),)))
    except (IndexError, AssertionError, AttributeError) as e:
        raise NotRowWise(f"the rule needs the result's shape: {e}") from e
    if type(found) is not Rows or found.outer != 1:
        raise NotRowWise("the cut dim does not stay a cut dim")
    return found


def _by_rule(s: Splitter, app: Application) -> Form | None:
    cut = next((f for f in operands(app) if isinstance(f, Blocks)), None)
    if cut is None:
        return None
    blocks = [f for f in operands(app) if isinstance(f, Blocks)]
    sizes = refined([b.sizes for b in blocks])
    if any(sum(b.sizes) != sum(sizes) for b in blocks):
        return None
    found = placed(app, {id(b): b.dim for b in blocks}, sum(sizes))
    pieces, start = [], 0
    for size in sizes:
        chosen = {id(b): cut_form(s, b, b.dim, start, start + size) for b in blocks}
        pieces.append(_mapped(app, lambda f, chosen=chosen: chosen.get(id(f), f)))
        start += size
    if found.inner != 1:
        return Blocks(found.dim, tuple(s.apply(p) for p in pieces))
    cut_dims = [f.dim if isinstance(f, Blocks) else -1 for f in operands(app)]
    return Blocks(found.dim, tuple(together(s, pieces, found.dim, cut_dims)))


def _unexpanded(s: Splitter, app: Application) -> Form | None:
    """The op on the unexpanded operand, its result expanded."""
    expanded = [f for f in operands(app) if isinstance(f, Expanded)]
    if len(expanded) != 1:
        return s.apply(_mapped(app, lambda f: Whole(s.builder.whole(f)) if isinstance(f, Expanded) else f))
    form = expanded[0]
    dims = [d for d in range(form.ndim) if not same_size(form.shape[d], form.form.shape[d])]
    places = []
    for dim in dims:
        if not is_static(form.shape[dim]):
            raise NotRowWise("expanded over the batch")
        places.append(placed(app, {id(form): dim}, form.shape[dim]))
    if any(p.inner != 1 for p in places):
        return s.apply(_mapped(app, lambda f: Whole(s.builder.whole(f)) if f is form else f))
    result = s.apply(_mapped(app, lambda f: form.form if f is form else f))
    shape = result.shape
    for dim, place in zip(dims, places):
        shape = with_size(shape, place.dim, form.shape[dim])
    return Expanded(result, shape)


# -- making and taking apart


@handles("aten.cat.default", "aten.concat.default", "aten.concatenate.default")
def cat(s: Splitter, app: Application) -> Form | None:
    """Parts of both sides stay parts; those of one side are joined."""
    forms = app["tensors"]
    if not all(isinstance(f, Form) for f in forms) or any(f.ndim != forms[0].ndim for f in forms):
        return None
    dim = app["dim"] % max(forms[0].ndim, 1)
    if any(not is_static(f.shape[dim]) for f in forms) or len({dtype_of(f) for f in forms}) > 1:
        return None
    parts = [p for f in forms for p in (f.parts if isinstance(f, Blocks) and f.dim == dim else (f,))]
    made = Blocks(dim, merged_picks((p for p in parts if hint(p.shape[dim])), dim))
    structured = any(isinstance(p, (Expanded, Blocks, Sum, Filled)) for p in made.parts)
    return made if len(made.parts) > 1 and (is_mixed(made) or structured) else None


def merged_picks(parts: Iterable[Form], dim: int) -> tuple[Form, ...]:
    """Neighbouring picks of one tensor along `dim` become one."""
    out: list[Form] = []
    for part in parts:
        before = out[-1] if out else None
        picks = isinstance(part, Picked) and isinstance(before, Picked)
        if picks and part.dim == dim and _source(part, dim) == _source(before, dim):
            out[-1] = Picked(part.base, part.dim, (*before.index, *part.index))
        else:
            out.append(part)
    return tuple(out)


@handles("aten.stack.default")
def stack(s: Splitter, app: Application) -> Form | None:
    """A concatenation of operands with a new dim."""
    dim = app["dim"] % (app["tensors"][0].ndim + 1)
    if not is_mixed(Blocks(0, tuple(app["tensors"]))):
        return None
    return s.op(aten.cat.default, [s.op(aten.unsqueeze.default, f, dim) for f in app["tensors"]], dim)


@handles("aten.slice.Tensor", "aten.narrow.default")
def slice_(s: Splitter, app: Application) -> Form | None:
    """A range of a dim of parts."""
    x = app.form("self")
    dim = app["dim"] % max(x.ndim, 1)
    if isinstance(x, Whole) or not is_static(x.shape[dim]):
        return None
    if str(app.target) == "aten.narrow.default":
        start, stop, step = app["start"], app["start"] + app["length"], 1
    else:
        start, stop, step = app["start"], app["end"], app["step"]
    if any(isinstance(v, Node) for v in (start, stop, step)):
        return None
    return pick_form(s, x, dim, range(x.shape[dim])[slice(start, stop, step)])


@handles("aten.select.int")
def select(s: Splitter, app: Application) -> Form | None:
    """One entry of a dim of parts: the entry of the part that has it."""
    x = app.form("self")
    dim, index = app["dim"] % max(x.ndim, 1), app["index"]
    if not isinstance(x, (Blocks, Expanded)) or not is_static(x.shape[dim]) or isinstance(index, Node):
        return None
    picked = pick_form(s, x, dim, [index % x.shape[dim]])
    return s.op(aten.squeeze.dim, picked, dim)


@handles("aten.index_select.default")
def index_select(s: Splitter, app: Application) -> Form | None:
    """Entries by a constant index."""
    x, index = app.form("self"), constant_value(s, app.form("index"))
    dim = app["dim"] % max(x.ndim, 1)
    if isinstance(x, Whole) or index is None or not is_static(x.shape[dim]):
        return None
    return pick_form(s, x, dim, [int(i) % x.shape[dim] for i in index])


def constant_value(s: Splitter, form: Form) -> list[int] | None:
    """The entries of an index vector known at compile time."""
    from passes.constants import evaluate

    if not isinstance(form, Whole):
        return None
    value = evaluate(s.captured, form.node)
    if value is None or value.ndim != 1 or value.dtype != torch.int64:
        return None
    return [int(v) for v in value]


@handles("aten.unbind.int")
def unbind(s: Splitter, app: Application) -> list[Form] | None:
    """Every entry of a dim of parts."""
    x = app.form("self")
    dim = app["dim"] % max(x.ndim, 1)
    if isinstance(x, Whole) or not is_static(x.shape[dim]):
        return None
    return [s.op(aten.squeeze.dim, pick_form(s, x, dim, [i]), dim) for i in range(x.shape[dim])]


@handles("aten.split.Tensor", "aten.split_with_sizes.default", "aten.split.sizes", "aten.chunk.default")
def split_parts(s: Splitter, app: Application) -> list[Form] | None:
    """Ranges of a dim of parts."""
    x = app.form("self")
    dim = app["dim"] % max(x.ndim, 1)
    if isinstance(x, Whole) or not is_static(x.shape[dim]):
        return None
    total = x.shape[dim]
    name = str(app.target)
    if name == "aten.chunk.default":
        size = math.ceil(total / app["chunks"])
    else:
        size = app.named.get("split_size", app.named.get("split_sizes"))
    sizes = size if isinstance(size, list) else [size] * (total // size) + [total % size] * bool(total % size)
    ends = _running(sizes)
    return [pick_form(s, x, dim, range(end - n, end)) for n, end in zip(sizes, ends)]


@handles("aten.expand.default")
def expand(s: Splitter, app: Application) -> Form | None:
    """An expand is not carried out: what reads it may do with one copy."""
    x = app.form("self")
    sizes = [v.meta["val"] if isinstance(v, Node) else v for v in app["size"]]
    while x.ndim < len(sizes):
        x = s.op(aten.unsqueeze.default, x, 0)
    shape = tuple(have if is_static(want) and want == -1 else want for want, have in zip(sizes, x.shape))
    if _equal(shape, x.shape):
        return x
    grown = [d for d in range(len(shape)) if not same_size(shape[d], x.shape[d])]
    if any(not is_static(shape[d]) for d in grown):
        return None
    return Expanded(x.form, shape) if isinstance(x, Expanded) else Expanded(x, shape)


@handles("aten.expand_as.default")
def expand_as(s: Splitter, app: Application) -> Form | None:
    """As `expand`, to the shape of another value."""
    x, shape = app.form("self"), app.form("other").shape
    if x.ndim != len(shape):
        return None
    grown = [d for d in range(len(shape)) if not same_size(shape[d], x.shape[d])]
    if not grown or any(not is_static(shape[d]) for d in grown):
        return None
    return Expanded(x.form if isinstance(x, Expanded) else x, shape)


@handles("aten.repeat.default")
def repeat(s: Splitter, app: Application) -> Form | None:
    """Copies of dims of size 1 are an expand."""
    x, repeats = app.form("self"), app["repeats"]
    if any(isinstance(r, Node) for r in repeats) or len(repeats) < x.ndim:
        return None
    while x.ndim < len(repeats):
        x = s.op(aten.unsqueeze.default, x, 0)
    if any(r != 1 and not (is_static(n) and n == 1) for r, n in zip(repeats, x.shape)):
        return None
    return Expanded(x, tuple(r if r != 1 else n for r, n in zip(repeats, x.shape)))
