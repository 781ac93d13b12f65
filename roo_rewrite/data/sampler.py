"""Which impressions go into which batch: whole requests, bounded, shuffled, sharded, resumable."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils.data import Sampler

from roo_rewrite.data.grouping import as_ids, group_rows
from roo_rewrite.errors import DataError

T = TypeVar("T")
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Bounds:
    """The largest batch: whichever bound comes first. A single request above it makes a batch of its own."""

    impressions: int | None = None
    requests: int | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        given = [b for b in (self.impressions, self.requests, self.bytes) if b is not None]
        if not given or min(given) < 1:
            raise DataError("a batch needs a bound of at least 1: max_impressions, max_requests or max_bytes")

    def cuts(self, counts: Array, sizes: Array | None = None) -> list[int]:
        """Ends of the batches over requests with `counts` impressions and `sizes` bytes, greedily filled."""
        total = len(counts)
        limits = [(np.arange(1, total + 1), self.requests), (np.cumsum(counts), self.impressions)]
        if self.bytes is not None:
            if sizes is None:
                raise DataError("max_bytes needs the bytes of each impression: pass sizes")
            limits.append((np.cumsum(sizes), self.bytes))
        ends: list[int] = []
        at = 0
        while at < total:
            reach = [
                int(np.searchsorted(used, limit + (used[at - 1] if at else 0), side="right"))
                for used, limit in limits
                if limit is not None
            ]
            at = max(at + 1, min(reach))
            ends.append(at)
        return ends


def shuffle_buffer(items: Iterable[T], size: int, rng: random.Random) -> Iterator[T]:
    """`items` in random order, each drawn from a window of `size` of them. Loses and repeats none."""
    window: list[T] = []
    for item in items:
        if len(window) < size:
            window.append(item)
            continue
        at = rng.randrange(size)
        yield window[at]
        window[at] = item
    rng.shuffle(window)
    yield from window


def check_shard(rank: int, world_size: int) -> None:
    """Raises DataError unless 0 <= rank < world_size."""
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} is not in 0..{world_size - 1}; pass rank and world_size of the process group")


class RequestSampler(Sampler[list[int]]):
    """Batches of rows for `DataLoader(batch_sampler=...)`: all impressions of a request in one batch.

    request_id: I integers or strings, not necessarily contiguous. Batches are bounded by max_impressions,
    max_requests or max_bytes (`sizes`: bytes of each row); a request above the bound is a batch of its own.
    shuffle: by request, through a window of `buffer` requests, the same for the same seed and epoch.
    rank, world_size: each request goes to one rank. Ranks may have different numbers of batches: under
    DDP use `Join`, as padding would repeat impressions.
    """

    def __init__(
        self,
        request_id: Tensor | Sequence[int] | Sequence[str],
        *,
        max_impressions: int | None = None,
        max_requests: int | None = None,
        max_bytes: int | None = None,
        sizes: Sequence[int] | Array | None = None,
        shuffle: bool = False,
        buffer: int = 65536,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        check_shard(rank, world_size)
        if buffer < 1:
            raise DataError(f"buffer must be at least 1 request, got {buffer}")
        self.bounds = Bounds(max_impressions, max_requests, max_bytes)
        grouping = group_rows(as_ids(request_id, "request_id"))
        self._order = grouping.order.cpu().numpy()
        self._counts = grouping.counts.cpu().numpy()
        self._starts = np.cumsum(self._counts) - self._counts
        self._bytes = None if sizes is None else self._request_bytes(np.asarray(sizes))
        self.shuffle, self.buffer, self.seed = shuffle, buffer, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._done = 0

    def _request_bytes(self, sizes: Array) -> Array:
        if sizes.shape != self._order.shape:
            raise DataError(f"sizes must give the bytes of each of the {len(self._order)} rows, got {sizes.shape}")
        running = np.concatenate([[0], np.cumsum(sizes[self._order])])
        per_request: Array = running[self._starts + self._counts] - running[self._starts]
        return per_request

    def set_epoch(self, epoch: int) -> None:
        """Starts `epoch`: another shuffle, from the first batch."""
        self.epoch, self._done = epoch, 0

    def _mine(self) -> Array:
        requests: Iterable[int] = range(len(self._counts))
        if self.shuffle:
            requests = shuffle_buffer(requests, self.buffer, random.Random(f"{self.seed}/{self.epoch}"))
        return np.fromiter(requests, np.int64)[self.rank :: self.world_size]

    def _plan(self) -> tuple[Array, list[int]]:
        mine = self._mine()
        sizes = None if self._bytes is None else self._bytes[mine]
        return mine, self.bounds.cuts(self._counts[mine], sizes)

    def __len__(self) -> int:
        return len(self._plan()[1])

    def __iter__(self) -> Iterator[list[int]]:
        mine, ends = self._plan()
        starts = [0, *ends]
        for i in range(self._done, len(ends)):
            self._done = i + 1
            rows = [self._order[self._starts[r] : self._starts[r] + self._counts[r]] for r in mine[starts[i] : ends[i]]]
            yield np.concatenate(rows).tolist()
        self._done = 0

    def state_dict(self, batches: int | None = None) -> dict[str, Any]:
        """Where the epoch stands. With DataLoader workers, which draw ahead, pass the `batches` trained on."""
        done = self._done if batches is None else batches
        return {"seed": self.seed, "epoch": self.epoch, "batches": done, "requests": len(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration goes on after the batch the state was taken at. Raises DataError for other data."""
        if state["requests"] != len(self._counts):
            raise DataError(
                f"the sampler's state is of {state['requests']} requests, the data has {len(self._counts)}; "
                "resume on the data it was taken on"
            )
        self.seed, self.epoch, self._done = state["seed"], state["epoch"], state["batches"]
