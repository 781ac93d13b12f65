"""Request-level data set -> impression log: the exact inverse of `to_requests`.

Rows come in the log's own order where it was kept, else request by request, each in its own order. Where
the log's order was kept and the log does not fit in memory, each part is cut into slices by row number
(resumable), and the slices are sorted one after the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from roo_rewrite.data import shuffle
from roo_rewrite.data.engines import DEFAULT_MEMORY, Progress, silent
from roo_rewrite.data.nest import impression_rows, plain_type
from roo_rewrite.data.store import part_meta, read_group
from roo_rewrite.data.table import POSITION, Manifest
from roo_rewrite.data.tasks import GROUP_IMPRESSIONS
from roo_rewrite.data.workdir import fingerprint, open_parts, sync, working
from roo_rewrite.errors import DataError


def to_impressions(
    requests: str | Path,
    out: str | Path,
    *,
    level: int = 9,
    memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
) -> int:
    """Writes the impressions of data set `requests` to Parquet file `out`; returns their number.

    level: zstd level. memory: bytes this may use above the interpreter's own. Raises DataError with the
    file and row group; then `out` is as it was.
    """
    out = Path(out)
    if out.is_dir():
        raise DataError(f"{out} is a directory; give the name of the Parquet file to write")
    manifest, paths = open_parts(requests)
    with working(out, {"parts": fingerprint(tuple(paths)), "memory": memory}) as work:
        tables = _in_order(manifest, paths, work, memory, progress or silent)
        partial = work / "out.parquet"
        rows = _write(partial, tables, manifest.columns.schema, level, _rows_within(manifest, memory // 40))
        if rows != manifest.impressions:
            raise DataError(f"{requests} promises {manifest.impressions} impressions, its parts hold {rows}")
        sync(partial)
        os.replace(partial, out)
    return rows


def _rows_within(manifest: Manifest, size: int) -> int:
    """Impression rows that fit in `size` bytes."""
    whole = int(manifest.provenance["memory"])
    return int(np.clip(size * manifest.impressions // max(1, whole), 64, GROUP_IMPRESSIONS))


def _in_order(manifest: Manifest, paths: list[str], work: Path, memory: int, progress: Progress) -> Iterator[pa.Table]:
    rows = _rows_within(manifest, memory // 40)
    columns, pool = manifest.columns, pa.default_memory_pool()
    if not columns.position:
        for i, path in enumerate(paths):
            yield from _expanded(path, rows)
            progress("read", i + 1, len(paths), manifest.parts[i].impressions)
        return
    if int(manifest.provenance["memory"]) <= memory // 4:
        whole = [t for path in paths for t in _expanded(path, rows)]
        yield _by_position(pa.concat_tables(whole))
        return
    edges = np.append(np.arange(0, manifest.impressions, 2 * rows), manifest.impressions)
    schema = pa.schema([pa.field(f.name, plain_type(f.type)) for f in columns.schema])
    schema = schema.append(pa.field(POSITION, pa.int64()))
    slices = [work / f"{i:05d}.slices" for i in range(len(paths))]
    for i, (path, target) in enumerate(zip(paths, slices)):
        if not shuffle.is_written(target):
            with shuffle.SliceWriter(target, schema, POSITION, edges) as writer:
                for table in _expanded(path, rows):
                    writer.add(_by_position(table, keep=True))
                    pool.release_unused()
        progress("map", i + 1, len(paths), manifest.parts[i].impressions)
    for bucket in range(len(edges) - 1):
        yield _by_position(pa.concat_tables(shuffle.read_slices(slices, schema, bucket)))
        pool.release_unused()
        progress("write", bucket + 1, len(edges) - 1, int(edges[bucket + 1] - edges[bucket]))


def _by_position(table: pa.Table, keep: bool = False) -> pa.Table:
    table = table.take(pa.array(np.argsort(table[POSITION].to_numpy(), kind="stable")))
    return table if keep else table.drop_columns([POSITION])


def _expanded(path: str, rows: int) -> Iterator[pa.Table]:
    """The impressions of a part, at most `rows` at a time."""
    meta = part_meta(path)
    for g in range(meta.row_groups):
        yield from impression_rows(read_group(path, meta, g), meta.columns, rows)


def _write(path: Path, tables: Iterable[pa.Table], schema: pa.Schema, level: int, rows: int) -> int:
    total = 0
    with pq.ParquetWriter(path, schema, compression="zstd", compression_level=level, write_page_checksum=True) as out:
        for table in regrouped(tables, rows):
            out.write_table(_as_logged(table, schema), row_group_size=max(1, table.num_rows))
            total += table.num_rows
    return total


def regrouped(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows, `rows` to a table but for the last."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        at = 0
        while at < table.num_rows:
            piece = table.slice(at, rows - count)
            held.append(piece)
            at, count = at + piece.num_rows, count + piece.num_rows
            if count == rows:
                yield pa.concat_tables(held)
                held, count = [], 0
    if held:
        yield pa.concat_tables(held)


def _as_logged(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The log's own types and column order."""
    return table if table.schema == schema else table.select(schema.names).cast(schema)
