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
import shutil
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from roo_rewrite.data import hive, plan
from roo_rewrite.data.engines import DEFAULT_MEMORY, Engine, Local, Progress, silent
from roo_rewrite.data.source import Source, open_source
from roo_rewrite.data.store import Writing
from roo_rewrite.data.table import Manifest, Part, assign, write_whole
from roo_rewrite.data.tasks import PART_BYTES, ClashesError, Job, OnConflict, is_mapped, map_unit, reduce_bucket
from roo_rewrite.data.workdir import check_target, fingerprint, next_generation, publish, working
from roo_rewrite.errors import DataError
from roo_rewrite.features import FeatureSpec

STEPS = ("slices", "data", "notes")


def to_requests(
    log: str | Path,
    out: str | Path,
    spec: FeatureSpec,
    request_id: str,
    *,
    user: str | None = None,
    time: str | None = None,
    partition: str | None = None,
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
    histories are stored once. partition: a request column; parts then lie in `column=value` directories, each
    of one value, and the files leave the column out. keep_order: keep each impression's row number, so that
    `to_impressions` gives back the log in its own order. memory: bytes this may use above the interpreter's own.
    Raises DataError with file, row group and column; then `out` is as it was.
    """
    out = Path(out)
    check_target(out)
    source = open_source(log)
    if not source.rows:
        raise DataError(f"{log} has no rows; there is nothing to convert")
    columns = assign(source.schema, spec, request_id, user, time, keep_order, partition)
    if partition is not None:
        hive.check_type(partition, source.schema.field(partition).type)
    writing = writing or Writing()
    engine = engine or Local()
    settings = {"columns": columns.to_dict(), "writing": asdict(writing), "on_conflict": on_conflict}
    key = {"files": fingerprint(source.files), **settings, "memory": memory, "version": version("roo-rewrite")}
    with working(out, key) as work:
        meta = {"spec": spec.to_dict(), "provenance": _provenance(source, engine)}
        known = _demotions(work)
        job = Job(source, columns.demote(known), writing, on_conflict, work, memory, meta, threads)
        while True:
            try:
                job, parts = _convert(job, engine, progress)
                break
            except ClashesError as e:
                names = [c.column for c in e.clashes]
                if on_conflict != "demote" or {request_id, partition} & set(names):
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
    """The job with the columns `names` on the impression side, from the start; a killed run's next one knows."""
    for step in STEPS:
        shutil.rmtree(job.work / step)
    write_whole(job.work / "demoted", json.dumps([*_demotions(job.work), *names]).encode())
    return replace(job, columns=job.columns.demote(names))


def _demotions(work: Path) -> list[str]:
    note = work / "demoted"
    found: list[str] = json.loads(note.read_bytes()) if note.exists() else []
    return found


def _convert(job: Job, engine: Engine, progress: Progress | None) -> tuple[Job, list[Part]]:
    tell = progress or silent
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
    for step in STEPS:
        (job.work / step).mkdir(exist_ok=True)
    if not job.direct:
        units = [i for i in range(len(job.source.units)) if not is_mapped(job, i)]
        total = len(job.source.units)
        for done, rows in enumerate(engine.run(map_unit, job, units), total - len(units) + 1):
            tell("map", done, total, rows)
    parts: list[Part] = []
    for done, made in enumerate(engine.run(reduce_bucket, job, list(range(len(edges) - 1))), 1):
        parts += [Part(**part) for part in made]
        tell("reduce", done, len(edges) - 1, int(expected[done - 1]))
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
