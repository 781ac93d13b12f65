"""A form contracted with a weight, as atoms: columns of one node, and the columns of the weight they meet.

    sum_a  factor_a * (coefficient_a * pick(node_a) @ weight_a[columns_a])

A factor of the rows stays outside of the product; one of the columns goes into the weight; entries that are
one value repeated meet the sum of their columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from passes.forms import (
    Blocks,
    Expanded,
    Filled,
    Form,
    Lazy,
    Picked,
    Scaled,
    Sum,
    Whole,
    provenance,
    same_shape,
    same_size,
)
from passes.split import Splitter
from passes.splits.scaled import Centred, Side
from roo_rewrite.facts import Provenance

aten = torch.ops.aten


@dataclass(frozen=True)
class Meets:
    """What a form is contracted with: columns of a weight [N, K, ...], and what the product is multiplied by.

    single: the column is the sum of many, met by one value repeated; that is no matrix product.
    """

    columns: tuple[int, ...]
    weight: Node
    coefficient: float = 1.0
    factor: Node | None = None
    single: bool = False


@dataclass(frozen=True)
class Atom:
    """`factor * coefficient * pick(node, index)` meets these columns of the weight. index None: all entries."""

    coefficient: float
    node: Node
    index: tuple[int, ...] | None
    columns: tuple[int, ...]
    weight: Node
    factor: Node | None = None
    single: bool = False


@dataclass(frozen=True)
class Group:
    """Atoms that share one product: operands side by side, and for each the weights it meets."""

    side: Provenance
    lead: tuple[object, ...]
    atoms: tuple[Atom, ...]

    @property
    def inner(self) -> int:
        """Entries contracted."""
        return sum(len(atoms[0].columns) for atoms in self.operands().values())

    @property
    def single(self) -> bool:
        """Whether its atoms have one entry a row each."""
        return self.atoms[0].single

    @property
    def factor(self) -> Node | None:
        """What the product is multiplied by, row by row."""
        return self.atoms[0].factor

    @property
    def products(self) -> frozenset[object]:
        """What is multiplied by what, whatever the factor."""
        return frozenset((a.coefficient, a.node, a.index, a.columns, a.weight) for a in self.atoms)

    def operands(self) -> dict[tuple[Node, tuple[int, ...] | None], list[Atom]]:
        """Operand -> the atoms that read it."""
        out: dict[tuple[Node, tuple[int, ...] | None], list[Atom]] = {}
        for atom in self.atoms:
            out.setdefault((atom.node, atom.index), []).append(atom)
        return out


def atoms_of(s: Splitter, form: Form, dim: int, meets: Meets) -> list[Atom]:
    """A form contracted over `dim`, as atoms."""
    if same_size(form.shape[dim], 1) and len(meets.columns) > 1:
        inner = form.form if isinstance(form, Expanded) else form
        return [_atom(s.builder.whole(inner), None, _added_up(s, meets))]
    match form:
        case Blocks(at, parts) if at == dim:
            out, start = [], 0
            for part, size in zip(parts, form.sizes):
                out += atoms_of(s, part, dim, replace(meets, columns=meets.columns[start : start + size]))
                start += size
            return out
        case Sum(terms, shape) if all(_spans(t, dim - len(shape), len(shape)) for _, t in terms):
            return [
                a
                for c, t in terms
                for a in atoms_of(s, t, t.ndim + dim - len(shape), replace(meets, coefficient=meets.coefficient * c))
            ]
        case Expanded(inner, _):
            return atoms_of(s, inner, dim, meets)
        case Picked(base, at, index) if at == dim:
            return [_atom(base.node, chosen, part) for chosen, part in _once(index, meets)]
        case Filled(value, _, _) if value == 0:
            return []
        case Centred(_, sides, at, _) if at == dim:
            return [a for part in sides for a in _centred(s, part, dim, meets)]
        case Scaled(inner, by, at, _) if at == dim and same_size(by.shape[dim], 1):
            factor = by.node if meets.factor is None else s.builder.call(aten.mul.Tensor, meets.factor, by.node)
            return atoms_of(s, inner, dim, replace(meets, factor=factor))
        case Scaled(inner, by, at, _) if at == dim:
            return atoms_of(s, inner, dim, _with_gain(s, meets, by.node))
        case Lazy(inner, _) if isinstance(inner, (Blocks, Whole, Sum, Scaled, Centred)):
            return atoms_of(s, inner, dim, meets)
        case _:
            return [_atom(s.builder.whole(form), None, meets)]


def _atom(node: Node, index: tuple[int, ...] | None, meets: Meets) -> Atom:
    return Atom(meets.coefficient, node, index, meets.columns, meets.weight, meets.factor, meets.single)


def _centred(s: Splitter, part: Side, dim: int, meets: Meets) -> list[Atom]:
    """One side's entries less their mean, and that mean less what is taken off, once for all of them."""
    mine = replace(meets, columns=tuple(meets.columns[i] for i in part.places))
    centred = atoms_of(s, Whole(part.centred), dim, mine)
    return centred + atoms_of(s, Whole(part.gap), dim, replace(mine, single=True))


def _once(index: tuple[int, ...], meets: Meets) -> list[tuple[tuple[int, ...], Meets]]:
    """Picks without repeats: first, second, ... occurrences of each entry, which share a product where they agree."""
    rounds: list[dict[int, int]] = []
    for entry, column in zip(index, meets.columns):
        mine = next((r for r in rounds if entry not in r), None)
        if mine is None:
            rounds.append(mine := {})
        mine[entry] = column
    return [(tuple(r), replace(meets, columns=tuple(r.values()))) for r in rounds]


def _spans(term: Form, back: int, ndim: int) -> bool:
    """Whether a term has dim `back` (from the end); one of fewer dims only where it is the last."""
    return term.ndim == ndim or (back == -1 and term.ndim > 0)


def _added_up(s: Splitter, meets: Meets) -> Meets:
    """One value repeated meets the sum of the columns."""
    total = s.builder.call(aten.sum.dim_IntList, s.builder.pick(meets.weight, 1, meets.columns), [1], True)
    return replace(meets, columns=(0,), weight=total, single=True)


def _with_gain(s: Splitter, meets: Meets, gain: Node) -> Meets:
    """Columns multiplied by a constant vector: the weight's are."""
    weight = s.builder.pick(meets.weight, 1, meets.columns)
    rest = [1] * (len(weight.meta["val"].shape) - 2)
    vector = s.builder.call(aten.reshape.default, gain, [1, len(meets.columns), *rest])
    scaled = s.builder.call(aten.mul.Tensor, weight, vector)
    return replace(meets, columns=tuple(range(len(meets.columns))), weight=scaled)


def joined(atoms: Sequence[Atom]) -> list[Atom]:
    """Picks of one node that meet the weight once each become one pick."""
    pairs = Counter((a.node, a.index) for a in atoms)
    out: dict[object, Atom] = {}
    for i, atom in enumerate(atoms):
        lone = atom.index is not None and atom.coefficient == 1 and pairs[atom.node, atom.index] == 1
        key = (atom.node, atom.weight, atom.factor)
        before = out.get(key) if lone else None
        if before is not None and before.index is not None and atom.index is not None:
            both = (*before.index, *atom.index)
            out[key] = replace(before, index=both, columns=(*before.columns, *atom.columns))
        else:
            out[key if lone else i] = atom
    return list(out.values())


def added(s: Splitter, atoms: Sequence[Atom]) -> list[Atom]:
    """Terms of one side that meet the same columns, and nothing else, are added before the product."""
    uses = Counter(a.node for a in atoms)
    out: list[Atom] = []
    sums: dict[object, list[Atom]] = {}
    for atom in atoms:
        shape = tuple(str(n) for n in atom.node.meta["val"].shape)
        early = side(atom.node) is not Provenance.IMPRESSION
        key = (atom.columns, atom.weight, atom.factor, atom.single, early, shape) if atom.index is None else atom
        if uses[atom.node] == 1:
            sums.setdefault(key, []).append(atom)
        else:
            out.append(atom)
    for terms in sums.values():
        if len(terms) == 1:
            out.append(terms[0])
        else:
            form = Sum(tuple((a.coefficient, Whole(a.node)) for a in terms), tuple(terms[0].node.meta["val"].shape))
            out.append(replace(terms[0], coefficient=1.0, node=s.builder.whole(form)))
    return out


def grouped(atoms: Sequence[Atom], back: int) -> list[Group]:
    """Atoms by side, factor and shape but for the contracted dim `back` (from the end), request side first.

    Single entries stay by themselves: wide operands are not copied to take them in.
    """
    groups: list[Group] = []
    for atom in atoms:
        shape = tuple(atom.node.meta["val"].shape)
        dim = len(shape) + back
        lead = (*shape[:dim], *shape[dim + 1 :])
        for i, group in enumerate(groups):
            if _alike(group.atoms[0], atom) and same_shape(group.lead, lead):
                groups[i] = Group(max(group.side, side(atom.node)), lead, (*group.atoms, atom))
                break
        else:
            groups.append(Group(side(atom.node), lead, (atom,)))
    return sorted(groups, key=lambda g: g.side is Provenance.IMPRESSION)


def _alike(a: Atom, b: Atom) -> bool:
    early = [side(x.node) is not Provenance.IMPRESSION for x in (a, b)]
    return early[0] == early[1] and a.single == b.single and a.factor is b.factor


def side(node: Node) -> Provenance:
    """The side a node is computed on."""
    return provenance(Whole(node))
