"""`data to-requests`, `to-impressions`, `join-labels` as commands."""

from __future__ import annotations

import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from roo_rewrite.cli.data import Bytes, data
from roo_rewrite.data.table import read_manifest
from roo_rewrite.errors import DataError


@pytest.fixture
def run():
    def call(*args):
        return CliRunner().invoke(data, [str(a) for a in args], catch_exceptions=False)

    return call


@pytest.fixture
def spec_file(tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text('request = ["user*", "hist*", "time"]\nimpression = ["item*", "click"]\n')
    return path


def test_there_and_back(run, small_log, write, tmp_path, spec_file, same_bits):
    table = small_log([i % 7 for i in range(40)])
    log, out, back = write(table), tmp_path / "out", tmp_path / "back.parquet"
    options = ["--request-id", "rid", "--spec", spec_file, "--user-id", "user", "--time", "time", "--memory", "64M"]
    result = run("to-requests", log, out, *options)
    assert result.exit_code == 0
    assert "7 requests, 40 impressions" in result.output
    assert "plan: 1/1" in result.stderr
    assert "reduce: 1/1" in result.stderr
    result = run("to-impressions", out, back, "--quiet")
    assert result.exit_code == 0
    assert "40 impressions" in result.output
    assert same_bits(pq.read_table(back), table)


def test_options_reach_the_files(run, small_log, write, tmp_path, spec_file):
    table = small_log([1, 1, 2])
    log = write(table.set_column(4, "user_name", pa.array(["a", "b", "c"])))
    out = tmp_path / "out"
    common = ["to-requests", log, out, "--request-id", "rid", "--spec", spec_file, "--quiet"]
    with pytest.raises(DataError, match="user_name"):
        run(*common)
    more = ["--on-conflict", "demote", "--any-order", "--no-dedup", "--encodings", "default", "--level", 1]
    result = run(*common, *more, "--partition-by", "user")
    assert "moved to the impressions: ['user_name']" in result.output
    manifest = read_manifest(out)
    assert not manifest.columns.position
    assert [p.path.split("/")[1] for p in manifest.parts] == ["user=1", "user=2"]
    assert "hist" in pq.read_schema(out / manifest.parts[0].path).names


@pytest.mark.parametrize("verb", ["to-requests", "to-impressions"])
def test_spark_that_is_not_there(run, small_log, write, tmp_path, spec_file, monkeypatch, verb):
    log, out = write(small_log([1, 1, 2])), tmp_path / "out"
    common = ["to-requests", log, out, "--request-id", "rid", "--spec", spec_file, "--quiet"]
    run(*common)
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    with pytest.raises(DataError, match="--engine spark needs pyspark"):
        run(*(common if verb == "to-requests" else [verb, out, tmp_path / "back.parquet"]), "--engine", "spark")
    assert not (tmp_path / "back.parquet").exists()


def test_joining_labels(run, small_log, write, tmp_path, spec_file):
    out = tmp_path / "out"
    log = write(small_log([1, 1, 2]))
    run("to-requests", log, out, "--request-id", "rid", "--spec", spec_file, "--quiet")
    outcomes = pa.table(
        {"rid": [1, 2, 9], "item": [1, 2, 3], "at": pa.array([1, 2, 3], pa.timestamp("s")), "buy": [5, 6, 7]}
    )
    pq.write_table(outcomes, tmp_path / "outcomes.parquet")
    keys = ["--impression-id", "item", "--label", "buy", "--time", "time", "--outcome-time", "at", "--window", 60]
    result = run("join-labels", out, tmp_path / "outcomes.parquet", out, *keys)
    assert result.exit_code == 0
    assert "2 joined" in result.output
    assert "1 no impression" in result.output


@pytest.mark.parametrize(
    ("text", "size"), [("512M", 512 << 20), ("2g", 2 << 30), ("7", 7), ("1KiB", 1024), ("3 GB", 3 << 30)]
)
def test_sizes(text, size):
    assert Bytes().convert(text, None, None) == size


def test_a_bad_size_is_bad_usage(run, tmp_path):
    result = run("to-impressions", tmp_path, tmp_path / "x.parquet", "--memory", "lots")
    assert result.exit_code == 2
    assert "no size" in result.output


def test_bad_input_exits_with_2_and_names_the_file(small_log, write, tmp_path, spec_file):
    from roo_rewrite.cli import main

    log = write(small_log([1, 2]))
    log.write_bytes(log.read_bytes()[:-9])
    args = ["data", "to-requests", str(log), str(tmp_path / "out"), "--request-id", "rid", "--spec", str(spec_file)]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2
    assert f"error: {log} cannot be read as Parquet" in result.stderr
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(main, ["infer-spec", str(log), "--request-id", "r", "--out", "x"]).exit_code == 2
