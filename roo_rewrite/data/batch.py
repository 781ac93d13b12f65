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

from roo_rewrite.errors import InputError
from roo_rewrite.facts import Provenance
from roo_rewrite.features import FeatureSpec
from roo_rewrite.inputs import Atom, Inputs, as_kind, is_kjt, lengths_of
from roo_rewrite.ops.ragged import segment_positions

Ids = Tensor | tuple[str, ...] | None


@dataclass(frozen=True, eq=False)
class Layout:
    """Which tensor of the call has which rows. Equal where the calling conventions are."""

    inputs: Inputs

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.inputs == other.inputs

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
    """A batch of requests. `batch.score(model)` calls a rewritten model with it.

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
        """The requests at `index`: a position, a slice (a view), a list of positions or a boolean mask [R]."""
        if isinstance(index, slice) and index.step in (None, 1):
            start, stop, _ = index.indices(self.num_requests)
            return narrow(self, start, max(start, stop))
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
            labels=take_rows(self.labels, picked),
            weights=take_rows(self.weights, picked),
            request_ids=take_ids(self.request_ids, rows),
            impression_ids=take_ids(self.impression_ids, picked),
            order=None if self.order is None else self.order.index_select(0, picked),
            cursor=None,
        )

    def score(self, model: Callable[..., Any]) -> Any:
        """`model(*args, **kwargs, num_impressions=num_impressions)`: a rewritten model on this batch."""
        return model(*self.args, **self.kwargs, num_impressions=self.num_impressions)

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


def narrow(batch: RequestBatch, start: int, stop: int) -> RequestBatch:
    """Requests [start, stop) as views of the batch's tensors."""
    first, last = (int(batch.num_impressions[:n].sum()) for n in (start, stop))
    spans = {Provenance.REQUEST: (start, stop), Provenance.IMPRESSION: (first, last)}
    inputs = batch.layout.inputs
    atoms, statics = inputs.flatten(batch.args, batch.kwargs, Provenance.REQUEST)
    by_name = {a.name: t for a, t in zip(inputs.atoms, atoms)}
    keepers = {a.rows_in: a for a in inputs.atoms if a.kind == "values"}
    cut = [_cut(a, by_name, keepers, inputs, *spans[a.provenance]) for a in inputs.atoms]
    args, kwargs = inputs.unflatten(cut, Provenance.REQUEST, statics)

    def rows(tree: Any, a: int, b: int) -> Any:
        return pytree.tree_map(lambda v: v[a:b] if isinstance(v, Tensor) else v, tree)

    ids, impression_ids = batch.request_ids, batch.impression_ids
    return replace(
        batch,
        args=args,
        kwargs=kwargs,
        num_impressions=batch.num_impressions[start:stop],
        labels=rows(batch.labels, first, last),
        weights=rows(batch.weights, first, last),
        request_ids=None if ids is None else ids[start:stop],
        impression_ids=None if impression_ids is None else impression_ids[first:last],
        order=None if batch.order is None else batch.order[first:last],
        cursor=None,
    )


def _cut(
    atom: Atom, tensors: Mapping[str, Tensor], values: Mapping[str, Atom], inputs: Inputs, start: int, stop: int
) -> Tensor:
    """Rows [start, stop) of one atom."""
    tensor = tensors[atom.name]
    if atom.kind == "shared":
        return tensor
    if atom.kind in ("dense", "lengths"):
        return tensor[start:stop]
    keeper = atom if atom.kind != "values" else next(a for a in inputs.atoms if a.name == atom.rows_in)
    lengths = lengths_of(keeper, tensors[keeper.name], tensors[values[keeper.name].name])
    if atom.kind == "values":
        first = int(lengths[:start].sum())
        return tensor[first : first + int(lengths[start:stop].sum())]
    return as_kind(atom.kind, lengths[start:stop], tensor.dtype)


def _request_rows(index: int | slice | Sequence[int] | Tensor, count: int) -> Tensor:
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        if index.shape != (count,):
            raise InputError(f"a mask over requests must have shape [{count}], got {list(index.shape)}")
        return index.nonzero().flatten()
    if isinstance(index, slice):
        return torch.tensor(range(count)[index], dtype=torch.long)
    positions = torch.as_tensor([index] if isinstance(index, int) else index, dtype=torch.long).flatten()
    outside = positions[(positions < -count) | (positions >= count)]
    if outside.numel():
        raise IndexError(f"request {int(outside[0])} of a batch of {count}")
    return torch.where(positions < 0, positions + count, positions)


def take_rows(tree: Any, rows: Tensor) -> Any:
    """Rows `rows` of every tensor of a nesting."""
    return pytree.tree_map(lambda v: v.index_select(0, rows.to(v.device)) if isinstance(v, Tensor) else v, tree)


def take_ids(ids: Ids, rows: Tensor) -> Ids:
    """The ids at `rows`."""
    if isinstance(ids, Tensor):
        return ids.index_select(0, rows.to(ids.device))
    return None if ids is None else tuple(ids[i] for i in rows.tolist())


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
