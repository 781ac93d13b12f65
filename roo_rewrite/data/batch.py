"""RequestBatch: a request-level call with its counts, labels, weights and ids.

request tensors     R rows   one per request
impression tensors  I rows   each request's impressions together, in their order
num_impressions     int64[R], sums to I; a request may have none
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from roo_rewrite.errors import DataError, InputError
from roo_rewrite.facts import Provenance
from roo_rewrite.features import FeatureSpec
from roo_rewrite.inputs import Atom, Inputs, as_kind, is_kjt, lengths_of
from roo_rewrite.ops.ragged import segment_positions

Ids = Tensor | tuple[str, ...] | None


class Layout:
    """Which tensor of the call has which rows. Equal where the calling conventions are."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Layout):
            return NotImplemented
        mine, theirs = self.inputs, other.inputs
        return (mine.spec, mine.tree, mine.leaves) == (theirs.spec, theirs.tree, theirs.leaves)

    __hash__ = None  # type: ignore[assignment]


class Notes:
    """What travels with a batch but is no tensor and no part of its structure: all notes compare equal."""

    def __init__(self, **values: Any):
        self.values = values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Notes)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class RequestBatch:
    """A batch of requests: `model(*batch.args, **batch.kwargs, num_impressions=batch.num_impressions)`.

    args, kwargs: the request-level call; packed columns and KeyedJaggedTensors of both sides are pairs.
    num_impressions: int64[R]. labels, weights: any nesting of tensors with I rows, or None.
    request_ids: R ids, impression_ids: I ids; an integer tensor or a tuple of strings, or None.
    order: int64[I], the caller's row of each impression, or None where it is the caller's order already.
    layout: the calling convention. cursor: where a reader stood after this batch, or None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_impressions: Tensor
    layout: Layout
    labels: Any = None
    weights: Any = None
    request_ids: Ids = None
    impression_ids: Ids = None
    order: Tensor | None = None
    cursor: Any = field(default=None, repr=False)

    @property
    def num_requests(self) -> int:
        """R."""
        return int(self.num_impressions.shape[0])

    def __len__(self) -> int:
        return self.num_requests

    @property
    def total_impressions(self) -> int:
        """I."""
        return int(self.num_impressions.sum())

    @property
    def spec(self) -> FeatureSpec:
        """The spec the batch was split by; it differs from the caller's where a feature was demoted."""
        return self.layout.inputs.spec

    @property
    def request_rows(self) -> Tensor:
        """int64[I]: the request of each impression."""
        return torch.repeat_interleave(self.num_impressions)

    def map(self, fn: Callable[[Any], Any]) -> RequestBatch:
        """`fn` on every tensor and KeyedJaggedTensor."""
        leaves, tree = pytree.tree_flatten(self, is_leaf=is_kjt)
        movable = [fn(v) if isinstance(v, Tensor) or is_kjt(v) else v for v in leaves]
        return cast(RequestBatch, pytree.tree_unflatten(movable, tree))

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> RequestBatch:
        """The batch on `device`. Dtypes are never changed."""
        return self.map(lambda v: v.to(torch.device(device), non_blocking=non_blocking))

    def pin_memory(self) -> RequestBatch:
        """The batch in page-locked memory; `DataLoader(pin_memory=True)` calls it."""
        return self.map(lambda v: v.pin_memory())

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> RequestBatch:
        """The requests at `index`: a position, a slice, a list of positions or a boolean mask [R]."""
        rows = _request_rows(index, self.num_requests).to(self.num_impressions.device)
        starts = self.num_impressions.cumsum(0) - self.num_impressions
        counts = self.num_impressions.index_select(0, rows)
        picked = segment_positions(starts.index_select(0, rows), counts)
        inputs = self.layout.inputs
        atoms, statics = inputs.flatten(self.args, self.kwargs, Provenance.REQUEST)
        atoms = inputs.select(atoms, rows, [Provenance.REQUEST])
        atoms = inputs.select(atoms, picked, [Provenance.IMPRESSION])
        args, kwargs = inputs.unflatten(atoms, Provenance.REQUEST, statics)
        return replace(
            self,
            args=args,
            kwargs=kwargs,
            num_impressions=counts,
            labels=_take(self.labels, picked),
            weights=_take(self.weights, picked),
            request_ids=_take_ids(self.request_ids, rows),
            impression_ids=_take_ids(self.impression_ids, picked),
            order=None if self.order is None else self.order.index_select(0, picked),
            cursor=None,
        )

    def restore(self, scores: Any) -> Any:
        """Scores of this batch (any nesting of tensors [I, ...]) in the caller's order of impressions.

        Of a slice, the rows it has, in the caller's relative order. Differentiable.
        Raises InputError where a tensor has not I rows.
        """
        total = int(self.order.shape[0]) if self.order is not None else self.total_impressions
        back = None if self.order is None else torch.argsort(self.order)

        def one(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.ndim == 0 or value.shape[0] != total:
                raise InputError(f"restore: scores have shape {list(value.shape)}, the batch has {total} impressions")
            return value if back is None else value.index_select(0, back.to(value.device))

        return pytree.tree_map(one, scores)

    def to_impressions(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The impression-level call `(args, kwargs)`: request features once per impression, in batch order."""
        inputs = self.layout.inputs
        atoms, statics = inputs.flatten(self.args, self.kwargs, Provenance.REQUEST)
        atoms = inputs.select(atoms, self.request_rows, [Provenance.REQUEST])
        return inputs.unflatten(atoms, Provenance.IMPRESSION, statics)


def concat(batches: Sequence[RequestBatch]) -> RequestBatch:
    """One batch of all requests of `batches`, in order. The rows of `order` count through.

    Raises DataError where there is none, their layouts differ, or only some carry labels, weights or ids.
    """
    if not batches:
        raise DataError("concat needs at least one batch")
    first = batches[0]
    if any(b.layout != first.layout for b in batches):
        raise DataError("concat: the batches were made with different features or specs; group them with one spec")
    inputs = first.layout.inputs
    flat = [inputs.flatten(b.args, b.kwargs, Provenance.REQUEST) for b in batches]
    atoms = _concat_atoms(inputs, [atoms for atoms, _ in flat])
    args, kwargs = inputs.unflatten(atoms, Provenance.REQUEST, flat[0][1])
    shifts, total = [], 0
    for b in batches:
        shifts.append(total)
        total += b.total_impressions
    orders = [
        (b.order if b.order is not None else torch.arange(b.total_impressions, device=b.num_impressions.device)) + s
        for b, s in zip(batches, shifts)
    ]
    return RequestBatch(
        args=args,
        kwargs=kwargs,
        num_impressions=torch.cat([b.num_impressions for b in batches]),
        layout=first.layout,
        labels=_concat_trees("labels", [b.labels for b in batches]),
        weights=_concat_trees("weights", [b.weights for b in batches]),
        request_ids=_concat_ids("request_ids", [b.request_ids for b in batches]),
        impression_ids=_concat_ids("impression_ids", [b.impression_ids for b in batches]),
        order=None if all(b.order is None for b in batches) else torch.cat(orders),
    )


def _concat_atoms(inputs: Inputs, calls: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    position = {a.name: i for i, a in enumerate(inputs.atoms)}
    values_of = {a.rows_in: position[a.name] for a in inputs.atoms if a.kind == "values"}
    return [_concat_atom(atom, i, values_of, calls) for i, atom in enumerate(inputs.atoms)]


def _concat_atom(atom: Atom, i: int, values_of: Mapping[str, int], calls: Sequence[Sequence[Tensor]]) -> Tensor:
    parts = [call[i] for call in calls]
    if atom.kind == "shared":
        if any(not torch.equal(p, parts[0]) for p in parts):
            raise DataError(f"concat: input {atom.name!r} has no rows and differs between the batches")
        return parts[0]
    if atom.kind in ("offsets", "offsets_total"):
        lengths = [lengths_of(atom, call[i], call[values_of[atom.name]]) for call in calls]
        return as_kind(atom.kind, torch.cat(lengths), parts[0].dtype)
    return torch.cat(parts)


def _request_rows(index: int | slice | Sequence[int] | Tensor, count: int) -> Tensor:
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        if index.shape != (count,):
            raise InputError(f"a mask over requests must have shape [{count}], got {list(index.shape)}")
        return index.nonzero().flatten()
    if isinstance(index, slice):
        return torch.arange(count)[index] if (index.step or 1) > 0 else torch.tensor(range(count)[index]).long()
    positions = torch.as_tensor([index] if isinstance(index, int) else index, dtype=torch.long).flatten()
    outside = positions[(positions < -count) | (positions >= count)]
    if outside.numel():
        raise IndexError(f"request {int(outside[0])} of a batch of {count}")
    return torch.where(positions < 0, positions + count, positions)


def _take(tree: Any, rows: Tensor) -> Any:
    return pytree.tree_map(lambda v: v.index_select(0, rows.to(v.device)) if isinstance(v, Tensor) else v, tree)


def _take_ids(ids: Ids, rows: Tensor) -> Ids:
    if isinstance(ids, Tensor):
        return ids.index_select(0, rows.to(ids.device))
    return None if ids is None else tuple(ids[i] for i in rows.tolist())


def _concat_trees(what: str, trees: Sequence[Any]) -> Any:
    flat = [pytree.tree_flatten(t) for t in trees]
    if any(spec != flat[0][1] for _, spec in flat) or len({t is None for t in trees}) > 1:
        raise DataError(f"concat: the {what} of the batches have different structures")
    if trees[0] is None:
        return None
    return pytree.tree_unflatten([torch.cat(parts) for parts in zip(*(leaves for leaves, _ in flat))], flat[0][1])


def _concat_ids(what: str, ids: Sequence[Ids]) -> Ids:
    if len({type(i) for i in ids}) > 1:
        raise DataError(f"concat: the {what} of the batches are of different kinds; give all of them ids, or none")
    if isinstance(ids[0], Tensor):
        return torch.cat([cast(Tensor, i) for i in ids])
    return None if ids[0] is None else tuple(name for names in ids for name in cast("tuple[str, ...]", names))


_CHILDREN = ("args", "kwargs", "num_impressions", "labels", "weights", "order")
_IDS = ("request_ids", "impression_ids")


def _flatten(batch: RequestBatch) -> tuple[list[Any], Any]:
    ids = [v if isinstance(v := getattr(batch, name), Tensor) else None for name in _IDS]
    strings = {n: v for n in _IDS if isinstance(v := getattr(batch, n), tuple)}
    notes = Notes(cursor=batch.cursor, **strings)
    return [*(getattr(batch, n) for n in _CHILDREN), *ids], (batch.layout, notes)


def _flatten_with_keys(batch: RequestBatch) -> tuple[list[tuple[Any, Any]], Any]:
    children, context = _flatten(batch)
    return [(pytree.GetAttrKey(n), v) for n, v in zip((*_CHILDREN, *_IDS), children)], context


def _unflatten(children: Any, context: Any) -> RequestBatch:
    layout, notes = context
    values = dict(zip((*_CHILDREN, *_IDS), children))
    return RequestBatch(layout=layout, **{**values, **notes.values})


pytree.register_pytree_node(
    RequestBatch,
    _flatten,
    _unflatten,
    serialized_type_name="roo_rewrite.data.RequestBatch",
    flatten_with_keys_fn=_flatten_with_keys,
)
