"""Late labels: the earliest outcome in the window joins; every other one is counted and kept with its reason."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_rewrite.data.labels import REJECTED, join_labels
from roo_rewrite.data.to_impressions import to_impressions
from roo_rewrite.data.to_requests import to_requests
from roo_rewrite.errors import DataError
from roo_rewrite.features import FeatureSpec

SPEC = FeatureSpec(["t"], ["imp"])
OUTCOME = st.tuples(
    st.one_of(st.none(), st.integers(0, 3)),
    st.one_of(st.none(), st.integers(0, 6)),
    st.one_of(st.none(), st.integers(0, 40)),
)
JOIN = {"impression_id": "imp", "labels": ["click", "watch"], "time": "t", "outcome_time": "at", "window": 10.0}


def impressions(pairs, seconds):
    """A log of (request, impression) pairs; request r is at r * 10 seconds."""
    kind = pa.timestamp("us") if seconds == "timestamp" else pa.int64()
    scale = 1_000_000 if seconds == "timestamp" else 1
    times = pa.array([r * 10 * scale for r, _ in pairs], pa.int64()).cast(kind)
    return pa.table(
        {
            "rid": pa.array([r for r, _ in pairs], pa.int64()),
            "imp": pa.array([i for _, i in pairs], pa.int64()),
            "t": times,
        }
    )


def outcomes(rows, seconds):
    kind = pa.timestamp("ms") if seconds == "timestamp" else pa.float64()
    at = [None if t is None else t * 1000 if seconds == "timestamp" else float(t) for *_, t in rows]
    return pa.table(
        {
            "rid": pa.array([r for r, _, _ in rows], pa.int64()),
            "imp": pa.array([i for _, i, _ in rows], pa.int64()),
            "at": pa.array(at, kind),
            "click": pa.array(list(range(len(rows))), pa.int32()),
            "watch": pa.array([[n / 2] if n % 2 else None for n in range(len(rows))], pa.list_(pa.float32())),
        }
    )


def oracle(pairs, rows):
    """Outcome by impression row, and the reason of every other outcome."""
    first = {}
    for i, pair in enumerate(pairs):
        first.setdefault(pair, i)
    joined, why = {}, []
    for n in sorted(range(len(rows)), key=lambda n: (rows[n][2] is None, rows[n][2] or 0, n)):
        request, impression, at = rows[n]
        if request is None or impression is None or at is None:
            why.append("no key")
        elif (request, impression) not in first:
            why.append("no impression")
        elif at < request * 10:
            why.append("early")
        elif at > request * 10 + 10:
            why.append("late")
        elif first[request, impression] in joined:
            why.append("duplicate")
        else:
            joined[first[request, impression]] = n
    return joined, Counter(why)


@given(
    pairs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=12),
    rows=st.lists(OUTCOME, max_size=14),
    seconds=st.sampled_from(["timestamp", "number"]),
    memory=st.sampled_from([1500, 1 << 30]),
)
@settings(deadline=None, max_examples=20)
def test_join_matches_the_oracle(pairs, rows, seconds, memory):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pq.write_table(impressions(pairs, seconds), folder / "log.parquet")
        table = outcomes(rows, seconds)
        pq.write_table(table, folder / "outcomes.parquet")
        to_requests(folder / "log.parquet", folder / "out", SPEC, "rid", memory=memory)
        counts = join_labels(folder / "out", folder / "outcomes.parquet", folder / "out", **JOIN)
        to_impressions(folder / "out", folder / "back.parquet")
        back = pq.read_table(folder / "back.parquet").to_pylist()
        rejected = pq.read_table(next((folder / "out").glob(f"data-*/{REJECTED}")))
    joined, why = oracle(pairs, rows)
    plain = table.to_pylist()
    for i, row in enumerate(back):
        expected = plain[joined[i]] if i in joined else {"click": None, "watch": None}
        assert (row["rid"], row["imp"]) == pairs[i]
        assert (row["click"], row["watch"]) == (expected["click"], expected["watch"])
    assert counts.pop("joined") == len(joined)
    assert counts.pop("impressions without") == len(pairs) - len(joined)
    assert {k: v for k, v in counts.items() if v} == dict(why)
    assert Counter(rejected["reason"].to_pylist()) == why
    assert sorted(rejected["click"].to_pylist()) == sorted(set(range(len(rows))) - set(joined.values()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ["nope"]}, r"outcomes lack \['nope'\]"),
        ({"labels": ["t"]}, r"requests have already \['t'\]"),
        ({"time": "when"}, r"requests lack \['when'\]"),
        ({"impression_id": "click"}, r"requests lack \['click'\]"),
    ],
)
def test_columns_that_do_not_fit(tmp_path, options, message):
    pq.write_table(impressions([(1, 1)], "timestamp"), tmp_path / "log.parquet")
    pq.write_table(outcomes([(1, 1, 12)], "timestamp"), tmp_path / "outcomes.parquet")
    to_requests(tmp_path / "log.parquet", tmp_path / "out", SPEC, "rid")
    with pytest.raises(DataError, match=message):
        join_labels(tmp_path / "out", tmp_path / "outcomes.parquet", tmp_path / "out", **{**JOIN, **options})
    assert to_impressions(tmp_path / "out", tmp_path / "back.parquet") == 1


def test_keys_of_two_types(tmp_path):
    pq.write_table(impressions([(1, 1)], "timestamp"), tmp_path / "log.parquet")
    table = outcomes([(1, 1, 12)], "timestamp")
    pq.write_table(table.set_column(0, "rid", pa.array(["1"])), tmp_path / "outcomes.parquet")
    to_requests(tmp_path / "log.parquet", tmp_path / "out", SPEC, "rid")
    with pytest.raises(DataError, match="key 'rid' is int64 in the requests and string in the outcomes"):
        join_labels(tmp_path / "out", tmp_path / "outcomes.parquet", tmp_path / "new", **JOIN)
