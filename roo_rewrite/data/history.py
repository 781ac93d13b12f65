"""Histories stored once: what each row adds to the row before.

Rows of one user stand together in time order, and a history is a window that moves on over the user's events:

    row     history         #new        #len
    0       a b c d         a b c d     4
    1       b c d e         e           4
    2       c d e f g       f g         5

The values of `#new`, one after the other, are a pool; row r's history is the last `#len` values of the pool up to
the end of its own. That is exact whatever the rows hold: where nothing overlaps, `#new` is the whole history.
A row group starts afresh. `newest-first` histories are stored reversed. A null history has a null `#len`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

NEW, LEN = "#new", "#len"
MAX_DROP = 4096
Array = npt.NDArray[Any]


def can_encode(kind: pa.DataType) -> bool:
    """Lists of plain values. Lists of lists and of structs are stored as they are."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    value = kind.value_type
    return bool(pa.types.is_primitive(value) or pa.types.is_string(value) or pa.types.is_large_string(value))


def encode(history: pa.Array, newest_first: bool) -> tuple[pa.Array, pa.Array]:
    """A list array -> (`#new`, `#len`)."""
    offsets, values = _parts(history)
    if newest_first:
        values = values.take(pa.array(_reversed(offsets)))
    lengths = np.diff(offsets)
    shared = _overlaps(_codes(values), offsets)
    fresh = lengths - shared
    picked = ranges(offsets[:-1] + shared, fresh)
    new_offsets = np.concatenate([[0], np.cumsum(fresh)])
    new = _list_like(history.type, new_offsets, values.take(pa.array(picked)))
    valid = history.is_valid().to_numpy(zero_copy_only=False)
    return new, pa.array(lengths.astype(np.int32), mask=~valid)


def decode(new: pa.Array, length: pa.Array, kind: pa.DataType, newest_first: bool) -> pa.Array:
    """Inverse of `encode`; `kind` is the history's own type."""
    ends, pool = _parts(new)
    lengths = pc.fill_null(length, 0).to_numpy().astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    at = ranges(ends[1:] - lengths, lengths)
    if newest_first:
        at = at[_reversed(offsets)]
    mask = None if length.null_count == 0 else length.is_null()
    return _list_like(kind, offsets, pool.take(pa.array(at)), mask)


def saving(history: pa.Array, newest_first: bool) -> int:
    """Values that `encode` need not store."""
    offsets, values = _parts(history)
    if newest_first:
        values = values.take(pa.array(_reversed(offsets)))
    return int(_overlaps(_codes(values), offsets).sum())


def ranges(starts: Array, lengths: Array) -> Array:
    """`[starts[i], starts[i] + lengths[i])` for each i, one after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    out: Array = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    return out


def _parts(lists: pa.Array) -> tuple[Array, pa.Array]:
    """Offsets from 0, null rows empty, and the values they cut."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
    return np.concatenate([[0], np.cumsum(lengths)]), lists.flatten()


def _list_like(kind: pa.DataType, offsets: Array, values: pa.Array, mask: pa.Array | None = None) -> pa.Array:
    large = pa.types.is_large_list(kind)
    maker, width = (pa.LargeListArray, pa.int64()) if large else (pa.ListArray, pa.int32())
    return maker.from_arrays(pa.array(offsets, width), values, type=kind, mask=mask)


def _reversed(offsets: Array) -> Array:
    """Positions of the values with every list turned round."""
    lengths = np.diff(offsets)
    total = int(offsets[-1])
    out: Array = np.repeat(offsets[:-1] + offsets[1:] - 1, lengths) - np.arange(total)
    return out


def _codes(values: pa.Array) -> Array:
    """uint64 per value, equal exactly where the values are the same bits (or both null)."""
    kind = values.type
    if not pa.types.is_primitive(kind) or pa.types.is_boolean(kind):
        indices = pc.dictionary_encode(values, null_encoding="encode").indices
        return np.asarray(indices.to_numpy().astype(np.uint64))
    width = kind.bit_width // 8
    start = values.offset * width
    data = values.buffers()[1]
    raw = np.frombuffer(data, np.uint8)[start : start + len(values) * width] if data else np.zeros(0, np.uint8)
    codes = raw.view(f"u{width}").astype(np.uint64)
    if values.null_count:
        valid = values.is_valid().to_numpy(zero_copy_only=False)
        both = np.stack([np.where(valid, codes, 0), valid.astype(np.uint64)])
        codes = np.unique(both, axis=1, return_inverse=True)[1].reshape(-1).astype(np.uint64)
    return codes


def _overlaps(codes: Array, offsets: Array) -> Array:
    """For each row the most values its head shares with the tail of the row before.

    A running polynomial sum (mod 2^64) makes a comparison of two ranges one product; what it finds is
    then compared value by value, so a collision costs space, not truth.
    """
    lengths = np.diff(offsets)
    shared = np.zeros(len(lengths), np.int64)
    if len(lengths) < 2 or not len(codes):
        return shared
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(len(codes) + 1, 0x9E3779B97F4A7C15, np.uint64))
        sums = np.concatenate([[np.uint64(0)], np.cumsum(_mixed(codes) * powers[:-1])])
        before, here = lengths[:-1], lengths[1:]
        drop = np.maximum(before - here, 0)
        active = np.flatnonzero((before > 0) & (here > 0))
        for _ in range(MAX_DROP):
            if not len(active):
                break
            size = before[active] - drop[active]
            tail, head = offsets[active] + drop[active], offsets[active + 1]
            left = (sums[tail + size] - sums[tail]) * powers[head - tail]
            hit = left == (sums[head + size] - sums[head]) * powers[0]
            shared[active[hit] + 1] = size[hit]
            drop[active] += 1
            active = active[~hit & (drop[active] < before[active])]
    return _verified(codes, offsets, shared)


def _verified(codes: Array, offsets: Array, shared: Array) -> Array:
    rows = np.flatnonzero(shared)
    sizes = shared[rows]
    same = codes[ranges(offsets[rows] - sizes, sizes)] == codes[ranges(offsets[rows], sizes)]
    wrong = np.repeat(rows, sizes)[~same]
    shared[wrong] = 0
    return shared


def _mixed(codes: Array) -> Array:
    """Spreads small codes over 64 bits."""
    mixed = codes + np.uint64(0x632BE59BD9B4E019)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    out: Array = mixed ^ (mixed >> np.uint64(31))
    return out
