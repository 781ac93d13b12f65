"""Parts in `column=value` directories: nothing lost, plain readers see the column, filters pass whole parts over."""

from __future__ import annotations

import datetime
import tempfile
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_rewrite.data import RequestDataset, hive, read, to_impressions, to_requests
from roo_rewrite.data.labels import join_labels
from roo_rewrite.data.store import Writing, part_meta, read_group
from roo_rewrite.data.table import read_manifest
from roo_rewrite.errors import DataError, SpecError

FAST = Writing(1, "default")
TEXTS = ["", "a/b", "=%5F", "ü ?", "..", None, hive.NULL, "null", "1"]
COLUMNS = {
    "text": pa.array(TEXTS),
    "date": pa.array([1, 20_000, None, -5, 0, 7, 8, 9, 10], pa.date32()),
    "int": pa.array([-(2**63), 2**63 - 1, None, 0, 1, 2, 3, 4, 5], pa.int64()),
    "uint": pa.array([2**64 - 1, 0, None, 1, 2, 3, 4, 5, 6], pa.uint64()),
    "bool": pa.array([True, False, None] * 3),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
}


def log_with(small_log, ids, column):
    """A log with a request column `user_part` of one of the kinds above, constant within each request."""
    return small_log(ids).append_column("user_part", column.take(pa.array([i % len(column) for i in ids])))


def parts_of(folder):
    return [str(folder / p.path) for p in read_manifest(folder).parts]


@given(
    ids=st.lists(st.integers(0, 12), min_size=1, max_size=30),
    kind=st.sampled_from(sorted(COLUMNS)),
    memory=st.sampled_from([4000, 1 << 30]),
    keep=st.booleans(),
)
@settings(deadline=None, max_examples=20, derandomize=True)
def test_round_trip(small_log, spec, same_bits, ids, kind, memory, keep):
    table = log_with(small_log, ids, COLUMNS[kind])
    with tempfile.TemporaryDirectory() as folder:
        log, out, back = (Path(folder) / n for n in ("log.parquet", "out", "back.parquet"))
        pq.write_table(table, log)
        options = {"user": "user", "time": "time", "keep_order": keep, "memory": memory, "writing": FAST}
        manifest = to_requests(log, out, spec, "rid", partition="user_part", **options)
        assert manifest.requests == len(set(ids))
        assert to_impressions(out, back, memory=memory, level=1) == len(ids)
        again = pq.read_table(back)
        for path in parts_of(out):
            meta = part_meta(path)
            assert "user_part" not in pq.read_schema(path).names
            assert len(set(map(str, read_group(path, meta, 0, ["rid", "user_part"])["user_part"]))) == 1
    rows = again["item"].to_pylist()
    assert rows == list(range(len(ids))) if keep else sorted(rows) == list(range(len(ids)))
    assert same_bits(again, table.take(pa.array(rows)))


@pytest.fixture
def dated(small_log, spec, write, tmp_path):
    """A data set partitioned by date, and its log."""
    days = pa.array([datetime.date(2026, 1, 1 + d) for d in range(4)] + [None])
    table = log_with(small_log, [i * 7 % 23 for i in range(90)], days)
    to_requests(
        write(table), tmp_path / "out", spec, "rid", user="user", time="time", partition="user_part", writing=FAST
    )
    return tmp_path / "out", table


def test_plain_readers_see_the_column(dated):
    folder, table = dated
    expected = {}
    for row in table.to_pylist():
        day = row["user_part"] and str(row["user_part"])
        expected[day] = expected.get(day, 0) + 1
    count = {}
    for row in ds.dataset(folder, partitioning="hive").to_table(columns=["user_part", "impressions"]).to_pylist():
        count[row["user_part"]] = count.get(row["user_part"], 0) + len(row["impressions"])
    assert count == expected
    found = duckdb.sql(
        "SELECT user_part, sum(len(impressions))::INT "
        f"FROM read_parquet('{folder}/data-*/**/part-*.parquet', hive_partitioning = true) GROUP BY 1"
    ).fetchall()
    assert {day and str(day): n for day, n in found} == expected


def test_filters_open_the_partitions_that_may_match(dated, monkeypatch):
    folder, table = dated
    seen = []
    monkeypatch.setattr(read, "read_group", lambda *args: (seen.append(args[0]), read_group(*args))[1])
    for expression in (
        pc.field("user_part") == datetime.date(2026, 1, 2),
        pc.is_null(pc.field("user_part")),
        (pc.field("user_part") > datetime.date(2026, 1, 3)) & (pc.field("rid") > 5),
    ):
        seen.clear()
        data = RequestDataset(folder, columns=["item"], filters=expression, max_requests=3)
        items = sorted(i for b in data for i in b.kwargs["item"].tolist())
        assert items == sorted(table.filter(expression)["item"].to_pylist())
        assert len(set(seen)) == 1
    data = RequestDataset(folder, columns=["user_part"], fill={"user_part": 0}, max_requests=99)
    days = [d for b in data for r in range(len(b)) for d in b.kwargs["user_part"][r : r + 1].tolist()]
    assert len(days) == len(set(table["rid"].to_pylist()))


def test_labels_join_a_partitioned_data_set(dated, tmp_path):
    folder, _ = dated
    outcomes = pa.table({"rid": [7, 9], "item": [1, 999], "at": pa.array([8000, 9000], pa.timestamp("us"))})
    pq.write_table(outcomes.append_column("buy", pa.array([1, 1])), tmp_path / "outcomes.parquet")
    before = sorted(p.partition("data-1/")[2] for p in parts_of(folder))
    keys = {"impression_id": "item", "labels": ["buy"], "time": "time", "outcome_time": "at", "window": 60}
    assert join_labels(folder, tmp_path / "outcomes.parquet", folder, **keys)["joined"] == 1
    assert sorted(p.partition("data-2/")[2] for p in parts_of(folder)) == before
    to_impressions(folder, tmp_path / "back.parquet")
    assert pc.sum(pq.read_table(tmp_path / "back.parquet")["buy"]).as_py() == 1
    assert ds.dataset(folder, partitioning="hive").count_rows() == 23


@pytest.mark.parametrize(
    ("column", "error", "message"),
    [
        ("nope", DataError, "no partition column 'nope'"),
        ("item", SpecError, "must be request columns"),
        ("rid", DataError, "coarser"),
        ("hist", DataError, "partition by an integer, string"),
        ("time", DataError, "'time' is timestamp"),
    ],
)
def test_bad_partitions(small_log, spec, write, tmp_path, column, error, message):
    with pytest.raises(error, match=message):
        to_requests(write(small_log([1, 2])), tmp_path / "out", spec, "rid", partition=column)
    assert not (tmp_path / "out").exists()


def test_too_many_partitions(small_log, spec, write, tmp_path, monkeypatch):
    monkeypatch.setattr(hive, "MOST", 3)
    with pytest.raises(DataError, match="changes 3 times in one part; choose a coarser one"):
        to_requests(write(small_log(list(range(5)))), tmp_path / "out", spec, "rid", partition="user_name")
    assert not (tmp_path / "out").exists()


def test_a_partition_column_is_not_demoted(small_log, spec, write, tmp_path):
    log = write(small_log([1, 1]).append_column("user_part", pa.array([1, 2])))
    with pytest.raises(DataError, match="'user_part' of request 1: 1 and 2"):
        to_requests(log, tmp_path / "out", spec, "rid", partition="user_part", on_conflict="demote")
    to_requests(log, tmp_path / "out", spec, "rid", partition="user_part", on_conflict="last")
    assert [Path(p).parent.name for p in parts_of(tmp_path / "out")] == ["user_part=2"]
