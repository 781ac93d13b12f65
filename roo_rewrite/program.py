"""One program: a captured model, analysed, split, hoisted and emitted for one mode and kind of input."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from roo_rewrite.capture import Captured
from roo_rewrite.emit import Emitted
from roo_rewrite.leaves import LeafSite

_CHEAP = 1 << 16


class LeafCall(nn.Module):
    """A leaf's call site in the emitted model: finds the real submodule by its path at each call."""

    def __init__(self, root: nn.Module, site: LeafSite):
        super().__init__()
        self.__dict__["_target"] = (root, site)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        root, site = self.__dict__["_target"]
        made: list[Tensor] = site.call(root, tensors)
        return made


@dataclass
class Program:
    """What a RequestModel runs.

    captured, emitted: None where nothing could be proved: then the original runs on the broadcast inputs.
    empty: whether it may run on an empty batch, because the original cannot.
    plan: the analysis behind it, for the report.
    """

    captured: Captured | None
    emitted: Emitted | None
    empty: bool = False
    plan: Any = None
    notes: tuple[str, ...] = ()
    candidates: tuple[Any, ...] = ()
    seen: dict[str, tuple[Tensor, int]] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        # Immutable once built, and the graph's traced values cannot be copied.
        return self

    def holds(self, model: nn.Module) -> bool:
        """Whether the buffers whose values were built on (masks, index vectors) still have these values.

        Small ones are compared at every call; large or remote ones only where torch says they were written.
        """
        assumed = {} if self.captured is None else self.captured.assumed
        for name, value in assumed.items():
            owner, _, key = name.rpartition(".")
            buffer = getattr(model.get_submodule(owner), key)
            seen = self.seen.get(name)
            cheap = buffer.numel() <= _CHEAP and buffer.device.type == "cpu"
            if not cheap and seen is not None and seen[0] is buffer and seen[1] == buffer._version:
                continue
            if buffer.shape != value.shape or not torch.equal(buffer.to(value), value):
                return False
            self.seen[name] = (buffer, buffer._version)
        return True

    def accepts(self, impressions: int) -> bool:
        """Whether the emitted functions hold for this many impressions.

        One impression is the original's: a trace never sees a batch of one, and there is nothing to save.
        """
        if self.captured is None or impressions == 1 or (impressions == 0 and not self.empty):
            return False
        return self.captured.accepts(impressions) if impressions else True


def holder(root: nn.Module, captured: Captured) -> nn.Module:
    """The module under `_roo` of the emitted model: constants of the trace, and leaf call sites."""
    made = nn.Module()
    for name, value in captured.constants.items():
        made.register_buffer(name, value, persistent=False)
    for index, site in enumerate(captured.sites):
        made.add_module(f"leaf_{index}", LeafCall(root, site))
    return made
