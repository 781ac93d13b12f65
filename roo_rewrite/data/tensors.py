"""Arrow columns as tensors, zero-copy where the column is plain numbers without nulls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.dlpack import from_dlpack

from roo_rewrite.data.batch import Layout, RequestBatch
from roo_rewrite.data.grouping import any_call, as_call
from roo_rewrite.data.table import IMPRESSIONS, Columns
from roo_rewrite.errors import DataError
from roo_rewrite.facts import Provenance
from roo_rewrite.features import FeatureSpec
from roo_rewrite.inputs import Atom, Dense, Inputs, Leaf, Path, Static, parameters_of

LENGTHS = "{}_lengths"
Call = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Wanted:
    """What a reader hands out. `aligned`: list column -> the one whose lengths it shares."""

    features: tuple[str, ...]
    labels: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    impression_id: str | None = None
    fill: Mapping[str, Any] | None = None
    aligned: Mapping[str, str] | None = None
    call: Call | None = None

    @property
    def columns(self) -> list[str]:
        """Every column to read."""
        extra = (self.impression_id,) if self.impression_id else ()
        return list(dict.fromkeys([*self.features, *self.labels, *self.weights, *extra]))


def to_batch(table: pa.Table, columns: Columns, wanted: Wanted) -> RequestBatch:
    """A request-level table -> RequestBatch. Raises DataError for a column that cannot be a tensor."""
    lists = table[IMPRESSIONS].combine_chunks()
    struct = lists.flatten()
    fields = {struct.type.field(i).name: column for i, column in enumerate(struct.flatten())}
    sources = {name: fields[name] if name in fields else table[name].combine_chunks() for name in wanted.columns}
    features: dict[str, Tensor] = {}
    atoms: dict[int, Atom] = {}
    for name in wanted.features:
        side = Provenance.REQUEST if name in columns.request else Provenance.IMPRESSION
        _add_feature(features, atoms, name, side, sources, wanted)
    args, kwargs = as_call(wanted.call(features) if wanted.call else features)
    ids = as_tensor(columns.request_id, table[columns.request_id].combine_chunks(), {}, strings=True)
    item = wanted.impression_id
    return RequestBatch(
        args=args,
        kwargs=kwargs,
        num_impressions=as_tensor("", pc.list_value_length(lists), {"": 0}).long(),
        layout=Layout(_inputs(args, kwargs, atoms)),
        labels={n: as_tensor(n, sources[n], wanted.fill) for n in wanted.labels} or None,
        weights={n: as_tensor(n, sources[n], wanted.fill) for n in wanted.weights} or None,
        request_ids=ids,
        impression_ids=as_tensor(item, sources[item], wanted.fill, strings=True) if item else None,
    )


def _add_feature(
    features: dict[str, Tensor],
    atoms: dict[int, Atom],
    name: str,
    side: Provenance,
    sources: Mapping[str, pa.Array],
    wanted: Wanted,
) -> None:
    column = sources[name]
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        features[name] = as_tensor(name, column, wanted.fill)
        atoms[id(features[name])] = Atom(name, side)
        return
    other = (wanted.aligned or {}).get(name, name)
    keeper = LENGTHS.format(other)
    features[name] = as_tensor(name, column.flatten(), wanted.fill)
    atoms[id(features[name])] = Atom(name, side, "values", keeper)
    if other == name:
        features[keeper] = _lengths(column)
        atoms[id(features[keeper])] = Atom(keeper, side, "lengths")
    elif not torch.equal(_lengths(column), _lengths(sources[other])):
        raise DataError(f"lists {name!r} and {other!r} differ in length; leave them out of aligned")


def _lengths(column: pa.Array) -> Tensor:
    """int64 [rows]; 0 for a null list."""
    lengths: Tensor = as_tensor("", pc.fill_null(pc.list_value_length(column), 0), None)
    return lengths.long()


def as_tensor(name: str, column: pa.Array, fill: Mapping[str, Any] | None, strings: bool = False) -> Any:
    """The column's values. Nulls are NaN in floats, `fill[name]` elsewhere; `strings` may come as a tuple."""
    kind = column.type
    if strings and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return tuple(column.to_pylist())
    if pa.types.is_fixed_size_list(kind) and not column.null_count:
        return as_tensor(name, column.flatten(), fill).reshape(len(column), kind.list_size)
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    if not (number or pa.types.is_temporal(kind)):
        raise DataError(f"column {name!r} is {kind}, which is no tensor: encode it, or leave it out of columns")
    if column.null_count:
        given = (fill or {}).get(name, float("nan") if pa.types.is_floating(kind) else None)
        if given is None:
            raise DataError(f"column {name!r} is {kind} and has nulls: say what they become, fill={{{name!r}: ...}}")
        column = pc.fill_null(column, pa.scalar(given, kind))
    if pa.types.is_temporal(kind):
        column = column.view(pa.int64() if kind.bit_width == 64 else pa.int32())
    if pa.types.is_boolean(kind):
        return torch.from_numpy(np.array(column.to_numpy(zero_copy_only=False)))
    return from_dlpack(column) if len(column) else torch.empty(0, dtype=_dtype(column.type))


def _dtype(kind: pa.DataType) -> torch.dtype:
    return torch.from_numpy(np.empty(0, kind.to_pandas_dtype())).dtype


def _inputs(args: Sequence[Any], kwargs: Mapping[str, Any], atoms: Mapping[int, Atom]) -> Inputs:
    """The calling convention of a call made of the columns' own tensors."""
    with_keys, tree = pytree.tree_flatten_with_path((args, kwargs))
    paths = tuple(_path(keys) for keys, _ in with_keys)
    named = [(".".join(str(key) for _, key in path), value) for path, (_, value) in zip(paths, with_keys)]
    names = {id(value): name for name, value in named}
    keepers = {a.name: key for key, a in atoms.items()}
    leaves: list[Leaf] = []
    sides: dict[Provenance, list[str]] = {Provenance.REQUEST: [], Provenance.IMPRESSION: []}
    jagged: dict[str, str] = {}
    for name, value in named:
        atom = atoms.get(id(value))
        if atom is None:
            if isinstance(value, Tensor):
                raise DataError(f"call made a new tensor {name!r}; it may only arrange the columns it is given")
            leaves.append(Static(name, value))
            continue
        keeper = names[keepers[atom.rows_in]] if atom.kind == "values" else ""
        leaves.append(Dense(name, (Atom(name, atom.provenance, atom.kind, keeper),)))
        sides[atom.provenance].append(name)
        if keeper:
            jagged[name] = keeper
    spec = FeatureSpec(sides[Provenance.REQUEST], sides[Provenance.IMPRESSION], jagged=jagged)
    return Inputs(spec, tree, tuple(leaves), paths, parameters_of(any_call, args, kwargs))


def _path(keys: tuple[Any, ...]) -> Path:
    """A pytree path in (args, kwargs) as a path from the parameters of `any_call`."""
    steps = [
        ("attribute", k.name) if hasattr(k, "name") else ("item", getattr(k, "key", getattr(k, "idx", k))) for k in keys
    ]
    return tuple(steps[1:]) if steps[0][1] == 1 else (("item", "args"), *steps[1:])
