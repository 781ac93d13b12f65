"""The forms of a value while `split` walks the graph: how it is cheapest to continue with it.

    Whole(node)                an ordinary tensor
    Picked(base, dim, index)   index_select(base, dim, index), not carried out
    Blocks(dim, parts)         a concatenation along dim that was never carried out
    Sum(terms, shape)          a sum of terms (coefficient, form) that was never carried out
    Expanded(form, shape)      size 1 along some dims, repeated only in name
    Filled(value, shape)       one constant everywhere
    Reshaped(form, shape)      a reshape that was never carried out

A form stands for a tensor of the impression-level graph; `Builder.whole` carries it out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from roo_rewrite.facts import Provenance

PROVENANCE = "roo_split_provenance"


class Form:
    """How a value is kept. `shape` is that of the tensor it stands for."""

    shape: tuple[Any, ...]

    @property
    def ndim(self) -> int:
        """Number of dims."""
        return len(self.shape)


@dataclass(frozen=True, eq=False)
class Whole(Form):
    """An ordinary tensor: a node of the new graph."""

    node: Node

    @functools.cached_property
    def shape(self) -> tuple[Any, ...]:  # type: ignore[override]
        return tuple(self.node.meta["val"].shape)


@dataclass(frozen=True, eq=False)
class Picked(Form):
    """Entries `index` of `base` along `dim`."""

    base: Whole
    dim: int
    index: tuple[int, ...]

    @functools.cached_property
    def shape(self) -> tuple[Any, ...]:  # type: ignore[override]
        return with_size(self.base.shape, self.dim, len(self.index))


@dataclass(frozen=True, eq=False)
class Blocks(Form):
    """Parts side by side along `dim`."""

    dim: int
    parts: tuple[Form, ...]

    @functools.cached_property
    def shape(self) -> tuple[Any, ...]:  # type: ignore[override]
        return with_size(self.parts[0].shape, self.dim, sum(self.sizes))

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Size of each part along `dim`."""
        return [int(p.shape[self.dim]) for p in self.parts]


@dataclass(frozen=True, eq=False)
class Sum(Form):
    """The sum of `coefficient * form`, each broadcast to `shape`."""

    terms: tuple[tuple[float, Form], ...]
    shape: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Expanded(Form):
    """`form`, of the same number of dims, repeated to `shape` where it has size 1."""

    form: Form
    shape: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Filled(Form):
    """`value` in every entry; `dtype` and device as those of node `like`."""

    value: float
    shape: tuple[Any, ...]
    like: Node


class Deferred(Form):
    """An op on `inner` not carried out yet; `how` does it."""

    inner: Form
    how: Callable[[], Node]

    def carry(self) -> Node:
        """The node of the value."""
        return self.how()


class Alike(Deferred):
    """One that has the shape of its `inner`."""

    @property
    def shape(self) -> tuple[Any, ...]:  # type: ignore[override]
        return self.inner.shape


@dataclass(frozen=True, eq=False)
class Lazy(Alike):
    """`inner` is what a consumer may take part by part; carried out whole, the value is made by `how`."""

    inner: Form
    how: Callable[[], Node]


@dataclass(frozen=True, eq=False)
class Turned(Lazy):
    """The last two of three dims of `source` in the other order."""

    source: Form


@dataclass(frozen=True, eq=False)
class Scaled(Alike):
    """`inner * by`, broadcast: `by` has size 1 along `dim`, or is a constant with entries along `dim` alone."""

    inner: Form
    by: Whole
    dim: int
    how: Callable[[], Node]


@dataclass(frozen=True, eq=False)
class Reshaped(Deferred):
    """`inner` as a row-major reshape to `shape`; `how` carries it out."""

    inner: Form
    shape: tuple[Any, ...]
    how: Callable[[], Node]


def with_size(shape: Sequence[Any], dim: int, size: Any) -> tuple[Any, ...]:
    """`shape` with another size in one dim."""
    return (*shape[:dim], size, *shape[dim + 1 :])


def leaves(form: Form) -> Iterator[Node]:
    """The nodes a form is made of."""
    match form:
        case Whole(node):
            yield node
        case Picked(base, _, _):
            yield base.node
        case Blocks(_, parts):
            for part in parts:
                yield from leaves(part)
        case Sum(terms, _):
            for _, term in terms:
                yield from leaves(term)
        case Expanded(inner, _):
            yield from leaves(inner)
        case Deferred():
            yield from leaves(form.inner)


def provenance(form: Form) -> Provenance:
    """The join over the form's nodes."""
    return max((node.meta[PROVENANCE] for node in leaves(form)), default=Provenance.CONSTANT)


def is_mixed(form: Form) -> bool:
    """Whether part of the form depends on the request alone, and part on the impression."""
    found = {node.meta[PROVENANCE] for node in leaves(form)}
    return Provenance.IMPRESSION in found and found != {Provenance.IMPRESSION} and Provenance.REQUEST in found


def is_static(size: Any) -> bool:
    """Whether a size does not depend on the batch."""
    return isinstance(size, int)


def same_shape(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two traced shapes are the same for every batch."""
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b))


def same_size(a: Any, b: Any) -> bool:
    """Whether two traced sizes are the same for every batch."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return type(a) is type(b) and bool(a == b)


def hint(size: Any) -> int:
    """A traced size as an integer; sizes known only at run time count as 1."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 1
    return int(size)


def numel(shape: Sequence[Any]) -> int:
    """Entries of a traced shape."""
    return math.prod(hint(s) for s in shape)


def dtype_of(form: Form) -> torch.dtype:
    """The dtype of a form's first node."""
    if isinstance(form, (Blocks, Sum)):
        parts = form.parts if isinstance(form, Blocks) else [t for _, t in form.terms]
        return dtype_of(parts[0])
    if isinstance(form, Expanded):
        return dtype_of(form.form)
    value = form.like.meta["val"] if isinstance(form, Filled) else next(leaves(form)).meta["val"]
    assert isinstance(value, Tensor)
    return value.dtype
