"""What is only written otherwise moves as far; what only looks like a law's form is not taken for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from law_parts import Model, parameter
from torch import Tensor


def joined(u: Tensor, x: Tensor) -> Tensor:
    return torch.cat([u, x], 1)


def plain(u: Tensor, x: Tensor) -> Tensor:
    return joined(u, x).reshape(-1, 2, 6)


ALIKE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "reshape_as": lambda u, x: joined(u, x).reshape_as(torch.stack([x, x], 1)),
    "view_as": lambda u, x: joined(u, x).view_as(torch.stack([x, x], 1)),
    "a stack of one": lambda u, x: torch.stack([plain(u, x)], 0).squeeze(0),
    "a stack of one, from the last": lambda u, x: torch.stack([plain(u, x)], -1).squeeze(-1),
    "a stack of both": lambda u, x: torch.stack([u, x], -2),
    "hstack": lambda u, x: torch.hstack([u, x]).reshape(-1, 2, 6),
    "hstack of matrices": lambda u, x: torch.hstack([u[:, None], x[:, None]]),
    "column_stack": lambda u, x: torch.column_stack([*u.unbind(1), x]).reshape(-1, 2, 6),
    "row_stack": lambda u, x: torch.row_stack([u.t(), *x.unbind(1)]).t().reshape(-1, 2, 6),
    "dstack": lambda u, x: torch.dstack([u, x]).transpose(1, 2),
}


@pytest.mark.parametrize("spelling", ALIKE)
def test_another_spelling_moves_as_much(law: Any, spelling: str) -> None:
    def of(spelled: Callable[[Tensor, Tensor], Tensor]) -> int:
        model = Model(lambda m, u, x: F.linear(spelled(u, x), m.w).relu(), w=parameter(4, 6))
        return int(law(model, u=(6,), x=(6,)).flops()[1])

    assert of(ALIKE[spelling]) == of(plain)


@pytest.mark.parametrize("power", [1, 2, 3, 0.5, -1])
def test_only_the_second_power_of_what_is_centred_is_its_square(law: Any, power: float) -> None:
    def run(m: Model, u: Tensor, x: Tensor) -> Tensor:
        h = joined(u, x).abs()
        centred = h - h.mean(1, keepdim=True)
        return F.linear(centred / (centred.pow(power).mean(1, keepdim=True) + 3), m.w)

    law(Model(run, w=parameter(2, 7)), u=(3,), x=(4,))
