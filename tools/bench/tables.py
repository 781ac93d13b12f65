"""The tables of docs/speed.md, in Markdown.

python -m tools.bench.tables fixtures --clock cpu
python -m tools.bench.tables deepctr --clock cpu
"""

from __future__ import annotations

import click
import torch

import fixtures
from fixtures import deepctr
from tools.bench.flops import EXAMPLE_ROWS
from tools.bench.speed import MODES, Plan, Row, measure
from tools.bench.subjects import load
from tools.bench.timing import CLOCKS, keep_memory
from tools.bound import bound


def line(*cells: str) -> None:
    click.echo(f"| {' | '.join(cells)} |")


def header(*cells: str) -> None:
    line(*cells)
    line(*("---" for _ in cells))


def rows(name: str, fanout: int, plan: Plan) -> dict[str, Row]:
    """The rows of a model by mode."""
    return {row.mode: row for row in measure(name, fanout, plan)}


def faster(row: Row, twin: bool = False) -> str:
    """Original over rewritten, and in brackets twin over rewritten."""
    assert row.rewritten is not None
    beside = f" ({row.twin / row.rewritten:.2f})" if twin and row.twin is not None else ""
    return f"{row.original / row.rewritten:.2f}x{beside}"


def left(row: Row, form: str) -> str:
    """FLOPs of a form as a share of the original's."""
    return f"{row.flops[form] / row.flops['original']:.3f}"


def plan(impressions: int, rounds: int, clock: str) -> Plan:
    keep_memory()
    if clock == "cpu":
        torch.set_num_threads(1)
    return Plan(("even",), MODES, impressions, rounds, "median", clock, True)


@click.group()
def main() -> None:
    """Print a table of docs/speed.md."""


rounds_option = click.option("--rounds", default=7, show_default=True, type=click.IntRange(1), help="of each variant")
clock_option = click.option("--clock", default="wall", show_default=True, type=click.Choice(list(CLOCKS)))


@main.command("fixtures")
@click.option("--fanout", default=16, show_default=True, type=click.IntRange(1))
@click.option("--impressions", default=1024, show_default=True, type=click.IntRange(1))
@rounds_option
@clock_option
def fixtures_(fanout: int, impressions: int, rounds: int, clock: str) -> None:
    """Each fixture against the original and its hand-written twin."""
    header("fixture", "FLOPs left", "twin", "scoring", "training", "rewrite s")
    for name in fixtures.NAMES:
        found = rows(name, fanout, plan(impressions, rounds, clock))
        scoring = found["scoring"]
        times = [faster(found[mode], twin=True) for mode in MODES]
        line(name, left(scoring, "rewritten"), left(scoring, "twin"), *times, f"{scoring.rewrite_s:.1f}")


@main.command("deepctr")
@click.argument("names", nargs=-1)
@click.option("--fanout", "hints", multiple=True, default=(10, 70), show_default=True, type=click.IntRange(1))
@click.option("--impressions", default=1400, show_default=True, type=click.IntRange(1))
@rounds_option
@clock_option
def deepctr_(names: tuple[str, ...], hints: tuple[int, ...], impressions: int, rounds: int, clock: str) -> None:
    """Each model of DeepCTR-Torch, or NAMES, at each fan-out: FLOPs before and left, the bounds, the times."""
    header("model", "fan-out", "MFLOPs", "left", "net", "scalar", *MODES)
    for name in names or deepctr.NAMES:
        for fanout in hints:
            fixture = load(f"deepctr:{name}")
            args, kwargs = fixture.example(rows=EXAMPLE_ROWS)
            limit = bound(fixture.model, args, kwargs, fixture.spec, fanout)
            found = rows(f"deepctr:{name}", fanout, plan(impressions, rounds, clock))
            scoring = found["scoring"]
            shares = (f"{limit.net_left:.3f}", f"{limit.scalar_left:.3f}")
            times = [faster(found[mode]) for mode in MODES]
            before = f"{scoring.flops['original'] / 1e6:.0f}"
            line(name, str(fanout), before, left(scoring, "rewritten"), *shares, *times)


if __name__ == "__main__":
    main()
