"""Models of one line, and what is drawn for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

few = settings(derandomize=True, max_examples=4, deadline=None)
FIELDS = ("u0", "x0", "u1", "x1")


def parameter(*shape: int) -> nn.Parameter:
    """Seeded by its shape."""
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))))


class Model(nn.Module):
    """`run(self, **inputs)`; parts are parameters, buffers or modules of it."""

    def __init__(self, run: Callable[..., Any], **parts: Any):
        super().__init__()
        self.__dict__["run"] = run
        for name, part in parts.items():
            if isinstance(part, (nn.Module, nn.Parameter)):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)

    def forward(self, **inputs: Tensor) -> Any:
        return self.run(self, **inputs)


@st.composite
def fields(draw: st.DrawFn, low: int = 1, high: int = 4) -> dict[str, int]:
    """Fields of both sides in any order, each with a width."""
    some = draw(st.sampled_from([FIELDS, FIELDS[:2], FIELDS[:3], FIELDS[1:]]))
    return {name: draw(st.integers(low, high)) for name in draw(st.permutations(some))}


def widths(drawn: dict[str, int]) -> tuple[int, int]:
    """Total width of the request fields, and of the impression fields."""
    return sum(n for f, n in drawn.items() if f[0] == "u"), sum(n for f, n in drawn.items() if f[0] == "x")


def side_by_side(inputs: dict[str, Tensor], names: Sequence[str], dim: int = -1) -> Tensor:
    """The fields in the drawn order."""
    return torch.cat([inputs[n] for n in names], dim)
