"""Rows of impressions -> rows of requests, and back; checked bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from roo_rewrite.data.history import ranges
from roo_rewrite.data.table import IMPRESSIONS, POSITION, Columns

ORDINAL = "__ordinal"
CACHED_ROWS = 4096
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Clash:
    """A request column differs between two rows of one request."""

    column: str
    request: Any
    values: tuple[Any, Any]

    def __str__(self) -> str:
        first, second = (_short(v) for v in self.values)
        return f"{self.column!r} of request {self.request!r}: {first} and {second}"


def request_schema(columns: Columns) -> pa.Schema:
    """Request columns, the request's ordinal and the row it was seen in."""
    return _keyed(columns, columns.request)


def impression_schema(columns: Columns) -> pa.Schema:
    """Impression columns, the request's ordinal and the row."""
    return _keyed(columns, columns.impression)


def _keyed(columns: Columns, names: tuple[str, ...]) -> pa.Schema:
    fields = [pa.field(c, plain_type(columns.schema.field(c).type)) for c in names]
    return pa.schema([*fields, pa.field(ORDINAL, pa.int64()), pa.field(POSITION, pa.int64())])


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries, whose codes cannot be sliced and joined."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(plain_type(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(f.name, plain_type(f.type)) for f in kind])
    return kind


def plain(table: pa.Table) -> pa.Table:
    """The table with plain types."""
    schema = pa.schema([pa.field(f.name, plain_type(f.type)) for f in table.schema])
    return table if schema == table.schema else table.cast(schema)


def by_request(ordinals: Array, positions: Array) -> tuple[Array, Array]:
    """(rows sorted by request and position, where each request starts among them)."""
    order = np.lexsort((positions, ordinals))
    starts = np.flatnonzero(np.diff(ordinals[order], prepend=-1))
    return order, starts


def _shown(scalar: pa.Scalar) -> Any:
    """A value for a message; nanoseconds, which Python has not, as their count."""
    return scalar.value if pa.types.is_timestamp(scalar.type) and scalar.type.unit == "ns" else scalar.as_py()


def once(table: pa.Table, columns: Columns, last: bool, check: bool) -> tuple[pa.Table, list[Clash]]:
    """One row per request of a table with ordinals, its first (or last) by position; and what differs, if checked."""
    order, starts = by_request(table[ORDINAL].to_numpy(), table[POSITION].to_numpy())
    counts = np.diff(starts, append=len(order))
    chosen = order[starts + counts - 1] if last else order[starts]
    others, base = _pairs(order, starts, counts)
    clashes = []
    if check and len(others):
        for name in columns.request:
            at = _first_difference(_whole(table[name]), others, base)
            if at is not None:
                rows = (int(base[at]), int(others[at]))
                values = tuple(_shown(table[name][r]) for r in rows)
                clashes.append(Clash(name, table[columns.request_id][rows[0]].as_py(), (values[0], values[1])))
    return table.take(pa.array(chosen)), clashes


def _first_difference(column: pa.Array, rows: Array, base: Array) -> int | None:
    """Where `column[rows]` and `column[base]` first differ. In pieces that stay in the cache."""
    for at in range(0, len(rows), CACHED_ROWS):
        piece = slice(at, at + CACHED_ROWS)
        bad = differs(column.take(pa.array(rows[piece])), column.take(pa.array(base[piece])))
        if bad.any():
            return at + int(np.flatnonzero(bad)[0])
    return None


def _pairs(order: Array, starts: Array, counts: Array) -> tuple[Array, Array]:
    """Every row but the first of its request, and that first row."""
    others = order[ranges(starts + 1, counts - 1)]
    return others, np.repeat(order[starts], counts - 1)


def nest(requests: pa.Table, impressions: pa.Table, columns: Columns) -> pa.Table:
    """One row per request, sorted by ordinal; `impressions` sorted alike. Drops the ordinals."""
    ordinals = impressions[ORDINAL].to_numpy()
    starts = np.searchsorted(ordinals, requests[ORDINAL].to_numpy())
    offsets = pa.array(np.append(starts, len(ordinals)), pa.int32())
    fields = [_whole(impressions[c]) for c in columns.fields]
    schema = impressions.schema
    struct = pa.StructArray.from_arrays(fields, fields=[schema.field(c) for c in columns.fields])
    body = requests.select(list(columns.request))
    return body.append_column(IMPRESSIONS, pa.ListArray.from_arrays(offsets, struct))


def impression_rows(table: pa.Table, columns: Columns, rows: int, ordered: bool = False) -> Iterator[pa.Table]:
    """Inverse of `nest`, at most `rows` impressions at a time: the log's columns, and positions if kept.

    ordered: by position, not request by request. A wide request column is then copied once all the same.
    """
    lists = _whole(table[IMPRESSIONS])
    owners = np.repeat(np.arange(len(lists)), pc.list_value_length(lists).to_numpy())
    struct = lists.flatten()
    order = np.argsort(pc.struct_field(struct, POSITION).to_numpy(), kind="stable") if ordered else None
    names = [*columns.schema.names, *[POSITION] * columns.position]
    for at in range(0, len(owners), rows):
        picked = slice(at, at + rows) if order is None else order[at : at + rows]
        taken = pa.array(owners[picked])
        piece = struct.slice(at, rows) if order is None else struct.take(pa.array(picked))
        parts = dict(zip((f.name for f in piece.type), piece.flatten()))
        parts |= {c: table[c].take(taken) for c in columns.request}
        yield pa.table({n: parts[n] for n in names})


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """One array of all chunks."""
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def differs(a: pa.Array, b: pa.Array) -> Array:
    """bool per row: the values are not the same bits. Nulls equal nulls, a NaN equals itself."""
    if isinstance(a, pa.ExtensionArray):
        a, b = a.storage, b.storage
    if pa.types.is_dictionary(a.type):
        a, b = a.dictionary_decode(), b.dictionary_decode()
    kind = a.type
    valid = a.is_valid().to_numpy(zero_copy_only=False)
    bad: Array = valid != b.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_null(kind):
        return bad
    if pa.types.is_struct(kind):
        inner = [differs(x, y) for x, y in zip(a.flatten(), b.flatten())]
        return np.asarray(np.logical_or.reduce([bad, *inner]))
    if pa.types.is_map(kind):
        a, b = (m.cast(pa.list_(pa.struct([kind.key_field, kind.item_field]))) for m in (a, b))
        return differs(a, b)
    if pa.types.is_fixed_size_list(kind):
        a, b = (x.cast(pa.list_(kind.value_type)) for x in (a, b))
        return differs(a, b)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _lists_differ(a, b, bad)
    if pa.types.is_floating(kind):
        width = f"int{kind.bit_width}"
        same = _numpy(a).view(width) == _numpy(b).view(width)
        return np.asarray(bad | (valid & ~bad & ~same))
    return np.asarray(bad | pc.fill_null(pc.not_equal(a, b), False).to_numpy(zero_copy_only=False))


def _numpy(a: pa.Array) -> Array:
    out: Array = pc.fill_null(a, pa.scalar(0, a.type)).to_numpy(zero_copy_only=False)
    return out


def _lists_differ(a: pa.Array, b: pa.Array, bad: Array) -> Array:
    sizes = [pc.fill_null(pc.list_value_length(x), 0).to_numpy() for x in (a, b)]
    bad = bad | (sizes[0] != sizes[1])
    good = np.flatnonzero(~bad)
    inner = differs(*(x.take(pa.array(good)).flatten() if bad.any() else x.flatten() for x in (a, b)))
    if inner.any():
        bad[np.repeat(good, sizes[0][good])[inner]] = True
    return bad


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
