"""`roo-rewrite data`: impression logs to request-level data sets, and back."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import click

from roo_rewrite.data.engines import DEFAULT_MEMORY, Engine, Progress
from roo_rewrite.data.labels import join_labels
from roo_rewrite.data.store import Writing
from roo_rewrite.data.to_impressions import to_impressions
from roo_rewrite.data.to_requests import to_requests
from roo_rewrite.features import FeatureSpec

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Bytes(click.ParamType[int]):
    """A size such as `512M` or `2G`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes, or a usage error."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)\s*([KMGT]?)(i?B)?", str(value).strip(), re.IGNORECASE)
        if match is None:
            self.fail(f"{value!r} is no size; write 512M or 2G", param, ctx)
        return int(match[1]) * _UNITS[match[2].upper()]


def show_progress(quiet: bool) -> Progress | None:
    """One line on stderr per step, renewed in place on a terminal, with impressions per second."""
    if quiet:
        return None
    began: dict[str, float] = {}
    rows_done: dict[str, int] = {}
    live = sys.stderr.isatty()

    def tell(stage: str, done: int, total: int, rows: int) -> None:
        now = time.monotonic()
        rows_done[stage] = rows_done.get(stage, 0) + rows
        elapsed = now - began.setdefault(stage, now)
        speed = f", {rows_done[stage] / elapsed:,.0f} impressions/s" if elapsed > 0.05 else ""
        if live or done == total:
            line = f"{stage}: {done}/{total}, {rows_done[stage]:,} impressions{speed}"
            click.echo(("\r\033[K" if live else "") + line, err=True, nl=not live or done == total)

    return tell


@click.group()
def data() -> None:
    """Request-level data: convert impression logs, both ways, and join late labels."""


memory_option = click.option(
    "--memory", type=Bytes(), default=DEFAULT_MEMORY, help="Bytes to use above the interpreter's own, as 512M. [2G]"
)
level_option = click.option("--level", type=click.IntRange(1, 22), default=9, show_default=True, help="zstd level.")
engine_option = click.option(
    "--engine", type=click.Choice(["duckdb", "spark"]), default="duckdb", show_default=True, help="What runs the tasks."
)
quiet_option = click.option("--quiet", is_flag=True, help="No progress on stderr.")
path = click.Path(path_type=Path)


@data.command("to-requests")
@click.argument("log")
@click.argument("out", type=path)
@click.option("--request-id", required=True, help="Column that names the request of an impression.")
@click.option("--spec", "spec_file", type=path, required=True, help="TOML file: request and impression columns.")
@click.option("--user-id", help="Column of the user: a user's requests stand together, histories are stored once.")
@click.option("--time", "time_column", help="Column that orders a user's requests.")
@click.option("--partition-by", "partition", help="Request column: parts in COLUMN=value directories. [none]")
@click.option("--on-conflict", type=click.Choice(["error", "first", "last", "demote"]), default="error")
@click.option("--keep-order/--any-order", default=True, help="Keep each impression's row number. [keep]")
@click.option("--encodings", type=click.Choice(["best", "default"]), default="best", help="Parquet encodings.")
@click.option("--dedup/--no-dedup", default=True, help="Store histories once. [on]")
@engine_option
@click.option("--threads", type=click.IntRange(1), help="DuckDB threads.")
@level_option
@memory_option
@quiet_option
def to_requests_command(
    log: str,
    out: Path,
    request_id: str,
    spec_file: Path,
    user_id: str | None,
    time_column: str | None,
    partition: str | None,
    on_conflict: Any,
    keep_order: bool,
    encodings: str,
    dedup: bool,
    engine: str,
    threads: int | None,
    level: int,
    memory: int,
    quiet: bool,
) -> None:
    """Converts the impression log LOG (file, directory or glob) into the request-level data set OUT.

    Bounded memory; a killed run leaves OUT as it was, and the same command goes on from there.
    """
    manifest = to_requests(
        log,
        out,
        FeatureSpec.from_toml(spec_file),
        request_id,
        user=user_id,
        time=time_column,
        partition=partition,
        keep_order=keep_order,
        on_conflict=on_conflict,
        writing=Writing(level, encodings, dedup),
        memory=memory,
        threads=threads,
        engine=_engine(engine),
        progress=show_progress(quiet),
    )
    size = sum(p.bytes for p in manifest.parts)
    click.echo(
        f"{out}: {manifest.requests:,} requests, {manifest.impressions:,} impressions, {size:,} bytes "
        f"in {len(manifest.parts)} parts"
    )
    if manifest.provenance["demoted"]:
        click.echo(f"not constant within a request, moved to the impressions: {manifest.provenance['demoted']}")


def _engine(name: str) -> Engine | None:
    if name == "duckdb":
        return None
    from roo_rewrite.data.spark import Spark

    return Spark()


@data.command("to-impressions")
@click.argument("requests", type=path)
@click.argument("out", type=path)
@engine_option
@level_option
@memory_option
@quiet_option
def to_impressions_command(requests: Path, out: Path, engine: str, level: int, memory: int, quiet: bool) -> None:
    """Writes the impressions of data set REQUESTS to the Parquet file OUT: the exact inverse of to-requests."""
    told = show_progress(quiet)
    rows = to_impressions(requests, out, level=level, memory=memory, engine=_engine(engine), progress=told)
    click.echo(f"{out}: {rows:,} impressions")


@data.command("join-labels")
@click.argument("requests", type=path)
@click.argument("outcomes")
@click.argument("out", type=path)
@click.option("--impression-id", required=True, help="Column of the impression, in both.")
@click.option("--label", "labels", multiple=True, required=True, help="Column of OUTCOMES to join; repeatable.")
@click.option("--time", "time_column", required=True, help="When the impression was logged.")
@click.option("--outcome-time", required=True, help="When the outcome arrived; a timestamp as --time.")
@click.option("--window", type=float, required=True, help="Seconds an outcome may take.")
@level_option
@quiet_option
def join_labels_command(
    requests: Path,
    outcomes: str,
    out: Path,
    impression_id: str,
    labels: tuple[str, ...],
    time_column: str,
    outcome_time: str,
    window: float,
    level: int,
    quiet: bool,
) -> None:
    """Joins late OUTCOMES to data set REQUESTS by (request, impression), into data set OUT.

    The first outcome within the window counts. Duplicates, late ones and ones without an impression are
    counted, and kept in OUT/_rejected.parquet with the reason.
    """
    counts = join_labels(
        requests,
        outcomes,
        out,
        impression_id=impression_id,
        labels=labels,
        time=time_column,
        outcome_time=outcome_time,
        window=window,
        writing=Writing(level),
        progress=show_progress(quiet),
    )
    click.echo(f"{out}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))
