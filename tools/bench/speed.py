"""Original, rewritten and hand-written twin on the same batch: milliseconds and ratios, scoring and training.

python -m tools.bench.speed late_stage din deepctr:DIN --fanout 16 --json
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fixtures
from fixtures import Call
from roo_rewrite.errors import RooError
from tools.bench.flops import count_flops
from tools.bench.subjects import EVERY, expanded, load, variants
from tools.bench.timing import CLOCKS, SHAPES, STATISTICS, fanouts, interleaved, keep_memory

MODES = ("scoring", "training")


@dataclass(frozen=True)
class Plan:
    """What to time."""

    shapes: tuple[str, ...]
    modes: tuple[str, ...]
    impressions: int
    rounds: int
    statistic: str
    clock: str
    rewritten: bool


@dataclass(frozen=True)
class Row:
    """One line of the table, times in milliseconds; rewritten and twin None where there is none.

    flops: of the matrix products of a forward pass, by variant. error: the largest difference of a score from the
    original's, over the variants timed. rewrite_s: seconds that the rewriting took, tracing included.
    """

    model: str
    mode: str
    fanout: int
    shape: str
    requests: int
    original: float
    rewritten: float | None
    twin: float | None
    flops: dict[str, int]
    error: float
    rewrite_s: float | None


def scorer(model: nn.Module, call: Call, extra: dict[str, Tensor]) -> Callable[[], Any]:
    args, kwargs = call

    def run() -> Any:
        with torch.inference_mode():
            return model(*args, **kwargs, **extra)

    return run


def trainer(model: nn.Module, call: Call, extra: dict[str, Tensor]) -> Callable[[], Any]:
    """Forward and backward; the optimizer's step is the same for all and left out."""
    args, kwargs = call

    def run() -> None:
        model.zero_grad(set_to_none=True)
        outputs = pytree.tree_leaves(model(*args, **kwargs, **extra))
        torch.stack([o.mean() for o in outputs]).sum().backward()

    return run


def measure(name: str, fanout: int, plan: Plan) -> Iterator[Row]:
    """The rows of one model at one fan-out."""
    fixture = load(name)
    forms, seconds = variants(fixture, fanout, plan.rewritten)
    for shape in plan.shapes:
        counts = fanouts(shape, fanout, plan.impressions)
        narrow = fixture.batch(counts)
        wide = expanded(fixture, narrow, counts)
        calls = {form: (wide, {}) if form == "original" else (narrow, {"num_impressions": counts}) for form in forms}
        flops = {form: count_flops(model, calls[form][0], **calls[form][1]) for form, model in forms.items()}
        for mode in plan.modes:
            make = scorer if mode == "scoring" else trainer
            for model in forms.values():
                model.train(mode == "training")
            scores = {form: pytree.tree_leaves(scorer(forms[form], *calls[form])()) for form in forms}
            error = max(float((a - b).abs().max()) for s in scores.values() for a, b in zip(s, scores["original"]))
            timed = {form: make(forms[form], *calls[form]) for form in forms}
            times = interleaved(timed, plan.rounds, plan.statistic, plan.clock)
            yield Row(
                name, mode, fanout, shape, len(counts), times["original"], times.get("rewritten"), times.get("twin"),
                flops, error, seconds,
            )  # fmt: skip


def table(rows: Sequence[Row], what: str) -> Table:
    """FLOPs are shares of the original's."""
    out = Table(title=f"milliseconds per batch ({what})")
    for column in ("model", "mode", "fan-out", "shape"):
        out.add_column(column)
    for column in (
        "original",
        "rewritten",
        "twin",
        "orig/rewr",
        "orig/twin",
        "twin/rewr",
        "FLOPs rewr",
        "twin",
        "error",
    ):
        out.add_column(column, justify="right")
    for r in rows:
        faster = (_ratio(r.original, r.rewritten), _ratio(r.original, r.twin), _ratio(r.twin, r.rewritten))
        times = (f"{t:.2f}" if t is not None else "-" for t in (r.original, r.rewritten, r.twin))
        left = (f"{r.flops[f] / r.flops['original']:.3f}" if r.flops.get(f) else "-" for f in ("rewritten", "twin"))
        took = f"{r.rewrite_s:.1f}" if r.rewrite_s is not None else "-"
        out.add_row(r.model, r.mode, str(r.fanout), r.shape, *times, *faster, *left, f"{r.error:.0e}", took)
    return out


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}x" if a is not None and b is not None else "-"


@click.command()
@click.argument("names", nargs=-1)
@click.option("--fanout", "hints", multiple=True, type=click.IntRange(1), help="default 1, 4, 16, 64; repeatable")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(SHAPES), help="of the fan-outs; default both")
@click.option("--mode", "modes", multiple=True, type=click.Choice(MODES), help="default both")
@click.option("--impressions", default=1024, show_default=True, type=click.IntRange(1), help="in a batch")
@click.option("--rounds", default=11, show_default=True, type=click.IntRange(1), help="runs of each variant")
@click.option("--statistic", default="median", show_default=True, type=click.Choice(list(STATISTICS)))
@click.option("--clock", default="wall", show_default=True, type=click.Choice(list(CLOCKS)), help="cpu: one thread")
@click.option("--threads", default=0, help="of torch; 0 leaves its choice")
@click.option("--twins-only", is_flag=True, help="leave the rewritten model out")
@click.option("--json", "as_json", is_flag=True, help="a JSON list on stdout")
def main(
    names: tuple[str, ...],
    hints: tuple[int, ...],
    shapes: tuple[str, ...],
    modes: tuple[str, ...],
    impressions: int,
    rounds: int,
    statistic: str,
    clock: str,
    threads: int,
    twins_only: bool,
    as_json: bool,
) -> None:
    """Time NAMES: fixtures, or deepctr:MODEL; all fixtures without any."""
    unknown = [n for n in names if n not in EVERY]
    if unknown:
        raise click.BadParameter(f"no model {', '.join(unknown)}; there are {', '.join(EVERY)}")
    keep_memory()
    if threads or clock == "cpu":
        torch.set_num_threads(1 if clock == "cpu" else threads)
    plan = Plan(shapes or SHAPES, modes or MODES, impressions, rounds, statistic, clock, not twins_only)
    rows: list[Row] = []
    progress = Console(stderr=True)
    for name, fanout in itertools.product(names or fixtures.NAMES, hints or (1, 4, 16, 64)):
        progress.print(f"{name} at fan-out {fanout}", style="dim", markup=False)
        try:
            rows += measure(name, fanout, plan)
        except RooError as e:
            progress.print(f"{name} at fan-out {fanout}: {e}", style="red", markup=False)
    if as_json:
        click.echo(json.dumps([asdict(r) for r in rows], indent=1))
    else:
        what = f"{statistic}, {clock} clock, {torch.get_num_threads()} threads"
        Console(width=None if sys.stdout.isatty() else 160).print(table(rows, what))


if __name__ == "__main__":
    main()
