"""Late labels: impressions are logged first, their outcomes joined within a window. Nothing is dropped silently.

An outcome joins the impression with its (request, impression) key when it came at or after the impression
and at most `window` seconds later; the earliest wins. Every other outcome is counted, and kept with its reason:
duplicate, late, early, no impression, no key. An impression without an outcome has null labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from roo_rewrite.data.engines import DEFAULT_MEMORY, Progress
from roo_rewrite.data.plan import duck_errors, duck_settings, quoted, texts
from roo_rewrite.data.source import Source, open_source
from roo_rewrite.data.store import Writing, part_meta, read_group, write_part
from roo_rewrite.data.table import IMPRESSIONS, Columns, Manifest, Part
from roo_rewrite.data.workdir import check_target, fingerprint, next_generation, open_parts, publish, working
from roo_rewrite.errors import DataError

REJECTED = "_rejected.parquet"
REASONS = ("duplicate", "late", "early", "no impression", "no key")

VERDICT_SQL = """
CREATE TABLE verdicts AS
WITH keyed AS (
    SELECT o.*, k.part, k.row, k.t AS logged,
        CASE WHEN o.request IS NULL OR o.impression IS NULL OR o.t IS NULL THEN 'no key'
             WHEN k.row IS NULL THEN 'no impression'
             WHEN o.t < k.t THEN 'early'
             WHEN o.t > k.t + {window} THEN 'late'
             ELSE 'joined' END AS verdict
    FROM outcomes o LEFT JOIN (
        SELECT * FROM keys QUALIFY row_number() OVER (PARTITION BY request, impression ORDER BY part, row) = 1
    ) k
    ON o.request = k.request AND o.impression = k.impression
), ranked AS (
    SELECT *, row_number() OVER (PARTITION BY part, row, verdict ORDER BY t, pos) AS place FROM keyed
)
SELECT pos, part, row, CASE WHEN verdict = 'joined' AND place > 1 THEN 'duplicate' ELSE verdict END AS verdict
FROM ranked
"""


@dataclass(frozen=True)
class _Keys:
    """The columns that tie outcomes to impressions."""

    impression_id: str
    time: str
    outcome_time: str


def join_labels(
    requests: str | Path,
    outcomes: str | Path,
    out: str | Path,
    *,
    impression_id: str,
    labels: Sequence[str],
    time: str,
    outcome_time: str,
    window: float,
    writing: Writing | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: Progress | None = None,
) -> dict[str, int]:
    """Writes data set `requests` with the columns `labels` of the Parquet log `outcomes` added, to `out`.

    Both hold the request id and `impression_id`; `time` and `outcome_time` are timestamps, or numbers of seconds.
    `out` may be `requests`. Returns how many outcomes were joined and how many were not, by reason, and
    how many impressions have none. The rejected ones stand beside the parts, in `_rejected.parquet`.
    """
    out = Path(out)
    check_target(out)
    manifest, paths = open_parts(requests)
    log = open_source(outcomes)
    keys = _Keys(impression_id, time, outcome_time)
    columns = _with_labels(manifest.columns, log, keys, labels)
    writing = writing or Writing()
    job = {"in": fingerprint((*paths, *log.files)), "columns": columns.to_dict(), "window": window}
    with (
        working(out, job | asdict(writing)) as work,
        duck_errors(log, f"{outcomes} cannot be joined"),
        duckdb.connect(work / "join.db", config=duck_settings(work, memory // 2)) as con,
    ):
        (work / "data").mkdir(exist_ok=True)
        _load(con, paths, manifest.columns, log, keys, labels)
        con.execute(VERDICT_SQL.format(window=round(window * 1_000_000)))
        counts = _counts(con, manifest)
        _write_rejected(con, log, work / "data" / REJECTED)
        parts = []
        for i, path in enumerate(paths):
            groups = _labelled(con, path, i, log, labels)
            name = manifest.parts[i].path.partition("/")[2]
            target = work / "data" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            meta = {"spec": manifest.spec, "provenance": manifest.provenance, "partition": part_meta(path).partition}
            parts.append(replace(write_part(target, groups, columns, writing, meta), path=name))
            if progress:
                progress("join", i + 1, len(paths), parts[-1].impressions)
        generation = next_generation(out)
        named = tuple(Part(f"{generation}/{p.path}", p.requests, p.impressions, p.bytes) for p in parts)
        provenance = {**manifest.provenance, "outcomes": counts}
        publish(work, out, Manifest(columns, named, manifest.spec, provenance), generation)
    return counts


def _with_labels(columns: Columns, log: Source, keys: _Keys, labels: Sequence[str]) -> Columns:
    wanted = [columns.request_id, keys.impression_id, keys.outcome_time, *labels]
    missing = [n for n in wanted if n not in log.schema.names]
    absent = [n for n in (keys.impression_id, keys.time) if n not in columns.schema.names]
    taken = [n for n in labels if n in columns.schema.names]
    if missing or absent or taken:
        problems = {"outcomes lack": missing, "requests lack": absent, "requests have already": taken}
        raise DataError("labels cannot be joined: " + "; ".join(f"{k} {v}" for k, v in problems.items() if v))
    for name in (columns.request_id, keys.impression_id):
        ours, theirs = columns.schema.field(name).type, log.schema.field(name).type
        if pa.types.is_integer(ours) != pa.types.is_integer(theirs):
            raise DataError(f"key {name!r} is {ours} in the requests and {theirs} in the outcomes; cast one of them")
    schema = columns.schema
    for name in labels:
        schema = schema.append(log.schema.field(name).with_nullable(True))
    return replace(columns, schema=schema, impression=(*columns.impression, *labels))


def _load(con: Any, paths: list[str], columns: Columns, log: Source, keys: _Keys, labels: Sequence[str]) -> None:
    """Tables `keys(request, impression, t, part, row)` and `outcomes(..., pos)`."""
    con.execute("DROP TABLE IF EXISTS keys; DROP TABLE IF EXISTS verdicts; DROP TABLE IF EXISTS outcomes")
    made = False
    for i, path in enumerate(paths):
        for batch in _key_tables(path, i, columns, keys):
            con.register("batch", batch)
            con.execute("INSERT INTO keys FROM batch" if made else "CREATE TABLE keys AS FROM batch")
            con.unregister("batch")
            made = True
    kind = log.schema.field(keys.outcome_time).type
    name = quoted(keys.outcome_time)
    moment = f"epoch_us({name})" if pa.types.is_timestamp(kind) else f"CAST(round({name} * 1000000) AS BIGINT)"
    con.execute(
        f"CREATE TABLE outcomes AS SELECT row_number() OVER () - 1 AS pos, {quoted(columns.request_id)} AS request, "
        f"{quoted(keys.impression_id)} AS impression, {moment} AS t FROM {_scan(log)}"
    )


def _scan(log: Source) -> str:
    return f"read_parquet({texts(log.files)})"


def _key_tables(path: str, part: int, columns: Columns, keys: _Keys) -> Iterator[pa.Table]:
    meta = part_meta(path)
    at = 0
    for g in range(meta.row_groups):
        table = read_group(path, meta, g, [columns.request_id, keys.time, keys.impression_id])
        lists = table[IMPRESSIONS].combine_chunks()
        owners = pa.array(np.repeat(np.arange(len(lists)), pc.list_value_length(lists).to_numpy()))
        struct = lists.flatten()

        def column(name: str, table: pa.Table = table, owners: pa.Array = owners, struct: pa.Array = struct) -> Any:
            return table[name].take(owners) if name in table.column_names else pc.struct_field(struct, name)

        yield pa.table(
            {
                "request": column(columns.request_id),
                "impression": column(keys.impression_id),
                "t": _micros(column(keys.time)),
                "part": pa.array(np.full(len(owners), part)),
                "row": pa.array(np.arange(at, at + len(owners))),
            }
        )
        at += len(owners)


def _micros(moments: Any) -> Any:
    if pa.types.is_timestamp(moments.type):
        return moments.cast(pa.timestamp("us", moments.type.tz), safe=False).cast(pa.int64())
    return pc.round(pc.multiply(moments.cast(pa.float64()), 1e6)).cast(pa.int64())


def _counts(con: Any, manifest: Manifest) -> dict[str, int]:
    found = dict(con.execute("SELECT verdict, count(*) FROM verdicts GROUP BY verdict").fetchall())
    joined = int(found.get("joined", 0))
    rejected = {reason: int(found.get(reason, 0)) for reason in REASONS}
    return {"joined": joined, **rejected, "impressions without": manifest.impressions - joined}


def _write_rejected(con: Any, log: Source, path: Path) -> None:
    con.execute(
        f"COPY (SELECT o.* EXCLUDE (pos), v.verdict AS reason "
        f"FROM (SELECT *, row_number() OVER () - 1 AS pos FROM {_scan(log)}) o JOIN verdicts v USING (pos) "
        f"WHERE v.verdict <> 'joined' ORDER BY pos) TO '{str(path).replace(chr(39), chr(39) * 2)}' "
        "(FORMAT parquet, COMPRESSION zstd)"
    )


def _labelled(con: Any, path: str, part: int, log: Source, labels: Sequence[str]) -> Iterator[pa.Table]:
    """The row groups of a part with the label fields added."""
    meta = part_meta(path)
    names = ", ".join(f"o.{quoted(n)}" for n in labels)
    joined = con.sql(
        f"SELECT v.row, {names} FROM (SELECT *, row_number() OVER () - 1 AS pos FROM {_scan(log)}) o "
        f"JOIN verdicts v USING (pos) WHERE v.verdict = 'joined' AND v.part = {part} ORDER BY v.row"
    ).to_arrow_table()
    rows = joined["row"].to_numpy()
    at = 0
    for g in range(meta.row_groups):
        table = read_group(path, meta, g)
        lists = table[IMPRESSIONS].combine_chunks()
        struct = lists.flatten()
        wanted = np.arange(at, at + len(struct))
        at += len(struct)
        found = np.searchsorted(rows, wanted)
        hit = np.zeros(len(wanted), bool)
        inside = found < len(rows)
        hit[inside] = rows[found[inside]] == wanted[inside]
        index = pa.array(np.where(hit, found, 0), mask=~hit)
        fields = [*struct.type, *(log.schema.field(n).with_nullable(True) for n in labels)]
        arrays = [
            *struct.flatten(),
            *(joined[n].combine_chunks().take(index).cast(log.schema.field(n).type) for n in labels),
        ]
        offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(lists).to_numpy())])
        nested = pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), pa.StructArray.from_arrays(arrays, fields=fields)
        )
        yield table.set_column(table.schema.get_field_index(IMPRESSIONS), IMPRESSIONS, nested)
