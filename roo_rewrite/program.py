"""One program: a captured model, analysed, split, hoisted and emitted for one mode and kind of input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from roo_rewrite.capture import Captured
from roo_rewrite.emit import Emitted
from roo_rewrite.leaves import LeafSite


class LeafCall(nn.Module):
    """A leaf's call site in the emitted model: finds the real submodule by its path at each call."""

    def __init__(self, root: nn.Module, site: LeafSite):
        super().__init__()
        self.__dict__["_target"] = (root, site)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        root, site = self.__dict__["_target"]
        return site.call(root, tensors)


@dataclass
class Program:
    """What a RequestModel runs.

    captured, emitted: None where nothing could be proved: then the original runs on the broadcast inputs.
    small: row counts (0, 1) for which the trace was seen to differ from the original.
    plan: the analysis behind it, for the report.
    """

    captured: Captured | None
    emitted: Emitted | None
    small: frozenset[int] = frozenset()
    plan: Any = None
    notes: tuple[str, ...] = ()
    candidates: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        # Immutable once built, and the graph's traced values cannot be copied.
        return self

    def accepts(self, impressions: int) -> bool:
        """Whether the emitted functions hold for this many impressions."""
        if self.captured is None or impressions in self.small:
            return False
        return self.captured.accepts(impressions) if impressions > 1 else True


def holder(root: nn.Module, captured: Captured, sites: Sequence[int]) -> nn.Module:
    """The module under `_roo` of the emitted model: constants of the trace, and leaf call sites."""
    made = nn.Module()
    for name, value in captured.constants.items():
        made.register_buffer(name, value, persistent=False)
    for site in sites:
        made.add_module(f"leaf_{site}", LeafCall(root, captured.sites[site]))
    return made
