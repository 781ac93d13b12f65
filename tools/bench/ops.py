"""The jagged operators one by one: ways to broadcast, to sum back, and to multiply at mixed rates.

python -m tools.bench.ops --shape skewed --clock cpu
"""

from __future__ import annotations

import json
from collections.abc import Callable

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from fixtures.fanout import Fanout
from tools.bench.timing import CLOCKS, SHAPES, fanouts, interleaved, keep_memory

Ways = dict[str, Callable[[], Tensor]]


def broadcasts(fanout: Fanout, width: int) -> Ways:
    """`[R, width] -> [I, width]`."""
    x = torch.randn(fanout.requests, width)
    rows, counts, total = fanout.rows, fanout.counts, fanout.impressions
    wide = rows.unsqueeze(1).expand(-1, width)
    ways: Ways = {
        "index_select": lambda: x.index_select(0, rows),
        "repeat_interleave": lambda: x.repeat_interleave(counts, 0, output_size=total),
        "advanced indexing": lambda: x[rows],
        "embedding": lambda: F.embedding(rows, x),
        "gather": lambda: x.gather(0, wide),
    }
    if fanout.even:
        ways["expand, copied"] = lambda: x.unsqueeze(1).expand(-1, fanout.longest, -1).flatten(0, 1)
    return ways


def sums(fanout: Fanout, width: int) -> Ways:
    """`[I, width] -> [R, width]`, what the gradient of a broadcast needs."""
    g = torch.randn(fanout.impressions, width)
    rows, counts, requests = fanout.rows, fanout.counts, fanout.requests
    wide = rows.unsqueeze(1).expand(-1, width)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    every = torch.arange(fanout.impressions)
    ways: Ways = {
        "index_add": lambda: g.new_zeros(requests, width).index_add_(0, rows, g),
        "scatter_add": lambda: g.new_zeros(requests, width).scatter_add_(0, wide, g),
        "embedding_bag sum": lambda: F.embedding_bag(every, g, offsets[:-1], mode="sum"),
        "segment_reduce": lambda: torch.segment_reduce(g, "sum", lengths=counts),
        "index_put": lambda: g.new_zeros(requests, width).index_put_((rows,), g, accumulate=True),
    }
    if fanout.even:
        ways["view, sum"] = lambda: g.unflatten(0, (requests, fanout.longest)).sum(1)
    return ways


def products(fanout: Fanout, width: int) -> Ways:
    """`[I, 1, width] x [R, width, 50] -> [I, 1, 50]`: scores of a candidate over its request's history."""
    keys, queries = torch.randn(fanout.requests, width, 50), torch.randn(fanout.impressions, 1, width)
    counts = fanout.counts.tolist()

    def loop() -> Tensor:
        parts = [q.squeeze(1) @ keys[r] for r, q in enumerate(queries.split(counts))]
        return torch.cat(parts).unsqueeze(1)

    return {
        "padded or bucketed bmm": lambda: fanout.bmm(queries, keys),
        "bmm over gathered keys": lambda: queries.bmm(keys.index_select(0, fanout.rows)),
        "one matmul per request": loop,
    }


TASKS: dict[str, Callable[[Fanout, int], Ways]] = {"broadcast": broadcasts, "sum": sums, "product": products}


def check(ways: Ways) -> None:
    """Every way computes the same; raises AssertionError where one does not."""
    first, *others = (way() for way in ways.values())
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)


@click.command()
@click.option("--task", "tasks", multiple=True, type=click.Choice(list(TASKS)), help="default all")
@click.option("--shape", "shapes", multiple=True, type=click.Choice(SHAPES), help="of the fan-outs; default both")
@click.option("--fanout", default=16, show_default=True, type=click.IntRange(1), help="mean impressions per request")
@click.option("--impressions", default=4096, show_default=True, type=click.IntRange(1), help="in a batch")
@click.option("--width", "widths", multiple=True, type=click.IntRange(1), help="columns; default 64 and 512")
@click.option("--rounds", default=21, show_default=True, type=click.IntRange(1), help="runs of each way")
@click.option("--clock", default="wall", show_default=True, type=click.Choice(list(CLOCKS)), help="cpu: one thread")
@click.option("--json", "as_json", is_flag=True, help="a JSON list on stdout")
def main(
    tasks: tuple[str, ...],
    shapes: tuple[str, ...],
    fanout: int,
    impressions: int,
    widths: tuple[int, ...],
    rounds: int,
    clock: str,
    as_json: bool,
) -> None:
    """Time the ways to do each jagged task."""
    keep_memory()
    if clock == "cpu":
        torch.set_num_threads(1)
    rows = []
    for task in tasks or tuple(TASKS):
        for shape in shapes or SHAPES:
            for width in widths or (64, 512):
                ways = TASKS[task](Fanout(fanouts(shape, fanout, impressions)), width)
                check(ways)
                times = interleaved(ways, rounds, clock=clock)
                rows += [{"task": task, "shape": shape, "width": width, "way": w, "ms": t} for w, t in times.items()]
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    table = Table(title=f"{impressions} impressions, mean fan-out {fanout}, median milliseconds ({clock} clock)")
    for column in ("task", "shape", "width", "way", "ms"):
        table.add_column(column)
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
