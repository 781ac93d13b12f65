"""Sums and activations in place: where a buffer is the op's own, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo

Run = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Net(nn.Module):
    def __init__(self, run: Run):
        super().__init__()
        torch.manual_seed(0)
        self.user, self.item, self.other = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 6, bias=False)
        self.scale = nn.Parameter(torch.randn(6))
        self.run = run

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.run(self, u, x)


def emitted(run: Run, training: bool = False, size: tuple[int, ...] = (4,)) -> str:
    """The emitted code, the model verified with values and gradients."""
    model = Net(run).train(training)
    spec = roo.FeatureSpec(request=["u"], impression=["x"])
    example = (torch.randn(8, *size), torch.randn(8, *size))
    made = roo.rewrite(model, example, spec=spec, fanout=16, check=True)
    assert made.code.count("\n") > 3
    roo.verify(model, made, batches=6)
    return made.code


FUSED: dict[str, tuple[Run, list[str]]] = {
    "a product onto the broadcast": (
        lambda m, u, x: torch.relu(m.user(u) + m.other(m.item(x))),
        ["linear_onto", "relu_"],
    ),
    "a product onto another": (lambda m, u, x: m.item(x) + m.other(x.repeat(1, 2)[:, :6]), ["linear_onto"]),
    "a broadcast read in place": (lambda m, u, x: m.user(u).tanh() * m.item(x), ["jagged_apply", "mul"]),
    "a sum in place, then its activation": (
        lambda m, u, x: torch.relu(m.item(x) + m.scale),
        ["add_", "relu_"],
    ),
    "a product entry by entry onto a sum": (
        lambda m, u, x: torch.relu(m.user(u) + m.item(x) + x.sum(1, keepdim=True) * m.scale),
        ["jagged_apply", "addcmul_", "relu_"],
    ),
    "a product entry by entry onto a row": (
        lambda m, u, x: torch.relu(m.item(x) * x.mean(1, keepdim=True) + m.scale.exp()),
        ["addcmul(", "relu_"],
    ),
    "two products entry by entry": (lambda m, u, x: m.item(x) * x[:, :1] + m.other(m.item(x)) * u[:, :1], ["addcmul"]),
    "a term added in place": (lambda m, u, x: m.item(x) + x.sum(1, keepdim=True), ["add_"]),
    "sigmoid and tanh": (
        lambda m, u, x: torch.sigmoid(m.item(x)) + torch.tanh(m.other(m.item(x) * 2)),
        ["sigmoid_", "tanh_"],
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", sorted(FUSED))
def test_it_is_written_in_place_and_equal(name: str, training: bool) -> None:
    run, wanted = FUSED[name]
    code = emitted(run, training)
    assert [w for w in wanted if w not in code] == []


@pytest.mark.parametrize("training", [False, True])
def test_rows_of_steps(training: bool) -> None:
    """Three dims: the terms that only repeat along the steps go first."""

    def run(m: Net, u: Tensor, x: Tensor) -> Tensor:
        steps = m.item(u)
        query = m.user(x[:, :1]) + 0.5
        return torch.relu(steps + query + m.other(steps * query)).sum(1)

    code = emitted(run, training, (5, 4))
    assert "linear_onto" in code
    assert "relu_" in code


DECLINED: dict[str, tuple[Run, str]] = {
    "read again": (lambda m, u, x: (h := m.item(x)) + torch.relu(h), "relu_"),
    "its backward needs it": (lambda m, u, x: torch.relu(torch.exp(x)), "relu_"),
    "not new memory": (lambda m, u, x: torch.relu(x.transpose(0, 1).transpose(0, 1)), "relu_"),
    "an input": (lambda m, u, x: torch.relu(x) + torch.sigmoid(u), "relu_"),
    "a parameter": (lambda m, u, x: torch.relu(m.scale) * m.item(x), "relu_"),
    "an output too": (lambda m, u, x: torch.cat([h := m.item(x), torch.relu(h)], 1), "relu_"),
    "the sum is larger": (lambda m, u, x: m.item(x).unsqueeze(1) + m.item(x).unsqueeze(2), "add_"),
    "another dtype": (lambda m, u, x: m.item(x) + m.scale.double(), "add_"),
    "a scaled sum": (lambda m, u, x: torch.add(x, m.other(m.item(x))[:, :4], alpha=2), "linear_onto"),
    "a product read twice": (lambda m, u, x: (p := m.other(m.item(x))) + m.item(x) + p.exp(), "linear_onto"),
    "a smaller product": (lambda m, u, x: m.item(x) + x[:, :1] * x[:, 1:2], "addcmul"),
    "a product with a number": (lambda m, u, x: m.item(x) * 3.0 + m.other(m.item(x).exp()).exp(), "addcmul"),
    "a product of another dtype": (lambda m, u, x: (m.item(x) * m.scale.double()) + m.scale.double(), "addcmul"),
    "a product of whole numbers": (lambda m, u, x: m.item(x) + ((x > 0).long() * 2 + 1).sum(1, True), "addcmul"),
    "a product of entries read twice": (lambda m, u, x: (p := m.item(x) * x[:, :1]) + m.scale + p.exp(), "addcmul"),
    "twice the same term": (lambda m, u, x: (p := m.item(x)) + p, "linear_onto"),
}


@pytest.mark.parametrize("name", sorted(DECLINED))
def test_it_declines(name: str) -> None:
    run, unwanted = DECLINED[name]
    assert unwanted not in emitted(run)


def test_a_value_kept_for_later_is_not_written_into() -> None:
    """What crosses may serve many calls."""
    model = Net(lambda m, u, x: torch.relu(m.user(u)) + torch.relu(m.user(u) + m.item(x)))
    spec = roo.FeatureSpec(request=["u"], impression=["x"])
    made = roo.rewrite(model, (torch.randn(8, 4), torch.randn(8, 4)), spec=spec)
    u, x, counts = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([2, 3])
    kept = made.request_part(u)
    first = made.impression_part(kept, x, num_impressions=counts)
    torch.testing.assert_close(made.impression_part(kept, x, num_impressions=counts), first, rtol=0, atol=0)
    torch.testing.assert_close(made(u, x, num_impressions=counts), first)


@pytest.mark.parametrize("counts", [[3, 3], [2, 0, 5], [1], [4]])
def test_sums_in_every_layout(counts: list[int]) -> None:
    """Even, uneven, one request: values and gradients as on broadcast inputs."""
    model = Net(lambda m, u, x: torch.relu((m.user(u).exp() * m.item(x)) + m.user(u) + m.other(m.item(x)))).double()
    spec = roo.FeatureSpec(request=["u"], impression=["x"])
    example = (torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64))
    made = roo.rewrite(model, example, spec=spec)
    number = torch.tensor(counts)
    u = torch.randn(len(counts), 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(sum(counts), 4, dtype=torch.float64, requires_grad=True)
    got, want = made(u, x, num_impressions=number), model(u[torch.repeat_interleave(number)], x)
    torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(made(u, x, num_impressions=number), want)
    for a, b in zip(torch.autograd.grad(got.sum(), (u, x)), torch.autograd.grad(want.sum(), (u, x))):
        torch.testing.assert_close(a, b)
