"""Two models rewritten, verified, explained and timed: `make demo`.

The project's late-stage ranker and DeepCTR-Torch's DIN, a model nobody here wrote. The last lines are the times.
"""

from __future__ import annotations

import sys
import time
import warnings

import click

import roo_rewrite
from roo_rewrite.errors import RooError
from tools.bench.speed import MODES, Plan, Row, load, measure
from tools.bench.timing import keep_memory

MODELS = ("late_stage", "deepctr:DIN")
FANOUTS = (1, 4, 16, 64)


@click.command()
@click.option("--impressions", default=1024, show_default=True, type=click.IntRange(1), help="in a batch that is timed")
@click.option("--rounds", default=11, show_default=True, type=click.IntRange(1), help="runs of each variant")
@click.option("--batches", default=20, show_default=True, type=click.IntRange(1), help="batches to verify on")
def main(impressions: int, rounds: int, batches: int) -> None:
    """Rewrites, verifies and times the two models."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        for name in MODELS:
            rewrite_and_verify(name, batches)
        rows = [row for name in MODELS for row in times(name, impressions, rounds)]
    except RooError as e:
        click.echo(f"error: {e}", err=True)
        sys.exit(1)
    click.echo(f"\nms a batch of {impressions} impressions, medians of {rounds} interleaved runs")
    click.echo(f"{'model':<12} {'mode':<9} {'fan-out':>7} {'original':>9} {'rewritten':>10} {'ratio':>7}")
    for r in rows:
        assert r.rewritten is not None
        click.echo(
            f"{r.model:<12} {r.mode:<9} {r.fanout:>7} {r.original:>9.2f} {r.rewritten:>10.2f} "
            f"{r.original / r.rewritten:>6.2f}x"
        )


def rewrite_and_verify(name: str, batches: int) -> None:
    """Prints the report of a model that has passed `verify`, in both modes."""
    fixture = load(name)
    args, kwargs = fixture.example()
    began = time.perf_counter()
    model = roo_rewrite.rewrite(fixture.model, args, kwargs, spec=fixture.spec, fanout=16)
    rewritten = time.perf_counter() - began
    report = model.report
    began = time.perf_counter()
    roo_rewrite.verify(fixture.model, model, batches=batches)
    click.echo(f"== {name}: rewritten in {rewritten:.1f} s, equal on {batches} batches", nl=False)
    click.echo(f" (values and gradients, float64, {time.perf_counter() - began:.1f} s)")
    click.echo(report.summary + "\n")


def times(name: str, impressions: int, rounds: int) -> list[Row]:
    """Original and rewritten at every fan-out, scoring and training; the rows in the order of the table."""
    keep_memory()
    plan = Plan(("even",), MODES, impressions, rounds, "median", "wall", True)
    rows = [r for fanout in FANOUTS for r in measure(name, fanout, plan)]
    return sorted(rows, key=lambda r: MODES.index(r.mode))


if __name__ == "__main__":
    main()
