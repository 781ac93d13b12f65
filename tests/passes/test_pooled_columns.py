"""pooled_columns: a permutation of tables is a concatenation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo

pytest.importorskip("fbgemm_gpu")
WIDTHS = (2, 4, 3)


def starts(widths: list[int]) -> Tensor:
    return torch.tensor([0, *widths]).cumsum(0)


class Regrouped(nn.Module):
    """A user's table, an item's and the user's again, put into another order before a linear layer."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.order, self.out = order, nn.Linear(sum(WIDTHS[i] for i in order), 8)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        pooled = torch.cat([u[:, :2], x, u[:, 2:]], 1)
        given, order = starts(list(WIDTHS)), torch.tensor(self.order)
        later = starts([WIDTHS[i] for i in self.order])
        permuted = torch.ops.fbgemm.permute_pooled_embs_auto_grad(pooled, given, order, later, torch.argsort(order))
        return torch.relu(self.out(permuted)).sum(1)


class Computed(Regrouped):
    """Negative: the order is known only at run time."""

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        pooled = torch.cat([u[:, :2], x, u[:, 2:]], 1)
        order = torch.argsort(-u.sum() * torch.arange(3))
        given = starts(list(WIDTHS))
        return torch.ops.fbgemm.permute_pooled_embs_auto_grad(pooled, given, order, given, order).sum(1)  # type: ignore[no-any-return]


def rewritten(model: nn.Module) -> roo.RequestModel:
    torch.manual_seed(0)
    example = (torch.randn(7, 5), torch.randn(7, 4))
    return roo.rewrite(model.eval(), example, spec=roo.FeatureSpec(["u"], ["x"]), fanout=64, check=True, split="always")


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0]])
def test_the_tables_of_the_user_go_through_the_linear_layer_once(order: list[int]) -> None:
    model = Regrouped(order)
    found = rewritten(model)
    roo.verify(model, found, batches=4)
    assert any(n.op == "linear" and n.runs == "request" for n in found.report.nodes), str(found.report)


def test_an_order_known_only_at_run_time_stays() -> None:
    found: Any = rewritten(Computed([0, 1, 2]))
    assert found._whole_program().emitted is None or "permute_pooled_embs" in found.code
