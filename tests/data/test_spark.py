"""The Spark engine gives what DuckDB gives, to the bit."""

from __future__ import annotations

import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roo_rewrite.data.table import read_manifest
from roo_rewrite.data.to_impressions import to_impressions
from roo_rewrite.data.to_requests import to_requests
from roo_rewrite.errors import DataError

pytest.importorskip("pyspark")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def engine():
    from roo_rewrite.data.spark import Spark

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            spark = Spark(master="local[2]")
        except DataError as e:
            pytest.skip(str(e))
        spark.session.conf.set("spark.sql.shuffle.partitions", "2")
        yield spark
        spark.session.stop()


def contents(folder):
    """Every part of a data set, as stored."""
    return [pq.read_table(folder / p.path).replace_schema_metadata() for p in read_manifest(folder).parts]


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        (20_000, {"user": "user", "time": "time"}),
        (1 << 30, {"user": "user_name"}),
        (1 << 30, {"partition": "user_name"}),
    ],
)
def test_both_engines_agree(engine, small_log, spec, write, tmp_path, same_bits, memory, options):
    tables = [small_log([i * 5 % 11 for i in range(30)]), small_log([i * 3 % 13 for i in range(20)])]
    tables[1] = tables[1].set_column(
        2, "time", pa.array([r * 1000 for r in tables[1]["rid"].to_pylist()], pa.timestamp("us"))
    )
    log = write(*tables, name="a lög [1]", row_group_size=25)
    ours = to_requests(log, tmp_path / "duck", spec, "rid", memory=memory, **options)
    theirs = to_requests(log, tmp_path / "spark", spec, "rid", memory=memory, engine=engine, **options)
    assert theirs.provenance["engine"] == "spark"
    assert [(p.requests, p.impressions) for p in ours.parts] == [(p.requests, p.impressions) for p in theirs.parts]
    for a, b in zip(contents(tmp_path / "duck"), contents(tmp_path / "spark"), strict=True):
        assert same_bits(a, b)
    to_impressions(tmp_path / "spark", tmp_path / "back.parquet", memory=memory, engine=engine)
    assert same_bits(pq.read_table(tmp_path / "back.parquet"), pa.concat_tables(tables))


def test_errors_of_tasks_come_back_as_they_were(engine, small_log, spec, write, tmp_path):
    table = small_log([1, 2, 1, 2] * 8)
    log = write(table.set_column(4, "user_name", pa.array([f"u{i}" for i in range(32)])), row_group_size=16)
    with pytest.raises(DataError, match="'user_name' of request 1: 'u0' and 'u"):
        to_requests(log, tmp_path / "out", spec, "rid", memory=20_000, engine=engine)
    manifest = to_requests(log, tmp_path / "out", spec, "rid", memory=20_000, engine=engine, on_conflict="demote")
    assert manifest.provenance["demoted"] == ["user_name"]


def test_a_missing_id_is_named(engine, small_log, spec, write, tmp_path):
    table = small_log(list(range(10)))
    ids = [None if i == 7 else i for i in range(10)]
    log = write(table.set_column(0, "rid", pa.array(ids, pa.int64())), row_group_size=5)
    with pytest.raises(DataError, match="row group 1, column 'rid': 1 impressions have no request id"):
        to_requests(log, tmp_path / "out", spec, "rid", engine=engine)
    assert not (tmp_path / "out").exists()
