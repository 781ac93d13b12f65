"""Columns of both sides in one tensor: each side runs once, however the columns lie.

f(cat[U[:, :2], x, U[:, 2:]], ...)  =  f of U, f of x, and picks of both
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo


class Packed(nn.Module):
    """Ids of all fields in one tensor [B, 6], offsets into one table, then `run` on [B, 6, 4]."""

    def __init__(self, run: Callable[[Packed, Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.run, self.offsets = run, [0, 5, 10, 15, 20, 25]
        self.table, self.deep, self.row = nn.Embedding(30, 4), nn.Linear(24, 3), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.run(self, self.table(ids + ids.new_tensor(self.offsets).unsqueeze(0)))


RUNS: dict[str, Callable[[Packed, Tensor], Tensor]] = {
    "a linear map of all": lambda m, t: m.deep(t.view(-1, 24)),
    "a sum over the fields": lambda m, t: t.sum(1),
    "squares": lambda m, t: m.deep((t * t).flatten(1)) + t.mean(1).sum(1, keepdim=True),
    "field by field": lambda m, t: torch.relu(m.row(t)).flatten(1),
    "two fields merged": lambda m, t: m.deep(torch.tanh(t.reshape(-1, 3, 8)).flatten(1)),
    "a field of each side alone": lambda m, t: t[:, 3] * t[:, 0],
    "another order": lambda m, t: m.deep(t.flip(1).flatten(1)),
}
RANGES = {
    "interleaved": [(0, 2), (3, 5)],
    "every other": [(0, 1), (2, 3), (4, 5)],
    "at both ends": [(0, 1), (5, 6)],
    "one range": [(0, 4)],
}


def rewritten(run: str, ranges: list[tuple[int, int]]) -> roo.RequestModel:
    model = Packed(RUNS[run])
    example = (torch.randint(5, (8, 6)),)
    spec = roo.FeatureSpec(columns={"ids": {"request": ranges}})
    made = roo.rewrite(model, example, spec=spec, fanout=16, check=True, split="always")
    roo.verify(model, made, batches=6)
    return made


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("ranges", ["interleaved", "at both ends"])
def test_columns(run: str, ranges: str) -> None:
    made = rewritten(run, RANGES[ranges])
    assert made.code.count("torch.embedding") <= 2, "one lookup a side"


@pytest.mark.parametrize("ranges", RANGES)
def test_wherever_they_lie(ranges: str) -> None:
    code = rewritten("a linear map of all", RANGES[ranges]).code
    assert code.count("torch.embedding") == 2
    assert "narrow(x" not in code, "the columns are not taken apart"


def test_slices_that_are_no_columns_of_one_tensor_stay() -> None:
    class Two(nn.Module):
        def forward(self, u: Tensor, x: Tensor) -> Tensor:
            return torch.cat([u[:, 1:3], x[:, :1], u[:, ::2]], 1).exp()

    example = (torch.randn(8, 4), torch.randn(8, 4))
    model = Two()
    made = roo.rewrite(model, example, spec=roo.FeatureSpec(request=["u"], impression=["x"]), fanout=16, check=True)
    roo.verify(model, made, batches=6)
