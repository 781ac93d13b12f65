"""A small impression-level model in a file, its spec, and a way to run the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click.testing
import pytest

from roo_rewrite.cli import main

MODEL = """
import torch
from torch import nn

class Ranker(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.user, self.item, self.top = nn.Linear(64, 64), nn.Linear(3, 8), nn.Linear(72, 1)

    def forward(self, user_x, item_x):
        user = torch.relu(self.user(user_x))
        return self.top(torch.cat([user, self.item(item_x)], 1)).squeeze(1)

class Ranking(Ranker):
    def forward(self, user_x, item_x):
        return super().forward(user_x.sort(0).values, item_x)

def make(kind=Ranker):
    g = torch.Generator().manual_seed(0)
    return kind().eval(), (torch.randn(7, 64, generator=g), torch.randn(7, 3, generator=g)), {}

def sorting():
    return make(Ranking)

def wrong_shapes():
    return Ranker(), (torch.randn(7, 5), torch.randn(7, 3))

def alone():
    return Ranker()

def broken():
    raise RuntimeError("no weights here")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds `model.py` and `spec.toml`."""
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "spec.toml").write_text('request = ["user_*"]\nimpression = ["item_*"]\n')
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Callable[..., click.testing.Result]:
    """`run("verify", "make")` runs a verb on a callable of the model file; further arguments follow."""

    def run(verb: str, name: str, *arguments: str, spec: str = "spec.toml") -> click.testing.Result:
        target = name if name.endswith(".pt2") or ":" in name else f"{folder / 'model.py'}:{name}"
        call = [verb, target, "--spec", str(folder / spec), *arguments]
        return click.testing.CliRunner().invoke(main, call, catch_exceptions=False)

    return run
