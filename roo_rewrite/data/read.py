"""Readers: a request-level data set as batches, for rewritten models and for unconverted ones."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import IterableDataset, get_worker_info

from roo_rewrite.data.batch import Ids, RequestBatch
from roo_rewrite.data.concat import concat
from roo_rewrite.data.prune import Filters, request_filter
from roo_rewrite.data.sampler import Bounds, check_shard
from roo_rewrite.data.sizes import request_bytes
from roo_rewrite.data.store import PartMeta, part_meta, read_group
from roo_rewrite.data.tensors import Call, Wanted, to_batch
from roo_rewrite.data.workdir import open_parts
from roo_rewrite.errors import DataError

Cursor = tuple[int, int, int]


class RequestDataset(IterableDataset[RequestBatch]):
    """Batches of whole requests: `DataLoader(RequestDataset(...), batch_size=None, num_workers=4)`.

    columns: what to read, request and impression columns alike; the default is all but the ids, labels and
    weights. A list column `c` becomes the jagged pair `c`, `c_lengths`. Features are keyword arguments by column
    name; `call` arranges them otherwise. Null numbers are NaN in floats and `fill[column]` elsewhere, null lists
    empty. aligned: list column -> the list column whose lengths it shares, as parallel histories do.
    filters: the requests to read, as a pyarrow expression or lists of (column, operator, value), over request
    columns. Row groups whose statistics exclude a match are not read; in the others rows are filtered.
    max_impressions, max_requests, max_bytes: bounds of a batch; bytes are those of its tensors (`request_bytes`).
    shuffle: row groups, then requests within `window` row groups, the same for the same seed and epoch. rank,
    world_size and DataLoader workers each get other row groups. prefetch: row groups read ahead, by one thread.
    Raises DataError for columns there are not, and filters on impression columns.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        columns: Sequence[str] | None = None,
        filters: Filters | None = None,
        labels: Sequence[str] = (),
        weights: Sequence[str] = (),
        impression_id: str | None = None,
        fill: Mapping[str, Any] | None = None,
        aligned: Mapping[str, str] | None = None,
        call: Call | None = None,
        max_impressions: int | None = None,
        max_requests: int | None = None,
        max_bytes: int | None = None,
        shuffle: bool = False,
        window: int = 4,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 1,
    ):
        check_shard(rank, world_size)
        self.manifest, paths = open_parts(folder)
        self.bounds = Bounds(max_impressions, max_requests, max_bytes)
        known = [*self.manifest.columns.request, *self.manifest.columns.impression]
        missing = [c for c in (*(columns or ()), *labels, *weights, *filter(None, [impression_id])) if c not in known]
        if missing:
            raise DataError(f"{folder} has no columns {missing}; it has {known}")
        apart = {self.manifest.columns.request_id, impression_id, *labels, *weights}
        loose = [c for pair in (aligned or {}).items() for c in pair if columns is not None and c not in columns]
        if loose:
            raise DataError(f"aligned names {loose}, which are not among the columns read")
        features = tuple(c for c in known if c not in apart) if columns is None else tuple(columns)
        self.wanted = Wanted(features, tuple(labels), tuple(weights), impression_id, fill, aligned, call)
        self.shuffle, self.window, self.seed = shuffle, max(1, window), seed
        self.rank, self.world_size, self.prefetch = rank, world_size, max(0, prefetch)
        self.epoch = 0
        self._cursors: dict[int, tuple[int, int]] = {}
        self.filter = None if filters is None else request_filter(filters, self.manifest.columns)
        metas = [part_meta(path) for path in paths]
        kept = self.filter.row_groups(list(zip(paths, metas))) if self.filter else [range(m.row_groups) for m in metas]
        self._groups = [(path, meta, g) for path, meta, found in zip(paths, metas, kept) for g in found]

    def set_epoch(self, epoch: int) -> None:
        """Starts `epoch`: another shuffle, from the first batch."""
        self.epoch, self._cursors = epoch, {}

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch stands: after the last batch this process (or `track`) saw."""
        groups = len(self._groups)
        return {"seed": self.seed, "epoch": self.epoch, "cursors": dict(self._cursors), "row_groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on where the state was taken; with the ranks, workers and filters of then.

        Raises DataError where the state counts other row groups.
        """
        if state["row_groups"] != len(self._groups):
            raise DataError(
                f"the reader's state is of {state['row_groups']} row groups, the data has {len(self._groups)}; "
                "resume on the data and with the filters it was taken with"
            )
        self.seed, self.epoch = state["seed"], state["epoch"]
        self._cursors = {int(shard): (at[0], at[1]) for shard, at in state["cursors"].items()}

    def track(self, loader: Iterable[RequestBatch]) -> Iterator[RequestBatch]:
        """The batches of a DataLoader with workers, noted for `state_dict` as they are handed out."""
        for batch in loader:
            self._note(batch.cursor)
            yield batch

    def _note(self, cursor: Cursor) -> None:
        self._cursors[cursor[0]] = (cursor[1], cursor[2])

    def __iter__(self) -> Iterator[RequestBatch]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        shard, shards = self.rank * workers + worker, self.world_size * workers
        groups = list(range(len(self._groups)))
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(groups)
        groups = groups[shard::shards]
        window = self.window if self.shuffle else 1
        first, skip = self._cursors.get(shard, (0, 0))
        for w, whole in self._windows(groups, window, first):
            for b, batch in enumerate(self._batches(whole, shard, w)):
                if w == first and b < skip:
                    continue
                done = replace(batch, cursor=(shard, w, b + 1))
                self._note(done.cursor)
                yield done
        if info is None:
            self._cursors = {}

    def _windows(self, groups: list[int], size: int, first: int) -> Iterator[tuple[int, RequestBatch]]:
        """(number, requests) of each run of row groups, the next ones being read meanwhile."""
        todo = deque(range(first * size, len(groups)))
        reading: deque[Future[RequestBatch]] = deque()
        with ThreadPoolExecutor(1) as pool:
            for w in range(first, -(-len(groups) // size)):
                parts = []
                for _ in range(min(size, len(groups) - w * size)):
                    while todo and len(reading) <= self.prefetch:
                        reading.append(pool.submit(self._read, groups[todo.popleft()]))
                    parts.append(reading.popleft().result())
                yield w, concat(parts) if len(parts) > 1 else parts[0]

    def _read(self, group: int) -> RequestBatch:
        path, meta, g = self._groups[group]
        by = self.filter.names if self.filter else ()
        names = list(dict.fromkeys([meta.columns.request_id, *self.wanted.columns, *by]))
        table = read_group(path, meta, g, _with_impressions(names, meta))
        if self.filter:
            table = self.filter.rows(table)
        try:
            return to_batch(table, meta.columns, self.wanted)
        except DataError as e:
            raise DataError(f"{path}, row group {g}: {e}") from e

    def _batches(self, whole: RequestBatch, shard: int, window: int) -> Iterator[RequestBatch]:
        counts = whole.num_impressions
        sizes = None if self.bounds.bytes is None else request_bytes(whole)
        if self.shuffle:
            rng = torch.Generator().manual_seed(
                random.Random(f"{self.seed}/{self.epoch}/{shard}/{window}").getrandbits(63)
            )
            order = torch.randperm(len(whole), generator=rng)
            counts = counts[order]
            sizes = None if sizes is None else sizes[order]
        at = 0
        for end in self.bounds.cuts(np.asarray(counts), None if sizes is None else np.asarray(sizes)):
            yield whole[order[at:end]] if self.shuffle else whole[at:end]
            at = end


def _with_impressions(names: list[str], meta: PartMeta) -> list[str]:
    """At least one field of the impressions, to know how many there are: the narrowest."""
    if any(n in meta.columns.fields for n in names):
        return names
    schema = meta.columns.schema
    plain = [n for n in meta.columns.impression if pa.types.is_primitive(schema.field(n).type)]
    narrow = sorted(plain, key=lambda n: schema.field(n).type.bit_width)
    return [*names, (narrow or meta.columns.fields)[0]]


class ImpressionBatch(NamedTuple):
    """An impression-level batch: the call of an unconverted model, and what else has I rows."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: Any
    weights: Any
    request_ids: Ids
    impression_ids: Ids


class ImpressionDataset(IterableDataset[ImpressionBatch]):
    """The same batches for models that are not converted: request features repeated for every impression."""

    def __init__(self, requests: RequestDataset):
        self.requests = requests

    def __iter__(self) -> Iterator[ImpressionBatch]:
        for batch in self.requests:
            args, kwargs = batch.to_impressions()
            rows = batch.request_rows
            ids = batch.request_ids
            if isinstance(ids, tuple):
                ids = tuple(ids[i] for i in rows.tolist())
            elif ids is not None:
                ids = ids[rows]
            yield ImpressionBatch(args, kwargs, batch.labels, batch.weights, ids, batch.impression_ids)
