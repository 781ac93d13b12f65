"""Helpers shared by the data tests, as fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from roo_rewrite.features import FeatureSpec

SPEC = FeatureSpec(request=["user*", "hist*", "time"], impression=["item*", "click"])


@pytest.fixture(scope="session")
def spec() -> FeatureSpec:
    """user*, hist*, time belong to the request; item*, click to the impression."""
    return SPEC


@pytest.fixture(scope="session")
def small_log() -> Callable[[list[int]], pa.Table]:
    """A log with the given request ids: request columns are functions of the id, impression columns of the row."""

    def make(ids: list[int]) -> pa.Table:
        rows = range(len(ids))
        tags = [None if i % 5 == 1 else [] if i % 5 == 2 else [float("nan"), None, i * 0.5][: i % 4] for i in rows]
        hist = [None if r % 7 == 6 else list(range(r // 2, r // 2 + r % 4)) for r in ids]
        floats = [float("nan") if i % 3 == 0 else -0.0 if i % 3 == 1 else i / 7 for i in rows]
        return pa.table(
            {
                "rid": pa.array(ids, pa.int64()),
                "user": pa.array([None if r == 3 else r % 3 for r in ids], pa.int64()),
                "time": pa.array([r * 1000 for r in ids], pa.timestamp("us")),
                "hist": pa.array(hist, pa.list_(pa.int64())),
                "user_name": pa.array([f"u{r}" if r % 4 else None for r in ids], pa.string()),
                "item": pa.array(list(rows), pa.int32()),
                "item_f": pa.array(floats, pa.float64()),
                "item_tags": pa.array(tags, pa.list_(pa.float32())),
                "click": pa.array([None if i % 4 == 3 else i % 2 for i in rows], pa.int8()),
            }
        )

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes tables as Parquet files of a directory (one path for one table)."""

    def files(*tables: pa.Table, name: str = "log", **options: Any) -> Path:
        if len(tables) == 1:
            path = tmp_path / f"{name}.parquet"
            pq.write_table(tables[0], path, **options)
            return path
        folder = tmp_path / name
        folder.mkdir()
        for i, table in enumerate(tables):
            pq.write_table(table, folder / f"{i}.parquet", **options)
        return folder

    return files


@pytest.fixture(scope="session")
def same_bits() -> Callable[[pa.Table, pa.Table], bool]:
    """Whether two tables are equal to the bit: NaN equals NaN, 0.0 differs from -0.0."""

    def same(a: pa.Table, b: pa.Table) -> bool:
        if a.schema != b.schema or a.num_rows != b.num_rows:
            return False
        return repr(plain(a).to_pylist()) == repr(plain(b).to_pylist())

    def plain(table: pa.Table) -> pa.Table:
        # Python has no nanoseconds: such columns as integers.
        columns = [c.cast(pa.int64()) if pa.types.is_timestamp(c.type) else c for c in table.columns]
        return pa.table(columns, names=table.column_names)

    return same
