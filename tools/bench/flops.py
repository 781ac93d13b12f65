"""FLOPs of the matrix products before and after, beside the bounds and the twin's: exact, whatever the machine does.

python -m tools.bench.flops din deepctr:DIN --fanout 10 --markdown
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fixtures import Call
from roo_rewrite.errors import RooError
from tools.bench.subjects import EVERY, expanded, load, variants
from tools.bench.timing import fanouts
from tools.bound import bound, decomposed

EXAMPLE_ROWS = 32
SLACK = 1.01

aten = torch.ops.aten
# torch counts none of what is added in place.
flop_registry.setdefault(aten.addmm_, flop_registry[aten.addmm])
flop_registry.setdefault(aten.baddbmm_, flop_registry[aten.baddbmm])


class Countable(TorchDispatchMode):
    """Raises RooError on an operator of this project's own that no FLOP formula is registered for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "roo" and func.overloadpacket not in flop_registry:
            raise RooError(f"{func} would count as no FLOPs; register_flop_formula says how many it takes")
        return func(*args, **(kwargs or {}))


def count_flops(model: nn.Module, call: Call, **extra: torch.Tensor) -> int:
    """Of the matrix products of a forward pass in eval, 2 for a multiply-add."""
    args, kwargs = call
    with decomposed(), FlopCounterMode(display=False) as counter, Countable():
        model.eval()(*args, **kwargs, **extra)
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Row:
    """One model at one fan-out: FLOPs of the original on the batch, and shares of it; None where there is none."""

    model: str
    fanout: int
    original: int
    net: float
    scalar: float
    rewritten: float | None
    twin: float | None

    @property
    def verdict(self) -> str:
        """What the rewritten model is over, if anything."""
        over = [
            name
            for name, share in (("scalar bound", self.scalar), ("twin", self.twin))
            if share is not None and self.rewritten is not None and self.rewritten > share * SLACK
        ]
        return "over " + ", ".join(over) if over else ""


def measure(name: str, fanout: int, requests: int, rewritten: bool) -> Row:
    """The row of one model: `requests` requests of `fanout` impressions each."""
    fixture = load(name)
    args, kwargs = fixture.example(rows=EXAMPLE_ROWS)
    limit = bound(fixture.model, args, kwargs, fixture.spec, fanout)
    counts = fanouts("even", fanout, requests * fanout)
    narrow = fixture.batch(counts)
    forms, _ = variants(fixture, fanout, rewritten)
    original = count_flops(forms.pop("original"), expanded(fixture, narrow, counts))
    share = {form: count_flops(model, narrow, num_impressions=counts) / original for form, model in forms.items()}
    return Row(
        name, fanout, original, limit.net_left, limit.scalar_left, share.get("rewritten"), share.get("twin")
    )  # fmt: skip


def cells(row: Row) -> list[str]:
    shares = [f"{s:.3f}" if s is not None else "-" for s in (row.net, row.scalar, row.rewritten, row.twin)]
    return [row.model, str(row.fanout), f"{row.original / 1e6:.1f}", *shares, row.verdict]


HEADER = ("model", "fan-out", "MFLOPs", "net bound", "scalar bound", "rewritten", "twin", "")


def markdown(rows: Sequence[Row]) -> str:
    lines = [HEADER, tuple("---" for _ in HEADER), *(cells(r) for r in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(rows: Sequence[Row]) -> Table:
    out = Table(title="FLOPs of the matrix products, shares of the original's")
    for i, column in enumerate(HEADER):
        out.add_column(column, justify="right" if 0 < i < len(HEADER) - 1 else "left")
    for row in rows:
        out.add_row(*cells(row))
    return out


@click.command()
@click.argument("names", nargs=-1)
@click.option("--fanout", "hints", multiple=True, type=click.IntRange(1), help="default 10; repeatable")
@click.option("--requests", default=8, show_default=True, type=click.IntRange(1), help="in the batch")
@click.option("--twins-only", is_flag=True, help="leave the rewritten model out")
@click.option("--json", "as_json", is_flag=True, help="a JSON list on stdout")
@click.option("--markdown", "as_markdown", is_flag=True, help="a Markdown table on stdout")
def main(
    names: tuple[str, ...], hints: tuple[int, ...], requests: int, twins_only: bool, as_json: bool, as_markdown: bool
) -> None:
    """Count NAMES: fixtures, or deepctr:MODEL; all of both without any."""
    unknown = [n for n in names if n not in EVERY]
    if unknown:
        raise click.BadParameter(f"no model {', '.join(unknown)}; there are {', '.join(EVERY)}")
    rows = []
    for name, fanout in itertools.product(names or EVERY, hints or (10,)):
        try:
            rows.append(measure(name, fanout, requests, not twins_only))
        except RooError as e:
            click.echo(f"{name} at fan-out {fanout}: {e}", err=True)
    if as_json:
        click.echo(json.dumps([{**asdict(r), "verdict": r.verdict} for r in rows], indent=1))
    elif as_markdown:
        click.echo(markdown(rows))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(table(rows))


if __name__ == "__main__":
    main()
