"""Atoms: the plain tensors a call falls apart into, and the kinds of argument they come from.

leaf                        atoms
tensor                      itself
packed columns [B, F]       x.request [B, Fr], x.impression [B, Fi]
JaggedTensor                f._values, f._lengths (and f._weights), whatever else it has worked out
KeyedJaggedTensor           per key: f.key.values, f.key.lengths (and f.key.weights)
anything else               none; kept as it is
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from roo_rewrite.errors import InputError
from roo_rewrite.facts import Provenance
from roo_rewrite.features import Range
from roo_rewrite.kjt import is_jagged, is_kjt, join

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

    def checked(self, value: Any) -> Any:
        """A new value. Raises InputError where it is a tensor, whose side the spec does not tell."""
        if isinstance(value, Tensor):
            raise InputError(f"input {self.name!r} is {shown(self.value)} in the example; rewrite with one that has it")
        return value

    def from_impression(self, value: Any) -> list[Tensor]:
        return []

    def to_impression(self, atoms: Sequence[Tensor]) -> Any:
        return self.value


@dataclass(frozen=True)
class RowCount(Static):
    """A number that a batch object keeps of itself: how many rows it has."""

    def checked_rows(self, value: Any, rows: Sequence[int]) -> None:
        """Raises InputError where it is something else now: in the example it could not be told from the rows."""
        if value not in rows:
            raise InputError(
                f"input {self.name!r} is {value!r} for tensors of {sorted(set(rows))} rows; in the example it was "
                f"the number of rows, {self.value}. Rewrite with an example of another number of rows"
            )


@dataclass(frozen=True)
class Dense(Leaf):
    """A tensor with its rows in dim 0, or one half of a jagged pair.

    given: what the caller passes for the lengths of a pair. The atom is always the lengths: offsets count all
    rows before, so they are made of the lengths at the boundary, where the trace sees it.
    """

    name: str
    atoms: tuple[Atom, ...]
    given: Kind = "lengths"

    def from_impression(self, value: Any) -> list[Tensor]:
        if not isinstance(value, Tensor):
            raise InputError(f"input {self.name!r} must be a tensor, got {type(value).__name__}")
        return [value]

    def to_impression(self, atoms: Sequence[Tensor]) -> Any:
        return atoms[0] if self.given == "lengths" else as_kind(self.given, atoms[0], atoms[0].dtype)


@dataclass(frozen=True)
class Columns(Leaf):
    """A packed `[B, F]` tensor whose columns belong to both sides."""

    name: str
    atoms: tuple[Atom, ...]
    request: tuple[Range, ...]
    width: int

    @functools.cached_property
    def _pieces(self) -> list[tuple[bool, Range]]:
        """All columns in order, as (is request, range)."""
        edges = sorted({0, self.width, *(e for r in self.request for e in r)})
        return [((a, b) in self.request, (a, b)) for a, b in zip(edges, edges[1:])]

    @functools.cached_property
    def _widths(self) -> tuple[int, int]:
        """How many columns are the request's, and how many the impressions'."""
        request = sum(b - a for is_request, (a, b) in self._pieces if is_request)
        return request, self.width - request

    def from_impression(self, value: Any) -> list[Tensor]:
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[1] != self.width:
            raise InputError(f"input {self.name!r} must be a tensor [rows, {self.width}], got {shown(value)}")
        sides = []
        for wanted in (True, False):
            parts = [value[:, a:b] for is_request, (a, b) in self._pieces if is_request is wanted]
            sides.append(torch.cat(parts, 1) if parts else value[:, :0])
        return sides

    def to_impression(self, atoms: Sequence[Tensor]) -> Any:
        taken = {True: 0, False: 0}
        parts = []
        for is_request, (a, b) in self._pieces:
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
        for side, part, width in zip(("request", "impression"), value, self._widths):
            if part.ndim < 2 or part.shape[1] != width:
                raise InputError(f"{side} part of input {self.name!r} must be [rows, {width}], got {shown(part)}")
        return list(value)

    def to_request(self, atoms: Sequence[Tensor]) -> Any:
        return (atoms[0], atoms[1])

    def from_side(self, value: Any, side: Provenance) -> list[Tensor]:
        return [value] if isinstance(value, Tensor) else super().from_side(value, side)


@dataclass(frozen=True)
class Jagged(Leaf):
    """A TorchRec `JaggedTensor`: values and lengths, and weights where the example has them."""

    name: str
    atoms: tuple[Atom, ...]
    type: Any

    def from_impression(self, value: Any) -> list[Tensor]:
        if not is_jagged(value) or (value.weights_or_none() is not None) is not (len(self.atoms) == 3):
            has = "with" if len(self.atoms) == 3 else "without"
            raise InputError(f"input {self.name!r} must be a JaggedTensor {has} weights, as in the example")
        return [value.values(), value.lengths(), *([value.weights()] if len(self.atoms) == 3 else [])]

    def to_impression(self, atoms: Sequence[Tensor]) -> Any:
        values, lengths, *weights = atoms
        return self.type(values, lengths=lengths, weights=weights[0] if weights else None)


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

    def from_side(self, value: Any, side: Provenance) -> list[Tensor]:
        wanted = [self.keys[i] for i in self._side(side)]
        return self._split(value) if is_kjt(value) and list(value.keys()) == wanted else super().from_side(value, side)

    def to_request(self, atoms: Sequence[Tensor]) -> Any:
        if len(set(self.sides)) == 1:
            return self.to_impression(atoms)
        pair = []
        for side in (Provenance.REQUEST, Provenance.IMPRESSION):
            chosen = self._side(side)
            flat = [atoms[i * self._step + j] for i in chosen for j in range(self._step)]
            pair.append(join([self.keys[i] for i in chosen], flat, self.weighted, [side] * len(chosen)))
        return tuple(pair)


def shown(value: Any) -> str:
    """A value in an error message."""
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


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
    offsets = functional.pad(lengths.cumsum(0), (1, 0)).to(dtype)
    return offsets[:-1] if kind == "offsets" else offsets
