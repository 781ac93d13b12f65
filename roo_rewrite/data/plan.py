"""The grouping itself, as SQL: which request each impression belongs to, and in which order requests stand.

The SQL reads only the keys (request id, partition, user, time), so that nothing wide passes through the engine and
every operator of it (group by, join, sort) can spill: no list is ever aggregated. The same text runs on
DuckDB and on Spark. Requests are ordered by partition, then user, then time, then first impression: a user's
requests stand together, for histories to be stored once and for statistics to prune.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from roo_rewrite.data.source import Source, read_row_group
from roo_rewrite.data.table import Columns
from roo_rewrite.errors import DataError

ORDER_SQL = """
SELECT k.pos AS pos, r.ordinal AS ordinal
FROM roo_keys k JOIN (
    SELECT id, row_number() OVER (ORDER BY {order}first_pos) - 1 AS ordinal
    FROM (SELECT id, min(pos) AS first_pos{keys} FROM roo_keys GROUP BY id) g
) r ON k.id = r.id
"""


def order_sql(columns: Columns) -> str:
    """(pos, ordinal) for every row of the relation `roo_keys(pos, id[, part_key][, user_key][, time_key])`."""
    keys = [key for key in key_columns(columns) if key != "id"]
    return ORDER_SQL.format(
        order="".join(f"{k} NULLS FIRST, " for k in keys), keys="".join(f", min({k}) AS {k}" for k in keys)
    )


def key_columns(columns: Columns) -> dict[str, str]:
    """Column of `roo_keys` -> column of the log."""
    order = {"part_key": columns.partition, "user_key": columns.user, "time_key": columns.time}
    named = {"id": columns.request_id, **order}
    return {k: v for k, v in named.items() if v is not None}


def quoted(name: str) -> str:
    """An SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def duck_ordinals(source: Source, columns: Columns, work: Path, memory: int, threads: int | None) -> Iterator[Any]:
    """(positions, ordinals) in batches, by DuckDB within `memory` bytes."""
    with duckdb.connect(config=duck_settings(work, memory, threads)) as con:
        con.execute("SET preserve_insertion_order = false")
        starts = pa.table({"name": list(source.files), "start": pa.array(source.file_starts(), pa.int64())})
        con.register("roo_files", starts)
        selected = ", ".join(f"f.{quoted(c)} AS {k}" for k, c in key_columns(columns).items())
        con.execute(
            f"CREATE TEMP VIEW roo_keys AS SELECT s.start + f.file_row_number AS pos, {selected} "
            f"FROM read_parquet({texts(source.files)}, filename = true, file_row_number = true) f "
            "JOIN roo_files s ON s.name = f.filename"
        )
        try:
            for batch in con.sql(order_sql(columns)).to_arrow_reader(1 << 16):
                yield batch.column(0).to_numpy(), batch.column(1).to_numpy()
        except duckdb.Error as e:
            check_keys(source, columns)
            raise DataError(f"DuckDB could not group the requests: {e}") from e


def duck_settings(work: Path, memory: int, threads: int | None = None) -> dict[str, Any]:
    """DuckDB within `memory` bytes, spilling into `work`."""
    settings: dict[str, Any] = {"memory_limit": f"{max(memory >> 20, 64)}MiB", "temp_directory": str(work / "spill")}
    return settings | ({"threads": threads} if threads else {})


def texts(names: tuple[str, ...]) -> str:
    """An SQL list of strings."""
    return "[" + ", ".join("'" + n.replace("'", "''") + "'" for n in names) + "]"


@contextlib.contextmanager
def duck_errors(source: Source, what: str) -> Iterator[None]:
    """DuckDB's error as a DataError; where a column of `source` is corrupt, the one that names it."""
    try:
        yield
    except duckdb.Error as e:
        source.check()
        raise DataError(f"{what}: {e}") from e


def check_keys(source: Source, columns: Columns) -> None:
    """Reads the key columns of every row group. Raises DataError at one that is corrupt or lacks a request id."""
    names = list(dict.fromkeys(key_columns(columns).values()))
    for unit in source.units:
        for batch in read_row_group(source.files[unit.file], unit.row_group, names, 1 << 16):
            check_ids(batch, columns.request_id, source.name(unit))


def check_ids(batch: pa.RecordBatch, request_id: str, where: str) -> None:
    """Raises DataError where an id is null."""
    missing = batch[request_id].null_count
    if missing:
        raise DataError(
            f"{where}, column {request_id!r}: {missing} impressions have no request id; "
            "drop them or give each an id of its own"
        )


def write_ordinals(batches: Iterator[Any], rows: int, path: Path) -> None:
    """The ordinal of every row, as `.npy`; -1 where the id is missing.

    Written before it is mapped: a full disk is an error in a write, and the end of the process in a map.
    """
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        header = {"descr": "<i8", "fortran_order": False, "shape": (rows,)}
        np.lib.format.write_array_header_1_0(file, header)
        for at in range(0, rows, 1 << 20):
            file.write(np.full(min(rows - at, 1 << 20), -1, "<i8").tobytes())
    out = np.load(partial, mmap_mode="r+")
    for positions, ordinals in batches:
        out[positions] = ordinals
    out.flush()
    del out
    partial.rename(path)


def request_counts(ordinals: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Impressions of each request. int64[R]."""
    total = np.zeros(0, np.int64)
    for at in range(0, len(ordinals), 1 << 20):
        chunk = np.bincount(ordinals[at : at + (1 << 20)][ordinals[at : at + (1 << 20)] >= 0])
        if len(chunk) > len(total):
            total = np.concatenate([total, np.zeros(len(chunk) - len(total), np.int64)])
        total[: len(chunk)] += chunk
    return total
