"""Part files: a request-level table -> Parquet, and back."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from roo_rewrite.data import history, hive
from roo_rewrite.data.source import UNREADABLE, bad_column, opening, short
from roo_rewrite.data.table import IMPRESSIONS, META_KEY, Columns, Part
from roo_rewrite.errors import DataError

SAMPLE_ROWS = 4096
SAMPLE_BYTES = 8 << 20


@dataclass(frozen=True)
class Writing:
    """How parts are written: zstd level, encodings "best" or "default", histories once or as they are."""

    level: int = 9
    encodings: str = "best"
    dedup: bool = True


def write_part(
    path: Path, groups: Iterator[pa.Table], columns: Columns, writing: Writing, meta: dict[str, Any]
) -> Part:
    """Writes request-level tables as the row groups of one file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    requests = impressions = 0
    writer: pq.ParquetWriter | None = None
    reverse: dict[str, bool] | None = None
    try:
        for table in groups:
            if reverse is None:
                reverse = _directions(table, columns) if writing.dedup else {}
            packed = pack(table, columns, reverse)
            if writer is None:
                described = _described(packed.schema, columns, reverse, meta)
                writer = pq.ParquetWriter(partial, described, **_options(packed, writing))
            writer.write_table(packed, row_group_size=max(1, packed.num_rows))
            requests += table.num_rows
            impressions += len(table[IMPRESSIONS].combine_chunks().flatten())
        assert writer is not None
        writer.close()
        os.replace(partial, path)
    finally:
        if writer is not None and writer.is_open:
            _abandon(writer)
    return Part(path.name, requests, impressions, path.stat().st_size)


def _abandon(writer: pq.ParquetWriter) -> None:
    """Closes after a failure; that the disk is full was said already."""
    try:
        writer.close()
    except (OSError, pa.ArrowException):
        writer.is_open = False


def pack(table: pa.Table, columns: Columns, reverse: dict[str, bool]) -> pa.Table:
    """Histories in `reverse` (column -> newest first) as `#new` and `#len`; without the partition column."""
    arrays: dict[str, pa.Array] = {}
    for name in table.column_names:
        column = table[name].combine_chunks()
        if name == columns.partition:
            continue
        if name in reverse:
            arrays[name + history.NEW], arrays[name + history.LEN] = history.encode(column, reverse[name])
        else:
            arrays[name] = column
    return pa.table(arrays)


def unpack(table: pa.Table, columns: Columns, reverse: dict[str, bool]) -> pa.Table:
    """Inverse of `pack` for one whole row group; columns that were not read stay away."""
    arrays: dict[str, pa.Array] = {}
    for name in table.column_names:
        stem = name.removesuffix(history.NEW)
        if name.endswith(history.LEN) and name.removesuffix(history.LEN) in reverse:
            continue
        if name != stem and stem in reverse:
            kind = columns.schema.field(stem).type
            length = table[stem + history.LEN].combine_chunks()
            arrays[stem] = history.decode(table[name].combine_chunks(), length, kind, reverse[stem])
        else:
            arrays[name] = table[name].combine_chunks()
    return pa.table(arrays)


def _directions(table: pa.Table, columns: Columns) -> dict[str, bool]:
    """Each history column of the log, and whether it is stored reversed."""
    sample = table.slice(0, SAMPLE_ROWS // 8)
    out = {}
    for name in columns.request:
        if history.can_encode(columns.schema.field(name).type):
            lists = sample[name].combine_chunks()
            out[name] = history.saving(lists, True) > history.saving(lists, False)
    return out


def _described(schema: pa.Schema, columns: Columns, reverse: dict[str, bool], meta: dict[str, Any]) -> pa.Schema:
    body = {**meta, "columns": columns.to_dict(), "histories": reverse}
    return schema.with_metadata({META_KEY: json.dumps(body).encode()})


def _options(table: pa.Table, writing: Writing) -> dict[str, Any]:
    base: dict[str, Any] = {
        "compression": "zstd",
        "compression_level": writing.level,
        "write_page_checksum": True,
        "write_statistics": True,
    }
    if writing.encodings == "default":
        return base
    return base | best_encodings(table, writing.level)


def best_encodings(table: pa.Table, level: int) -> dict[str, Any]:
    """The smallest encoding of every leaf column, by writing a sample with each."""
    rows = max(1, min(SAMPLE_ROWS, table.num_rows * SAMPLE_BYTES // max(1, table.nbytes)))
    sample = table.slice(0, rows)
    plain = _leaf_sizes(sample, level, {"use_dictionary": True})
    best = {path: (size, "DICTIONARY") for path, (size, _) in plain.items()}
    tries = {
        "BYTE_STREAM_SPLIT": {"FLOAT", "DOUBLE"},
        "DELTA_BINARY_PACKED": {"INT32", "INT64"},
        "DELTA_BYTE_ARRAY": {"BYTE_ARRAY"},
        "PLAIN": {"INT32", "INT64", "FLOAT", "DOUBLE", "BYTE_ARRAY"},
    }
    for encoding, kinds in tries.items():
        chosen = {path: encoding for path, (_, kind) in plain.items() if kind in kinds}
        sizes = _leaf_sizes(sample, level, {"use_dictionary": False, "column_encoding": chosen}) if chosen else {}
        for path in chosen:
            best[path] = min(best[path], (sizes[path][0], encoding))
    coded = {path: e for path, (_, e) in best.items() if e != "DICTIONARY"}
    dictionary = [path for path, (_, e) in best.items() if e == "DICTIONARY"]
    return {"use_dictionary": dictionary or False, "column_encoding": coded or None}


def _leaf_sizes(table: pa.Table, level: int, options: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """Compressed size and physical type of every leaf column."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=level, write_statistics=False, **options)
    metadata = pq.ParquetFile(sink).metadata
    out: dict[str, tuple[int, str]] = {}
    for g in range(metadata.num_row_groups):
        group = metadata.row_group(g)
        for c in range(group.num_columns):
            leaf = group.column(c)
            before = out.get(leaf.path_in_schema, (0, ""))[0]
            out[leaf.path_in_schema] = (before + leaf.total_compressed_size, leaf.physical_type)
    return out


@dataclass(frozen=True)
class PartMeta:
    """What a part says of itself."""

    columns: Columns
    histories: dict[str, bool]
    partition: dict[str, str | None]
    row_groups: int


def part_meta(path: str) -> PartMeta:
    """Raises DataError where `path` is no part of a request-level data set."""
    with opening(path) as file:
        raw = (file.schema_arrow.metadata or {}).get(META_KEY)
        if raw is None:
            raise DataError(f"{path} is not request-level: its metadata has no key {META_KEY.decode()!r}")
        body = json.loads(raw)
        columns = Columns.from_dict(body["columns"])
        return PartMeta(columns, body["histories"], body["partition"], file.metadata.num_row_groups)


def read_group(path: str, meta: PartMeta, group: int, names: Sequence[str] | None = None) -> pa.Table:
    """One row group with whole histories: all columns, or request columns and struct fields `names`.

    Raises DataError with file, row group and column.
    """
    with opening(path) as file:
        leaves = None if names is None else _leaves(meta, names)
        try:
            packed = file.read_row_group(group, columns=leaves)
        except UNREADABLE as e:
            column = bad_column(file, group, leaves or file.schema_arrow.names)
            raise DataError(f"{path}, row group {group}, {column}: {short(e)}. The file is corrupt") from e
    table = unpack(packed, meta.columns, meta.histories)
    for name, text in meta.partition.items():
        if names is None or name in names:
            value = hive.value(text, meta.columns.schema.field(name).type)
            table = table.append_column(name, pa.repeat(value, table.num_rows))
    return table


def _leaves(meta: PartMeta, names: Sequence[str]) -> list[str]:
    out: list[str] = []
    for name in names:
        if name in meta.histories:
            out += [name + history.NEW, name + history.LEN]
        elif name in meta.columns.fields:
            out.append(f"{IMPRESSIONS}.list.element.{name}")
        elif name not in meta.partition:
            out.append(name)
    return out
