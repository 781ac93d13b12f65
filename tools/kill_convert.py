"""Kills conversions at random moments and checks that nothing is lost and nothing half-written.

    python tools/kill_convert.py --kills 100

Two logs take turns in one data set. Each conversion is a process of its own that gets SIGKILL at a random
moment of its run; then the data set must be the old log or the new one, to the bit, and the next run goes on.
The same for the way back. Exit status 1 where it is neither.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq
from make_logs import SHAPES, SPEC, arrival_order, block

from roo_rewrite.data.store import Writing
from roo_rewrite.data.to_impressions import to_impressions
from roo_rewrite.data.to_requests import to_requests
from roo_rewrite.features import FeatureSpec

MEMORY = 2 << 20


class HalfWrittenError(Exception):
    """The data set is neither the old nor the new one."""


def run(task: Callable[[], None], kill_after: float | None) -> bool:
    """Runs `task` in a child process; True where it ended by itself, False where it was killed."""
    child = os.fork()
    if child == 0:
        try:
            task()
            os._exit(0)
        except BaseException as e:
            print(e, file=sys.stderr)
            os._exit(1)
    end = time.monotonic() + (1e9 if kill_after is None else kill_after)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.001)
    if status != 0:
        raise HalfWrittenError(f"the conversion failed by itself, status {status}")
    return True


class Trial:
    """One data set, two logs."""

    def __init__(self, folder: Path, impressions: int):
        self.folder, self.out, self.back = folder, folder / "requests", folder / "back.parquet"
        self.logs = [folder / "a.parquet", folder / "b.parquet"]
        for seed, log in enumerate(self.logs):
            table = arrival_order(block(SHAPES["feed"], impressions, seed), seed)
            pq.write_table(table, log, row_group_size=impressions // 4)
        self.tables = [pq.read_table(log) for log in self.logs]

    def convert(self, which: int) -> None:
        """The log into the data set."""
        spec = FeatureSpec(**SPEC)
        options = {"user": "user_id", "time": "time", "memory": MEMORY, "writing": Writing(1)}
        to_requests(self.logs[which], self.out, spec, "request_id", **options)

    def revert(self) -> None:
        """The data set into a log."""
        to_impressions(self.out, self.back, memory=MEMORY, level=1)

    def holds(self, path: Path) -> int:
        """Which log is in the Parquet file."""
        table: pa.Table = pq.read_table(path)
        for which, expected in enumerate(self.tables):
            if table.equals(expected):
                return which
        raise HalfWrittenError(f"{path} holds neither log")

    def stored(self) -> int:
        """Which log is in the data set."""
        check = self.folder / "check.parquet"
        run(lambda: void(to_impressions(self.out, check, level=1)), None)
        return self.holds(check)


def void(_: object) -> None:
    """A task returns nothing."""


def torture(folder: Path, kills: int, impressions: int, seed: int) -> tuple[int, int]:
    """(kills, conversions that went through); raises HalfWrittenError."""
    rng = random.Random(seed)
    trial = Trial(folder, impressions)
    began = time.monotonic()
    run(lambda: trial.convert(0), None)
    run(trial.revert, None)
    span = (time.monotonic() - began) / 2
    now, killed, finished = 0, 0, 0
    while killed < kills:
        target = 1 - now
        way_back = rng.random() < 0.25
        task = trial.revert if way_back else (lambda which=target: trial.convert(which))
        if run(task, rng.uniform(0, span * 1.1)):
            finished += 1
        else:
            killed += 1
        now = trial.stored()
        if trial.back.exists():
            trial.holds(trial.back)
    run(lambda: trial.convert(1 - now), None)
    if trial.stored() != 1 - now:
        raise HalfWrittenError("the last run did not bring the other log")
    left = sorted(p.name for p in folder.iterdir())
    if left != ["a.parquet", "b.parquet", "back.parquet", "check.parquet", "requests"] and not any(
        "back" in n for n in left if n.startswith(".")
    ):
        raise HalfWrittenError(f"left behind: {left}")
    return killed, finished


@click.command()
@click.option("--kills", default=100, show_default=True)
@click.option("--impressions", default=6_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(kills: int, impressions: int, seed: int) -> None:
    """Kills conversions at random moments; exit status 1 where something is lost."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            killed, finished = torture(Path(folder), kills, impressions, seed)
        except HalfWrittenError as e:
            raise click.ClickException(str(e)) from e
    click.echo(f"{killed} kills, {finished} conversions went through; every time the old data set or the new one")


if __name__ == "__main__":
    main()
