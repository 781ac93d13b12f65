"""Products of two values that both have structure: pairs, scores, einsums.

    bmm(T, T')        T = cat[E a, c] along a row dim: a grid of products, the request-request cell moves;
                      (c, a) is the transpose of (a, c)
    bmm(x, y)         x, y cut along the contracted dim: a sum of products of pieces

Every product is an einsum of letters; a piece is cut along one letter at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from passes.coalesce import coalesced
from passes.forms import Blocks, Expanded, Filled, Form, Lazy, Sum, Whole, provenance, same_size
from passes.price_products import pays
from passes.split import Application, Splitter, handles
from passes.splits.blocks import has_early, pick_form, refined
from passes.splits.columns import of_letters
from passes.splits.outer import contracted
from roo_rewrite.facts import Provenance
from roo_rewrite.rules.matmul import spelled_out

aten = torch.ops.aten
Emit = Callable[[Form, Form], Form]
_LETTERS = "abcdefgh"
_ONES = "STUVWXYZ"
_MANY = 2


def bilinear(s: Splitter, app: Application, x: Form, y: Form) -> Form | None:
    """A product of two forms; None where no piece of it would move."""
    letters = _letters(app, x, y)
    crossed = letters is not None and _crosses(app, x, y, letters)
    if letters is None or (isinstance(x, Whole) and isinstance(y, Whole) and not (crossed and _both_sides(x, y))):
        return None

    def emit(a: Form, b: Form) -> Form:
        if str(app.target) == "aten.einsum.default":
            return s.plain(app.replaced(tensors=[a, b]))
        second = "mat2" if "mat2" in app.named else "other"
        return _mirrored(s, app, a, b) or s.plain(app.replaced(**{"self": a, second: b}))

    if crossed:
        return s.op(aten.mul.Tensor, x, y) if letters[0][-1] not in letters[2] else _as_outer(s, x, y, letters)
    if str(app.target) == "aten.einsum.default":
        made = of_letters(s, x, y, letters)
        if made is not None:
            return made
    x, y = _simple(s, x), _simple(s, y)
    considered, built = len(s.price.candidates), len(s.builder.graph.nodes)
    made = _contract(s, x, y, letters, emit)
    if made is None or not moves(made):
        del s.price.candidates[considered:]
        return None
    if not isinstance(made, (Blocks, Sum)):
        return made
    whole = emit(*(Whole(s.builder.whole(f)) for f in (x, y)))
    return made if pays(s, f"product {app.target}".removesuffix(".default"), whole, made, built) else None


def _mirrored(s: Splitter, app: Application, x: Form, y: Form) -> Form | None:
    """x @ t(y), where y @ t(x) is there already: below the diagonal a grid of pairs is its upper half, transposed."""
    first, second = (s.builder.whole(f) for f in (x, y))
    other = _transposed(second)
    for made in () if other is None or other is first else other.users:
        if made.target is app.target and made.args[0] is other and _transposed(made.args[1]) is first:
            return Whole(s.builder.call(aten.transpose.int, made, -2, -1))
    return None


def _transposed(node: Any) -> Node | None:
    """What a node is the transpose of, in its last two dims."""
    if not isinstance(node, Node) or node.target is not aten.transpose.int:
        return None
    x, *dims = node.args
    last = len(node.meta["val"].shape) - 1
    return x if isinstance(x, Node) and {d % (last + 1) for d in dims} == {last - 1, last} else None  # type: ignore[operator]


def _crosses(app: Application, x: Form, y: Form, letters: tuple[str, str, str]) -> bool:
    """Whether nothing is contracted: an einsum of outer products, a column times a row."""
    if str(app.target) == "aten.einsum.default":
        return not set(letters[0] + letters[1]) - set(letters[2])
    return x.ndim == y.ndim and same_size(x.shape[-1], 1)


def _both_sides(x: Form, y: Form) -> bool:
    """Whether one of two forms depends on the impression, and the other on the request alone."""
    return {provenance(f) for f in (x, y)} == {Provenance.REQUEST, Provenance.IMPRESSION}


def _as_outer(s: Splitter, x: Form, y: Form, letters: tuple[str, str, str]) -> Form | None:
    """A product that contracts nothing is a broadcast multiplication."""
    forms = []
    for form, names in zip((x, y), letters):
        if [c for c in letters[2] if c in names] != list(names):
            return None
        for at, c in enumerate(letters[2]):
            if c not in names:
                form = s.op(aten.unsqueeze.default, form, at)
        forms.append(form)
    return s.op(aten.mul.Tensor, *forms)


def _simple(s: Splitter, form: Form) -> Form:
    """Sums and picks are carried out; blocks stay, those of one side together."""
    form = form.inner if isinstance(form, Lazy) else form
    if isinstance(form, Blocks):
        form = coalesced(s, form)
    return form if isinstance(form, (Blocks, Expanded, Whole, Filled)) else Whole(s.builder.whole(form))


def moves(form: Form) -> bool:
    """Whether some piece depends on the request alone."""
    parts = form.parts if isinstance(form, Blocks) else [t for _, t in form.terms] if isinstance(form, Sum) else [form]
    if isinstance(form, (Blocks, Sum)):
        return any(moves(p) for p in parts)
    if isinstance(form, Expanded):
        return True
    return provenance(form) is not Provenance.IMPRESSION


def _letters(app: Application, x: Form, y: Form) -> tuple[str, str, str] | None:
    """The product as an einsum: letters of x, of y, and of the result."""
    match str(app.target):
        case "aten.bmm.default":
            return "bik", "bkj", "bij"
        case "aten.mm.default":
            return "ik", "kj", "ij"
        case "aten.einsum.default":
            left, right = spelled_out(app["equation"], [x.ndim, y.ndim]).split("->")
            first, second = left.split(",")
            repeated = len(set(first)) < len(first) or len(set(second)) < len(second)
            sizes = dict(zip(first, x.shape))
            broadcast = any(not same_size(sizes.get(c, n), n) for c, n in zip(second, y.shape))
            return None if repeated or broadcast else (first, second, right)
        case "aten.matmul.default" if min(x.ndim, y.ndim) >= 2:
            return _matmul_letters(x, y)
    return None


def _matmul_letters(x: Form, y: Form) -> tuple[str, str, str] | None:
    """Leading dims broadcast: one of size 1 against more has a letter of its own, which is not in the result."""
    lead = max(x.ndim, y.ndim) - 2
    names = [list(_LETTERS[lead + 2 - f.ndim : lead]) for f in (x, y)]
    for at in range(1, min(x.ndim, y.ndim) - 1):
        sizes = [f.shape[-2 - at] for f in (x, y)]
        if not same_size(*sizes):
            ones = [same_size(n, 1) for n in sizes]
            if not any(ones):
                return None
            names[ones.index(True)][-at] = _ONES[at]
    return f"{''.join(names[0])}ik", f"{''.join(names[1])}kj", f"{_LETTERS[:lead]}ij"


def _contract(s: Splitter, x: Form, y: Form, letters: tuple[str, str, str], emit: Emit) -> Form | None:
    """The product of forms, cut along the letters their blocks lie on."""
    if isinstance(x, Filled) or isinstance(y, Filled):
        return _filled(x, y, letters)
    cut = _next_cut(x, y, letters)
    if cut is None:
        x, y = (Whole(s.builder.whole(f)) for f in (x, y))
        return emit(x, y)
    nested = any(isinstance(p, Blocks) for f in (x, y) if isinstance(f, Blocks) for p in f.parts)
    if cut not in letters[2] and isinstance(x, Blocks) != isinstance(y, Blocks) and not nested:
        return _by_side(s, x, y, letters, cut, emit)
    sizes = refined([f.sizes for f, names in zip((x, y), letters) if isinstance(f, Blocks) and names[f.dim] == cut])
    if cut in letters[2] and len(sizes) > _MANY:
        return _grouped(s, x, y, letters, cut, sizes, emit)
    parts, start = [], 0
    for size in sizes:
        part = _contract(s, *_pieces(s, x, y, letters, cut, range(start, start + size)), letters, emit)
        if part is None:
            return None
        parts.append(part)
        start += size
    if cut in letters[2]:
        return parts[0] if len(parts) == 1 else Blocks(letters[2].index(cut), tuple(parts))
    kept = [p for p in parts if not (isinstance(p, Filled) and p.value == 0)]
    return Sum(tuple((1.0, p) for p in kept), parts[0].shape) if len(kept) > 1 else (kept or parts)[0]


def _pieces(
    s: Splitter, x: Form, y: Form, letters: tuple[str, str, str], cut: str, index: Sequence[int]
) -> tuple[Form, Form]:
    """The operands at these entries of the letter `cut`; one without the letter as it is."""
    chosen = (pick_form(s, f, n.index(cut), index) if cut in n else f for f, n in zip((x, y), letters))
    first, second = (_simple(s, f) for f in chosen)
    return first, second


def _grouped(
    s: Splitter, x: Form, y: Form, letters: tuple[str, str, str], cut: str, sizes: Sequence[int], emit: Emit
) -> Form | None:
    """Many pieces along a kept letter: those alike in side run as one, and each finds its entries in the result."""
    at, start = letters[2].index(cut), 0
    pieces: list[tuple[tuple[bool, ...], range]] = []
    for size in sizes:
        index = range(start, start + size)
        pieces.append((tuple(has_early(f) for f in _pieces(s, x, y, letters, cut, index)), index))
        start += size
    done: dict[tuple[bool, ...], tuple[Form, list[int]]] = {}
    for sides in dict.fromkeys(sides for sides, _ in pieces):
        entries = [i for found, index in pieces if found == sides for i in index]
        mine = zip(_pieces(s, x, y, letters, cut, entries), letters)
        first, second = (_joined(s, f, n.index(cut)) if cut in n else f for f, n in mine)
        made = _contract(s, first, second, letters, emit)
        if made is None:
            return None
        done[sides] = made, entries
    parts = [pick_form(s, done[sides][0], at, [done[sides][1].index(i) for i in index]) for sides, index in pieces]
    return Blocks(at, tuple(parts))


def _joined(s: Splitter, form: Form, dim: int) -> Form:
    """Blocks along `dim` of one side, as one tensor; transposes as the transpose of what they show, joined."""
    if not isinstance(form, Blocks) or form.dim != dim:
        return form
    sources = [_transposed(p.node) if isinstance(p, Whole) else None for p in form.parts]
    shown = [n for n in sources if n is not None]
    if len(shown) < len(sources) or dim < form.ndim - 2:
        return Whole(s.builder.whole(form))
    joined = s.builder.cat(shown, 2 * form.ndim - 3 - dim)
    return Whole(s.builder.call(aten.transpose.int, joined, -2, -1))


def _by_side(s: Splitter, x: Form, y: Form, letters: tuple[str, str, str], cut: str, emit: Emit) -> Form | None:
    """One operand in blocks over the contracted letter: a product for each side, however many blocks it has."""
    blocks, other, at = (x, y, 0) if isinstance(x, Blocks) else (y, x, 1)
    assert isinstance(blocks, Blocks)
    sides: dict[bool, tuple[list[Form], list[int]]] = {True: ([], []), False: ([], [])}
    terms, start, order = list[tuple[float, Form]](), 0, (letters[at], letters[1 - at], letters[2])
    for part, size in zip(blocks.parts, blocks.sizes):
        outer = contracted(s, part, other, order, cut, start)
        if outer is not None:
            terms.append((1.0, outer))
        elif not (isinstance(part, Filled) and part.value == 0):
            parts, places = sides[provenance(part) is not Provenance.IMPRESSION]
            parts.append(part)
            places += range(start, start + size)
        start += size
    for parts, places in sides.values():
        if parts:
            joined = s.op(aten.cat.default, parts, blocks.dim) if len(parts) > 1 else parts[0]
            mine = _simple(s, joined if len(parts) == 1 else Whole(s.builder.whole(joined)))
            names = letters[1 - at]
            rest = _simple(s, pick_form(s, other, names.index(cut), places)) if cut in names else other
            made = _contract(s, *((mine, rest) if at == 0 else (rest, mine)), letters, emit)
            if made is None:
                return None
            terms.append((1.0, made))
    if not terms:
        return None
    return terms[0][1] if len(terms) == 1 else Sum(tuple(terms), terms[0][1].shape)


def _next_cut(x: Form, y: Form, letters: tuple[str, str, str]) -> str | None:
    """A letter some operand is cut along: kept letters first, so that sums stay innermost."""
    found = [names[f.dim] for f, names in zip((x, y), letters) if isinstance(f, Blocks)]
    kept = [c for c in found if c in letters[2]]
    return (kept or found or [None])[0]  # type: ignore[list-item]


def _filled(x: Form, y: Form, letters: tuple[str, str, str]) -> Form | None:
    """A product with zeros is zeros."""
    zero = x if isinstance(x, Filled) else y
    assert isinstance(zero, Filled)
    if zero.value != 0:
        return None
    sizes = {c: n for f, names in zip((x, y), letters) for c, n in zip(names, f.shape)}
    return Filled(0.0, tuple(sizes[c] for c in letters[2]), zero.like)


@handles("aten.bmm.default")
def bmm(s: Splitter, app: Application) -> Form | None:
    """A batch of products of blocks."""
    return bilinear(s, app, app.form("self"), app.form("mat2"))
