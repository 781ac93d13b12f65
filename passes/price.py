"""What a split is thought to gain: the time before and after, on the device of the trace, at a fan-out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from passes.forms import numel
from roo_rewrite.cost import NOMINAL_IMPRESSIONS, Device
from roo_rewrite.facts import Provenance

_ELEMENT = 4


@dataclass(frozen=True)
class Candidate:
    """A split that was considered: nanoseconds before and after at the nominal batch, and whether it was taken.

    measured: time without it over time with it, once `split_gains` has taken both.
    """

    what: str
    before: float
    after: float
    taken: bool
    where: str = ""
    measured: float | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What it is called: the same whenever the model is built."""
        return self.what, self.where

    @property
    def gain(self) -> float:
        """Predicted time before over time after."""
        return self.before / self.after if self.after else float("inf")


@dataclass
class Price:
    """Prices at `fanout`; mode "always" takes every split, for experiments.

    otherwise: keys of splits to decide the other way, to measure them.
    """

    device: Device
    fanout: float
    batch: int
    mode: Literal["priced", "always", "never"]
    otherwise: frozenset[tuple[str, str]] = frozenset()
    candidates: list[Candidate] = field(default_factory=list)

    def rows(self, shape: Sequence[Any], side: Provenance) -> float:
        """Entries of a traced shape at the nominal batch of a side; a constant has no batch."""
        entries = float(numel(shape))
        if any(not isinstance(s, int) for s in shape):
            entries *= NOMINAL_IMPRESSIONS / self.batch
            entries /= self.fanout if side is not Provenance.IMPRESSION else 1.0
        return entries

    def product(self, shape: Sequence[Any], inner: int, side: Provenance) -> float:
        """Time of a contraction of `inner` entries into each entry of `shape`."""
        entries = self.rows(shape, side)
        flops = 2.0 * entries * inner / self.device.flops_per_ns
        return flops + entries * _ELEMENT / self.device.bytes_per_ns

    def batched(self, matrices: float, m: float, k: float, n: float) -> float:
        """Time of so many products `[m, k]` by `[k, n]`."""
        device = self.device
        entries = m * k + k * n + m * n
        each = (
            device.matrix_ns + 2.0 * m * k * n / device.flops_per_ns + entries * _ELEMENT / device.matrix_bytes_per_ns
        )
        return matrices * each

    def move(self, shape: Sequence[Any], side: Provenance = Provenance.IMPRESSION, times: float = 2.0) -> float:
        """Time to read and write `shape` once."""
        return times * self.rows(shape, side) * _ELEMENT / self.device.bytes_per_ns

    def start(self, ops: int) -> float:
        """Time to start `ops` more ops."""
        return ops * self.device.start_ns

    def take(self, what: str, before: float, after: float, where: str = "") -> bool:
        """Whether a split pays; it is written down either way."""
        taken = (self.mode == "always" or after < 0.97 * before) != ((what, where) in self.otherwise)
        self.candidates.append(Candidate(what, before, after, taken, where))
        return taken
