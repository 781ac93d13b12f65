"""The calling convention: how `(args, kwargs)` fall apart into atoms (see `atoms`), and back.

An impression-level call has I rows everywhere. A request-level call takes the same arguments with R
rows on the request side; packed columns and KeyedJaggedTensors become a pair (request, impression).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from roo_rewrite.atoms import (
    Atom,
    Columns,
    Dense,
    Jagged,
    Keyed,
    Kind,
    Leaf,
    RowCount,
    Static,
    as_kind,
    atoms_rows,
    has_rows,
    lengths_of,
    shown,
)
from roo_rewrite.errors import InputError, SpecError
from roo_rewrite.facts import Provenance
from roo_rewrite.features import FeatureSpec, matches
from roo_rewrite.jagged_pairs import jagged_pairs
from roo_rewrite.kjt import is_jagged, is_kjt, is_ragged, name_parts
from roo_rewrite.nest import Nest, call_nests, gather
from roo_rewrite.objects import register_objects
from roo_rewrite.ops.ragged import select_ragged
from roo_rewrite.parameters import Parameters, Path, follow, parameters_of

__all__ = [
    "Atom",
    "Columns",
    "Dense",
    "Inputs",
    "Keyed",
    "Leaf",
    "Parameters",
    "Path",
    "Static",
    "as_kind",
    "atoms_rows",
    "bind_inputs",
    "follow",
    "has_rows",
    "is_kjt",
    "lengths_of",
    "parameters_of",
]


@dataclass(frozen=True)
class Inputs:
    """The calling convention of one model: its leaves in order and the tree they came from.

    atoms: all of them, in the order of the flattened call.
    """

    spec: FeatureSpec
    tree: pytree.TreeSpec
    leaves: tuple[Leaf, ...]
    paths: tuple[Path, ...]
    parameters: Parameters
    atoms: tuple[Atom, ...] = field(init=False, compare=False)
    _keepers: dict[Provenance, tuple[tuple[int, Atom], ...]] = field(init=False, compare=False, repr=False)
    _offsets: dict[str, Kind] = field(init=False, compare=False, repr=False)
    _nests: dict[Provenance, Nest | None] = field(init=False, compare=False, repr=False)
    _packed: tuple[tuple[int, Columns], ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        # Every call asks for these.
        atoms = tuple(a for leaf in self.leaves for a in leaf.atoms)
        rowed = [(i, a) for i, a in enumerate(atoms) if has_rows(a)]
        given = {leaf.name: leaf.given for leaf in self.leaves if isinstance(leaf, Dense)}
        object.__setattr__(self, "atoms", atoms)
        object.__setattr__(
            self, "_keepers", {side: tuple((i, a) for i, a in rowed if a.provenance is side) for side in Provenance}
        )
        object.__setattr__(self, "_offsets", {n: k for n, k in given.items() if k != "lengths"})
        starts = itertools.accumulate((len(leaf.atoms) for leaf in self.leaves), initial=0)
        packed = tuple((at, leaf) for at, leaf in zip(starts, self.leaves) if isinstance(leaf, Columns))
        plain = len(given) + len(packed) == len(self.leaves) and not self._offsets
        nests = call_nests(self.paths, [isinstance(leaf, Columns) for leaf in self.leaves]) if plain else {}
        object.__setattr__(self, "_packed", packed)
        object.__setattr__(self, "_nests", nests)

    def __deepcopy__(self, memo: dict[int, Any]) -> Inputs:
        # Immutable; torch warns of copies of its tree specs.
        return self

    def __reduce__(self) -> Any:
        # A tree spec does not pickle without a warning; a tree of that structure does.
        skeleton = pytree.tree_unflatten(list(range(len(self.leaves))), self.tree)
        return _of_skeleton, (self.spec, skeleton, self.leaves, self.paths, self.parameters)

    def flatten(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], level: Provenance
    ) -> tuple[list[Tensor], list[Any]]:
        """A call at `level` -> (atoms, static values). Raises InputError when the structure differs."""
        request = level is Provenance.REQUEST
        given = self.parameters.bind(args, kwargs)
        atoms: list[Tensor] = []
        nest = self._nests.get(level)
        if nest is not None and gather(given, nest, atoms):
            for at, columns in self._packed:
                columns.from_request(atoms[at : at + 2])
            return atoms, []
        atoms.clear()
        statics: list[Any] = []
        counts: list[tuple[RowCount, Any]] = []
        seen = 0
        for leaf, path in zip(self.leaves, self.paths):
            value = follow(given, path, leaf.name)
            seen += _leaf_count(value)
            if isinstance(leaf, RowCount):
                counts.append((leaf, value))
            elif isinstance(leaf, Static):
                statics.append(leaf.checked(value))
            else:
                atoms += leaf.from_request(value) if request else leaf.from_impression(value)
        held = sum(_leaf_count(value) for value in given.values())
        if held != seen:
            raise InputError(f"the call holds {held - seen} values that the example does not have; rewrite with them")
        for leaf, value in counts:
            leaf.checked_rows(value, [atoms[i].shape[0] for side in Provenance for i, _ in self._keepers[side]])
        return self._lengths(atoms, self.atoms), statics

    def _lengths(self, tensors: list[Tensor], atoms: Sequence[Atom]) -> list[Tensor]:
        """The tensors of `atoms`, offsets turned into the lengths they stand for."""
        if not self._offsets:
            return tensors
        values = {a.rows_in: t for a, t in zip(atoms, tensors) if a.kind == "values"}
        return [
            lengths_of(replace(a, kind=self._offsets[a.name]), t, values[a.name]) if a.name in self._offsets else t
            for a, t in zip(atoms, tensors)
        ]

    def flatten_side(self, args: Sequence[Any], kwargs: Mapping[str, Any], side: Provenance) -> list[Tensor]:
        """The atoms of one side, from a full request-level call or from one that leaves the other side out.

        Positional arguments are then those parameters that hold something of this side, in order.
        """
        wanted = [any(a.provenance is side for a in leaf.atoms) for leaf in self.leaves]
        roots = list(dict.fromkeys(path[0][1] for path, mine in zip(self.paths, wanted) if mine))
        full = len(args) + len(kwargs) >= len(self.parameters.roots)
        parameters = self.parameters if full else Parameters(tuple(r for r in self.parameters.names if r in roots), "")
        given = parameters.bind(args, kwargs, partial=True)
        atoms: list[Tensor] = []
        for leaf, path, mine in zip(self.leaves, self.paths, wanted):
            if mine:
                value = follow(given, path, leaf.name)
                atoms += leaf.from_side(value, side)
        return self._lengths(atoms, [a for a in self.atoms if a.provenance is side])

    def unflatten(
        self, atoms: Sequence[Tensor], level: Provenance, statics: Sequence[Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Inverse of `flatten`; `statics` replaces the example's values that are not tensors."""
        values, at = [], 0
        given = iter(statics or ())
        for leaf in self.leaves:
            if isinstance(leaf, RowCount):
                values.append(self._count(atoms))
                continue
            if isinstance(leaf, Static):
                values.append(leaf.value if statics is None else next(given))
                continue
            mine = atoms[at : at + len(leaf.atoms)]
            at += len(leaf.atoms)
            values.append(leaf.to_request(mine) if level is Provenance.REQUEST else leaf.to_impression(mine))
        args, kwargs = pytree.tree_unflatten(values, self.tree)
        return tuple(args), dict(kwargs)

    def _count(self, atoms: Sequence[Tensor]) -> Any:
        """What a batch object says of its rows: those of its impressions, where it has any."""
        for side in (Provenance.IMPRESSION, Provenance.REQUEST):
            for i, _ in self._keepers[side]:
                return atoms[i].shape[0]
        return 0

    def rows(self, atoms: Sequence[Tensor], side: Provenance) -> int | None:
        """How many rows the atoms of `side` have; None where there are none. Raises InputError if they disagree."""
        keepers = self._keepers[side]
        try:
            found = {atoms[i].shape[0] for i, _ in keepers}
        except IndexError:
            single = [a.name for i, a in keepers if not atoms[i].ndim]
            raise InputError(f"inputs {single} are single numbers, in the example they have rows") from None
        if len(found) > 1:
            counts = {a.name: atoms[i].shape[0] for i, a in keepers}
            raise InputError(f"{side.name.lower()} inputs must have the same number of rows, got {counts}")
        return next(iter(found), None)

    def select(self, atoms: Sequence[Tensor], rows: Tensor, sides: Sequence[Provenance]) -> list[Tensor]:
        """Rows `rows` of every atom of `sides`; the others as they are. The slow, plain gather."""
        by_name = {a.name: t for a, t in zip(self.atoms, atoms)}
        out: dict[str, Tensor] = {}
        for atom, tensor in zip(self.atoms, atoms):
            if atom.name in out:
                continue
            if atom.provenance not in sides or atom.kind == "shared":
                out[atom.name] = tensor
            elif atom.kind == "values":
                keeper = self._atom(atom.rows_in)
                out[atom.name], out[keeper.name] = select_ragged(tensor, by_name[keeper.name], rows)
            elif atom.kind == "dense":
                out[atom.name] = tensor.index_select(0, rows)
        for atom, tensor in zip(self.atoms, atoms):
            if atom.name not in out:
                out[atom.name] = tensor.index_select(0, rows)
        return [out[a.name] for a in self.atoms]

    def _atom(self, name: str) -> Atom:
        return next(a for a in self.atoms if a.name == name)


def _of_skeleton(spec: FeatureSpec, skeleton: Any, *rest: Any) -> Inputs:
    return Inputs(spec, pytree.tree_structure(skeleton), *rest)


def _leaf_count(value: Any) -> int:
    return 1 if isinstance(value, Tensor) else len(pytree.tree_leaves(value, is_leaf=is_ragged))


def _flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten(tree, is_leaf=is_ragged)


def _path(keys: tuple[Any, ...], parameters: Parameters) -> Path:
    """A pytree path in (args, kwargs) as a path from the parameters."""
    steps = [
        ("attribute", k.name) if hasattr(k, "name") else ("item", getattr(k, "key", getattr(k, "idx", k))) for k in keys
    ]
    if steps[0][1] == 1:
        return tuple(steps[1:])
    at, names = steps[1][1], parameters.names
    head = [("item", names[at])] if at < len(names) else [("item", parameters.rest), ("item", at - len(names))]
    return (*head, *steps[2:])


def bind_inputs(
    forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], spec: FeatureSpec
) -> Inputs:
    """The calling convention of `forward` for this example. Raises SpecError where the spec does not fit."""
    if not isinstance(spec, FeatureSpec):
        raise SpecError(f"spec must be a FeatureSpec(request=[...], impression=[...]), got {type(spec).__name__}")
    parameters = parameters_of(forward, args, kwargs)
    if "num_impressions" in (*parameters.names, *parameters.roots):
        raise SpecError("forward has a parameter num_impressions of its own; wrap the model and give it another name")
    call = (tuple(args), dict(kwargs))
    register_objects(call)
    name_parts()
    with_paths, _ = pytree.tree_flatten_with_path(call, is_leaf=is_ragged)
    tree = _flatten(call)[1]
    paths = tuple(_path(keys, parameters) for keys, _ in with_paths)
    named = [(".".join(str(key) for _, key in path), value) for path, (_, value) in zip(paths, with_paths)]
    features: list[str] = []
    for name, value in named:
        features += _names(name, value)
    unknown = [k for k in (*spec.columns, *spec.jagged, *spec.jagged.values()) if not matches(k, features)]
    if unknown:
        raise SpecError(f"FeatureSpec names {unknown} in columns or jagged; the inputs are {features}")
    sides = spec.assign(features)
    pairs = jagged_pairs(spec, features, {n: v for n, v in named if isinstance(v, Tensor)}, sides)
    leaves = [_leaf(name, value, spec, sides, pairs, features) for name, value in named]
    rows = {len(value) for _, value in named if isinstance(value, Tensor) and value.ndim}
    leaves = [
        RowCount(leaf.name, leaf.value) if isinstance(leaf, Static) and _counts_rows(leaf, path, rows) else leaf
        for leaf, path in zip(leaves, paths)
    ]
    return Inputs(spec, tree, tuple(leaves), paths, parameters)


def _counts_rows(leaf: Static, path: Path, rows: set[int]) -> bool:
    """Whether a number that a batch object keeps beside its tensors is how many rows they have."""
    return path[-1][0] == "attribute" and type(leaf.value) is int and rows == {leaf.value}


def _names(name: str, value: Any) -> list[str]:
    """The features in one leaf of the call."""
    if is_kjt(value):
        return [f"{name}.{k}" for k in value.keys()]
    if is_jagged(value):
        return [f"{name}.{part}" for part in ("_values", "_lengths", "_weights")[: 2 + _weighted(value)]]
    return [name] * isinstance(value, Tensor)


def _weighted(jagged: Any) -> bool:
    return jagged.weights_or_none() is not None


def _leaf(
    name: str,
    value: Any,
    spec: FeatureSpec,
    sides: dict[str, Provenance],
    pairs: dict[str, tuple[Kind, str]],
    features: list[str],
) -> Leaf:
    if is_kjt(value):
        return _keyed(name, value, sides)
    if is_jagged(value):
        return _jagged(name, value, sides)
    if hasattr(value, "__array_interface__") and not isinstance(value, Tensor) and len(getattr(value, "shape", ())):
        raise SpecError(f"input {name!r} is a {type(value).__name__}; give tensors, only they have rows")
    if not isinstance(value, Tensor):
        return Static(name, value)
    column_key = spec.column_key(name, features)
    if column_key is not None:
        if value.ndim < 2:
            raise SpecError(f"columns of {name!r}: it must be a tensor [rows, columns], got {shown(value)}")
        parts = (Atom(f"{name}.request", Provenance.REQUEST), Atom(f"{name}.impression", Provenance.IMPRESSION))
        return Columns(name, parts, spec.request_columns(column_key, value.shape[1]), value.shape[1])
    kind, keeper = pairs.get(name, ("shared" if value.ndim == 0 else "dense", ""))
    given: Kind = kind if kind in ("offsets", "offsets_total") else "lengths"
    kept: Kind = "lengths" if kind in ("offsets", "offsets_total") else kind
    side = Provenance.REQUEST if kind == "shared" else sides[name]  # of no row: it goes with the request part
    return Dense(name, (Atom(name, side, kept, keeper if kind == "values" else ""),), given)


def _keyed(name: str, kjt: Any, sides: dict[str, Provenance]) -> Keyed:
    keys = tuple(kjt.keys())
    weighted = _weighted(kjt)
    atoms: list[Atom] = []
    for key in keys:
        side, stem = sides[f"{name}.{key}"], f"{name}.{key}"
        atoms += [Atom(f"{stem}.values", side, "values", f"{stem}.lengths"), Atom(f"{stem}.lengths", side, "lengths")]
        atoms += [Atom(f"{stem}.weights", side, "values", f"{stem}.lengths")] if weighted else []
    return Keyed(name, tuple(atoms), keys, tuple(sides[f"{name}.{k}"] for k in keys), weighted)


def _jagged(name: str, value: Any, sides: dict[str, Provenance]) -> Jagged:
    values, lengths, *weights = names = _names(name, value)
    if len({sides[n] for n in names}) > 1:
        raise SpecError(f"all parts of the JaggedTensor {name!r} must lie on the same side")
    atoms = [Atom(n, sides[n], "values", lengths) for n in (values, *weights)]
    return Jagged(name, (atoms[0], Atom(lengths, sides[lengths], "lengths"), *atoms[1:]), type(value))
