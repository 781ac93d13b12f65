"""The tasks of a conversion to requests, and the job they belong to.

    map       each row group: rows by bucket of ordinals, request columns once per batch
    reduce    each bucket: request columns checked and once, impressions in order -> its parts

Results are files, named when they are whole: a task done before is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from roo_rewrite.data import hive, plan, shuffle
from roo_rewrite.data.nest import ORDINAL, Clash, by_request, impression_schema, nest, once, plain, request_schema
from roo_rewrite.data.sampler import Bounds
from roo_rewrite.data.source import Source, Unit
from roo_rewrite.data.store import Writing, write_part
from roo_rewrite.data.table import POSITION, Columns, write_whole
from roo_rewrite.errors import DataError

OnConflict = Literal["error", "first", "last", "demote"]
GROUP_IMPRESSIONS = 131_072
PART_BYTES = 1 << 30  # no column of a part then outgrows the 32-bit offsets of its lists and strings


@dataclass(frozen=True)
class Job:
    """One conversion, as every task of it sees it. `edges`: bucket b has ordinals [edges[b], edges[b + 1])."""

    source: Source
    columns: Columns
    writing: Writing
    on_conflict: OnConflict
    work: Path
    memory: int
    meta: dict[str, Any]
    threads: int | None = None
    edges: tuple[int, ...] = ()
    expected: tuple[int, ...] = ()

    @property
    def batch_rows(self) -> int:
        """Rows handled at once in the map step."""
        return int(np.clip(self.memory // 32 // self.source.row_bytes(self.columns.schema.names), 64, 1 << 16))

    @property
    def direct(self) -> bool:
        """Whether one bucket in memory will do."""
        return len(self.edges) == 2

    @property
    def data(self) -> Path:
        """Where the reduce step puts the parts."""
        return self.work / "data"

    def slices(self, unit: int, side: str) -> Path:
        """Where the map step puts the rows of a unit."""
        return self.work / "slices" / f"{unit:06d}.{side}"


class ClashesError(DataError):
    """Request columns that are not constant within a request."""

    def __init__(self, clashes: list[Clash]):
        listing = "\n  ".join(map(str, clashes))
        super().__init__(
            f"request columns must be constant within a request:\n  {listing}\n"
            "Make them impression columns in the spec, or choose --on-conflict first, last or demote."
        )
        self.clashes = clashes

    def __reduce__(self) -> Any:
        return type(self), (self.clashes,)


def _batches(job: Job, i: int) -> Iterator[tuple[pa.Table, pa.Table]]:
    """(request rows once, impression rows) of each batch of unit `i`, sorted by request and position."""
    unit: Unit = job.source.units[i]
    ordinals = np.load(job.work / "ordinals.npy", mmap_mode="r")
    at = unit.start
    names = list(job.columns.schema.names)
    for batch in job.source.read(unit, names, job.batch_rows if not job.direct else 1 << 30):
        plan.check_ids(batch, job.columns.request_id, job.source.name(unit))
        positions = np.arange(at, at + batch.num_rows)
        at += batch.num_rows
        table = plain(pa.Table.from_batches([batch]))
        table = table.append_column(ORDINAL, pa.array(ordinals[positions]))
        table = table.append_column(POSITION, pa.array(positions))
        requests = table.select([*job.columns.request, ORDINAL, POSITION])
        yield _once(requests, job), _sorted(table.select([*job.columns.impression, ORDINAL, POSITION]))


def _sorted(table: pa.Table) -> pa.Table:
    order, _ = by_request(table[ORDINAL].to_numpy(), table[POSITION].to_numpy())
    return table if bool((np.diff(order) == 1).all()) else table.take(pa.array(order))


def is_mapped(job: Job, i: int) -> bool:
    """Whether a run before this one finished both sides of unit `i`."""
    return all(shuffle.is_written(job.slices(i, side)) for side in ("requests", "impressions"))


def map_unit(job: Job, i: int) -> int:
    """Slices of one row group by bucket; returns its rows."""
    edges = np.asarray(job.edges)
    with (
        shuffle.SliceWriter(job.slices(i, "requests"), request_schema(job.columns), ORDINAL, edges) as requests,
        shuffle.SliceWriter(job.slices(i, "impressions"), impression_schema(job.columns), ORDINAL, edges) as rest,
    ):
        for once_each, impressions in _batches(job, i):
            requests.add(once_each)
            rest.add(impressions)
            pa.default_memory_pool().release_unused()
    return job.source.units[i].rows


def reduce_bucket(job: Job, bucket: int) -> list[dict[str, Any]]:
    """The parts of a bucket: the fields of each one's Part, paths relative to `job.data`."""
    note = job.work / "notes" / f"{bucket:05d}.json"
    found: list[dict[str, Any]] = json.loads(note.read_bytes()) if note.exists() else []
    if found and all((job.data / part["path"]).exists() for part in found):
        return found
    requests, impressions = _gather(job, bucket)
    requests = _once(requests, job)
    if impressions.num_rows != job.expected[bucket]:
        raise DataError(
            f"part {bucket} has {impressions.num_rows} of {job.expected[bucket]} impressions; "
            "the input changed while it was read. Run again"
        )
    impressions = _sorted(impressions)
    if job.columns.partition is None:
        made = [_part(job, f"part-{bucket:05d}.parquet", requests, impressions, {})]
    else:
        made = _partitioned(job, bucket, requests, impressions, job.columns.partition)
    write_whole(note, json.dumps(made).encode())
    pa.default_memory_pool().release_unused()
    return made


def _partitioned(job: Job, bucket: int, requests: pa.Table, impressions: pa.Table, column: str) -> list[dict[str, Any]]:
    """One part for each value of the partition column."""
    firsts = np.searchsorted(impressions[ORDINAL].to_numpy(), requests[ORDINAL].to_numpy())
    firsts = np.append(firsts, impressions.num_rows)
    made = []
    for i, (start, stop, text) in enumerate(hive.runs(requests[column].combine_chunks())):
        mine = impressions.slice(firsts[start], firsts[stop] - firsts[start])
        name = f"{hive.directory(column, text)}/part-{bucket:05d}-{i:03d}.parquet"
        made.append(_part(job, name, requests.slice(start, stop - start), mine, {column: text}))
    return made


def _part(
    job: Job, name: str, requests: pa.Table, impressions: pa.Table, partition: dict[str, str | None]
) -> dict[str, Any]:
    path = job.data / name
    path.parent.mkdir(parents=True, exist_ok=True)
    groups = _row_groups(requests, impressions, job)
    part = write_part(path, groups, job.columns, job.writing, {**job.meta, "partition": partition})
    return asdict(replace(part, path=name))


def _gather(job: Job, bucket: int) -> tuple[pa.Table, pa.Table]:
    if job.direct:
        pairs = [pair for i in range(len(job.source.units)) for pair in _batches(job, i)]
        return pa.concat_tables([r for r, _ in pairs]), pa.concat_tables([i for _, i in pairs])
    units = range(len(job.source.units))
    slices = [[job.slices(i, side) for i in units] for side in ("requests", "impressions")]
    requests = _combined(shuffle.read_slices(slices[0], request_schema(job.columns), bucket), job)
    impressions = shuffle.read_slices(slices[1], impression_schema(job.columns), bucket)
    return requests, pa.concat_tables(impressions)


def _combined(tables: Iterator[pa.Table], job: Job) -> pa.Table:
    """All request rows, brought down to one per request whenever they take much memory."""
    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if len(held) > 1 and sum(t.nbytes for t in held) > job.memory // 16:
            held = [_once(pa.concat_tables(held), job)]
    return pa.concat_tables(held)


def _once(requests: pa.Table, job: Job) -> pa.Table:
    """One row per request. Raises ClashesError where they differ and that matters."""
    check = job.on_conflict in ("error", "demote")
    kept, clashes = once(requests, job.columns, job.on_conflict == "last", check)
    if clashes:
        raise ClashesError(clashes)
    return kept


def _row_groups(requests: pa.Table, impressions: pa.Table, job: Job) -> Iterator[pa.Table]:
    """Nested tables of about GROUP_IMPRESSIONS impressions each, fewer where memory is small."""
    if not job.columns.position:
        impressions = impressions.drop_columns([POSITION])
    row_bytes = job.source.row_bytes(job.columns.schema.names)
    most = int(np.clip(job.memory // 32 // row_bytes, 1024, GROUP_IMPRESSIONS))
    ends = np.searchsorted(impressions[ORDINAL].to_numpy(), requests[ORDINAL].to_numpy(), side="right")
    at = 0
    for stop in Bounds(impressions=most).cuts(np.diff(ends, prepend=0)):
        first, last = (int(ends[at - 1]) if at else 0), int(ends[stop - 1])
        pa.default_memory_pool().release_unused()
        yield nest(requests.slice(at, stop - at), impressions.slice(first, last - first), job.columns)
        at = stop
