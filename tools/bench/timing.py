"""Timing that holds up on a shared machine: variants interleaved in one process, memory kept by the process."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

SHAPES = ("even", "skewed")
STATISTICS: dict[str, Callable[[list[float]], float]] = {"median": statistics.median, "fastest": min}
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def keep_memory() -> None:
    """Freed memory stays with the process, as serving allocators have it.

    glibc gives large blocks back at once and pays page faults for them again: measured up to a third of a DIN's time,
    and it depends on what ran before. Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim, top_pad, mmap_max = -1, -2, -4
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim, 2**31 - 1)
        libc.mallopt(top_pad, 2**26)


def interleaved(
    variants: Mapping[str, Callable[[], object]], rounds: int, statistic: str = "median", clock: str = "wall"
) -> dict[str, float]:
    """Milliseconds of each variant over `rounds`; each round runs all of them, starting with another one.

    statistic: median or fastest. clock: wall, or cpu where other work shares the cores (give torch one thread then:
    the cpu clock adds threads up).
    """
    now = CLOCKS[clock]
    names = list(variants)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        for _ in range(2):
            variants[name]()
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = now()
            variants[name]()
            taken[name].append(now() - start)
    return {name: 1e3 * STATISTICS[statistic](times) for name, times in taken.items()}


def fanouts(shape: str, fanout: int, impressions: int, seed: int = 0) -> Tensor:
    """`num_impressions [R]`, int64, summing to `impressions` with mean `fanout`.

    even: all alike. skewed: log-normal (sigma 1.2), so that a few requests hold most impressions and some hold none.
    """
    requests = max(1, impressions // fanout)
    if shape == "even":
        share = torch.ones(requests, dtype=torch.float64)
    elif shape == "skewed":
        g = torch.Generator().manual_seed(seed)
        share = (1.2 * torch.randn(requests, generator=g, dtype=torch.float64)).exp()
    else:
        raise ValueError(f"no fan-out shape {shape!r}; there are {', '.join(SHAPES)}")
    # Rounding the running total keeps the sum exact.
    ends = (share.cumsum(0) / share.sum() * impressions).round().long()
    return ends.diff(prepend=ends.new_zeros(1))
