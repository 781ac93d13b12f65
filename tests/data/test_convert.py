"""Both converters, against plain Python: nothing lost, bounded, resumable, all or nothing."""

from __future__ import annotations

import importlib
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_rewrite.data.store import Writing, part_meta, read_group
from roo_rewrite.data.table import MANIFEST, read_manifest
from roo_rewrite.data.to_impressions import to_impressions
from roo_rewrite.data.to_requests import to_requests
from roo_rewrite.errors import DataError, SpecError
from roo_rewrite.features import FeatureSpec

module = importlib.import_module("roo_rewrite.data.to_requests")
IDS = st.lists(st.integers(0, 12), min_size=1, max_size=40)
TINY = 4000


def requests_of(folder: Path) -> list[dict]:
    """All rows of a data set, request by request."""
    rows = []
    for part in read_manifest(folder).parts:
        path = str(folder / part.path)
        meta = part_meta(path)
        for g in range(meta.row_groups):
            rows += read_group(path, meta, g).to_pylist()
    return rows


@given(
    ids=IDS, memory=st.sampled_from([TINY, 1 << 30]), keep=st.booleans(), cut=st.integers(0, 40), dedup=st.booleans()
)
@settings(deadline=None, max_examples=40)
def test_round_trip(small_log, spec, same_bits, ids, memory, keep, cut, dedup):
    table = small_log(ids)
    with tempfile.TemporaryDirectory() as folder:
        log, out, back = (Path(folder) / n for n in ("log", "out", "back.parquet"))
        log.mkdir()
        pq.write_table(table.slice(0, cut), log / "a.parquet", row_group_size=5)
        pq.write_table(table.slice(cut), log / "b.parquet")
        options = {"user": "user", "time": "time", "keep_order": keep, "memory": memory}
        manifest = to_requests(log, out, spec, "rid", writing=Writing(3, "best", dedup), **options)
        assert manifest.requests == len(set(ids))
        assert manifest.impressions == len(ids)
        assert to_impressions(out, back, memory=memory) == len(ids)
        again = pq.read_table(back)
        assert not list(Path(folder).glob(".*"))
    expected = table if keep else table.take(order_of(table))
    assert same_bits(again, expected)


def order_of(table: pa.Table) -> list[int]:
    """Requests by user (nulls first), time and first row; the rows of each in order."""
    ids = table["rid"].to_pylist()
    users, times = table["user"].to_pylist(), table["time"].to_pylist()
    first = {r: ids.index(r) for r in ids}

    def key(i: int) -> tuple:
        user = users[first[ids[i]]]
        return (user is not None, user or 0, times[first[ids[i]]], first[ids[i]], i)

    return sorted(range(len(ids)), key=key)


@given(IDS)
@settings(deadline=None, max_examples=15)
def test_one_row_per_request_with_its_impressions(small_log, spec, ids):
    table = small_log(ids)
    with tempfile.TemporaryDirectory() as folder:
        log, out = Path(folder) / "log.parquet", Path(folder) / "out"
        pq.write_table(table, log)
        to_requests(log, out, spec, "rid", keep_order=False)
        rows = requests_of(out)
    plain = table.to_pylist()
    assert [r["rid"] for r in rows] == list(dict.fromkeys(ids))
    for row in rows:
        mine = [p for p in plain if p["rid"] == row["rid"]]
        assert [repr(i) for i in row["impressions"]] == [
            repr({k: p[k] for k in ("item", "item_f", "item_tags", "click")}) for p in mine
        ]
        assert row["hist"] == mine[0]["hist"]


def test_types_survive(tmp_path, same_bits):
    n = 6
    columns = {
        "rid": pa.array(["a", "b", "a", "c", "b", "ü"]),
        "user_dict": pa.array(["x", "y", "x", None, "y", "x"]).dictionary_encode(),
        "user_map": pa.array([[("k", 1)], [], [("k", 1)], None, [], []], pa.map_(pa.string(), pa.int32())),
        "user_nest": pa.array([[[1, None]], None, [[1, None]], [None, []], None, []], pa.list_(pa.list_(pa.int64()))),
        "hist_s": pa.array([["p", None], [], ["p", None], ["p", None, "q"], [], None]),
        "hist_b": pa.array([[True], [False, True], [True], [], [False, True], None]),
        "hist_large": pa.array([[1.5], [2.5], [1.5], [], [2.5], None], pa.large_list(pa.float32())),
        "item_u64": pa.array([2**64 - 1, 0, None, 1, 2, 3], pa.uint64()),
        "item_dec": pa.array([None, 1, 2, 3, 4, 5]).cast(pa.decimal128(24, 3)),
        "item_ns": pa.array(np.arange(n), pa.timestamp("ns", "UTC")),
        "item_bin": pa.array([b"\x00\xff", b"", None, b"a", b"b", b"c"]),
        "item_struct": pa.array([{"a": 1, "b": [1.0]}, None, {"a": None, "b": None}, {"a": 2, "b": []}, None, None]),
        "item_f16": pa.array(np.arange(n, dtype=np.float16)),
        "item_fixed": pa.array([[i, i] for i in range(n)], pa.list_(pa.float64(), 2)),
        "item_date": pa.array(np.arange(n).astype(np.int32), pa.date32()),
        "item_null": pa.nulls(n),
    }
    table = pa.table(columns)
    log, out, back = tmp_path / "log.parquet", tmp_path / "out", tmp_path / "back.parquet"
    pq.write_table(table, log)
    spec = FeatureSpec(["user*", "hist*"], ["item*"])
    for memory in (TINY, 1 << 30):
        to_requests(log, out, spec, "rid", memory=memory)
        to_impressions(out, back, memory=memory)
        assert same_bits(pq.read_table(back), table)


def test_histories_are_stored_once(tmp_path):
    histories = [list(range(i, i + 100)) for i in range(50)]
    log = pa.table({"rid": list(range(50)), "user": [1] * 50, "hist": histories, "item": list(range(50))})
    pq.write_table(log, tmp_path / "log.parquet")
    spec = FeatureSpec(["user", "hist"], ["item"])
    out = tmp_path / "out"
    to_requests(tmp_path / "log.parquet", out, spec, "rid", user="user")
    path = out / read_manifest(out).parts[0].path
    stored = pq.read_table(path)
    assert sum(len(v) for v in stored["hist#new"].to_pylist()) == 100 + 49
    assert [r["hist"] for r in requests_of(out)] == histories
    reverse = [h[::-1] for h in histories]
    newest_first = log.set_column(2, "hist", pa.array(reverse))
    pq.write_table(newest_first, tmp_path / "log.parquet")
    to_requests(tmp_path / "log.parquet", out, spec, "rid", user="user")
    path = out / read_manifest(out).parts[0].path
    assert sum(len(v) for v in pq.read_table(path)["hist#new"].to_pylist()) == 100 + 49
    assert [r["hist"] for r in requests_of(out)] == reverse


def test_statistics_prune_by_user(small_log, spec, write, tmp_path):
    log = write(small_log(list(range(12)) * 3))
    out = tmp_path / "out"
    manifest = to_requests(log, out, spec, "rid", user="user", memory=TINY)
    assert len(manifest.parts) > 2
    bounds = []
    for part in manifest.parts:
        group = pq.ParquetFile(out / part.path).metadata.row_group(0)
        stats = next(
            group.column(c) for c in range(group.num_columns) if group.column(c).path_in_schema == "user"
        ).statistics
        if stats.has_min_max:
            bounds.append((stats.min, stats.max))
    assert all(a[1] <= b[0] for a, b in zip(bounds, bounds[1:]))


def test_a_request_of_many_impressions(tmp_path, small_log, spec, same_bits):
    table = small_log([5] * 100_000 + [6])
    pq.write_table(table, tmp_path / "log.parquet")
    manifest = to_requests(
        tmp_path / "log.parquet", tmp_path / "out", spec, "rid", memory=1 << 20, writing=Writing(1, "default")
    )
    assert manifest.requests == 2
    to_impressions(tmp_path / "out", tmp_path / "back.parquet", memory=1 << 20, level=1)
    assert pq.read_table(tmp_path / "back.parquet").equals(table.replace_schema_metadata()) or same_bits(
        pq.read_table(tmp_path / "back.parquet"), table
    )


@pytest.mark.parametrize("memory", [TINY, 1 << 30])
def test_conflicts(small_log, spec, write, tmp_path, memory):
    table = small_log([1, 2, 1, 2] * 8)
    names = [f"u{i}" for i in range(32)]
    log = write(table.set_column(4, "user_name", pa.array(names)), row_group_size=4)
    out = tmp_path / "out"
    with pytest.raises(DataError, match="'user_name' of request 1: 'u0' and 'u"):
        to_requests(log, out, spec, "rid", memory=memory)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
    to_requests(log, out, spec, "rid", on_conflict="first", memory=memory)
    assert sorted(r["user_name"] for r in requests_of(out)) == ["u0", "u1"]
    to_requests(log, out, spec, "rid", on_conflict="last", memory=memory)
    assert sorted(r["user_name"] for r in requests_of(out)) == ["u30", "u31"]
    manifest = to_requests(log, out, spec, "rid", on_conflict="demote", memory=memory)
    assert manifest.provenance["demoted"] == ["user_name"]
    to_impressions(out, tmp_path / "back.parquet", memory=memory)
    assert pq.read_table(tmp_path / "back.parquet")["user_name"].to_pylist() == names


def test_a_stopped_run_goes_on(small_log, spec, write, tmp_path, monkeypatch):
    log = write(small_log([i % 9 for i in range(60)]), row_group_size=7)
    out = tmp_path / "out"
    real, seen = module.reduce_bucket, []

    def stop(job, bucket):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(bucket)
        return real(job, bucket)

    monkeypatch.setattr(module, "reduce_bucket", stop)
    with pytest.raises(KeyboardInterrupt):
        to_requests(log, out, spec, "rid", memory=TINY)
    assert not out.exists()
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / ".out.roo-work" / "data").glob("*.parquet")}
    assert len(written) == 2
    monkeypatch.setattr(module, "reduce_bucket", real)
    monkeypatch.setattr(module.plan, "duck_ordinals", lambda *a: pytest.fail("planned again"))
    monkeypatch.setattr(module, "map_unit", lambda *a: pytest.fail("mapped again"))
    manifest = to_requests(log, out, spec, "rid", memory=TINY)
    assert manifest.impressions == 60
    for path, stamp in written.items():
        assert (out / "data-1" / path.name).stat().st_mtime_ns == stamp


@pytest.mark.parametrize("memory", [TINY, 1 << 30])
def test_a_run_killed_after_it_demoted_goes_on(small_log, spec, write, tmp_path, monkeypatch, same_bits, memory):
    table = small_log([1, 2, 1, 2] * 8)
    table = table.set_column(4, "user_name", pa.array([f"u{i}" for i in range(32)]))
    log, out = write(table, row_group_size=4), tmp_path / "out"
    real = module.reduce_bucket

    def stop(job, bucket):
        made = real(job, bucket)
        if "user_name" in job.columns.impression:
            raise KeyboardInterrupt
        return made

    monkeypatch.setattr(module, "reduce_bucket", stop)
    with pytest.raises(KeyboardInterrupt):
        to_requests(log, out, spec, "rid", on_conflict="demote", memory=memory)
    monkeypatch.undo()
    manifest = to_requests(log, out, spec, "rid", on_conflict="demote", memory=memory)
    assert manifest.provenance["demoted"] == ["user_name"]
    assert "user_name" in manifest.columns.impression
    to_impressions(out, tmp_path / "back.parquet")
    assert same_bits(pq.read_table(tmp_path / "back.parquet"), table)


@pytest.mark.parametrize("side", ["requests", "impressions"])
def test_a_unit_half_mapped_is_mapped_again(small_log, spec, write, tmp_path, monkeypatch, same_bits, side):
    table = small_log([i % 9 for i in range(60)])
    log, out = write(table, row_group_size=7), tmp_path / "out"
    monkeypatch.setattr(module, "reduce_bucket", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        to_requests(log, out, spec, "rid", memory=TINY)
    monkeypatch.undo()
    (tmp_path / ".out.roo-work" / "slices" / f"000003.{side}.json").unlink()
    to_requests(log, out, spec, "rid", memory=TINY)
    to_impressions(out, tmp_path / "back.parquet")
    assert same_bits(pq.read_table(tmp_path / "back.parquet"), table)


def test_a_changed_input_starts_afresh(small_log, spec, write, tmp_path, monkeypatch):
    log = write(small_log([1, 2, 3] * 9))
    out = tmp_path / "out"
    monkeypatch.setattr(module, "reduce_bucket", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        to_requests(log, out, spec, "rid", memory=TINY)
    monkeypatch.undo()
    write(small_log([4] * 5))
    assert to_requests(log, out, spec, "rid", memory=TINY).requests == 1


def test_replacing_a_data_set(small_log, spec, write, tmp_path):
    out = tmp_path / "out"
    to_requests(write(small_log([1, 2])), out, spec, "rid")
    to_requests(write(small_log([3, 4, 4])), out, spec, "rid")
    assert [r["rid"] for r in requests_of(out)] == [3, 4]
    assert sorted(p.name for p in out.iterdir()) == [MANIFEST, "data-2"]


@pytest.mark.parametrize("stop", ["write", "rmtree"])
def test_killed_while_it_publishes(small_log, spec, write, tmp_path, monkeypatch, stop):
    out = tmp_path / "out"
    to_requests(write(small_log([1, 2])), out, spec, "rid")
    log = write(small_log([3, 4, 4]))
    workdir = importlib.import_module("roo_rewrite.data.workdir")

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(workdir.Manifest if stop == "write" else workdir.shutil, stop, die)
    with pytest.raises(KeyboardInterrupt):
        to_requests(log, out, spec, "rid")
    monkeypatch.undo()
    assert [r["rid"] for r in requests_of(out)] == ([1, 2] if stop == "write" else [3, 4])
    to_requests(log, out, spec, "rid")
    assert [r["rid"] for r in requests_of(out)] == [3, 4]
    assert len(list(out.iterdir())) == 2
    assert not list(tmp_path.glob(".*"))


def test_two_runs_at_once_are_refused(small_log, spec, write, tmp_path):
    import fcntl

    work = tmp_path / ".out.roo-work"
    work.mkdir()
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run"):
            to_requests(write(small_log([1])), tmp_path / "out", spec, "rid")
    shutil.rmtree(work)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"request_id": "nope"}, DataError, "no request id column 'nope'"),
        ({"request_id": "item_f"}, DataError, "must be an integer or a string"),
        ({"user": "ghost"}, DataError, "no user id column 'ghost'"),
        ({"user": "item"}, SpecError, "must be request columns"),
    ],
)
def test_bad_options(small_log, spec, write, tmp_path, options, error, message):
    given = {"request_id": "rid", **options}
    with pytest.raises(error, match=message):
        to_requests(write(small_log([1])), tmp_path / "out", spec, **given)
    assert not (tmp_path / "out").exists()


def test_a_spec_that_leaves_columns_out(small_log, write, tmp_path):
    spec = FeatureSpec(["user*", "item"], ["item*"])
    with pytest.raises(SpecError, match=r"(?s)'time' is not assigned.*'item' is on both sides"):
        to_requests(write(small_log([1])), tmp_path / "out", spec, "rid")


def test_a_target_that_holds_something_else(small_log, spec, write, tmp_path):
    log = write(small_log([1]))
    with pytest.raises(DataError, match="holds other files"):
        to_requests(log, tmp_path, spec, "rid")
    with pytest.raises(DataError, match="is a file"):
        to_requests(log, log, spec, "rid")
    with pytest.raises(DataError, match="is no request-level data set"):
        to_impressions(tmp_path, tmp_path / "x.parquet")
