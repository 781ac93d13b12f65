"""What a forward returns of `x.shape` is a torch.Size again, as it stands or within other values."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo
from roo_rewrite.export import write
from roo_rewrite.outputs import flatten_output, unflatten_output


class Shapes(nn.Module):
    def __init__(self, alone: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)
        self.alone = alone

    def forward(self, u: Tensor, x: Tensor) -> Any:
        made = self.b(torch.tanh(self.a(u)) * x)
        return made.shape if self.alone else (made, made.shape, {"width": [x.shape[1:], tuple(u.shape)]})


def rewritten(alone: bool = False) -> tuple[nn.Module, roo.RequestModel]:
    torch.manual_seed(0)
    model = Shapes(alone)
    spec = roo.FeatureSpec(request=["u"], impression=["x"])
    return model, roo.rewrite(model, (torch.randn(7, 4), torch.randn(7, 3)), spec=spec)


def held(found: Any, rows: int) -> None:
    score, shape, inner = found
    width, plain = inner["width"]
    assert score.shape == shape == (rows, 2)
    assert width == (3,)
    assert plain == (rows, 4)
    assert [type(v) for v in (shape, width, plain)] == [torch.Size, torch.Size, tuple]


COUNTS = ([2, 0, 3], [1], [0, 0], [])


@pytest.mark.parametrize("counts", COUNTS)
def test_a_size_stays_a_size(counts: list[int]) -> None:
    model, made = rewritten()
    u, x = torch.randn(len(counts), 4), torch.randn(sum(counts), 3)
    held(made(u, x, num_impressions=torch.tensor(counts, dtype=torch.long)), sum(counts))
    held(model(u[torch.repeat_interleave(torch.tensor(counts, dtype=torch.long))], x), sum(counts))


def test_a_size_alone() -> None:
    _, made = rewritten(alone=True)
    found = made(torch.randn(2, 4), torch.randn(5, 3), num_impressions=torch.tensor([2, 3]))
    assert type(found) is torch.Size
    assert found == (5, 2)


@pytest.mark.parametrize("out", [(1, 2), [0.5, (3,)], {"a": ()}])
def test_what_was_no_size_stays_as_it_is(out: Any) -> None:
    values, tree = flatten_output(out)
    again = unflatten_output(values, tree, [])
    assert again == out
    assert type(again) is type(out)


def test_compiled_and_written(tmp_path: Path) -> None:
    _, made = rewritten()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(made, fullgraph=True, dynamic=True, backend="eager")
        for counts in ([2, 0, 3], [1, 1, 4, 1]):
            args = torch.randn(len(counts), 4), torch.randn(sum(counts), 3)
            held(compiled(*args, num_impressions=torch.tensor(counts)), sum(counts))
    assert write(made, tmp_path / "out") == []
    sources = [p.read_text() for p in (tmp_path / "out").glob("*.py")]
    assert any("torch.Size((3,))" in s for s in sources)
