"""What a split is thought to gain: the time before and after, on the device of the trace, at a fan-out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch.fx import Graph, Node

from passes.forms import Blocks, Form, Whole, hint, numel
from roo_rewrite.cost import NOMINAL_IMPRESSIONS, Device, cost, runs, time
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


def _apart(part: Form) -> float:
    """Runs of memory that a part is read in."""
    value = part.node.meta["val"] if isinstance(part, Whole) else None
    return 1.0 if value is None else runs(value)


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

    def product(self, shape: Sequence[Any], inner: int, side: Provenance, outputs: int | None = None) -> float:
        """Time of a contraction of `inner` entries into each entry of `shape`.

        outputs: entries that the same `inner` entries go into; None: the last dim of `shape`.
        """
        entries, columns = self.rows(shape, side), hint(shape[-1]) if outputs is None else outputs
        moved = entries + entries / max(columns, 1) * inner
        flops = 2.0 * entries * inner / self.device.product_flops_per_ns
        return flops + moved * _ELEMENT / self.device.product_bytes_per_ns

    def batched(self, matrices: float, m: float, k: float, n: float) -> float:
        """Time of so many products `[m, k]` by `[k, n]`."""
        device, flops, entries = self.device, 2.0 * m * k * n, m * k + k * n + m * n
        if matrices <= 1:
            return flops / device.product_flops_per_ns + entries * _ELEMENT / device.product_bytes_per_ns
        each = flops / device.matrix_flops_per_ns + entries * _ELEMENT / device.matrix_bytes_per_ns
        return matrices * (device.matrix_ns + each)

    def move(self, shape: Sequence[Any], side: Provenance = Provenance.IMPRESSION, times: float = 2.0) -> float:
        """Time to read and write `shape` once."""
        return times * self.rows(shape, side) * _ELEMENT / self.device.bytes_per_ns

    def copied(self, node: Node, side: Provenance) -> float:
        """Time to copy a value whose rows do not lie in memory as such, which a product does; else none."""
        value = node.meta["val"]
        if value.ndim < 3 or hint(value.stride(-1)) == 1:
            return 0.0
        return self.move(value.shape, side) + self._runs(value.shape, runs(value), side)

    def gathered(self, shape: Sequence[Any], side: Provenance, run: int) -> float:
        """Time to copy a value for a product over a dim that is not the last, in runs of so many entries."""
        return self.move(shape, side) + self.rows(shape, side) / run * self.device.run_ns

    def joined(self, form: Form) -> float:
        """Time to put the parts of a form side by side, at the impressions' rows; of another form to carry it out."""
        if not isinstance(form, Blocks):
            return self.move(form.shape)
        outer, late = float(numel(form.shape[: form.dim])), Provenance.IMPRESSION
        found = [max(outer, _apart(p)) for p in form.parts]
        return self.move(form.shape) + self._runs(form.shape, sum(found), late)

    def _runs(self, shape: Sequence[Any], apart: float, side: Provenance) -> float:
        """Time of so many runs of a traced shape."""
        return self.rows(shape, side) / max(numel(shape), 1) * apart * self.device.run_ns

    def start(self, ops: int) -> float:
        """Time to start `ops` more ops."""
        return ops * self.device.start_ns

    def together(self, graph: Graph) -> float:
        """Time of all nodes of a graph at the impressions' rows."""
        calls = [n for n in graph.nodes if n.op == "call_function" and cost(n).bytes]
        scale = NOMINAL_IMPRESSIONS / self.batch
        return sum(scale * time(n, self.device) for n in calls) + self.start(len(calls))

    def take(self, what: str, before: float, after: float, where: str = "") -> bool:
        """Whether a split pays, or costs as much but for what a price is off by; it is written down either way.

        Of equal time the one with fewer FLOPs; at fan-out 1 a split has no fewer.
        """
        tie = 1.05 - 0.08 / self.fanout
        taken = (self.mode == "always" or after < tie * before) != ((what, where) in self.otherwise)
        self.candidates.append(Candidate(what, before, after, taken, where))
        return taken
