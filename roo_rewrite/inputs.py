"""The calling convention: how `(args, kwargs)` fall apart into tensors with rows, and back.

A model is called with nested arguments. Each leaf becomes one or more *atoms*, plain tensors that lie
wholly on one side:

    leaf                        atoms
    tensor                      itself
    packed columns [B, F]       x.request [B, Fr], x.impression [B, Fi]
    KeyedJaggedTensor           per key: f.key.values, f.key.lengths (and f.key.weights)
    anything else               none; kept as it is

An impression-level call has I rows everywhere. A request-level call takes the same arguments with R
rows on the request side; packed columns and KeyedJaggedTensors become a pair (request, impression).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from roo_rewrite.errors import InputError, SpecError
from roo_rewrite.facts import Provenance
from roo_rewrite.features import FeatureSpec, Range, matches
from roo_rewrite.kjt import is_kjt as is_kjt
from roo_rewrite.kjt import join
from roo_rewrite.ops.ragged import offsets_of, select_ragged

Kind = Literal["dense", "shared", "values", "lengths", "offsets", "offsets_total"]


@dataclass(frozen=True)
class Atom:
    """One tensor of the flattened call. `rows_in` names the lengths or offsets of a `values` atom."""

    name: str
    provenance: Provenance
    kind: Kind = "dense"
    rows_in: str = ""


class Leaf:
    """One leaf of `(args, kwargs)`: its atoms, and the way there and back at both levels."""

    name: str
    atoms: tuple[Atom, ...]

    def from_impression(self, value: Any) -> list[Tensor]:
        """The leaf of an impression-level call -> its atoms."""
        raise NotImplementedError

    def to_impression(self, atoms: Sequence[Tensor]) -> Any:
        """Inverse of `from_impression`; traced as part of the model."""
        raise NotImplementedError

    def from_request(self, value: Any) -> list[Tensor]:
        """The leaf of a request-level call -> its atoms."""
        return self.from_impression(value)

    def to_request(self, atoms: Sequence[Tensor]) -> Any:
        """Inverse of `from_request`."""
        return self.to_impression(atoms)

    def from_side(self, value: Any, side: Provenance) -> list[Tensor]:
        """The atoms of one side, from a request-level leaf or from that side's part alone."""
        return [t for a, t in zip(self.atoms, self.from_request(value)) if a.provenance is side]


@dataclass(frozen=True)
class Static(Leaf):
    """Not a tensor: part of the program, not of the batch."""

    name: str
    value: Any
    atoms: tuple[Atom, ...] = ()

    def from_impression(self, value: Any) -> list[Tensor]:
        return []

    def to_impression(self, atoms: Sequence[Tensor]) -> Any:
        return self.value


@dataclass(frozen=True)
class Dense(Leaf):
    """A tensor with its rows in dim 0, or one half of a jagged pair."""

    name: str
    atoms: tuple[Atom, ...]

    def from_impression(self, value: Any) -> list[Tensor]:
        if not isinstance(value, Tensor):
            raise InputError(f"input {self.name!r} must be a tensor, got {type(value).__name__}")
        return [value]

    def to_impression(self, atoms: Sequence[Tensor]) -> Any:
        return atoms[0]


@dataclass(frozen=True)
class Columns(Leaf):
    """A packed `[B, F]` tensor whose columns belong to both sides."""

    name: str
    atoms: tuple[Atom, ...]
    request: tuple[Range, ...]
    width: int

    def _pieces(self) -> list[tuple[bool, Range]]:
        """All columns in order, as (is request, range)."""
        edges = sorted({0, self.width, *(e for r in self.request for e in r)})
        return [((a, b) in self.request, (a, b)) for a, b in zip(edges, edges[1:])]

    def from_impression(self, value: Any) -> list[Tensor]:
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != self.width:
            raise InputError(f"input {self.name!r} must be a tensor [rows, {self.width}], got {_what(value)}")
        sides = []
        for wanted in (True, False):
            parts = [value[:, a:b] for is_request, (a, b) in self._pieces() if is_request is wanted]
            sides.append(torch.cat(parts, 1) if parts else value[:, :0])
        return sides

    def to_impression(self, atoms: Sequence[Tensor]) -> Any:
        taken = {True: 0, False: 0}
        parts = []
        for is_request, (a, b) in self._pieces():
            start = taken[is_request]
            taken[is_request] = start + b - a
            parts.append(atoms[0 if is_request else 1][:, start : start + b - a])
        return torch.cat(parts, 1)

    def from_request(self, value: Any) -> list[Tensor]:
        if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(isinstance(v, Tensor) for v in value):
            raise InputError(
                f"input {self.name!r} holds columns of both sides: pass the pair "
                "(x_request [R, .], x_impression [I, .])"
            )
        widths = [sum(b - a for is_request, (a, b) in self._pieces() if is_request is side) for side in (True, False)]
        for side, part, width in zip(("request", "impression"), value, widths):
            if part.ndim < 2 or part.shape[1] != width:
                raise InputError(f"{side} part of input {self.name!r} must be [rows, {width}], got {_what(part)}")
        return list(value)

    def to_request(self, atoms: Sequence[Tensor]) -> Any:
        return (atoms[0], atoms[1])

    def from_side(self, value: Any, side: Provenance) -> list[Tensor]:
        return [value] if isinstance(value, Tensor) else super().from_side(value, side)


@dataclass(frozen=True)
class Keyed(Leaf):
    """A TorchRec `KeyedJaggedTensor`: one jagged pair per key, each key on one side."""

    name: str
    atoms: tuple[Atom, ...]
    keys: tuple[str, ...]
    sides: tuple[Provenance, ...]
    weighted: bool

    @property
    def _step(self) -> int:
        return 3 if self.weighted else 2

    def from_impression(self, value: Any) -> list[Tensor]:
        if not is_kjt(value) or list(value.keys()) != list(self.keys):
            raise InputError(f"input {self.name!r} must be a KeyedJaggedTensor with keys {list(self.keys)}")
        return self._split(value)

    def _split(self, kjt: Any) -> list[Tensor]:
        parts = []
        for jagged in (kjt[key] for key in kjt.keys()):
            parts += [jagged.values(), jagged.lengths()]
            parts += [jagged.weights()] if self.weighted else []
        return parts

    def to_impression(self, atoms: Sequence[Tensor]) -> Any:
        return join(self.keys, atoms, self.weighted, self.sides)

    def _side(self, side: Provenance) -> list[int]:
        return [i for i, s in enumerate(self.sides) if s is side]

    def from_request(self, value: Any) -> list[Tensor]:
        if len(set(self.sides)) == 1:
            return self.from_impression(value)
        wanted = [[self.keys[i] for i in self._side(s)] for s in (Provenance.REQUEST, Provenance.IMPRESSION)]
        good = isinstance(value, (tuple, list)) and len(value) == 2 and all(is_kjt(v) for v in value)
        if not good or [list(v.keys()) for v in value] != wanted:
            raise InputError(
                f"input {self.name!r} holds keys of both sides: pass a pair of KeyedJaggedTensors with keys "
                f"{wanted[0]} (request rows) and {wanted[1]} (impression rows)"
            )
        parts: list[Tensor] = []
        pieces = [self._split(v) for v in value]
        for side in self.sides:
            piece = pieces[0 if side is Provenance.REQUEST else 1]
            parts += [piece.pop(0) for _ in range(self._step)]
        return parts

    def to_request(self, atoms: Sequence[Tensor]) -> Any:
        if len(set(self.sides)) == 1:
            return self.to_impression(atoms)
        pair = []
        for side in (Provenance.REQUEST, Provenance.IMPRESSION):
            chosen = self._side(side)
            flat = [atoms[i * self._step + j] for i in chosen for j in range(self._step)]
            pair.append(join([self.keys[i] for i in chosen], flat, self.weighted, [side] * len(chosen)))
        return tuple(pair)


def _what(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@dataclass(frozen=True)
class Inputs:
    """The calling convention of one model: its leaves in order and the tree they came from."""

    spec: FeatureSpec
    tree: pytree.TreeSpec
    leaves: tuple[Leaf, ...]
    paths: tuple[Path, ...]
    parameters: Parameters

    def __deepcopy__(self, memo: dict[int, Any]) -> Inputs:
        # Immutable; torch warns of copies of its tree specs.
        return self

    @property
    def atoms(self) -> tuple[Atom, ...]:
        """All atoms, in the order of the flattened call."""
        return tuple(a for leaf in self.leaves for a in leaf.atoms)

    def flatten(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], level: Provenance
    ) -> tuple[list[Tensor], list[Any]]:
        """A call at `level` -> (atoms, static values). Raises InputError when the structure differs."""
        request = level is Provenance.REQUEST
        given = self.parameters.bind(args, kwargs)
        atoms: list[Tensor] = []
        statics: list[Any] = []
        for leaf, path in zip(self.leaves, self.paths):
            value = follow(given, path, leaf.name)
            if isinstance(leaf, Static):
                statics.append(value)
            else:
                atoms += leaf.from_request(value) if request else leaf.from_impression(value)
        return atoms, statics

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
        return atoms

    def unflatten(
        self, atoms: Sequence[Tensor], level: Provenance, statics: Sequence[Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Inverse of `flatten`; `statics` replaces the example's values that are not tensors."""
        values, at = [], 0
        given = iter(statics or ())
        for leaf in self.leaves:
            if isinstance(leaf, Static):
                values.append(leaf.value if statics is None else next(given))
                continue
            mine = atoms[at : at + len(leaf.atoms)]
            at += len(leaf.atoms)
            values.append(leaf.to_request(mine) if level is Provenance.REQUEST else leaf.to_impression(mine))
        args, kwargs = pytree.tree_unflatten(values, self.tree)
        return tuple(args), dict(kwargs)

    def rows(self, atoms: Sequence[Tensor], side: Provenance) -> int | None:
        """How many rows the atoms of `side` have; None where there are none. Raises InputError if they disagree."""
        counts = {a.name: atoms_rows(a, t) for a, t in zip(self.atoms, atoms) if a.provenance is side and has_rows(a)}
        if len(set(counts.values())) > 1:
            raise InputError(f"{side.name.lower()} inputs must have the same number of rows, got {counts}")
        return next(iter(counts.values()), None)

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
                lengths = lengths_of(keeper, by_name[atom.rows_in], tensor)
                out[atom.name], chosen = select_ragged(tensor, lengths, rows)
                out[keeper.name] = as_kind(keeper.kind, chosen, by_name[keeper.name].dtype)
            elif atom.kind == "dense":
                out[atom.name] = tensor.index_select(0, rows)
        for atom, tensor in zip(self.atoms, atoms):
            if atom.name not in out:
                out[atom.name] = tensor.index_select(0, rows)
        return [out[a.name] for a in self.atoms]

    def _atom(self, name: str) -> Atom:
        return next(a for a in self.atoms if a.name == name)


def has_rows(atom: Atom) -> bool:
    """Whether the atom's own first dim counts rows."""
    return atom.kind not in ("shared", "values")


def atoms_rows(atom: Atom, tensor: Tensor) -> int:
    """How many rows `tensor` stands for."""
    return int(tensor.shape[0]) - (atom.kind == "offsets_total")


def lengths_of(keeper: Atom, tensor: Tensor, values: Tensor) -> Tensor:
    """The lengths `[B]` a lengths or offsets atom stands for."""
    if keeper.kind == "lengths":
        return tensor
    if keeper.kind == "offsets":
        tensor = torch.cat([tensor, tensor.new_full((1,), values.shape[0])])
    return tensor.diff()


def as_kind(kind: Kind, lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """`lengths` written as lengths or offsets."""
    if kind == "lengths":
        return lengths.to(dtype)
    offsets = offsets_of(lengths).to(dtype)
    return offsets[:-1] if kind == "offsets" else offsets


Path = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Parameters:
    """The parameters of `forward`: names of the positional ones, of `*args`, and those the example gave."""

    names: tuple[str, ...]
    rest: str
    roots: tuple[str, ...] = ()

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any], partial: bool = False) -> dict[str, Any]:
        """Values by parameter. Raises InputError for too many positional or for doubly given ones."""
        given = dict(zip(self.names, args))
        if len(args) > len(self.names):
            if not self.rest:
                raise InputError(f"{len(args)} positional arguments given; the parameters are {list(self.names)}")
            given[self.rest] = tuple(args[len(self.names) :])
        for name, value in kwargs.items():
            if name in given:
                raise InputError(f"argument {name!r} is given twice, by place and by name")
            given[name] = value
        extra = [name for name in given if name not in self.roots]
        if extra and not partial:
            raise InputError(f"arguments {extra} are not in the example; its arguments are {list(self.roots)}")
        return given


def follow(given: Mapping[str, Any], path: Path, name: str) -> Any:
    """The value at `path`. Raises InputError where the call lacks it."""
    value: Any = given
    try:
        for kind, key in path:
            value = getattr(value, key) if kind == "attribute" else value[key]
    except (KeyError, IndexError, TypeError, AttributeError):
        raise InputError(f"the call lacks input {name!r}, which the example has") from None
    return value


def parameters_of(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Parameters:
    """The parameters of `forward` as this example gives them. Raises InputError where it does not fit."""
    try:
        signature = inspect.signature(forward)
        bound = signature.bind(*args, **kwargs)
    except ValueError:
        return Parameters((), "args", ("args", *kwargs))
    except TypeError as e:
        raise InputError(f"the example does not fit forward: {e}") from e
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = tuple(p.name for p in signature.parameters.values() if p.kind in positional)
    rest = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_POSITIONAL), "")
    open_ended = next((p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    roots = [n for n in bound.arguments if n != open_ended]
    return Parameters(names, rest, (*roots, *bound.arguments.get(open_ended or "", ())))


def _flatten(tree: Any) -> tuple[list[Any], pytree.TreeSpec]:
    return pytree.tree_flatten(tree, is_leaf=is_kjt)


def register_dataclasses(tree: Any) -> None:
    """Makes pytree nodes of the dataclass instances in `tree`, at any depth, that hold tensors."""
    for value in pytree.tree_leaves(tree, is_leaf=is_kjt):
        if is_dataclass(value) and not isinstance(value, (type, Tensor)):
            fields = list(vars(value).values())
            register_dataclasses(fields)
            if any(isinstance(v, Tensor) or is_kjt(v) for v in pytree.tree_leaves(fields, is_leaf=is_kjt)):
                torch.export.register_dataclass(type(value))


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
    parameters = parameters_of(forward, args, kwargs)
    call = (tuple(args), dict(kwargs))
    register_dataclasses(call)
    with_paths, _ = pytree.tree_flatten_with_path(call, is_leaf=is_kjt)
    tree = _flatten(call)[1]
    paths = tuple(_path(keys, parameters) for keys, _ in with_paths)
    named = [(".".join(str(key) for _, key in path), value) for path, (_, value) in zip(paths, with_paths)]
    features: list[str] = []
    for name, value in named:
        features += [f"{name}.{k}" for k in value.keys()] if is_kjt(value) else [name] * isinstance(value, Tensor)
    unknown = [k for k in (*spec.columns, *spec.jagged, *spec.jagged.values()) if not matches(k, features)]
    if unknown:
        raise SpecError(f"FeatureSpec names {unknown} in columns or jagged; the inputs are {features}")
    sides = spec.assign(features)
    pairs = _jagged_pairs(spec, features, {n: v for n, v in named if isinstance(v, Tensor)}, sides)
    leaves = [_leaf(name, value, spec, sides, pairs, features) for name, value in named]
    return Inputs(spec, tree, tuple(leaves), paths, parameters)


def _jagged_pairs(
    spec: FeatureSpec, features: list[str], tensors: dict[str, Tensor], sides: dict[str, Provenance]
) -> dict[str, tuple[Kind, str]]:
    """name -> (its kind, the name of its lengths or offsets), for both halves of every declared pair."""
    rows = {t.shape[0] for n, t in tensors.items() if n not in _partners(spec, features) and t.ndim}
    pairs: dict[str, tuple[Kind, str]] = {}
    for values_key, rows_key in spec.jagged.items():
        values, keeper = matches(values_key, features)[0], matches(rows_key, features)[0]
        if sides[values] is not sides[keeper]:
            raise SpecError(f"jagged pair {values!r} and {keeper!r} must lie on the same side")
        pairs[values] = ("values", keeper)
        pairs[keeper] = (_rows_kind(keeper, tensors[keeper], tensors[values], rows), keeper)
    return pairs


def _partners(spec: FeatureSpec, features: list[str]) -> set[str]:
    return {n for pair in spec.jagged.items() for key in pair for n in matches(key, features)}


def _rows_kind(name: str, keeper: Tensor, values: Tensor, rows: set[int]) -> Kind:
    """Lengths, or offsets with or without the final total; told apart by what adds up."""
    flat = keeper.tolist()
    total = values.shape[0]
    ascending = bool(flat) and flat[0] == 0 and all(a <= b for a, b in zip(flat, flat[1:]))
    if len(rows) == 1 and ascending and flat[-1] == total and len(flat) == next(iter(rows)) + 1:
        return "offsets_total"
    if sum(flat) == total and not (ascending and "offset" in name):
        return "lengths"
    if ascending and flat[-1] <= total:
        return "offsets_total" if not rows and flat[-1] == total else "offsets"
    raise SpecError(
        f"jagged {name!r} is neither lengths (they sum to {sum(flat)}) nor offsets of {total} values; check the example"
    )


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
    if not isinstance(value, Tensor):
        return Static(name, value)
    column_key = spec.column_key(name, features)
    if column_key is not None:
        if value.ndim < 2:
            raise SpecError(f"columns of {name!r}: it must be a tensor [rows, columns], got {_what(value)}")
        parts = (Atom(f"{name}.request", Provenance.REQUEST), Atom(f"{name}.impression", Provenance.IMPRESSION))
        return Columns(name, parts, spec.request_columns(column_key, value.shape[1]), value.shape[1])
    kind, keeper = pairs.get(name, ("shared" if value.ndim == 0 else "dense", ""))
    return Dense(name, (Atom(name, sides[name], kind, keeper if kind == "values" else ""),))


def _keyed(name: str, kjt: Any, sides: dict[str, Provenance]) -> Keyed:
    keys = tuple(kjt.keys())
    weighted = kjt.weights_or_none() is not None
    atoms: list[Atom] = []
    for key in keys:
        side, stem = sides[f"{name}.{key}"], f"{name}.{key}"
        atoms += [Atom(f"{stem}.values", side, "values", f"{stem}.lengths"), Atom(f"{stem}.lengths", side, "lengths")]
        atoms += [Atom(f"{stem}.weights", side, "values", f"{stem}.lengths")] if weighted else []
    return Keyed(name, tuple(atoms), keys, tuple(sides[f"{name}.{k}"] for k in keys), weighted)
