"""Trains one model twice, on impressions and on requests, and compares weights and speed.

    python tools/train_loop.py --impressions 60000

For each published shape (RecFlow 4, MIND 37 and a feed of 10 impressions per request) it writes a log, converts it,
and (1) takes the same steps with the original model on impressions and with the rewritten one on requests, in
float64, comparing all weights after every step; (2) measures end to end, in float32, samples/s of: impression-level
Parquet -> original; impression-level Parquet -> group on the fly -> rewritten; request-level data -> rewritten.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import torch
from make_logs import CATEGORIES, ITEM_FLOATS, ITEMS, SHAPES, SPEC, USER_FLOATS, write_log
from torch import Tensor, nn
from torch.nn import functional

import roo_rewrite as roo
from roo_rewrite.data.grouping import group
from roo_rewrite.data.read import RequestDataset
from roo_rewrite.data.tensors import as_tensor
from roo_rewrite.data.to_requests import to_requests
from roo_rewrite.features import FeatureSpec

HISTORIES = ["hist_item", "hist_dwell"]
FEATURES = [
    *HISTORIES,
    "user_age",
    *(f"user_f{i}" for i in range(USER_FLOATS)),
    "item_id",
    "item_category",
    *(f"item_f{i}" for i in range(ITEM_FLOATS)),
]
MODEL_SPEC = FeatureSpec(["user_*", "hist_*"], ["item_*"], jagged=dict.fromkeys(HISTORIES, "hist_item_lengths"))


class Ranker(nn.Module):
    """A history pooled with learnt weights of its dwell times, a user tower, an item tower, a head over both."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.item = nn.Embedding(ITEMS, 16)
        self.event = nn.Embedding(ITEMS, 16)
        self.category = nn.Embedding(CATEGORIES, 8)
        self.age = nn.Embedding(8, 8)
        self.dwell = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, 1))
        self.user = nn.Sequential(
            nn.Linear(16 + 8 + USER_FLOATS, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.ReLU()
        )
        self.candidate = nn.Sequential(nn.Linear(16 + 8 + ITEM_FLOATS, width), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, hist_item: Tensor, hist_item_lengths: Tensor, hist_dwell: Tensor, **features: Tensor) -> Tensor:
        """Logits, one per row."""
        kind = self.item.weight.dtype
        starts = hist_item_lengths.cumsum(0) - hist_item_lengths
        weights = self.dwell(hist_dwell.to(kind).log1p().unsqueeze(1)).squeeze(1)
        pooled = functional.embedding_bag(hist_item, self.event.weight, starts, mode="sum", per_sample_weights=weights)
        user_floats = torch.stack([features[f"user_f{i}"] for i in range(USER_FLOATS)], 1).to(kind)
        item_floats = torch.stack([features[f"item_f{i}"] for i in range(ITEM_FLOATS)], 1).to(kind)
        user = self.user(torch.cat([pooled / 100, self.age(features["user_age"]), user_floats], 1))
        ids = [self.item(features["item_id"]), self.category(features["item_category"])]
        candidate = self.candidate(torch.cat([*ids, item_floats], 1))
        return self.head(torch.cat([user, candidate], 1)).squeeze(1)


@dataclass
class Clock:
    """Seconds by step of the loop."""

    seconds: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "group": 0.0, "step": 0.0})
    rows: int = 0

    def run(self, what: str, work: Callable[[], Any]) -> Any:
        """`work()`, its time added to `what`."""
        began = time.perf_counter()
        try:
            return work()
        finally:
            self.seconds[what] += time.perf_counter() - began

    @property
    def speed(self) -> float:
        """Impressions a second, all steps."""
        return self.rows / sum(self.seconds.values())


def impression_batches(log: Path, rows: int) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """(features, labels, request ids) of an impression-level Parquet log, by pyarrow."""
    with pq.ParquetFile(log) as file:
        for batch in file.iter_batches(rows, columns=[*FEATURES, "click", "request_id"]):
            columns: dict[str, Tensor] = {}
            for name in FEATURES:
                column = batch[name]
                if name in HISTORIES:
                    columns["hist_item_lengths"] = as_tensor(name, column.value_lengths(), None).long()
                    column = column.flatten()
                columns[name] = as_tensor(name, column, None)
            yield columns, as_tensor("click", batch["click"], None), as_tensor("request_id", batch["request_id"], None)


def loss_of(logits: Tensor, click: Tensor) -> Tensor:
    """Mean cross entropy."""
    return functional.binary_cross_entropy_with_logits(logits, click.to(logits.dtype))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, kwargs: dict[str, Any], click: Tensor) -> float:
    """One training step; the loss."""
    optimizer.zero_grad()
    loss = loss_of(model(**kwargs), click)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def with_model(requests: Path, dtype: torch.dtype, fanout: float) -> tuple[nn.Module, nn.Module]:
    """(original, rewritten copy), from the same weights."""
    torch.manual_seed(0)
    original = Ranker().to(dtype)
    example = next(iter(reader(requests, 64))).to_impressions()
    return original, roo.rewrite(copy.deepcopy(original), *example, spec=MODEL_SPEC, fanout=fanout)


def reader(requests: Path, rows: int) -> RequestDataset:
    """Batches of about `rows` impressions."""
    aligned = {"hist_dwell": "hist_item"}
    return RequestDataset(
        requests, columns=FEATURES, labels=["click"], aligned=aligned, max_impressions=rows, shuffle=True, window=8
    )


def compare(requests: Path, steps: int, rows: int, fanout: float) -> float:
    """The same steps on impressions and on requests, in float64: the largest difference of any weight after any."""
    original, rewritten = with_model(requests, torch.float64, fanout)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (original, rewritten)]
    worst = 0.0
    for done, batch in enumerate(reader(requests, rows)):
        if done == steps:
            break
        click = batch.labels["click"]
        step(original, optimizers[0], batch.to_impressions()[1], click)
        step(rewritten, optimizers[1], {**batch.kwargs, "num_impressions": batch.num_impressions}, click)
        mine, theirs = dict(original.named_parameters()), dict(rewritten.named_parameters())
        assert mine.keys() == theirs.keys()
        worst = max(worst, *(float((mine[n] - theirs[n]).detach().abs().max()) for n in mine))
    return worst


def train(source: str, log: Path, requests: Path, rows: int, fanout: float) -> Clock:
    """One epoch; the time of each step of the loop, the first batch (which builds the program) apart.

    source: "impressions", "grouped" or "requests".
    """
    original, rewritten = with_model(requests, torch.float32, fanout)
    model = original if source == "impressions" else rewritten
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clock, first = Clock(), True
    batches: Iterator[Any] = iter(reader(requests, rows)) if source == "requests" else impression_batches(log, rows)
    while True:
        found = clock.run("read", lambda: next(batches, None))
        if found is None:
            return clock
        if source == "impressions":
            kwargs, click, _ = found
        else:
            batch = found
            if source == "grouped":
                features, click, ids = found
                batch = clock.run("group", lambda f=features, c=click, i=ids: group(f, i, MODEL_SPEC, labels=c))
                click = batch.labels
            else:
                click = batch.labels["click"]
            kwargs = {**batch.kwargs, "num_impressions": batch.num_impressions}
        if first:
            step(model, optimizer, kwargs, click)
            clock, first = Clock(), False
            continue
        clock.rows += len(click)
        clock.run("step", lambda k=kwargs, c=click: step(model, optimizer, k, c))


def table(profile: str, folder: Path, impressions: int, rows: int, steps: int) -> list[str]:
    """Rows of the result table for one log."""
    log, by_request, requests = folder / "arrival.parquet", folder / "request.parquet", folder / "requests"
    write_log(profile, log, impressions, order="arrival")
    write_log(profile, by_request, impressions, order="request")
    to_requests(log, requests, FeatureSpec(**SPEC), "request_id", user="user_id", time="time")
    fanout = SHAPES[profile].fanout
    worst = compare(requests, steps, rows, fanout)
    lines = [f"{profile}: weights differ by at most {worst:.1e} in float64 over {steps} steps"]
    base = 0.0
    for source, name in (
        ("impressions", "impression Parquet -> original"),
        ("grouped", "impression Parquet -> group -> rewritten"),
        ("requests", "request data -> rewritten"),
    ):
        clock = train(source, by_request if source == "grouped" else log, requests, rows, fanout)
        base = base or clock.speed
        parts = " | ".join(f"{clock.seconds[k]:.2f}" for k in ("read", "group", "step"))
        lines.append(f"| {profile} | {name} | {parts} | {clock.speed:,.0f} | {clock.speed / base:.2f}x |")
    return lines


@click.command()
@click.option("--impressions", default=60_000, show_default=True)
@click.option("--rows", default=2048, show_default=True, help="impressions in a batch")
@click.option("--steps", default=10, show_default=True, help="float64 steps compared")
@click.option("--threads", default=0, help="torch threads; 0 for torch's own choice")
@click.option("--profile", "profiles", multiple=True, type=click.Choice(sorted(SHAPES)), default=sorted(SHAPES))
def main(impressions: int, rows: int, steps: int, threads: int, profiles: tuple[str, ...]) -> None:
    """Compares impression-level and request-level training of one model: weights, then samples/s."""
    if threads:
        torch.set_num_threads(threads)
    click.echo("| log | path | read s | group s | step s | samples/s | |\n|---|---|---:|---:|---:|---:|---:|")
    for profile in profiles:
        with tempfile.TemporaryDirectory() as folder:
            for line in table(profile, Path(folder), impressions, rows, steps):
                click.echo(line)


if __name__ == "__main__":
    main()
