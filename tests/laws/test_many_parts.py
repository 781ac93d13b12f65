"""Many parts along a dim: the parts of each side run as one op, in any order, and only those that are read."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from law_parts import Model, parameter
from torch import Tensor

ORDERS = {
    "sides together": ["u0", "u1", "u2", "x0", "x1", "x2"],
    "alternating": ["u0", "x0", "u1", "x1", "u2", "x2"],
    "repeated": ["u0", "x0", "u1", "u0", "x1", "u2", "x2", "x0"],
    "wide": ["u3", "x0", "u0", "x3", "u1", "x1"],
}
WIDE = ("u3", "x3")


def attention(m: Model, t: Tensor) -> Tensor:
    q, k, v = (torch.tensordot(t, w, dims=([-1], [0])) for w in (m.q, m.k, m.v))
    return torch.softmax(torch.einsum("bik,bjk->bij", q, k), -1) @ v


def pairs(m: Model, t: Tensor) -> Tensor:
    rows, columns = zip(*itertools.combinations(t.split(1, 1), 2))
    p = torch.cat(rows, 1) * torch.cat(columns, 1)
    scores = torch.tensordot(torch.relu(torch.tensordot(p, m.q, dims=([-1], [0])) + m.bias), m.h, dims=([-1], [0]))
    return (torch.softmax(scores, 1) * p).sum(1)


def made(law: Any, names: list[str], run: Any) -> Any:
    parts = {
        "q": parameter(4, 4),
        "k": parameter(4, 4),
        "v": parameter(4, 5),
        "bias": parameter(4),
        "h": parameter(4, 1),
    }
    sizes = {n: (2 if n in WIDE else 1, 4) for n in dict.fromkeys(names)}
    return law(Model(lambda m, **inputs: run(m, torch.cat([inputs[n] for n in names], 1)), **parts), **sizes)


@pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS)
def test_attention_over_fields(law: Any, names: list[str]) -> None:
    found = made(law, names, attention)
    mapped = found.code().count("aten.tensordot") + found.code().count("aten.linear")
    assert mapped == 3 * 2, "a product for each matrix and side"
    early = sum(2 if n in WIDE else 1 for n in names if n[0] == "u")
    before, after = found.flops()
    assert after <= before - 2 * (12 - 3) * (early * 4 * (4 + 4 + 5) + early * early * 4)


@pytest.mark.parametrize("names", ORDERS.values(), ids=ORDERS)
def test_attention_over_pairs(law: Any, names: list[str]) -> None:
    found = made(law, names, pairs)
    assert found.code().count("aten.tensordot") <= 2 * 4, "a product for each pair of sides"
    early = sum(2 if n in WIDE else 1 for n in names if n[0] == "u")
    before, after = found.flops()
    pooled_at_once = 12 * early * (early - 1) * 4  # a product now, so that it counts
    assert after <= before - (12 - 3) * early * (early - 1) * (4 * 4 + 4) + pooled_at_once


def test_what_is_not_read_is_not_computed(law: Any) -> None:
    def run(m: Model, t: Tensor) -> Tensor:
        return torch.tensordot(torch.cat([t[:, ::2], t[:, 1::2] * 2], 1), m.q, dims=([-1], [0]))[:, :5]

    found = made(law, ORDERS["alternating"], run)
    before, after = found.flops()
    assert after < before


def test_few_parts_stay_as_they_are(law: Any) -> None:
    """Joining two parts of a side would copy them for nothing."""
    found = made(law, ["u0", "x0", "u1"], lambda m, t: torch.tensordot(t, m.q, dims=([-1], [0])).sum(1))
    assert found.code().count("aten.tensordot") == 3


def pooled(op: Any) -> Any:
    def run(m: Model, t: Tensor) -> Tensor:
        scores = torch.softmax((t @ m.h).squeeze(-1), 1)
        return op(scores, t)

    return run


POOLED = {
    "sum": lambda w, t: (w.unsqueeze(-1) * t).sum(1),
    "sum, weights second, size kept": lambda w, t: (t * w.unsqueeze(-1)).sum(1, keepdim=True),
    "sum of two dims": lambda w, t: (w.unsqueeze(-1) * t).sum((1, 2)),
}
NOT_POOLED = {
    "another dim": lambda w, t: (w.unsqueeze(-1) * t).sum(2),
    "mean": lambda w, t: (w.unsqueeze(-1) * t).mean(1),
    "in another dtype": lambda w, t: (w.unsqueeze(-1).float() * t).sum(1),
    "weights of every entry": lambda w, t: (w.unsqueeze(-1).expand_as(t).contiguous() * t).sum(1),
    "not reduced": lambda w, t: w.unsqueeze(-1) * t,
}
LABEL = "sum: weighted parts of both sides"


@pytest.mark.parametrize("op", POOLED.values(), ids=POOLED)
@pytest.mark.parametrize("names", [["x0", "u3", "x1"], ORDERS["repeated"]], ids=["few", "many"])
def test_weighted_sum_over_fields(law: Any, names: list[str], op: Any) -> None:
    assert LABEL in made(law, names, pooled(op)).took()


@pytest.mark.parametrize("op", NOT_POOLED.values(), ids=NOT_POOLED)
def test_no_weighted_sum(law: Any, op: Any) -> None:
    assert LABEL not in priced(law, ORDERS["alternating"], pooled(op))


def test_the_requests_own_weights_are_no_weighted_sum(law: Any) -> None:
    found = made(law, ORDERS["alternating"], lambda m, t: (torch.ones_like(t[:, :, :1]) * t).sum(1))
    assert LABEL not in found.took()


def priced(law: Any, names: list[str], run: Any) -> list[str]:
    found = made(law, names, run)
    return [c.what for c in found.model._whole_program().candidates if c.gain > 1]
