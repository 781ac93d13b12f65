"""Rows to buckets by a key, within bounded memory: slices on disk, one file per input unit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from roo_rewrite.data.table import write_whole


class SliceWriter:
    """A file of record batches, each of one bucket; bucket b has keys [edges[b], edges[b+1])."""

    def __init__(self, path: Path, schema: pa.Schema, key: str, edges: npt.NDArray[np.int64]):
        self._path, self._key, self._edges = path, key, edges
        self._partial = path.with_name(path.name + ".partial")
        self._buckets: list[int] = []
        self._sink = pa.OSFile(str(self._partial), "wb")
        options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
        self._writer = pa.ipc.new_file(self._sink, schema, options=options)

    def add(self, table: pa.Table) -> None:
        """Rows sorted by the key."""
        cuts = np.searchsorted(table[self._key].to_numpy(), self._edges)
        for bucket in np.flatnonzero(np.diff(cuts)).tolist():
            piece = table.slice(cuts[bucket], cuts[bucket + 1] - cuts[bucket]).combine_chunks()
            for batch in piece.to_batches():
                self._writer.write_batch(batch)
                self._buckets.append(bucket)

    def __enter__(self) -> SliceWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._sink.close()
            return
        self._writer.close()
        self._sink.close()
        self._partial.rename(self._path)
        write_whole(_index(self._path), json.dumps(self._buckets).encode())


def _index(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def is_written(path: Path) -> bool:
    """Whether a `SliceWriter` finished; its index is written last."""
    return _index(path).exists()


def read_slices(paths: Iterable[Path], schema: pa.Schema, bucket: int) -> Iterator[pa.Table]:
    """The rows of a bucket, file by file."""
    for path in paths:
        wanted = [i for i, b in enumerate(json.loads(_index(path).read_bytes())) if b == bucket]
        if wanted:
            with pa.OSFile(str(path), "rb") as source:
                reader = pa.ipc.open_file(source)
                yield pa.Table.from_batches([reader.get_batch(i) for i in wanted], schema)
