"""Figures of request-level data: bytes, conversion, readers, memory.

    python tools/bench/data.py storage
    python tools/bench/data.py speed
    python tools/bench/data.py readers
    python tools/bench/data.py memory --limit 256

On logs of `tools/make_logs.py`. Times are the least of several runs taken in turns.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from make_logs import SHAPES, SPEC, write_log

from roo_rewrite.data.read import RequestDataset
from roo_rewrite.data.store import Writing, best_encodings
from roo_rewrite.data.tensors import as_tensor
from roo_rewrite.data.to_impressions import regrouped, to_impressions
from roo_rewrite.data.to_requests import to_requests
from roo_rewrite.features import FeatureSpec

LOG_SPEC = FeatureSpec(**SPEC)
KEYS: dict[str, Any] = {"request_id": "request_id", "user": "user_id", "time": "time"}
FILL = {"watch": 0.0}
NUMBERS = ["user_id", "user_age", "user_f0", "user_f1", "user_f2", "user_f3", "hist_item", "hist_action", "hist_dwell"]
NUMBERS += ["item_id", "item_category", *(f"item_f{i}" for i in range(8)), "position", "click", "watch"]


def stored(
    log: Path, out: Path, *, keep_order: bool = True, dedup: bool = True, best: bool = True, level: int = 9
) -> int:
    """Bytes of the log as a request-level data set."""
    writing = Writing(level, "best" if best else "default", dedup)
    manifest = to_requests(log, out, LOG_SPEC, **KEYS, keep_order=keep_order, writing=writing)
    return sum(p.bytes for p in manifest.parts)


def same_encodings(log: Path, level: int) -> int:
    """Bytes of an impression-level log written with the encodings and level the data set has."""
    table = pq.read_table(log)
    target = log.with_suffix(".best")
    options = best_encodings(table, level)
    pq.write_table(table, target, compression="zstd", compression_level=level, row_group_size=131_072, **options)
    return target.stat().st_size


def storage_of(profile: str, impressions: int, folder: Path) -> list[str]:
    """Rows of the storage table: more samples in the same bytes, against each baseline."""
    logs = {order: folder / f"{order}.parquet" for order in ("arrival", "request", "user")}
    for order, log in logs.items():
        write_log(profile, log, impressions, order=order)
    base = {order: log.stat().st_size for order, log in logs.items()}
    same = {order: same_encodings(log, 9) for order, log in logs.items()}
    variants: dict[str, dict[str, Any]] = {
        "all": {},
        "any order": {"keep_order": False},
        "no history dedup": {"dedup": False},
        "default encodings, zstd 1": {"best": False, "level": 1},
        "plain nested: neither, zstd 1": {"best": False, "dedup": False, "level": 1, "keep_order": False},
    }
    rows = []
    for name, options in variants.items():
        size = stored(logs["arrival"], folder / "out", **options)
        default = " | ".join(f"{b / size - 1:+.0%}" for b in base.values())
        equal = " | ".join(f"{b / size - 1:+.0%}" for b in same.values())
        rows.append(f"| {profile} | {name} | {size / 1e6:.2f} | {default} | {equal} |")
    return rows


def least(runs: int, *work: Callable[[], object]) -> list[float]:
    """The least seconds of each piece of work, taken in turns."""
    best = [float("inf")] * len(work)
    for _ in range(runs):
        for i, one in enumerate(work):
            began = time.perf_counter()
            one()
            best[i] = min(best[i], time.perf_counter() - began)
    return best


def speed_of(profile: str, impressions: int, folder: Path, runs: int) -> str:
    """One row: both conversions against DuckDB's copy at the same level."""
    log, out, back = folder / "log.parquet", folder / "out", folder / "back.parquet"
    rows = write_log(profile, log, impressions, order="arrival")

    def copy() -> None:
        options = "FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL 9"
        duckdb.connect().execute(f"COPY (FROM '{log}') TO '{folder / 'copy.parquet'}' ({options})")

    there = lambda: stored(log, out)  # noqa: E731
    copied, forward, reverse = least(runs, copy, there, lambda: to_impressions(out, back, level=9))
    return (
        f"| {profile} | {copied:.2f} | {forward:.2f} ({forward / copied:.2f}x) | {reverse:.2f} "
        f"({reverse / copied:.2f}x) | {rows / forward:,.0f} |"
    )


def read_impressions(log: Path, rows: int) -> int:
    """All columns of an impression-level log as tensors, by pyarrow."""
    seen = 0
    with pq.ParquetFile(log) as file:
        for batch in file.iter_batches(rows, columns=NUMBERS):
            for name in NUMBERS:
                column = batch[name]
                if hasattr(column, "value_lengths"):
                    as_tensor(name, column.value_lengths(), None)
                    column = column.flatten()
                as_tensor(name, column, FILL)
            seen += batch.num_rows
    return seen


def read_requests(folder: Path, rows: int) -> int:
    """The same columns of the data set, as RequestBatches."""
    return sum(b.total_impressions for b in RequestDataset(folder, columns=NUMBERS, fill=FILL, max_impressions=rows))


def readers_of(profile: str, impressions: int, folder: Path, runs: int) -> str:
    """One row: impressions a second of both readers."""
    log, out = folder / "log.parquet", folder / "out"
    rows = write_log(profile, log, impressions, order="arrival")
    stored(log, out)
    old, new = least(runs, lambda: read_impressions(log, 4096), lambda: read_requests(out, 4096))
    return f"| {profile} | {rows / old:,.0f} | {rows / new:,.0f} | {old / new:.1f}x |"


CHILD = """
from roo_rewrite.data.to_requests import to_requests
from roo_rewrite.data.to_impressions import to_impressions
from roo_rewrite.features import FeatureSpec
def status(what):
    return int(next(l for l in open("/proc/self/status") if l.startswith(what)).split()[1]) / 1024
before = status("VmRSS")
{work}
print(status("VmHWM") - before)
"""


def peak(work: str) -> float:
    """MiB a piece of Python took at its peak above the interpreter and its imports."""
    done = subprocess.run([sys.executable, "-c", CHILD.format(work=work)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def same_rows(a: Path, b: Path) -> Iterator[int]:
    """Rows of each pair of equal batches of two logs, in order."""
    with pq.ParquetFile(a) as one, pq.ParquetFile(b) as other:
        for x, y in zip(regrouped(_tables(one), 8192), regrouped(_tables(other), 8192), strict=True):
            yield x.num_rows if x.equals(y) else 0


def _tables(file: pq.ParquetFile) -> Iterator[pa.Table]:
    return (pa.Table.from_batches([batch]) for batch in file.iter_batches(8192))


@click.group()
def main() -> None:
    """Figures of request-level data."""


impressions_option = click.option("--impressions", default=60_000, show_default=True)
runs_option = click.option("--runs", default=3, show_default=True)


@main.command()
@impressions_option
def storage(impressions: int) -> None:
    """More samples in the same storage, against impression-level Parquet (zstd 1)."""
    click.echo("| log | data set | MB | arrival | by request | by user | same enc.: arrival | by request | by user |")
    click.echo("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for profile in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            click.echo("\n".join(storage_of(profile, impressions, Path(folder))))


@main.command()
@impressions_option
@runs_option
def speed(impressions: int, runs: int) -> None:
    """Conversions against DuckDB copying the log to Parquet at the same zstd level."""
    click.echo("| log | DuckDB copy s | to-requests s | to-impressions s | impressions/s |\n|---|---:|---:|---:|---:|")
    for profile in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            click.echo(speed_of(profile, impressions, Path(folder), runs))


@main.command()
@impressions_option
@runs_option
def readers(impressions: int, runs: int) -> None:
    """Impressions a second as tensors: impression-level pyarrow against RequestDataset."""
    torch.set_num_threads(1)
    click.echo("| log | impression Parquet | request data set | |\n|---|---:|---:|---:|")
    for profile in SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            click.echo(readers_of(profile, impressions, Path(folder), runs))


@main.command()
@click.option("--limit", default=256, show_default=True, help="MiB")
@click.option("--times", default=10, show_default=True, help="size of the log in memory, in limits")
@click.option("--profile", default="feed", show_default=True, type=click.Choice(sorted(SHAPES)))
def memory(limit: int, times: int, profile: str) -> None:
    """Peak memory of both conversions of a log many times the limit, above the interpreter and its imports."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log, out, back = folder / "log.parquet", folder / "out", folder / "back.parquet"
        rows = write_log(profile, log, times * limit * (1 << 20) // 2800, order="arrival", blocks=times)
        given = f"{str(log)!r}, {str(out)!r}, FeatureSpec(**{SPEC!r})"
        rest = f"user='user_id', time='time', memory={limit << 20}"
        forward = peak(f"to_requests({given}, 'request_id', {rest})")
        reverse = peak(f"to_impressions({str(out)!r}, {str(back)!r}, memory={limit << 20})")
        back_rows = sum(same_rows(log, back))
        click.echo("| log | impressions | limit MiB | to-requests MiB | to-impressions MiB | rows the same, in order |")
        click.echo("|---|---:|---:|---:|---:|---:|")
        click.echo(f"| {profile} | {rows:,} | {limit} | {forward:.0f} | {reverse:.0f} | {back_rows:,} |")


if __name__ == "__main__":
    main()
