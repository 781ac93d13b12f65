"""Impression log -> request-level data set: bounded memory, resumable, all or nothing.

    plan      SQL over the keys: the ordinal of every row's request            (plan.py)
    map       each row group: rows by bucket of ordinals, request columns once per batch
    reduce    each bucket: request columns checked and once, impressions in order -> one part
    publish   the parts move into place, the manifest is replaced              (workdir.py)

A log that fits in a third of the memory goes through one bucket without touching the disk in between.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from roo_rewrite.data import plan, shuffle
from roo_rewrite.data.nest import ORDINAL, Clash, by_request, impression_schema, nest, once, plain, request_schema
from roo_rewrite.data.sampler import Bounds
from roo_rewrite.data.source import Source, Unit, open_source
from roo_rewrite.data.store import Writing, write_part
from roo_rewrite.data.table import POSITION, Columns, Manifest, Part, assign, write_whole
from roo_rewrite.data.workdir import check_target, fingerprint, next_generation, publish, working
from roo_rewrite.errors import DataError
from roo_rewrite.features import FeatureSpec

OnConflict = Literal["error", "first", "last", "demote"]
Progress = Callable[[str, int, int, int], None]
DEFAULT_MEMORY = 2 << 30
PART_BYTES = 4 << 30
GROUP_IMPRESSIONS = 131_072


class Engine(Protocol):
    """Runs the plan's SQL, and the tasks of the other steps."""

    name: str

    def ordinals(self, job: Job) -> Iterator[Any]:
        """(positions, ordinals) of all rows."""

    def run(self, task: Callable[[Job, int], Any], job: Job, items: list[int]) -> Iterator[Any]:
        """`task(job, i)` for each i, in any order; results in the order of `items`."""


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


class Local:
    """DuckDB and this process."""

    name = "duckdb"

    def ordinals(self, job: Job) -> Iterator[Any]:
        """See Engine."""
        return plan.duck_ordinals(job.source, job.columns, job.work, job.memory // 3, job.threads)

    def run(self, task: Callable[[Job, int], Any], job: Job, items: list[int]) -> Iterator[Any]:
        """See Engine."""
        return (task(job, i) for i in items)


def to_requests(
    log: str | Path,
    out: str | Path,
    spec: FeatureSpec,
    request_id: str,
    *,
    user: str | None = None,
    time: str | None = None,
    keep_order: bool = True,
    on_conflict: OnConflict = "error",
    writing: Writing | None = None,
    memory: int = DEFAULT_MEMORY,
    threads: int | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Converts the impression log at `log` into a request-level data set in directory `out`.

    request_id, user, time: columns of the log; with `user` (and `time`) a user's requests stand together, and
    histories are stored once. keep_order: keep each impression's row number, so that `to_impressions`
    gives back the log in its own order. memory: bytes this may use above the interpreter's own.
    Raises DataError with file, row group and column; then `out` is as it was.
    """
    out = Path(out)
    check_target(out)
    source = open_source(log)
    if not source.rows:
        raise DataError(f"{log} has no rows; there is nothing to convert")
    columns = assign(source.schema, spec, request_id, user, time, keep_order)
    writing = writing or Writing()
    engine = engine or Local()
    settings = {"columns": columns.to_dict(), "writing": asdict(writing), "on_conflict": on_conflict}
    key = {"files": fingerprint(source.files), **settings, "memory": memory, "version": version("roo-rewrite")}
    with working(out, key) as work:
        meta = {"spec": spec.to_dict(), "provenance": _provenance(source, engine)}
        job = Job(source, columns, writing, on_conflict, work, memory, meta, threads)
        while True:
            try:
                job, parts = _convert(job, engine, progress)
                break
            except ClashesError as e:
                names = [c.column for c in e.clashes]
                if on_conflict != "demote" or request_id in names:
                    raise
                job = _demoted(job, names)
        generation = next_generation(out)
        named = tuple(replace(p, path=f"{generation}/{p.path}") for p in parts)
        provenance = {**meta["provenance"], "demoted": [c for c in columns.request if c not in job.columns.request]}
        manifest = Manifest(job.columns, named, spec.to_dict(), provenance)
        publish(work, out, manifest, generation)
    return manifest


def _provenance(source: Source, engine: Engine) -> dict[str, Any]:
    names = [Path(f).name for f in source.files]
    return {
        "files": names,
        "rows": source.rows,
        "memory": source.bytes,
        "engine": engine.name,
        "roo-rewrite": version("roo-rewrite"),
        "pyarrow": pa.__version__,
        "python": platform.python_version(),
    }


def _demoted(job: Job, names: list[str]) -> Job:
    for step in ("slices", "data"):
        for path in (job.work / step).glob("*"):
            path.unlink()
    return replace(job, columns=job.columns.demote(names))


def _convert(job: Job, engine: Engine, progress: Progress | None) -> tuple[Job, list[Part]]:
    tell = progress or (lambda stage, done, total, rows: None)
    ordinals = job.work / "ordinals.npy"
    if not ordinals.exists():
        tell("plan", 0, 1, 0)
        plan.write_ordinals(engine.ordinals(job), job.source.rows, ordinals)
    counts = plan.request_counts(np.load(ordinals, mmap_mode="r"))
    if int(counts.sum()) != job.source.rows:
        plan.check_keys(job.source, job.columns)
        raise DataError(f"the engine placed {int(counts.sum())} of {job.source.rows} rows; did the input change?")
    tell("plan", 1, 1, job.source.rows)
    edges = _edges(counts, job)
    expected = np.add.reduceat(counts, edges[:-1])
    job = replace(job, edges=tuple(edges.tolist()), expected=tuple(expected.tolist()))
    for step in ("slices", "data"):
        (job.work / step).mkdir(exist_ok=True)
    if not job.direct:
        units = [i for i in range(len(job.source.units)) if not _mapped(job, i)]
        total = len(job.source.units)
        for done, rows in enumerate(engine.run(map_unit, job, units), total - len(units) + 1):
            tell("map", done, total, rows)
    parts: list[Part] = []
    for done, part in enumerate(engine.run(reduce_bucket, job, list(range(len(edges) - 1))), 1):
        parts.append(Part(**part))
        tell("reduce", done, len(edges) - 1, parts[-1].impressions)
    return job, parts


def _edges(counts: npt.NDArray[np.int64], job: Job) -> npt.NDArray[np.int64]:
    """Bucket edges over ordinals: each within the memory a reduce may take, if its requests are."""
    if job.source.bytes <= min(job.memory // 3, PART_BYTES):
        return np.array([0, len(counts)])
    request, impression = (job.source.row_bytes(c) for c in (job.columns.request, job.columns.impression))
    sizes = np.cumsum(request + impression * counts)
    bucket = (sizes - 1) // max(1, min(job.memory // 16, PART_BYTES))
    starts = np.flatnonzero(np.diff(bucket, prepend=-1))
    return np.append(starts, len(counts)).astype(np.int64)


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


def _mapped(job: Job, i: int) -> bool:
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


def reduce_bucket(job: Job, bucket: int) -> dict[str, Any]:
    """One part: the fields of its Part. A part finished before is left as it is."""
    path = job.work / "data" / f"part-{bucket:05d}.parquet"
    note = path.with_suffix(".json")
    if note.exists():
        found: dict[str, Any] = json.loads(note.read_bytes())
        return found
    requests, impressions = _gather(job, bucket)
    requests = _once(requests, job)
    if impressions.num_rows != job.expected[bucket]:
        raise DataError(
            f"part {bucket} has {impressions.num_rows} of {job.expected[bucket]} impressions; "
            "the input changed while it was read. Run again"
        )
    groups = _row_groups(requests, _sorted(impressions), job)
    part = asdict(write_part(path, groups, job.columns, job.writing, job.meta))
    write_whole(note, json.dumps(part).encode())
    pa.default_memory_pool().release_unused()
    return part


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
