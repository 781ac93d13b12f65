"""Bad input: an error that names file, row group and column; input untouched, no partial output."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roo_rewrite.data.infer import infer
from roo_rewrite.data.labels import join_labels
from roo_rewrite.data.table import MANIFEST, read_manifest
from roo_rewrite.data.to_impressions import to_impressions
from roo_rewrite.data.to_requests import to_requests
from roo_rewrite.errors import DataError

MEMORIES = pytest.mark.parametrize("memory", [4000, 1 << 30])


def tree(folder):
    """Every file below `folder` and its contents."""
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def fails(tmp_path, spec):
    """Converts, expects an error, and that nothing on the disk changed."""

    def check(log, message, memory=1 << 30, error=DataError):
        before = tree(tmp_path)
        with pytest.raises(error, match=message):
            to_requests(log, tmp_path / "out", spec, "rid", memory=memory)
        assert tree(tmp_path) == before
        assert not (tmp_path / "out").exists()

    return check


@MEMORIES
def test_a_missing_request_id(small_log, write, fails, memory):
    table = small_log(list(range(20)))
    ids = table["rid"].to_pylist()
    ids[13] = None
    log = write(table.set_column(0, "rid", pa.array(ids)), row_group_size=5)
    fails(log, r"log\.parquet, row group 2, column 'rid': 1 impressions have no request id", memory)


def test_a_column_that_changes_type(small_log, write, fails):
    first = small_log([1, 2])
    second = first.set_column(5, "item", first["item"].cast(pa.int64()))
    fails(write(first, second), r"column 'item' is int32 in .*0\.parquet and int64 in .*1\.parquet; cast")


def test_a_column_that_is_missing_in_one_file(small_log, write, fails):
    first = small_log([1, 2])
    fails(write(first, first.drop_columns(["click"])), r"1\.parquet has other columns than .*missing \['click'\]")


@pytest.mark.parametrize("keep", [0, 3, 300, -1, -200])
def test_a_truncated_file(small_log, write, fails, keep):
    log = write(small_log(list(range(30))))
    log.write_bytes(log.read_bytes()[:keep])
    fails(log, r"log\.parquet cannot be read as Parquet: .*truncated")


@MEMORIES
@pytest.mark.parametrize("column", ["rid", "item_f", "hist"])
def test_a_corrupt_page(small_log, write, fails, column, memory):
    log = write(small_log(list(range(40))), row_group_size=10, write_page_checksum=True)
    with pq.ParquetFile(log) as file:
        group = file.metadata.row_group(2)
        chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.split(".")[0] == column)
        at = chunk.data_page_offset + chunk.total_compressed_size // 2
    data = bytearray(log.read_bytes())
    data[at] ^= 0xFF
    log.write_bytes(bytes(data))
    fails(log, rf"log\.parquet, row group 2, column '{column}': .*corrupt", memory)


def test_another_format(tmp_path, fails):
    (tmp_path / "log.parquet").write_text("rid,user\n1,2\n")
    fails(tmp_path / "log.parquet", "cannot be read as Parquet")
    fails(tmp_path / "nothing*.parquet", "no Parquet file at")


def test_no_rows(small_log, write, fails):
    fails(write(small_log([])), "has no rows")


def test_one_file_without_rows_is_no_matter(small_log, write, tmp_path, spec):
    log = write(small_log([1, 1]), small_log([]), small_log([2]))
    assert to_requests(log, tmp_path / "out", spec, "rid").impressions == 3


@MEMORIES
def test_ids_split_across_files_and_row_groups(small_log, write, tmp_path, spec, same_bits, memory):
    tables = [small_log([1, 2, 3] * 5) for _ in range(3)]
    log = write(*tables, row_group_size=2)
    manifest = to_requests(log, tmp_path / "out", spec, "rid", memory=memory)
    assert manifest.requests == 3
    to_impressions(tmp_path / "out", tmp_path / "back.parquet", memory=memory)
    assert same_bits(pq.read_table(tmp_path / "back.parquet"), pa.concat_tables(tables))


def test_a_reserved_name(small_log, write, fails):
    fails(write(small_log([1]).rename_columns({"item": "impressions"})), "storage format's own")


def test_a_full_disk(small_log, write, tmp_path, spec):
    """A limit on file size fails writes as a full disk does, in the middle of a part."""
    table = small_log(list(range(4000)))
    log = write(table)
    before = tree(tmp_path)
    code = (
        "import resource, sys\n"
        "from roo_rewrite.data.to_requests import to_requests\n"
        "from roo_rewrite.features import FeatureSpec\n"
        "from roo_rewrite.errors import DataError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try:\n"
        f"    to_requests({str(log)!r}, {str(tmp_path / 'out')!r}, {spec!r}, 'rid')\n"
        "except DataError as e:\n"
        "    print(e); sys.exit(2)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "is full" in done.stdout
    assert tree(tmp_path) == before


FULL = """
import os, sys
from pathlib import Path
from roo_rewrite.data.to_requests import to_requests
from roo_rewrite.errors import DataError
from roo_rewrite.features import FeatureSpec
log, disk = sys.argv[1:]
for free in (10_000, 60_000, 92_000):
    stat = os.statvfs(disk)
    (Path(disk) / "rest").write_bytes(bytes(max(0, stat.f_bavail * stat.f_bsize - free)))
    try:
        to_requests(log, Path(disk) / "out", FeatureSpec(["user*", "hist*", "time"], ["item*", "click"]), "rid")
        sys.exit("went through")
    except DataError as e:
        assert "full" in str(e) or "No space" in str(e), e
    assert os.listdir(disk) == ["rest"], os.listdir(disk)
    (Path(disk) / "rest").unlink()
"""


def test_a_disk_without_room(small_log, write, tmp_path):
    """A small disk of memory, as a write to a file in a map ends the process where there is no room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["unshare", "-Urm", "sh", "-c", f'mount -t tmpfs -o size=400k none {disk} && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no disk of memory can be mounted here")
    log = write(small_log(list(range(10_000))))
    command = [*mounted, sys.executable, "-c", FULL, str(log), str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def corrupt(path, column, group=1):
    """Turns the head of the column's page over, which no reader can take."""
    with pq.ParquetFile(path) as file:
        leaves = file.metadata.row_group(group)
        chunk = next(c for c in map(leaves.column, range(leaves.num_columns)) if c.path_in_schema.startswith(column))
        at = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[at : at + 6] = bytes(b ^ 0xFF for b in data[at : at + 6])
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("column", ["rid", "item_f"])
def test_inference_names_the_corrupt_column(small_log, write, column):
    log = write(small_log([1, 1, 2, 2] * 3), row_group_size=5)
    corrupt(log, column)
    with pytest.raises(DataError, match=rf"log\.parquet, row group 1, column '{column}': .*corrupt"):
        infer(log, "rid")


def test_joining_names_the_corrupt_column(small_log, write, tmp_path, spec):
    to_requests(write(small_log([1, 2, 2])), tmp_path / "out", spec, "rid")
    outcomes = pa.table({"rid": [1, 2], "item": [0, 1], "at": pa.array([1, 2], pa.timestamp("us")), "buy": [1, 0]})
    late = write(outcomes, name="late", row_group_size=1)
    corrupt(late, "buy")
    before = tree(tmp_path)
    keys = {"impression_id": "item", "labels": ["buy"], "time": "time", "outcome_time": "at", "window": 60}
    with pytest.raises(DataError, match=r"late\.parquet, row group 1, column 'buy': .*corrupt"):
        join_labels(tmp_path / "out", late, tmp_path / "out", **keys)
    assert tree(tmp_path) == before


def test_damaged_data_sets(small_log, write, tmp_path, spec):
    out = tmp_path / "out"
    to_requests(write(small_log([1, 2, 2])), out, spec, "rid")
    part = out / read_manifest(out).parts[0].path
    data = part.read_bytes()
    with pq.ParquetFile(part) as file:
        leaf = file.metadata.row_group(0).column(0)
        at = leaf.data_page_offset + leaf.total_compressed_size - 3
    part.write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
    with pytest.raises(DataError, match=r"part-00000\.parquet, row group 0, column 'rid'"):
        to_impressions(out, tmp_path / "back.parquet")
    part.unlink()
    with pytest.raises(DataError, match="lacks 1 of its 1 parts"):
        to_impressions(out, tmp_path / "back.parquet")
    (out / MANIFEST).write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        to_impressions(out, tmp_path / "back.parquet")
    (out / MANIFEST).write_text('{"format": 9}')
    with pytest.raises(DataError, match="has format 9"):
        to_impressions(out, tmp_path / "back.parquet")
    assert not (tmp_path / "back.parquet").exists()


def test_an_impression_file_is_no_part(small_log, write, tmp_path, spec):
    out = tmp_path / "out"
    log = write(small_log([1, 2, 2]))
    to_requests(log, out, spec, "rid")
    part = out / read_manifest(out).parts[0].path
    part.write_bytes(log.read_bytes())
    with pytest.raises(DataError, match="is not request-level"):
        to_impressions(out, tmp_path / "back.parquet")


def test_kills_leave_the_old_or_the_new_data_set():
    """A few kills here; `tools/kill_convert.py --kills 100` for many."""
    kills = os.environ.get("ROO_KILLS", "3")
    tool = os.path.join(os.path.dirname(__file__), "..", "..", "tools", "kill_convert.py")
    command = [sys.executable, tool, "--kills", kills, "--impressions", "1500"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{kills} kills" in done.stdout
