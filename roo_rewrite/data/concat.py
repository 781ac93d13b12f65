"""concat: one batch of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from roo_rewrite.data.batch import Ids, RequestBatch
from roo_rewrite.errors import DataError
from roo_rewrite.facts import Provenance
from roo_rewrite.inputs import Atom, Inputs, as_kind, lengths_of


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
