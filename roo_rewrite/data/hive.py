"""Partitions: parts in `column=value` directories, as Hive, DuckDB, Spark and pyarrow lay them out.

The column is not in the files. Its value is in the directory's name for other readers, and as text in the part's
own metadata for ours, so that no name need be taken apart: types, nulls and odd characters come back.
"""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from roo_rewrite.data.nest import differs, plain_type
from roo_rewrite.errors import DataError

NULL = "__HIVE_DEFAULT_PARTITION__"
MOST = 1000


def check_type(name: str, kind: pa.DataType) -> None:
    """Raises DataError where values of type `kind` cannot name directories."""
    kind = plain_type(kind)
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (text or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_date32(kind)):
        raise DataError(f"column {name!r} is {kind}; partition by an integer, string, boolean or date32 column")


def runs(column: pa.Array) -> Iterator[tuple[int, int, str | None]]:
    """(start, stop, value as text) of each run of equal values. Raises DataError where there are too many."""
    starts = [0, *(np.flatnonzero(differs(column[:-1], column[1:])) + 1).tolist(), len(column)]
    if len(starts) > MOST:
        raise DataError(f"the partition column changes {len(starts) - 2:,} times in one part; choose a coarser one")
    texts = column.take(pa.array(starts[:-1])).cast(pa.string()).to_pylist()
    yield from zip(starts, starts[1:], texts)


def directory(column: str, text: str | None) -> str:
    """`column=value`, both percent-encoded."""
    if text == NULL:
        return f"{quote(column, safe='')}=%5F{text[1:]}"
    return f"{quote(column, safe='')}={NULL if text is None else quote(text, safe='')}"


def value(text: str | None, kind: pa.DataType) -> pa.Scalar:
    """Inverse of the text: a scalar of the plain type of `kind`."""
    return pa.scalar(text, pa.string()).cast(plain_type(kind))
