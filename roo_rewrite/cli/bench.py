"""`roo-rewrite bench`: the original and the rewritten model, timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from roo_rewrite.cli.common import Options, Step, model_options, progress, rewritten, show
from roo_rewrite.equivalence import draw_batch
from roo_rewrite.facts import Provenance
from roo_rewrite.module import RequestModel
from roo_rewrite.report import SplitReport
from roo_rewrite.report import splits as split_lines
from roo_rewrite.split_gains import measure


@dataclass(frozen=True)
class Row:
    """Medians in milliseconds at one fan-out."""

    fanout: int
    mode: str
    original: float
    rewritten: float

    @property
    def ratio(self) -> float:
        return self.original / self.rewritten


@click.command("bench")
@click.option("--at", "fanouts", type=click.IntRange(1), multiple=True, default=(1, 4, 16, 64), show_default=True)
@click.option("--impressions", type=click.IntRange(1), default=1024, show_default=True, help="In a batch.")
@click.option("--rounds", type=click.IntRange(1), default=11, show_default=True, help="Runs of each.")
@click.option("--splits", type=click.IntRange(0), default=8, show_default=True, help="Splits to measure, at most.")
@model_options
def bench(options: Options, fanouts: tuple[int, ...], impressions: int, rounds: int, splits: int) -> None:
    """Times MODEL and its request-level form on even batches at several fan-outs, each rewritten for its own.

    At --fanout, each split of the model is measured too: scoring with it against scoring without it.
    """
    rows: list[Row] = []
    with progress() as step:
        for fanout in fanouts:
            original, _, model = rewritten(options, step, fanout)
            counts = torch.full((max(1, impressions // fanout),), fanout)
            for mode in ("scoring", "training"):
                step(f"{mode} at fan-out {fanout}")
                times = _times(original, model, counts, mode, rounds)
                rows.append(Row(fanout, mode, times["original"], times["rewritten"]))
        found = _splits(options, step, impressions, rounds, splits) if splits else ()
    lines = [f"{'fan-out':>7} {'mode':<9} {'original ms':>12} {'rewritten ms':>13} {'ratio':>7}"]
    lines += [f"{r.fanout:>7} {r.mode:<9} {r.original:>12.2f} {r.rewritten:>13.2f} {r.ratio:>6.2f}x" for r in rows]
    lines += split_lines(found) if found else []
    rows_out = [asdict(r) | {"ratio": r.ratio} for r in rows]
    show(options, "\n".join(lines), {"rows": rows_out, "splits": [asdict(s) for s in found]})


def _splits(options: Options, step: Step, impressions: int, rounds: int, most: int) -> tuple[SplitReport, ...]:
    """The splits at the hinted fan-out, measured."""
    _, _, model = rewritten(options, step)
    counts = torch.full((max(1, int(impressions // options.fanout)),), int(options.fanout))

    def times(mine: RequestModel, other: RequestModel) -> tuple[float, float]:
        step("measuring splits")
        taken = interleaved({"mine": _scoring(mine, counts), "other": _scoring(other, counts)}, rounds)
        return taken["mine"], taken["other"]

    measure(model, times, most)
    return model.report.splits


def _scoring(model: RequestModel, counts: Tensor) -> Callable[[], None]:
    example, statics = model._example
    batch = draw_batch(model._inputs, example, counts.tolist(), torch.Generator().manual_seed(0))
    args, kwargs = model._inputs.unflatten(batch.atoms, Provenance.REQUEST, statics)
    return lambda: _score(model, lambda: model(*args, num_impressions=counts, **kwargs))


def _times(original: nn.Module, model: RequestModel, counts: Tensor, mode: str, rounds: int) -> dict[str, float]:
    example, statics = model._example
    batch = draw_batch(model._inputs, example, counts.tolist(), torch.Generator().manual_seed(0))
    wide = model._inputs.unflatten(batch.expanded(model._inputs), Provenance.IMPRESSION, statics)
    args, kwargs = model._inputs.unflatten(batch.atoms, Provenance.REQUEST, statics)
    run = _score if mode == "scoring" else _train
    return interleaved(
        {
            "original": lambda: run(original, lambda: original(*wide[0], **wide[1])),
            "rewritten": lambda: run(model, lambda: model(*args, num_impressions=counts, **kwargs)),
        },
        rounds,
    )


def _score(module: nn.Module, call: Callable[[], Any]) -> None:
    with torch.inference_mode():
        call()


def _train(module: nn.Module, call: Callable[[], Any]) -> None:
    """Forward and backward; the optimizer's step is the same for both and left out."""
    module.zero_grad(set_to_none=True)
    outputs = [t for t in pytree.tree_leaves(call()) if isinstance(t, Tensor) and t.requires_grad]
    if outputs:
        torch.stack([t.mean() for t in outputs]).sum().backward()  # type: ignore[no-untyped-call]


def interleaved(variants: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each variant; they run in turn, after one run each to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for round_ in range(rounds + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if round_:
                taken[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times) for name, times in taken.items()}
