"""The same conversion on a Spark cluster: the plan's SQL as it is, the other steps as Spark tasks.

All executors must see the input and the output under the same paths. `memory` bounds one task, of which an
executor runs as many at once as it has cores.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as pq

from roo_rewrite.data.plan import check_keys, key_columns, order_sql
from roo_rewrite.data.tasks import Job
from roo_rewrite.errors import DataError, RooError

WAVES = 4
T = TypeVar("T")


class Spark:
    """Engine for `to_requests`. session: the one to use; else one is made, with Spark's own settings."""

    name = "spark"

    def __init__(self, session: Any = None, master: str | None = None):
        self.session = session or _start(master)

    def ordinals(self, job: Job) -> Iterator[Any]:
        """See Engine. Row numbers come from Spark's `_metadata.row_index`."""
        from pyspark.sql import functions as f

        folder = job.work / "ordinals.spark"
        starts = [(self._uri(n), s) for n, s in zip(job.source.files, job.source.file_starts())]
        try:
            files = self.session.createDataFrame(starts, "file string, start bigint")
            keys = [f.col(f"`{c.replace('`', '``')}`").alias(k) for k, c in key_columns(job.columns).items()]
            path = f.regexp_replace("_metadata.file_path", "^file:/+", "file:/").alias("file")
            row = f.col("_metadata.row_index").alias("row")
            log = self.session.read.parquet(*map(_hadoop, job.source.files))
            log.select(path, row, *keys).join(f.broadcast(files), "file").withColumn(
                "pos", f.col("start") + f.col("row")
            ).drop("file", "start", "row").createOrReplaceTempView("roo_keys")
            self.session.sql(order_sql(job.columns)).write.mode("overwrite").parquet(_hadoop(str(folder)))
        except Exception as e:
            if isinstance(e, RooError):
                raise
            check_keys(job.source, job.columns)
            raise DataError(f"Spark could not group the requests: {str(e).splitlines()[0]}") from e
        for part in sorted(folder.glob("*.parquet")):
            with pq.ParquetFile(part) as file:
                for batch in file.iter_batches(columns=["pos", "ordinal"]):
                    yield batch.column(0).to_numpy(), batch.column(1).to_numpy()

    def _uri(self, name: str) -> str:
        """What Spark calls the file, by Spark's own encoding."""
        made = self.session._jvm.org.apache.hadoop.fs.Path(str(Path(name).resolve())).toUri().getRawPath()
        return f"file:{made}"

    def run(self, task: Callable[[T, int], Any], job: T, items: list[int]) -> Iterator[Any]:
        """See Engine. Errors of tasks are raised here as they were there."""
        context = self.session.sparkContext
        wave = WAVES * context.defaultParallelism
        for at in range(0, len(items), wave):
            some = items[at : at + wave]
            for error, value in context.parallelize(some, len(some)).map(_Task(task, job)).collect():
                if error is not None:
                    raise error
                yield value


def _hadoop(name: str) -> str:
    """A local path as Spark takes it: a URI whose glob characters mean themselves."""
    return "file://" + re.sub(r"([\[\]{}*?\\])", r"\\\1", str(Path(name).resolve()))


class _Task:
    """A task whose error is a value, so that Spark neither retries it nor turns it into text."""

    def __init__(self, task: Callable[[Any, int], Any], job: Any):
        self.task, self.job = task, job

    def __call__(self, item: int) -> tuple[BaseException | None, Any]:
        try:
            return None, self.task(self.job, item)
        except (RooError, OSError) as e:
            return e, None


def _start(master: str | None) -> Any:
    try:
        from pyspark.sql import SparkSession
    except ImportError as e:
        raise DataError("--engine spark needs pyspark: pip install 'roo-rewrite[spark]', and Java 17 or later") from e
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    builder = SparkSession.builder.appName("roo-rewrite").config("spark.ui.showConsoleProgress", "false")
    builder = builder.config("spark.sql.legacy.parquet.nanosAsLong", "true")
    try:
        return (builder.master(master) if master else builder).getOrCreate()
    except Exception as e:
        raise DataError(f"Spark does not start: {str(e).splitlines()[0]}. Is Java 17 or later installed?") from e
