"""What is noise in a result excuses nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo
import roo_rewrite.pipeline
from roo_rewrite.equivalence import check_once
from roo_rewrite.noise import jittered, judged, steadied

F64 = torch.float64
SPEC = roo.FeatureSpec(request=["u"], impression=["x"])


class Chaotic(nn.Module):
    """One output is nothing but rounding, the other is plain. `whole`: only the first."""

    def __init__(self, whole: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.whole = nn.Linear(4, 4), nn.Linear(4, 4), whole

    def forward(self, u: Tensor, x: Tensor) -> Any:
        h = self.a(u)
        chaos = torch.sin(1e17 * h) * x
        return chaos if self.whole else (chaos, torch.tanh(self.b(u)) * x)


def rewritten(model: nn.Module) -> Any:
    torch.manual_seed(0)
    return roo.rewrite(model, (torch.randn(6, 4, dtype=F64), torch.randn(6, 4, dtype=F64)), spec=SPEC)


def test_verify_judges_the_entries_that_are_no_noise() -> None:
    model = Chaotic().double()
    made = rewritten(model)
    assert not made.report.fallback
    roo.verify(model, made)
    program = made._current[made.training]
    right = program.emitted.whole
    program.emitted = replace(program.emitted, whole=lambda *a: ((out := right(*a))[0], out[1] * 1.0001))
    with pytest.raises(roo.EquivalenceError, match="output 1"):
        roo.verify(model, made)


def test_a_wrong_program_does_not_hide_behind_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    good = roo_rewrite.pipeline.passes.hoist.hoist

    def faulty(*args: Any) -> Any:
        graph = good(*args)
        next(n for n in graph.nodes if n.target is torch.ops.aten.tanh.default).target = torch.ops.aten.sin.default
        return graph

    monkeypatch.setattr(roo_rewrite.pipeline.passes.hoist, "hoist", faulty)
    report = rewritten(Chaotic().double()).report
    assert report.fallback
    assert "output 1" in str(report.notes)


def test_where_all_is_noise_nothing_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    good = roo_rewrite.pipeline.passes.hoist.hoist

    def rounds(*args: Any) -> Any:
        graph = good(*args)
        scale = next(n for n in graph.nodes if 1e17 in n.args)
        scale.args = tuple(1e17 + 64 if a == 1e17 else a for a in scale.args)
        return graph

    monkeypatch.setattr(roo_rewrite.pipeline.passes.hoist, "hoist", rounds)
    model = Chaotic(whole=True).double()
    made = rewritten(model)
    assert made.report.fallback
    u, x, counts = torch.randn(2, 4, dtype=F64), torch.randn(5, 4, dtype=F64), torch.tensor([2, 3])
    assert torch.equal(made(u, x, num_impressions=counts), model(u.repeat_interleave(counts, 0), x))


def test_steadied_takes_only_what_moves() -> None:
    want, got = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.5, 3.0])
    moved = torch.tensor([1.2, 2.0, 3.0])
    steady = steadied([got], [want], [([want], [moved])], 1e-3)
    assert steady[0].tolist() == [1.0, 2.5, 3.0]
    assert judged([got], steady)
    assert not judged([got], [want])


class Fresh(nn.Module):
    """Batch norm over one request gives its bias, 0 but for rounding: a ReLU there passes gradients by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.out = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(12, 2)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        out: Tensor = self.out(torch.cat([self.norm(self.a(u)).relu(), x], -1))
        return out


def test_a_relu_after_a_fresh_batch_norm_of_one_request_is_noise() -> None:
    torch.manual_seed(0)
    model = Fresh().double()
    made = rewritten(model)
    judged_on = [check_once(model, made, made._inputs, made._example[0], [n], s) for s in range(8) for n in (3, 5, 6)]
    assert not any(judged_on)
    wrong = Fresh().double()
    wrong.load_state_dict({n: t + 1e-6 if n == "norm.bias" else t for n, t in model.state_dict().items()})
    assert check_once(wrong, made, made._inputs, made._example[0], [3], 0)


def test_verify_tells_two_models_apart() -> None:
    with pytest.raises(roo.EquivalenceError, match="these are two models"):
        roo.verify(Chaotic(), rewritten(Fresh().double()))
    with pytest.raises(roo.InputError, match="batches 1 or more"):
        roo.verify(Fresh(), rewritten(Fresh().double()), batches=0)


class Normed(nn.Module):
    """Dense inputs of the request go straight into a batch norm: no parameter comes before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.score = nn.BatchNorm1d(4), nn.Linear(8, 1)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.score(torch.cat([self.norm(u), x], 1))


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("check", [False, True])
def test_a_batch_norm_of_one_requests_inputs_is_noise(scale: float, check: bool) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        model = Normed().train()
        made = roo.rewrite(model, (scale + scale * torch.randn(6, 4), torch.randn(6, 4)), spec=SPEC, check=check)
        assert not made.report.fallback
        assert "nothing was split" not in str(made.report)
        roo.verify(model, made)


def test_a_wrong_batch_norm_of_inputs_is_no_noise() -> None:
    torch.manual_seed(0)
    model = Normed().double().train()
    made = roo.rewrite(model, (1000 * torch.randn(6, 4, dtype=F64), torch.randn(6, 4, dtype=F64)), spec=SPEC)
    program = made._current[True]
    right = program.emitted.whole
    program.emitted = replace(program.emitted, whole=lambda *a: (right(*a)[0] * 1.0001,))
    with pytest.raises(roo.EquivalenceError, match=r"off by 1.00e-04"):
        roo.verify(model, made)


def test_inputs_are_moved_row_by_row_but_for_whole_numbers() -> None:
    same = torch.full((50, 1), 0.3)
    ids, flags = torch.arange(50.0).unsqueeze(1), torch.randint(0, 2, (50,))
    packed = torch.cat([ids, same], 1).requires_grad_()
    moved, kept = jittered([packed, flags], 0)
    assert kept is flags
    assert torch.equal(moved[:, 0], packed[:, 0])
    assert len(moved[:, 1].unique()) > 3
    assert (moved / packed - 1)[1:].abs().max() <= 5 * torch.finfo(torch.float32).eps
    moved.sum().backward()
    torch.testing.assert_close(packed.grad, torch.ones_like(packed))
