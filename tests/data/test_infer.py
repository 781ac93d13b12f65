"""infer: constant within requests, nearly so, or not; against a plain oracle."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from roo_rewrite.cli.infer_spec import infer_spec
from roo_rewrite.data.infer import infer
from roo_rewrite.data.to_requests import to_requests
from roo_rewrite.errors import DataError
from roo_rewrite.features import FeatureSpec

VALUES = st.sampled_from([None, 0, 1])
ROWS = st.lists(
    st.tuples(st.integers(0, 3), VALUES, st.lists(VALUES, max_size=2), st.integers(0, 1)), min_size=2, max_size=16
)


@given(ROWS)
@settings(deadline=None, max_examples=30)
def test_what_is_constant_matches_the_oracle(rows):
    ids = [r[0] for r in rows]
    if len(set(ids)) == len(ids):
        return
    table = pa.table(
        {
            "rid": ids,
            "a": pa.array([r[1] for r in rows], pa.int64()),
            "b": pa.array([r[2] for r in rows], pa.list_(pa.int64())),
            "user": [r[3] for r in rows],
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.parquet"
        pq.write_table(table, path)
        found = infer(path, "rid", user="user")
    for facts, at in zip(found.columns, (1, 2, 3)):
        for level, key in (("request", 0), ("user", 3)):
            groups = {r[key]: {repr(q[at]) for q in rows if q[key] == r[key]} for r in rows}
            assert facts.varies[level] == sum(len(g) > 1 for g in groups.values())
        assert (facts.name in found.spec.request) == (facts.varies["request"] == 0)


@pytest.fixture
def log(small_log, tmp_path):
    table = small_log([i % 19 for i in range(95)])
    ages = [i % 19 for i in range(95)]
    ages[58] = 99
    table = table.append_column("user_age", pa.array(ages))
    pq.write_table(table, tmp_path / "log.parquet")
    return tmp_path / "log.parquet"


def test_nearly_constant_columns_are_shown_with_examples(log, tmp_path):
    found = infer(log, "rid", user="user")
    assert [c.name for c in found.nearly(0.06)] == ["user_age"]
    age = next(c for c in found.columns if c.name == "user_age")
    assert found.share(age, found.levels[0]) == 1 / 19
    assert sorted(age.examples[0].removeprefix("1: ").split(" and ")) == ["1", "99"]
    assert "user_age" in found.spec.impression


def test_what_a_level_saves(log):
    found = infer(log, "rid", user="user")
    by_name = {c.name: c for c in found.columns}
    request, user = found.levels
    assert (request.groups, user.groups) == (19, 3)
    assert found.saves(by_name["time"], request) == round(by_name["time"].bytes * 0.8)
    assert found.saves(by_name["time"], user) == 0
    assert found.saves(by_name["user"], user) == round(by_name["user"].bytes * (1 - 3 / 95))


def test_the_command_writes_a_spec_that_converts(log, tmp_path):
    out = tmp_path / "spec.toml"
    args = [str(log), "--request-id", "rid", "--user-id", "user", "--out", str(out), "--nearly", "0.06"]
    result = CliRunner().invoke(infer_spec, args, catch_exceptions=False)
    assert result.exit_code == 0
    assert "nearly request-level: user_age" in result.output
    assert "# nearly request-level: 'user_age' varies in 5.26% of requests" in out.read_text()
    spec = FeatureSpec.from_toml(out)
    assert set(spec.request) == {"user", "time", "hist", "user_name"}
    assert to_requests(log, tmp_path / "out", spec, "rid").requests == 19


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({"rid": [1, 2], "a": [1, 2]}, {}, "no request of .* has two impressions"),
        ({"rid": pa.array([], pa.int64()), "a": pa.array([], pa.int64())}, {}, "has no rows"),
        ({"rid": [1, None, 1], "a": [1, 2, 1]}, {}, "row group 0, column 'rid': 1 impressions have no request id"),
        ({"rid": [1, 1], "a": [1, 2]}, {"user": "u"}, "no user column 'u'"),
    ],
)
def test_bad_logs(tmp_path, table, options, message):
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    with pytest.raises(DataError, match=message):
        infer(tmp_path / "log.parquet", "rid", **options)
