"""Synthetic impression logs with the published shapes of public data sets.

    python tools/make_logs.py recflow /tmp/recflow.parquet --impressions 60000 --order arrival

Shapes (impressions per request): RecFlow 4, MIND 37, feed 10. A user's history has 150 to 200 events and
grows by a few between the user's requests. One row per impression: ids, time, user features (categories and
random floats), histories, item features (categories and random floats), label.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

Array = npt.NDArray[np.generic]
USER_FLOATS, ITEM_FLOATS = 4, 8
ITEMS, CATEGORIES = 100_000, 300
DAY_US = 86_400_000_000


@dataclass(frozen=True)
class Shape:
    """Mean impressions per request, and requests per user."""

    fanout: float
    requests_per_user: int


SHAPES = {"recflow": Shape(4, 12), "mind": Shape(37, 8), "feed": Shape(10, 12)}
SPEC = {
    "request": ["user_*", "hist_*", "time"],
    "impression": ["impression_id", "item_*", "position", "click", "watch"],
}


def block(shape: Shape, impressions: int, seed: int, first_user: int = 0) -> pa.Table:
    """About `impressions` rows of whole users, request by request, users in order."""
    rng = np.random.default_rng(seed)
    requests = max(1, round(impressions / shape.fanout))
    per_user = rng.integers(1, 2 * shape.requests_per_user, 1 + requests // shape.requests_per_user)
    user = np.repeat(np.arange(len(per_user)), per_user)[:requests]
    requests = len(user)
    counts = 1 + rng.poisson(shape.fanout - 1, requests)
    time = _request_times(user, rng)
    history, offsets = _histories(user, rng)
    floats = {f"user_f{i}": rng.standard_normal(user[-1] + 1).astype(np.float32)[user] for i in range(USER_FLOATS)}
    request_side = {
        "request_id": pa.array(np.argsort(np.argsort(time)) + (first_user << 20)),
        "user_id": pa.array(user + first_user),
        "time": pa.array(time, pa.timestamp("us")),
        "user_age": pa.array(rng.integers(0, 8, user[-1] + 1).astype(np.int32)[user]),
        "user_country": pa.array(np.char.add("country", (user % 40).astype(str))),
        **{k: pa.array(v) for k, v in floats.items()},
        **{k: pa.ListArray.from_arrays(offsets, v) for k, v in history.items()},
    }
    rows = pa.array(np.repeat(np.arange(requests), counts))
    columns = pa.table(request_side).take(rows)
    for name, column in _item_side(counts, rng, first_user).items():
        columns = columns.append_column(name, column)
    return columns.combine_chunks()


def _request_times(user: Array, rng: np.random.Generator) -> Array:
    """Microseconds; a user's requests hours apart."""
    gaps = rng.exponential(DAY_US / 6, len(user)).astype(np.int64)
    starts = np.flatnonzero(np.diff(user, prepend=-1))
    running = np.cumsum(gaps)
    return (
        1_750_000_000_000_000 + running - running[starts][user - user[0]] + rng.integers(0, DAY_US, user[-1] + 1)[user]
    )


def _histories(user: Array, rng: np.random.Generator) -> tuple[dict[str, pa.Array], pa.Array]:
    """Windows of 150 to 200 events over each user's log, moving on by 0 to 6 events a request."""
    grown = rng.integers(0, 7, len(user))
    starts = np.flatnonzero(np.diff(user, prepend=-1))
    grown[starts] = 200
    ends = np.cumsum(grown)
    width = rng.integers(150, 201, user[-1] + 1)[user]
    offsets = np.concatenate([[0], np.cumsum(width)])
    at = np.arange(offsets[-1]) - np.repeat(offsets[:-1], width) + np.repeat(ends - width, width)
    total = int(ends[-1])
    items = np.minimum(rng.zipf(1.2, total), ITEMS).astype(np.int64) * 7919 % ITEMS
    events = {
        "hist_item": items,
        "hist_action": rng.integers(0, 6, total).astype(np.int32),
        "hist_dwell": rng.exponential(30, total).astype(np.float32),
    }
    return {k: pa.array(v[at]) for k, v in events.items()}, pa.array(offsets, pa.int32())


def _item_side(counts: Array, rng: np.random.Generator, first_user: int) -> dict[str, pa.Array]:
    total = int(counts.sum())
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    clicked = rng.random(total) < 0.1
    return {
        "impression_id": pa.array(np.arange(total) + (first_user << 24)),
        "item_id": pa.array(rng.integers(0, ITEMS, total)),
        "item_category": pa.array(rng.integers(0, CATEGORIES, total).astype(np.int32)),
        **{f"item_f{i}": pa.array(rng.standard_normal(total).astype(np.float32)) for i in range(ITEM_FLOATS)},
        "position": pa.array((np.arange(total) - starts).astype(np.int32)),
        "click": pa.array(clicked.astype(np.int8)),
        "watch": pa.array(rng.exponential(20, total).astype(np.float32), mask=~clicked),
    }


def arrival_order(table: pa.Table, seed: int) -> pa.Table:
    """Rows as their labels arrive: request time and a delay of minutes to hours."""
    rng = np.random.default_rng(seed + 1)
    delay = rng.exponential(DAY_US / 48, table.num_rows).astype(np.int64)
    return table.take(pa.array(np.argsort(table["time"].cast(pa.int64()).to_numpy() + delay, kind="stable")))


def write_log(profile: str, out: Path, impressions: int, seed: int = 0, order: str = "arrival", blocks: int = 1) -> int:
    """Writes one Parquet file of `blocks` runs of row groups, each of other users; returns the rows written."""
    rows, first_user = 0, 0
    writer: pq.ParquetWriter | None = None
    for b in range(blocks):
        table = block(SHAPES[profile], impressions // blocks, seed + 100 * b, first_user)
        first_user = int(table["user_id"][-1].as_py()) + 1
        if order == "arrival":
            table = arrival_order(table, seed + b)
        elif order == "request":
            table = table.take(pa.array(np.argsort(table["request_id"].to_numpy(), kind="stable")))
        if writer is None:
            writer = pq.ParquetWriter(out, table.schema, compression="zstd")
        writer.write_table(table, row_group_size=131_072)
        rows += table.num_rows
    assert writer is not None
    writer.close()
    return rows


@click.command()
@click.argument("profile", type=click.Choice(sorted(SHAPES)))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--impressions", default=60_000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--order", type=click.Choice(["arrival", "request", "user"]), default="arrival", show_default=True)
@click.option("--blocks", default=1, show_default=True, help="written one by one, so memory holds one block")
def main(profile: str, out: Path, impressions: int, seed: int, order: str, blocks: int) -> None:
    """Writes a synthetic log of PROFILE to OUT, and its spec beside it."""
    rows = write_log(profile, out, impressions, seed, order, blocks)
    lines = [f"{side} = {names!r}".replace("'", '"') for side, names in SPEC.items()]
    out.with_suffix(".toml").write_text("\n".join(lines) + "\n")
    click.echo(f"{out}: {rows} impressions, {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
