"""The impression log: Parquet files, their row groups, and errors that say where."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from roo_rewrite.errors import DataError

UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
_WIDTHS = {"INT32": 4, "INT64": 8, "INT96": 8, "FLOAT": 4, "DOUBLE": 8, "BOOLEAN": 1, "BYTE_ARRAY": 8}


@dataclass(frozen=True)
class Unit:
    """One row group of `file`: rows `[start, start + rows)` of the whole log, bytes in memory by column."""

    file: int
    row_group: int
    start: int
    rows: int
    widths: dict[str, int]

    @property
    def bytes(self) -> int:
        """Estimated bytes of all columns in memory."""
        return sum(self.widths.values())


@dataclass(frozen=True)
class Source:
    """An impression log: files in order, one schema, row groups."""

    files: tuple[str, ...]
    schema: pa.Schema
    units: tuple[Unit, ...]

    @property
    def rows(self) -> int:
        """Impressions in all files."""
        return sum(u.rows for u in self.units)

    @property
    def bytes(self) -> int:
        """Estimated bytes of all columns in memory."""
        return sum(u.bytes for u in self.units)

    def row_bytes(self, columns: Sequence[str]) -> int:
        """Estimated bytes in memory of `columns` in one row."""
        return sum(u.widths[c] for u in self.units for c in columns) // max(1, self.rows) + 1

    def file_starts(self) -> list[int]:
        """The first row of each file."""
        starts, at = [], 0
        for f in range(len(self.files)):
            starts.append(at)
            at += sum(u.rows for u in self.units if u.file == f)
        return starts

    def read(self, unit: Unit, columns: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        """Row batches of one row group. Raises DataError with file, row group and column."""
        yield from read_row_group(self.files[unit.file], unit.row_group, columns, batch_rows)

    def check(self) -> None:
        """Reads everything. Raises DataError at the first column that cannot be."""
        for unit in self.units:
            for _ in self.read(unit, self.schema.names, 1 << 16):
                pass

    def name(self, unit: Unit) -> str:
        """`file, row group n`, for messages."""
        return f"{self.files[unit.file]}, row group {unit.row_group}"


def open_source(path: str | Path) -> Source:
    """The log at `path`: a Parquet file, a directory of them, or a glob. Reads the footers of all files.

    Raises DataError where there is no file, one cannot be read, or a column's type or set differs between files.
    """
    files = find_files(path)
    units: list[Unit] = []
    schema: pa.Schema | None = None
    start = 0
    for i, name in enumerate(files):
        with opening(name) as file:
            theirs = file.schema_arrow
            schema = schema or theirs
            _same_schema(files[0], schema, name, theirs)
            for g in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(g)
                units.append(Unit(i, g, start, group.num_rows, _memory(group, theirs.names)))
                start += group.num_rows
    assert schema is not None
    return Source(tuple(files), schema.remove_metadata(), tuple(units))


def find_files(path: str | Path) -> list[str]:
    """Parquet files of a file, directory (its `*.parquet` at any depth) or glob, sorted."""
    path = str(path)
    if Path(path).is_dir():
        files = sorted(str(p) for p in Path(path).rglob("*.parquet"))
    elif Path(path).exists():
        files = [path]
    else:
        files = sorted(glob.glob(path, recursive=True))
    if not files:
        raise DataError(f"no Parquet file at {path}; give a file, a directory of *.parquet, or a quoted glob")
    return files


@contextlib.contextmanager
def opening(name: str) -> Iterator[pq.ParquetFile]:
    """An open Parquet file. Raises DataError naming it where it is not one."""
    try:
        file = pq.ParquetFile(name, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{name} cannot be read as Parquet: {short(e)}. Is it truncated, or another format?") from e
    with file:
        yield file


def read_row_group(name: str, group: int, columns: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
    """Row batches of row group `group`. Raises DataError with file, row group and column."""
    with opening(name) as file:
        try:
            yield from file.iter_batches(batch_rows, row_groups=[group], columns=list(columns))
        except UNREADABLE as e:
            column = bad_column(file, group, columns)
            raise DataError(f"{name}, row group {group}, {column}: {short(e)}. The file is corrupt") from e


def bad_column(file: pq.ParquetFile, group: int, columns: Sequence[str]) -> str:
    """Which of `columns` of a row group cannot be read, for messages."""
    for column in columns:
        try:
            file.read_row_group(group, columns=[column])
        except UNREADABLE:
            return f"column {column!r}"
    return "columns " + ", ".join(map(repr, columns))


def _same_schema(first: str, schema: pa.Schema, name: str, theirs: pa.Schema) -> None:
    if len(set(theirs.names)) != len(theirs.names):
        raise DataError(f"{name} has two columns of one name; rename one: {theirs.names}")
    here, there = set(schema.names), set(theirs.names)
    if here != there:
        raise DataError(
            f"{name} has other columns than {first}: missing {sorted(here - there)}, further {sorted(there - here)}"
        )
    for column in schema:
        if theirs.field(column.name).type != column.type:
            raise DataError(
                f"column {column.name!r} is {column.type} in {first} and {theirs.field(column.name).type} in {name}; "
                "cast one of them"
            )


def _memory(group: pq.RowGroupMetaData, names: Sequence[str]) -> dict[str, int]:
    widths = dict.fromkeys(names, 0)
    for c in range(group.num_columns):
        leaf = group.column(c)
        path = leaf.path_in_schema
        owner = max((n for n in names if path == n or path.startswith(n + ".")), key=len)
        widths[owner] += max(leaf.total_uncompressed_size, leaf.num_values * _WIDTHS.get(leaf.physical_type, 8))
    return widths


def short(error: BaseException) -> str:
    """An error's message on one line."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= 300 else text[:297] + "..."
