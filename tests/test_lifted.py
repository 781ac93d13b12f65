"""Parameters and buffers that a module reaches through a list of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo
from roo_rewrite.lifted import _named

SPEC = roo.FeatureSpec(request=["user"], impression=["item"])


class Kept(nn.Module):
    """A product with what `hold` keeps of a registered parameter or buffer, in a list or a dict."""

    def __init__(self, hold: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.weight = nn.Parameter(torch.rand(8, 3))
        self.register_buffer("scale", torch.rand(8, 3))
        held = {"buffer": self.scale, "detached": self.weight.detach()}.get(hold, self.weight)
        self.held = {"first": [held]} if hold == "dict" else [held]

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        first = self.held["first"][0] if isinstance(self.held, dict) else self.held[0]
        return torch.cat([self.embedding(user), self.embedding(item)], 1) @ (first * self.scale)


@pytest.mark.parametrize("hold", ["list", "dict", "buffer", "detached"])
def test_what_a_list_holds_is_the_tensor_that_is_registered(hold: str) -> None:
    original = Kept(hold)
    model = roo.rewrite(original, (torch.arange(6), torch.arange(6)), spec=SPEC, fanout=10, check=True)
    assert model._whole_program().emitted is not None
    roo.verify(original, model, batches=3)
    original.load_state_dict({name: value + 1 for name, value in original.state_dict().items()})
    roo.verify(original, model, batches=3)


def test_memory_that_has_two_names_has_none() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Parameter(torch.rand(3))
            self.two = nn.Parameter(self.one.data)
            self.empty, self.sparse = nn.Parameter(torch.rand(0)), nn.Parameter(torch.rand(2, 2).to_sparse())

    assert not _named(Two())
