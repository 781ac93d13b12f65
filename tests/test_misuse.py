"""Whatever is given wrongly is a RooError that says what, where and what next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo

F64 = torch.float64
SPEC = roo.FeatureSpec(request=["u"], impression=["x"])
U, X, COUNTS = torch.randn(3, 4, dtype=F64), torch.randn(5, 4, dtype=F64), torch.tensor([2, 0, 3])
EXAMPLE = (torch.randn(6, 4, dtype=F64), torch.randn(6, 4, dtype=F64))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return (self.a(u) * self.b(x)).sum(-1)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, Any]:
    model = Model().double()
    return model, roo.rewrite(model, EXAMPLE, spec=SPEC)


CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "other sizes": (lambda r: r(U[:, :3], X, num_impressions=COUNTS), r"input 'u' is .*3\].*in the example .*4\]"),
    "other dtype": (lambda r: r(U.long(), X, num_impressions=COUNTS), "torch.int64"),
    "other dims": (lambda r: r(U[:, 0], X, num_impressions=COUNTS), "dims"),
    "other device": (lambda r: r(U, X, num_impressions=COUNTS.to("meta")), "lies on meta"),
    "no tensor": (lambda r: r(U.tolist(), X, num_impressions=COUNTS), "'u'"),
    "expanded already": (lambda r: r(U.repeat_interleave(COUNTS, 0), X, num_impressions=COUNTS), "R rows, not I"),
    "counts by place": (lambda r: r(U, X, COUNTS), "3 positional arguments"),
    "counts as booleans": (lambda r: r(U, X, num_impressions=COUNTS > 0), "int64"),
    "counts without a dim": (lambda r: r(U, X, num_impressions=torch.tensor(5)), "int64"),
}


@pytest.mark.parametrize("what", CALLS)
def test_a_call_that_is_no_batch(what: str, pair: tuple[nn.Module, Any]) -> None:
    call, message = CALLS[what]
    with pytest.raises(roo.RooError, match=message):
        call(pair[1])


def test_the_models_own_error_stays_its_own() -> None:
    class Fails(Model):
        def forward(self, u: Tensor, x: Tensor) -> Tensor:
            if x.shape[0] == 5:
                raise KeyError("five")
            return super().forward(u, x)

    made = roo.rewrite(Fails().double(), EXAMPLE, spec=SPEC)
    with pytest.raises(KeyError, match="five"):
        made(U, X, num_impressions=COUNTS)


REWRITES: dict[str, dict[str, Any]] = {
    "no spec": {"spec": None},
    "a dict for a spec": {"spec": {"request": ["u"], "impression": ["x"]}},
    "fanout in words": {"fanout": "many"},
    "fanout below one": {"fanout": 0},
    "fanout not finite": {"fanout": float("inf")},
    "fanout no number": {"fanout": float("nan")},
    "leaves as a string": {"leaves": "a"},
    "leaves as modules": {"leaves": [nn.Linear(1, 1)]},
    "an unknown split": {"split": "sometimes"},
    "an unknown dropout": {"dropout": "shared"},
    "no module": {"model": lambda u, x: u * x},
    "a number for the example": {"args": 3},
    "a list for kwargs": {"kwargs": [1]},
    "values that are their own lengths": {"spec": roo.FeatureSpec(["u"], ["x"], jagged={"x": "x"})},
}


@pytest.mark.parametrize("what", REWRITES)
def test_a_rewrite_that_cannot_be(what: str) -> None:
    given: dict[str, Any] = {"model": Model().double(), "args": EXAMPLE, "spec": SPEC, **REWRITES[what]}
    with pytest.raises(roo.RooError):
        roo.rewrite(given.pop("model"), given.pop("args"), given.pop("kwargs", None), **given)


@pytest.mark.parametrize(
    "fields", [{"request": None}, {"request": "u"}, {"request": [1]}, {"columns": ["x"]}, {"jagged": ["x"]}], ids=str
)
def test_a_spec_that_is_none(fields: dict[str, Any]) -> None:
    with pytest.raises(roo.SpecError, match=next(iter(fields))):
        roo.FeatureSpec(**fields)


def test_verify_of_something_else(pair: tuple[nn.Module, Any]) -> None:
    model, made = pair
    for first, second in ((made, model), (model, None), (None, made)):
        with pytest.raises(roo.RooError, match="the original model first"):
            roo.verify(first, second)  # type: ignore[arg-type]
    for other in (nn.Linear(2, 2), Model().double()):
        with pytest.raises(roo.RooError):
            roo.verify(other, made)
    with pytest.raises(roo.InputError, match="batches 1 or more"):
        roo.verify(model, made, batches=0)
    with pytest.raises(roo.InputError, match="whole numbers"):
        roo.verify(model, made, seed="a")  # type: ignore[arg-type]
