"""A model as a function of its atoms, which is what is traced."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from roo_rewrite.branches import Branches
from roo_rewrite.errors import CaptureError
from roo_rewrite.facts import Provenance
from roo_rewrite.inputs import Inputs
from roo_rewrite.kept import Masked
from roo_rewrite.outputs import COMPUTED, COMPUTED_VALUE, flatten_output
from roo_rewrite.purity import twin
from roo_rewrite.tracing import no_lost_calls

Returned = tuple[list[Any], pytree.TreeSpec]


class Adapter(nn.Module):
    """The model called on its atoms, and the conditions of `branches`; remembers the structure of what it returned."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        statics: Sequence[Any],
        branches: Branches | None = None,
        masked: Masked | None = None,
        see: Callable[[Sequence[Tensor]], None] | None = None,
    ):
        super().__init__()
        self.__dict__["_see"] = see
        self.__dict__["_masked"] = masked
        self.__dict__["_branches"] = branches
        self.model = model
        self.__dict__["_call"] = (inputs, statics)
        self.__dict__["_out"] = None

    def forward(self, *atoms: Tensor) -> tuple[Any, ...]:
        inputs, statics = self.__dict__["_call"]
        if self.__dict__["_see"] is not None:
            self.__dict__["_see"](atoms)
        # One symbol for the batch: sizes of one input divide those of another.
        counts = [t.shape[0] for atom, t in zip(inputs.atoms, atoms) if atom.kind in ("dense", "lengths", "offsets")]
        for count in counts[1:]:
            torch._check(count == counts[0])  # type: ignore[no-untyped-call]
        args, kwargs = inputs.unflatten(atoms, Provenance.IMPRESSION, statics)
        values, tree = flatten_output(self.model(*args, **kwargs))
        self.__dict__["_out"] = ([v if not isinstance(v, COMPUTED) else COMPUTED_VALUE for v in values], tree)
        branches, masked = self.__dict__["_branches"], self.__dict__["_masked"]
        values = masked.assured(values) if masked is not None else values
        return (*(v for v in values if isinstance(v, COMPUTED)), *(branches.asked.values() if branches else ()))

    @property
    def returned(self) -> Returned:
        """Leaves and structure of what the last call returned."""
        found: Returned = self.__dict__["_out"]
        return found


def rehearsed(
    model: nn.Module, inputs: Inputs, example: Sequence[Tensor], statics: Sequence[Any], batch: int
) -> Returned:
    """What the model returns, found by running copies of it on `batch` rows and fewer: leaves and structure.

    Raises CaptureError where a trace could not tell a size from a plain value, and where it would lose a call.
    """
    found: list[Returned] = []
    for size in (batch, batch - 2):
        adapter = Adapter(twin(model), inputs, statics)
        with no_lost_calls():
            adapter(*inputs.select(example, torch.arange(size), (Provenance.REQUEST, Provenance.IMPRESSION)))
        found.append(adapter.returned)
    if found[0] != found[1]:
        raise CaptureError("forward returns plain values that depend on the batch size")
    return found[0]
