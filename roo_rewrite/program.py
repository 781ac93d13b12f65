"""One program: a captured model, analysed, split, hoisted and emitted for one mode and kind of input."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from roo_rewrite.capture import Captured
from roo_rewrite.emit import Emitted
from roo_rewrite.facts import META, Provenance, Rows
from roo_rewrite.inputs import Inputs
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
        if site.checked:
            site.check(made)
        return made


@dataclass
class Program:
    """What a RequestModel runs.

    captured, emitted: None where nothing could be proved: then the original runs on the broadcast inputs.
    empty: whether it may run on an empty batch, because the original cannot.
    plan: the analysis behind it, for the report. single: whether it may stand for the original on one impression.
    mode, kinds, statics: the state of the model, the kinds of tensors and the plain values it was built for.
    """

    captured: Captured | None
    emitted: Emitted | None
    empty: bool = False
    plan: Any = None
    notes: tuple[str, ...] = ()
    candidates: tuple[Any, ...] = ()
    seen: dict[str, tuple[Tensor, int]] = field(default_factory=dict)
    single: bool = False
    mode: Any = None
    kinds: tuple[Any, ...] = ()
    statics: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        # Immutable once built, and the graph's traced values cannot be copied.
        return self

    def holds(self, model: nn.Module) -> bool:
        """Whether the buffers whose values were built on (masks, index vectors) still have these values.

        Small ones are compared at every call; large or remote ones only where torch says they were written.
        """
        for name, buffer, value in self._assumed(model):
            seen = self.seen.get(name)
            cheap = buffer.numel() <= _CHEAP and buffer.device.type == "cpu"
            if not cheap and seen is not None and seen[0] is buffer and seen[1] == buffer._version:
                continue
            if buffer.shape != value.shape or not torch.equal(buffer.to(value), value):
                return False
            self.seen[name] = (buffer, buffer._version)
        return True

    def assert_holds(self, model: nn.Module) -> None:
        """The same within compiled or exported code, which cannot be built anew: it raises RuntimeError there."""
        for name, buffer, value in self._assumed(model):
            same = torch.isclose(buffer.to(value), value, rtol=0.0, atol=0.0, equal_nan=True).all()
            torch._assert_async(same, f"buffer {name!r} has changed: call the rewritten model once, then compile it")

    def _assumed(self, model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Each buffer whose values were built on: its name, what it holds now, what it held then."""
        for name, value in ({} if self.captured is None else self.captured.assumed).items():
            owner, _, key = name.rpartition(".")
            yield name, getattr(model.get_submodule(owner), key), value

    def accepts(self, impressions: int) -> bool:
        """Whether the emitted functions hold for this many impressions.

        One impression is the original's: a trace never sees a batch of one, and there is nothing to save.
        """
        if self.captured is None or impressions == 1 or (impressions == 0 and not self.empty):
            return False
        return self.captured.accepts(impressions) if impressions else True

    @property
    def always(self) -> bool:
        """Whether the emitted functions hold for any number of impressions from two on."""
        return self.captured is not None and self.captured.accepts.always

    @functools.cached_property
    def checked(self) -> bool:
        """Whether a call may find that the batch is not one of the trace: by a leaf's sizes, or by the rows kept."""
        return self.captured is not None and (self.captured.kept or any(s.checked for s in self.captured.sites))

    def names(self, inputs: Inputs) -> tuple[str, ...]:
        """The names of what crosses: of the request's atoms where nothing could be proved."""
        if self.emitted is not None:
            return self.emitted.residuals
        return tuple(a.name for a in inputs.atoms if a.provenance is Provenance.REQUEST)

    def serves(self, impressions: int) -> bool:
        """As `accepts`, where the original can no longer be asked: its request inputs are gone."""
        if impressions < 2 or self.captured is None:
            return self.single or not impressions
        return self.captured.accepts(impressions)

    @functools.cached_property
    def crossing(self) -> dict[str, tuple[tuple[int | None, ...], torch.dtype]]:
        """Shape and dtype of each value that crosses, by name: None for the rows of its first dim, -1 for any size."""
        nodes = {} if self.emitted is None else {n.name: n for n in self.emitted.graph.nodes}
        found = {}
        for name in () if self.emitted is None else self.emitted.residuals:
            known: Any = nodes[name].meta.get(META)
            value = nodes[name].meta["val"]
            shape = [s if isinstance(s, int) else -1 for s in value.shape]
            rows = known is not None and known.batching in (Rows(0),)
            found[name] = tuple(None if rows and not dim else s for dim, s in enumerate(shape)), value.dtype
        return found

    def alike(self, values: Mapping[str, Tensor]) -> bool:
        """Whether tensors by name may be those that cross in this program."""
        return self.emitted is None or all(
            n in values
            and (values[n].ndim, values[n].dtype) == (len(shape), dtype)
            and all(s in (None, -1, t) for s, t in zip(shape, values[n].shape))
            for n, (shape, dtype) in self.crossing.items()
        )


def holder(root: nn.Module, captured: Captured) -> nn.Module:
    """The module under `_roo` of the emitted model: constants of the trace, and leaf call sites."""
    made = nn.Module()
    for name, value in captured.constants.items():
        made.register_buffer(name, value, persistent=False)
    for index, site in enumerate(captured.sites):
        made.add_module(f"leaf_{index}", LeafCall(root, site))
    return made
