"""rewrite(): its options, its errors, and what it does when a pass fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo
import roo_rewrite.pipeline

SPEC = roo.FeatureSpec(["u"], ["x"])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return (torch.tanh(self.a(u)) * x).sum(-1)


def example(rows: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4), torch.randn(rows, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fanout": 0.5}, "fanout is impressions a request"),
        ({"fanout": float("nan")}, "fanout is impressions a request"),
        ({"dropout": "sometimes"}, "dropout must be"),
        ({"leaves": ["b"]}, "name no submodule"),
        ({"leaves": [""]}, "name no submodule"),
    ],
)
def test_an_option_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(roo.SpecError, match=message):
        roo.rewrite(Model(), example(), spec=SPEC, **options)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.randn(3, 4), torch.randn(5, 4)), "cannot be called with the example"),
        ((torch.randn(1, 4), torch.randn(5, 4)), "must be impression-level"),
        ((torch.randn(0, 4), torch.randn(0, 4)), "no rows"),
        ((torch.randn(3, 9), torch.randn(3, 4)), "cannot be called with the example"),
    ],
)
def test_an_example_that_is_none(args: tuple[Tensor, Tensor], message: str) -> None:
    with pytest.raises(roo.CaptureError, match=message):
        roo.rewrite(Model(), args, spec=SPEC)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda model: torch.compile(model, backend="eager")])
def test_a_compiled_model_is_refused(compiled: Any) -> None:
    with pytest.raises(roo.CaptureError, match="rewrite the module it was made from"):
        roo.rewrite(compiled(Model()), example(), spec=SPEC)


def test_a_model_wrapped_for_many_devices_is_refused() -> None:
    with pytest.raises(roo.CaptureError, match="rewrite the module it holds"):
        roo.rewrite(torch.nn.DataParallel(Model()), example(), spec=SPEC)


@pytest.mark.parametrize("name", ["normalize", "annotate", "split", "partition", "hoist", "lower"])
def test_a_pass_that_fails_does_not_keep_a_model_from_running(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(getattr(roo_rewrite.pipeline.passes, name), name, broken)
    model = Model()
    rewritten = roo.rewrite(model, example(), spec=SPEC)
    assert "please report it" in str(rewritten.report)
    roo.verify(model, rewritten, batches=3)
    with pytest.raises(ZeroDivisionError):
        roo.rewrite(model, example(), spec=SPEC, check=True)


def test_a_split_that_is_wrong_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    split = roo_rewrite.pipeline.passes.split.split

    def wrong(captured: Any, fanout: float, mode: str) -> Any:
        made = split(captured, fanout, mode)
        for node in captured.graph.nodes:
            if node.target is torch.ops.aten.tanh.default and mode != "never":
                node.target = torch.ops.aten.sin.default
        return made

    monkeypatch.setattr(roo_rewrite.pipeline.passes.split, "split", wrong)
    model = Model()
    rewritten = roo.rewrite(model, example(), spec=SPEC, fanout=64)
    assert "nothing was split" in str(rewritten.report)
    assert rewritten._whole_program().emitted is not None
    roo.verify(model, rewritten, batches=3)


def test_a_tensor_alone_is_the_only_argument() -> None:
    class One(nn.Module):
        def forward(self, u: Tensor) -> Tensor:
            return u.tanh()

    rewritten = roo.rewrite(One(), torch.randn(4, 3), spec=roo.FeatureSpec(["u"], []))
    assert rewritten(torch.zeros(2, 3), num_impressions=torch.tensor([1, 2])).shape == (3, 3)


def test_a_forward_that_replaces_a_submodule_runs_as_it_is() -> None:
    class Replaces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.user, self.item, self.other = (nn.Linear(3, 2) for _ in range(3))

        def forward(self, u: Tensor, x: Tensor) -> Tensor:
            self.other = self.item
            return self.user(u) + self.other(x)

    original = Replaces()
    model = roo.rewrite(original, (torch.randn(5, 3), torch.randn(5, 3)), spec=SPEC)
    u, x, counts = torch.randn(2, 3), torch.randn(5, 3), torch.tensor([2, 3])
    torch.testing.assert_close(model(u, x, num_impressions=counts), original(u.repeat_interleave(counts, 0), x))
