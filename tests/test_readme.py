"""The code in the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parent.parent


class Ranker(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item, self.top = nn.Linear(64, 64), nn.Linear(16, 16), nn.Linear(80, 1)

    def forward(self, user_x: torch.Tensor, item_x: torch.Tensor) -> torch.Tensor:
        return self.top(torch.cat([torch.relu(self.user(user_x)), self.item(item_x)], 1)).squeeze(1)


def test_the_example_runs_and_is_short() -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    scope = {"impression_model": Ranker().eval()}
    exec(code, scope)
    assert scope["scores"].shape == (8,)


def test_documents_name_files_that_exist() -> None:
    known = [ROOT, ROOT / "roo_rewrite", ROOT / "passes"]
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("architecture.md")):
        for name in re.findall(r"`([\w/]+\.(?:py|md|j2))`", page.read_text()):
            assert any((folder / name).is_file() for folder in known) or name == "model.py", f"{page.name}: {name}"
