"""Parts that are entries of one tensor: an op runs once on all of them, however many they are.

cat[u0, i0, u1, i1]       =  U[0], I[0], U[1], I[1]        U = cat[u0, u1], I = cat[i0, i1]
cat[U[:3], i, U[3:]]      =  the same slices as picks of U
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Node

from passes.forms import Blocks, Form, Picked, Whole, hint, is_static, provenance
from passes.split import Splitter
from roo_rewrite.facts import EFFECT, Provenance

aten = torch.ops.aten
_MANY = 4


def coalesced(s: Splitter, form: Blocks) -> Form:
    """Blocks whose plain parts of each side are picks of one tensor, neighbours one; few parts stay as they are.

    All of one tensor are no Blocks any more.
    """
    if len(form.parts) <= _MANY:
        return form
    parts = form.parts
    for early in (True, False):
        parts = _of_one_tensor(s, parts, form.dim, early)
    parts = merged_picks(parts, form.dim)
    return Blocks(form.dim, parts) if len(parts) > 1 else parts[0]


def _of_one_tensor(s: Splitter, parts: tuple[Form, ...], dim: int, early: bool) -> tuple[Form, ...]:
    """The plain parts of a side as picks of what any of them has, side by side."""
    used: dict[Node, set[int]] = {}
    found: dict[int, Node] = {}
    for i, part in enumerate(parts):
        if isinstance(part, (Whole, Picked)) and (provenance(part) is not Provenance.IMPRESSION) == early:
            along = isinstance(part, Picked) and part.dim == dim
            found[i] = part.base.node if along else s.builder.whole(part)  # type: ignore[union-attr]
            used.setdefault(found[i], set()).update(picked(part, dim))
    picks = {(node, tuple(picked(parts[i], dim))) for i, node in found.items()}
    if len(used) < 2 or len(picks) >= _MANY * len(used):  # few tensors already
        return parts
    kept = {node: sorted(entries) for node, entries in used.items()}
    base = Whole(s.builder.cat([s.builder.pick(node, dim, index) for node, index in kept.items()], dim))
    places = {entry: place for place, entry in enumerate((node, e) for node, index in kept.items() for e in index)}
    return tuple(
        Picked(base, dim, tuple(places[found[i], e] for e in picked(part, dim))) if i in found else part
        for i, part in enumerate(parts)
    )


def with_picks(parts: Sequence[Form], dim: int) -> list[Form]:
    """Parts side by side along `dim`; slices along it of one tensor, of which there are several, as picks."""
    found = [_as_pick(part, dim) for part in parts]
    bases = [f.base.node if f is not None else None for f in found]
    return [p if f is None or bases.count(f.base.node) < 2 else f for p, f in zip(parts, found)]


def _as_pick(form: Form, dim: int) -> Picked | None:
    """A slice of known place as entries of what it is cut from."""
    if not isinstance(form, Whole) or form.node.target is not aten.slice.Tensor or form.node.kwargs:
        return None
    given: list[Any] = list(form.node.args)
    x, at, start, stop, step = given + [None, 0, None, None, 1][len(given) :]
    value = x.meta["val"]
    known = all(isinstance(n, (int, type(None))) for n in (start, stop)) and step == 1
    if at % value.ndim != dim or not known or not is_static(value.shape[dim]) or EFFECT in x.meta:
        return None
    return Picked(Whole(x), dim, tuple(range(value.shape[dim])[start:stop]))


def merged_picks(parts: Iterable[Form], dim: int) -> tuple[Form, ...]:
    """Neighbouring picks of one tensor along `dim` become one."""
    out: list[Form] = []
    for part in parts:
        before = out[-1] if out else None
        same = isinstance(part, Picked) and isinstance(before, Picked) and part.dim == dim
        if same and source(part, dim) == source(before, dim):  # type: ignore[arg-type]
            assert isinstance(part, Picked)
            assert isinstance(before, Picked)
            out[-1] = Picked(part.base, part.dim, (*before.index, *part.index))
        else:
            out.append(part)
    return tuple(out)


def source(form: Form, cut: int) -> Any:
    """What pieces must share to run as one: the tensor picked from along the cut, or the very form."""
    if isinstance(form, Picked) and form.dim == cut:
        return form.base.node, cut
    return (form.node, cut) if isinstance(form, Whole) and cut >= 0 else id(form)


def picked(form: Form, dim: int) -> Sequence[int]:
    """The entries of its source along `dim` that a form is."""
    return form.index if isinstance(form, Picked) and form.dim == dim else range(hint(form.shape[dim]))
