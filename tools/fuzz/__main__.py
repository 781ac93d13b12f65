"""Runs the fuzzer for a given time."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections import Counter

import click
import torch

import tools.fuzz
from tools.fuzz.runner import Outcome, case, drawn_steps, listing, outcome, smallest


@click.command(help=tools.fuzz.__doc__)
@click.option("--seconds", default=60.0, help="How long to go on.")
@click.option("--count", default=10**9, help="At most so many graphs.")
@click.option("--seed", default=0, help="The first seed.")
@click.option("--length", default=12, help="At most so many steps a graph.")
@click.option("--split", default="both", type=click.Choice(["priced", "always", "never", "both"]))
@click.option("--export", default=19, help="One in so many is traced by torch.export; 0 for none.")
@click.option("--shrink/--no-shrink", default=True, help="Whether to look for the smallest program that goes wrong.")
def main(seconds: float, count: int, seed: int, length: int, split: str, export: int, shrink: bool) -> None:
    ends, tally = time.monotonic() + seconds, Counter[str]()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.CRITICAL)
    for current in range(seed, seed + count):
        if time.monotonic() > ends:
            break
        mode = split if split != "both" else ("always", "priced")[current % 2]
        exports = bool(export) and current % export == 0
        found = tried(current, length, mode, exports)
        tally[f"{mode}{' exported' if exports else ''}: {found.kind}"] += 1
        if found.kind == "wrong" and not shrink:
            click.echo(f"seed {current} --split {mode}{' exported' if exports else ''} is wrong: {found.why[-300:]}")
        elif found.kind == "wrong":
            steps, only, again = smallest(drawn_steps(current, length), current, mode, exports)
            text = f"seed {current} --split {mode}: {[s.name for s in steps]}\n{listing(case(steps, current, only))}"
            click.echo(f"{text}\n{again.why or found.why}\n")
        elif found.kind != "equal":
            click.echo(f"seed {current} is {found.kind}: {found.why[:200]}")
        if sum(tally.values()) % 100 == 0:
            click.echo(_told(tally))
    click.echo(_told(tally))
    sys.exit(1 if any("wrong" in k for k in tally) else 0)


def _told(tally: Counter[str]) -> str:
    return f"{sum(tally.values())} graphs: " + ", ".join(f"{n} {k}" for k, n in sorted(tally.items()))


def tried(seed: int, length: int, split: str, export: bool) -> Outcome:
    """The outcome of one seed."""
    return outcome(case(drawn_steps(seed, length), seed), seed, split, export)


if __name__ == "__main__":
    main()
