"""Request-level data set -> impression log: the exact inverse of `to_requests`.

Rows come in the log's own order where it was kept, else request by request, each in its own order. Where
the log's order was kept and the log does not fit in memory, each part is cut into slices by row number
(resumable), and the slices are sorted one after the other.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from roo_rewrite.data import shuffle
from roo_rewrite.data.engines import DEFAULT_MEMORY, Engine, Local, Progress, silent
from roo_rewrite.data.nest import impression_rows, plain_type
from roo_rewrite.data.store import part_meta, read_group
from roo_rewrite.data.table import POSITION, Columns, Manifest
from roo_rewrite.data.tasks import GROUP_IMPRESSIONS, PART_BYTES
from roo_rewrite.data.workdir import fingerprint, open_parts, sync, working
from roo_rewrite.errors import DataError


@dataclass(frozen=True)
class Cut:
    """Parts cut into slices by row number; bucket b has rows [edges[b], edges[b + 1])."""

    paths: tuple[str, ...]
    columns: Columns
    work: Path
    edges: npt.NDArray[np.int64]
    rows: int

    @property
    def schema(self) -> pa.Schema:
        """The log's columns and the row number."""
        fields = [pa.field(f.name, plain_type(f.type)) for f in self.columns.schema]
        return pa.schema([*fields, pa.field(POSITION, pa.int64())])

    def slices(self, part: int) -> Path:
        """Where the slices of a part lie."""
        return self.work / f"{part:05d}.slices"


def to_impressions(
    requests: str | Path,
    out: str | Path,
    *,
    level: int = 9,
    memory: int = DEFAULT_MEMORY,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> int:
    """Writes the impressions of data set `requests` to Parquet file `out`; returns their number.

    level: zstd level. memory: bytes this may use above the interpreter's own. engine: what cuts the parts into
    slices; the one file is written here. Raises DataError with the file and row group; then `out` is as it was.
    """
    out = Path(out)
    if out.is_dir():
        raise DataError(f"{out} is a directory; give the name of the Parquet file to write")
    manifest, paths = open_parts(requests)
    with working(out, {"parts": fingerprint(tuple(paths)), "memory": memory}) as work:
        rows = _rows_within(manifest, memory // 40)
        edges = np.append(np.arange(0, manifest.impressions, 2 * rows), manifest.impressions)
        cut = Cut(tuple(paths), manifest.columns, work, edges, rows)
        tables = _in_order(manifest, cut, memory, engine or Local(), progress or silent)
        partial = work / "out.parquet"
        written = _write(partial, tables, manifest.columns.schema, level, rows)
        if written != manifest.impressions:
            raise DataError(f"{requests} promises {manifest.impressions} impressions, its parts hold {written}")
        sync(partial)
        os.replace(partial, out)
    return written


def _rows_within(manifest: Manifest, size: int) -> int:
    """Impression rows that fit in `size` bytes."""
    whole = int(manifest.provenance["memory"])
    return int(np.clip(size * manifest.impressions // max(1, whole), 64, GROUP_IMPRESSIONS))


def _in_order(manifest: Manifest, cut: Cut, memory: int, engine: Engine, progress: Progress) -> Iterator[pa.Table]:
    if not cut.columns.position:
        for i, path in enumerate(cut.paths):
            yield from _expanded(path, cut.rows)
            progress("read", i + 1, len(cut.paths), manifest.parts[i].impressions)
        return
    if int(manifest.provenance["memory"]) <= min(memory // 4, PART_BYTES):
        whole = pa.concat_tables(t for path in cut.paths for t in _groups(path)).combine_chunks()
        yield from impression_rows(whole, cut.columns, cut.rows, ordered=True)
        return
    todo = [i for i in range(len(cut.paths)) if not shuffle.is_written(cut.slices(i))]
    for i, rows in zip(todo, engine.run(cut_part, cut, todo)):
        progress("map", i + 1, len(cut.paths), rows)
    slices = [cut.slices(i) for i in range(len(cut.paths))]
    last = len(cut.edges) - 1
    for bucket in range(last):
        yield _by_position(pa.concat_tables(shuffle.read_slices(slices, cut.schema, bucket)))
        pa.default_memory_pool().release_unused()
        progress("write", bucket + 1, last, int(cut.edges[bucket + 1] - cut.edges[bucket]))


def cut_part(cut: Cut, part: int) -> int:
    """Slices of one part by row number; returns its rows."""
    total = 0
    with shuffle.SliceWriter(cut.slices(part), cut.schema, POSITION, cut.edges) as writer:
        for table in _expanded(cut.paths[part], cut.rows):
            writer.add(_by_position(table))
            total += table.num_rows
            pa.default_memory_pool().release_unused()
    return total


def _by_position(table: pa.Table) -> pa.Table:
    return table.take(pa.array(np.argsort(table[POSITION].to_numpy(), kind="stable")))


def _groups(path: str) -> Iterator[pa.Table]:
    meta = part_meta(path)
    return (read_group(path, meta, g) for g in range(meta.row_groups))


def _expanded(path: str, rows: int) -> Iterator[pa.Table]:
    """The impressions of a part, at most `rows` at a time."""
    columns = part_meta(path).columns
    for table in _groups(path):
        yield from impression_rows(table, columns, rows)


def _write(path: Path, tables: Iterable[pa.Table], schema: pa.Schema, level: int, rows: int) -> int:
    total = 0
    with pq.ParquetWriter(path, schema, compression="zstd", compression_level=level, write_page_checksum=True) as out:
        for table in ahead(regrouped(tables, rows)):
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


def ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The same tables, the next one being made by a thread while this one is used."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, tables, None)
        while (table := coming.result()) is not None:
            coming = pool.submit(next, tables, None)
            yield table


def _as_logged(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The log's own types, columns and their order."""
    table = table.select(schema.names)
    return table if table.schema == schema else table.cast(schema)
