"""What the hazards have in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Plain(nn.Module):
    """A harmless two-sided model: one linear layer a side, and their product."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def user(self, u: Tensor) -> Tensor:
        """What must run once per request."""
        return torch.relu(self.a(u))

    def mix(self, h: Tensor, x: Tensor) -> Tensor:
        """One score an impression."""
        return (h * self.b(x)).sum(-1)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u), x)
