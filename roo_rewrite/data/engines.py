"""What runs a conversion: this process with DuckDB, or a cluster (spark.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from roo_rewrite.data import plan
from roo_rewrite.data.tasks import Job

T = TypeVar("T")
Progress = Callable[[str, int, int, int], None]
DEFAULT_MEMORY = 2 << 30


def silent(stage: str, done: int, total: int, rows: int) -> None:
    """No progress is told."""


class Engine(Protocol):
    """Runs the plan's SQL, and the tasks of the other steps."""

    name: str

    def ordinals(self, job: Job) -> Iterator[Any]:
        """(positions, ordinals) of all rows."""

    def run(self, task: Callable[[T, int], Any], job: T, items: list[int]) -> Iterator[Any]:
        """`task(job, i)` for each i, in any order; results in the order of `items`."""


class Local:
    """DuckDB and this process."""

    name = "duckdb"

    def ordinals(self, job: Job) -> Iterator[Any]:
        """See Engine."""
        return plan.duck_ordinals(job.source, job.columns, job.work, job.memory // 3, job.threads)

    def run(self, task: Callable[[T, int], Any], job: T, items: list[int]) -> Iterator[Any]:
        """See Engine."""
        return (task(job, i) for i in items)
