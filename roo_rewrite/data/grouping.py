"""group: impression rows -> RequestBatch, checked to lose nothing.

Request ids need not be contiguous: requests stand in the order of their first impression, and the
impressions of each in their own order. `batch.restore(scores)` undoes that.
"""

from __future__ import annotations

import glob
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from roo_rewrite.data.batch import Ids, Layout, RequestBatch, take_ids, take_rows
from roo_rewrite.errors import DataError
from roo_rewrite.facts import Provenance
from roo_rewrite.features import FeatureSpec
from roo_rewrite.inputs import Atom, Columns, Inputs, Keyed, Leaf, atoms_rows, bind_inputs, has_rows, lengths_of
from roo_rewrite.ops.ragged import segment_positions

OnConflict = Literal["error", "first", "last", "demote"]
CONFLICT_CHOICES = ("error", "first", "last", "demote")


class DemotedFeature(UserWarning):
    """A request feature was found to vary within a request and was moved to the impression side."""


@dataclass(frozen=True)
class Grouping:
    """codes [I]: request of each row; order [I]: rows, request by request; counts [R]; first, last [R]: rows."""

    codes: Tensor
    order: Tensor
    counts: Tensor
    first: Tensor
    last: Tensor


@dataclass(frozen=True)
class Conflict:
    """Rows `row` and `first` of one request differ in `atom`; `columns` are those of a packed input that differ."""

    atom: Atom
    row: int
    first: int
    columns: tuple[int, ...]


def group(
    impression_batch: Any,
    request_id: Tensor | Sequence[int] | Sequence[str] | np.ndarray[Any, Any],
    spec: FeatureSpec,
    *,
    labels: Any = None,
    weights: Any = None,
    impression_id: Tensor | Sequence[int] | Sequence[str] | None = None,
    on_conflict: OnConflict = "error",
    model: Callable[..., Any] | None = None,
) -> RequestBatch:
    """An impression-level batch of I rows -> a RequestBatch, its request features once per request.

    impression_batch: what the impression-level model is called with. A dict is its keyword arguments; a
    tuple or list its positional ones; `(tuple, dict)` both; anything else the only argument. A model that
    takes one mapping is given `({...},)`.
    request_id: I integers or strings. labels, weights: any nesting of tensors with I rows.
    on_conflict: what to do where a request feature is not constant within a request: "error"; "first" or
    "last" takes that impression's value; "demote" moves the feature (of a packed input the columns at fault)
    to the impression side, warns, and the batch's `spec` says so.
    model: gives positional arguments the names of its `forward`, as in `rewrite`.

    Raises DataError for a missing id or a conflict, SpecError and InputError as `rewrite` does.
    """
    if on_conflict not in CONFLICT_CHOICES:
        raise DataError(f"on_conflict must be one of {CONFLICT_CHOICES}, got {on_conflict!r}")
    args, kwargs = as_call(impression_batch)
    forward = forward_of(model)
    inputs = bind_inputs(forward, args, kwargs, spec)
    atoms, statics = inputs.flatten(args, kwargs, Provenance.IMPRESSION)
    ids = as_ids(request_id, "request_id")
    _check_rows(inputs, atoms, len(ids))
    grouping = group_rows(ids)
    conflicts = find_conflicts(inputs, atoms, grouping)
    if conflicts and on_conflict == "error":
        raise DataError(_explain(conflicts, atoms, inputs, ids))
    if conflicts and on_conflict == "demote":
        inputs = bind_inputs(forward, args, kwargs, _demoted_spec(inputs, conflicts))
        atoms, statics = inputs.flatten(args, kwargs, Provenance.IMPRESSION)
    rows = grouping.last if on_conflict == "last" else grouping.first
    atoms = inputs.select(atoms, rows, [Provenance.REQUEST])
    atoms = inputs.select(atoms, grouping.order, [Provenance.IMPRESSION])
    out_args, out_kwargs = inputs.unflatten(atoms, Provenance.REQUEST, statics)
    impression_ids = None if impression_id is None else as_ids(impression_id, "impression_id")
    return RequestBatch(
        args=out_args,
        kwargs=out_kwargs,
        num_impressions=grouping.counts,
        layout=Layout(inputs),
        labels=take_rows(labels, grouping.order),
        weights=take_rows(weights, grouping.order),
        request_ids=take_ids(ids, grouping.first),
        impression_ids=take_ids(impression_ids, grouping.order),
        order=grouping.order,
    )


def as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`(args, kwargs)` of a batch, by the convention of `group`."""
    if isinstance(batch, Mapping) and all(isinstance(k, str) for k in batch):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2 and isinstance(batch[0], tuple) and isinstance(batch[1], dict):
            return batch[0], dict(batch[1])
        return tuple(batch), {}
    return (batch,), {}


def forward_of(model: Callable[..., Any] | None) -> Callable[..., Any]:
    """The callable whose signature names the arguments."""
    return getattr(model, "forward", model) if model is not None else any_call


def any_call(*args: Any, **kwargs: Any) -> None:
    """Stands for a model of unknown signature."""


def as_ids(ids: Any, what: str) -> Tensor | tuple[str, ...]:
    """An integer tensor [N] or a tuple of N strings. Raises DataError for a missing id or another type."""
    if isinstance(ids, Tensor):
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise DataError(f"{what} must be integers [N], got a {ids.dtype} tensor {list(ids.shape)}")
        return ids.long()
    values = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    for i, value in enumerate(values):
        if value is None or value != value:
            raise DataError(f"{what} of row {i} is missing; every impression must name its request")
    if all(isinstance(v, str) for v in values) and values:
        return tuple(values)
    if all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in values):
        return torch.tensor(values, dtype=torch.long)
    kinds = sorted({type(v).__name__ for v in values})
    raise DataError(f"{what} must be all integers or all strings, got {', '.join(kinds)}")


def group_rows(ids: Tensor | tuple[str, ...]) -> Grouping:
    """Rows by request, requests in the order of their first row."""
    if isinstance(ids, tuple):
        seen: dict[str, int] = {}
        codes = torch.tensor([seen.setdefault(v, len(seen)) for v in ids], dtype=torch.long)
        count = len(seen)
    else:
        unique, inverse = torch.unique(ids, return_inverse=True)
        count = int(unique.shape[0])
        rows = torch.arange(ids.shape[0], device=ids.device)
        first = torch.full((count,), ids.shape[0], device=ids.device).scatter_reduce(0, inverse, rows, "amin")
        codes = torch.argsort(torch.argsort(first)).index_select(0, inverse)
    order = torch.argsort(codes, stable=True)
    counts = torch.bincount(codes, minlength=count)
    ends = counts.cumsum(0)
    return Grouping(codes, order, counts, order[ends - counts], order[ends - 1])


def find_conflicts(inputs: Inputs, atoms: Sequence[Tensor], grouping: Grouping) -> list[Conflict]:
    """The first conflict of each request atom, by exact bits."""
    by_name = {a.name: t for a, t in zip(inputs.atoms, atoms)}
    base = grouping.first.index_select(0, grouping.codes)
    found = []
    for atom, tensor in zip(inputs.atoms, atoms):
        if atom.provenance is not Provenance.REQUEST or atom.kind not in ("dense", "values"):
            continue
        if atom.kind == "dense":
            bad = ~_same_bits(tensor, tensor.index_select(0, base))
        else:
            keeper = next(a for a in inputs.atoms if a.name == atom.rows_in)
            bad = _ragged_differs(tensor, lengths_of(keeper, by_name[atom.rows_in], tensor), base)
        cells = bad.flatten(1) if bad.ndim > 1 else bad.unsqueeze(1)
        wrong = cells.any(1).nonzero().flatten()
        if wrong.numel():
            row = int(wrong[0])
            columns = cells.any(0).nonzero().flatten().tolist() if atom.name.endswith(".request") else []
            found.append(Conflict(atom, row, int(base[row]), tuple(columns)))
    return found


def _same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise equality of bit patterns: NaN equals itself, 0.0 and -0.0 differ."""
    if a.is_floating_point() and a.element_size() in (2, 4, 8):
        as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        return a.contiguous().view(as_int) == b.contiguous().view(as_int)
    return a == b


def _ragged_differs(values: Tensor, lengths: Tensor, base: Tensor) -> Tensor:
    """bool[I]: row i of the jagged pair differs from row base[i]."""
    lengths = lengths.long()
    bad = lengths != lengths.index_select(0, base)
    starts = lengths.cumsum(0) - lengths
    rows = (~bad).nonzero().flatten()
    counts = lengths.index_select(0, rows)
    mine = segment_positions(starts.index_select(0, rows), counts)
    theirs = segment_positions(starts.index_select(0, base.index_select(0, rows)), counts)
    same = _same_bits(values.index_select(0, mine), values.index_select(0, theirs))
    wrong = (~same.flatten(1)).any(1) if same.ndim > 1 else ~same
    owners = torch.repeat_interleave(rows, counts)
    return bad.index_fill(0, owners[wrong], True)


def _explain(conflicts: Sequence[Conflict], atoms: Sequence[Tensor], inputs: Inputs, ids: Ids) -> str:
    lines = []
    for c in conflicts:
        assert ids is not None
        request = ids[c.row].item() if isinstance(ids, Tensor) else ids[c.row]
        old, new = (_value(inputs, atoms, c.atom, row) for row in (c.first, c.row))
        lines.append(
            f"{feature_name(inputs, c.atom)!r} of request {request!r}: {old} in row {c.first}, {new} in row {c.row}"
        )
    listing = "\n  ".join(lines)
    return (
        f"request features must be constant within a request:\n  {listing}\n"
        f'Make them impression features in the spec, or pass on_conflict="first", "last" or "demote".'
    )


def _value(inputs: Inputs, atoms: Sequence[Tensor], atom: Atom, row: int) -> str:
    picked = inputs.select(atoms, torch.tensor([row], device=atoms[0].device), [Provenance.REQUEST])
    value = next(t for a, t in zip(inputs.atoms, picked) if a.name == atom.name)
    text = str((value if atom.kind == "values" else value[0]).tolist())
    return text if len(text) <= 120 else text[:117] + "..."


def feature_name(inputs: Inputs, atom: Atom) -> str:
    """The name a spec gives the feature `atom` is part of."""
    leaf = next(leaf for leaf in inputs.leaves if atom in leaf.atoms)
    if isinstance(leaf, Keyed):
        return atom.name.rsplit(".", 1)[0]
    return leaf.name


def _demoted_spec(inputs: Inputs, conflicts: Sequence[Conflict]) -> FeatureSpec:
    """The spec with the features (or packed columns) at fault on the impression side."""
    names = {feature_name(inputs, c.atom) for c in conflicts}
    names |= {c.atom.rows_in for c in conflicts if c.atom.kind == "values"}
    names |= {a.name for a in inputs.atoms if a.kind == "values" and a.rows_in in names}
    sides: dict[Provenance, list[str]] = {Provenance.REQUEST: [], Provenance.IMPRESSION: []}
    columns = dict(inputs.spec.columns)
    for leaf in inputs.leaves:
        if isinstance(leaf, Columns):
            bad = {column for c in conflicts if c.atom in leaf.atoms for column in c.columns}
            key = inputs.spec.column_key(leaf.name, [other.name for other in inputs.leaves])
            if bad and key is not None:
                columns[key] = _without(leaf, bad)
            continue
        for name, side in _feature_sides(leaf):
            sides[Provenance.IMPRESSION if name in names else side].append(glob.escape(name))
    warnings.warn(
        f"not constant within a request, moved to the impression side: {', '.join(sorted(names))}",
        DemotedFeature,
        stacklevel=3,
    )
    return replace(
        inputs.spec, request=sides[Provenance.REQUEST], impression=sides[Provenance.IMPRESSION], columns=columns
    )


def _feature_sides(leaf: Leaf) -> list[tuple[str, Provenance]]:
    if isinstance(leaf, Keyed):
        return [(f"{leaf.name}.{key}", side) for key, side in zip(leaf.keys, leaf.sides)]
    return [(leaf.name, leaf.atoms[0].provenance)] if leaf.atoms else []


def _without(leaf: Columns, bad: set[int]) -> dict[str, list[tuple[int, int]]]:
    """The column ranges of `leaf` without the request columns numbered in `bad` (counted among request columns)."""
    request = [c for a, b in leaf.request for c in range(a, b)]
    keep = {c for i, c in enumerate(request) if i not in bad}
    impression = [(c, c + 1) for c in range(leaf.width) if c not in keep]
    return {"impression": impression}


def _check_rows(inputs: Inputs, atoms: Sequence[Tensor], ids: int) -> None:
    rows = {a.name: atoms_rows(a, t) for a, t in zip(inputs.atoms, atoms) if has_rows(a) and atoms_rows(a, t) != ids}
    if rows:
        raise DataError(f"there are {ids} request ids, but these inputs have other numbers of rows: {rows}")
