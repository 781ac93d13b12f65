"""RequestModel: what a user does with it after rewriting."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import roo_rewrite as roo

SPEC = roo.FeatureSpec(request=["u", "history"], impression=["x"])
COUNTS = torch.tensor([2, 0, 3])


class Model(nn.Module):
    """A history pooled by its own mask, a tower with batch norm and dropout, an item embedding."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.items = nn.Embedding(9, 4)
        self.a = nn.Linear(8, 4, bias=False)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(dropout)
        self.b = nn.Linear(8, 1)
        self.scale = 1.0

    def forward(self, u: Tensor, history: Tensor, x: Tensor) -> Tensor:
        mask = (history > 0).to(u.dtype).unsqueeze(-1)
        pooled = (self.items(history) * mask).sum(1) / mask.sum(1).clamp(min=1)
        h = self.drop(torch.tanh(self.norm(self.a(torch.cat([u, pooled], 1)))))
        return self.b(torch.cat([h, self.items(x)], 1)).squeeze(-1) * self.scale


def batch(counts: Tensor = COUNTS, length: int = 5, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    requests, impressions = len(counts), int(counts.sum())
    return [
        torch.randn(requests, 4, generator=generator, dtype=torch.float64).to(dtype),
        torch.randint(9, (requests, length), generator=generator),
        torch.randint(9, (impressions,), generator=generator),
    ]


def expanded(tensors: list[Tensor], counts: Tensor) -> list[Tensor]:
    rows = [r for r, count in enumerate(counts.tolist()) for _ in range(count)]
    return [tensors[0][rows], tensors[1][rows], tensors[2]]


def make(dropout: float = 0.0, training: bool = False) -> tuple[nn.Module, Any]:
    """Two models with equal weights: the original, and one rewritten."""
    torch.manual_seed(0)
    model = Model(dropout).double().train(training)
    truth = copy.deepcopy(model)
    return truth, roo.rewrite(model, batch(torch.ones(6, dtype=torch.long)), spec=SPEC, fanout=64)


def agree(truth: nn.Module, model: Any, counts: Tensor = COUNTS, **how: Any) -> None:
    tensors = batch(counts, **how)
    torch.manual_seed(7)
    want = truth(*expanded(tensors, counts))
    torch.manual_seed(7)
    got = model(*tensors, num_impressions=counts)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def hoisted(model: Any) -> bool:
    plan = model._whole_program().plan
    return plan is not None and any(n.op == "call_function" for n in plan.request)


def test_scores_and_parameters_are_the_originals() -> None:
    model = Model()
    rewritten = roo.rewrite(model, batch(torch.ones(6, dtype=torch.long), dtype=torch.float32), spec=SPEC)
    assert [(n, id(p)) for n, p in rewritten.named_parameters()] == [(n, id(p)) for n, p in model.named_parameters()]
    assert list(rewritten.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("counts", [[1], [5], [1, 1, 1], [0, 2, 0, 7], [3, 3]])
@pytest.mark.parametrize("training", [False, True])
def test_any_counts(counts: list[int], training: bool) -> None:
    truth, model = make(training=training)
    number = torch.tensor(counts)
    if training and sum(counts) == 1:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(*batch(number), num_impressions=number)
        return
    agree(truth, model, number)


def test_empty_batch() -> None:
    truth, model = make()
    for counts in (torch.zeros(0, dtype=torch.long), torch.zeros(3, dtype=torch.long)):
        agree(truth, model, counts)


def test_modes_switch_both_ways() -> None:
    truth, model = make(dropout=0.5)
    for mode in (True, False, True, True, False):
        truth.train(mode)
        model.train(mode)
        agree(truth, model)
        assert hoisted(model)
    torch.testing.assert_close(model.norm.running_var, truth.norm.running_var)
    assert int(model.norm.num_batches_tracked) == int(truth.norm.num_batches_tracked) == 3


def test_submodule_mode_is_seen() -> None:
    truth, model = make(dropout=0.5, training=True)
    for module in (truth, model):
        module.norm.eval()
        module.drop.eval()
    agree(truth, model)


def test_original_switched_instead() -> None:
    torch.manual_seed(0)
    original = Model().double().eval()
    model = roo.rewrite(original, batch(torch.ones(6, dtype=torch.long)), spec=SPEC)
    original.train()
    truth = copy.deepcopy(original)
    agree(truth, model)


@pytest.mark.parametrize("name", ["sgd", "adam", "rowwise_adagrad"])
def test_steps_land_on_the_same_weights(name: str) -> None:
    truth, model = make(dropout=0.3, training=True)
    for step in range(4):
        counts = torch.tensor([[2, 0, 3], [6], [1, 1, 1, 4], [0, 5, 2]][step])
        tensors = batch(counts, seed=step)
        for module, given, extra in (
            (truth, expanded(tensors, counts), {}),
            (model, tensors, {"num_impressions": counts}),
        ):
            torch.manual_seed(step)
            module.zero_grad()
            module(*given, **extra).square().mean().backward()
            optimize(module, name)
    for (key, got), want in zip(model.state_dict().items(), truth.state_dict().values()):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")


def optimize(module: nn.Module, name: str) -> None:
    """One step; the state of the optimizer is kept on the parameters."""
    if name == "rowwise_adagrad":
        for p in module.parameters():
            grad = p.grad.reshape(len(p), -1)
            sums = vars(p).setdefault("sums", torch.zeros(len(p), dtype=p.dtype))
            sums += grad.square().mean(1)
            p.data -= 0.1 * (grad / (sums.sqrt() + 1e-10)[:, None]).view_as(p)
        return
    kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[name]
    if "optimizer" not in vars(module):
        vars(module)["optimizer"] = kind(module.parameters(), lr=0.01)
    vars(module)["optimizer"].step()


def test_dropout_per_request_shares_a_mask() -> None:
    torch.manual_seed(0)
    model = roo.rewrite(
        Model(0.5).double().train(), batch(torch.ones(6, dtype=torch.long)), spec=SPEC, dropout="per_request"
    )
    counts = torch.tensor([4, 3])
    tensors = batch(counts)
    tensors[2] = torch.zeros_like(tensors[2])
    scores = model(*tensors, num_impressions=counts)
    assert len(set(scores[:4].tolist())) == 1
    assert len(set(scores[4:].tolist())) == 1


@pytest.mark.parametrize("length", [1, 3, 9])
def test_another_history_length(length: int) -> None:
    truth, model = make()
    agree(truth, model, length=length)
    assert hoisted(model)


def test_a_counter_of_flops_around_the_call_that_builds_a_program_is_not_traced() -> None:
    truth, model = make()
    tensors = batch(length=9)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        first = model(*tensors, num_impressions=COUNTS)
    building = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.testing.assert_close(model(*tensors, num_impressions=COUNTS), first, rtol=0, atol=0)
    assert hoisted(model)
    assert building == counter.get_total_flops()
    agree(truth, model, length=9)


def test_a_global_hook_that_changes_values_counts() -> None:
    def twice(module: nn.Module, args: Any, output: Any) -> Any:
        return output * 2 if isinstance(module, nn.Linear) else None

    truth, model = make()
    hook = nn.modules.module.register_module_forward_hook(twice)
    try:
        agree(truth, model, length=9)
    finally:
        hook.remove()


def test_another_dtype() -> None:
    truth, model = make()
    tensors = batch(dtype=torch.float32)
    got = model.float()(*tensors, num_impressions=COUNTS)
    want = truth.float()(*expanded(tensors, COUNTS))
    torch.testing.assert_close(got, want)
    assert hoisted(model)
    agree(truth.double(), model.double())


@pytest.mark.parametrize("training", [False, True])
def test_under_autocast(training: bool) -> None:
    truth, model = make(training=training)
    truth, model = truth.float(), model.float()
    tensors = batch(dtype=torch.float32)
    exact = copy.deepcopy(truth).double()(tensors[0][[0, 0, 2, 2, 2]].double(), *expanded(tensors, COUNTS)[1:])
    with torch.autocast("cpu", torch.bfloat16):
        want = truth(*expanded(tensors, COUNTS))
        got = model(*tensors, num_impressions=COUNTS)
    assert got.dtype == want.dtype
    assert (got - exact).abs().max() <= 2 * (want - exact).abs().max() + 1e-2
    assert hoisted(model)


def test_no_grad_and_inference_mode() -> None:
    truth, model = make()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            agree(truth, model)
            agree(truth, model, length=4 if isinstance(context, torch.no_grad) else 6)
    tensors = batch(length=4)
    assert model(*tensors, num_impressions=COUNTS).requires_grad


def test_settings_changed_after_rewriting_count() -> None:
    truth, model = make(dropout=0.5)
    truth.scale, model.scale = 3.0, 3.0
    assert model._original.scale == 3.0
    agree(truth, model)
    for module in (truth, model):
        module.train()
        module.drop.p = 0.1
        module.norm.momentum = 0.7
    agree(truth, model)
    torch.testing.assert_close(model.norm.running_mean, truth.norm.running_mean)


def test_frozen_after_rewriting() -> None:
    _, model = make()
    model.a.weight.requires_grad_(False)
    model(*batch(), num_impressions=COUNTS).sum().backward()
    assert model.a.weight.grad is None
    assert model.b.bias.grad is not None


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_stand_alone(how: Callable[[Any], Any]) -> None:
    truth, model = make()
    other = how(model)
    with torch.no_grad():
        model.b.weight.zero_()
    agree(truth, other)
    with torch.no_grad():
        other.b.weight.zero_()
        truth.b.weight.zero_()
    agree(truth, other)


def test_state_dict_both_ways() -> None:
    truth, model = make()
    fresh = Model().double().eval()
    fresh.load_state_dict(model.state_dict())
    agree(fresh, model)
    with torch.no_grad():
        truth.a.weight.mul_(2)
    buffer = io.BytesIO()
    torch.save(truth.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict(torch.load(buffer, weights_only=True))
    agree(truth, model)


def test_parts_give_what_the_whole_gives() -> None:
    _, model = make()
    u, history, x = batch()
    user = model.request_part(u, history)
    scores = model.impression_part(user, x, num_impressions=COUNTS)
    torch.testing.assert_close(scores, model(u, history, x, num_impressions=COUNTS))


def test_a_request_without_impressions_touches_nothing() -> None:
    """NaN, infinities and ids out of range in it reach neither gradients nor statistics."""
    truth, model = make(training=True)
    tensors = batch()
    tensors[0][1] = float("nan")
    tensors[1][1] = 10**6
    for module, given, extra in ((truth, expanded(tensors, COUNTS), {}), (model, tensors, {"num_impressions": COUNTS})):
        module(*given, **extra).sum().backward()
    for got, want in zip(model.parameters(), truth.parameters()):
        torch.testing.assert_close(got.grad, want.grad)
    torch.testing.assert_close(model.norm.running_var, truth.norm.running_var)


def test_strided_inputs() -> None:
    truth, model = make()
    u, history, x = batch()
    wide = torch.zeros(4, 3, dtype=torch.float64)
    wide.copy_(u.t())
    got = model(wide.t(), history.repeat_interleave(2, 1)[:, ::2], x.repeat_interleave(2)[::2], num_impressions=COUNTS)
    torch.testing.assert_close(got, truth(*expanded([u, history, x], COUNTS)))


def test_keywords_and_places() -> None:
    truth, model = make()
    u, history, x = batch()
    want = truth(*expanded([u, history, x], COUNTS))
    for args, kwargs in (((u,), {"x": x, "history": history}), ((), {"history": history, "u": u, "x": x})):
        torch.testing.assert_close(model(*args, num_impressions=COUNTS, **kwargs), want)


U, HISTORY, X = batch()


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((U, HISTORY, X), {}, "num_impressions is missing"),
        ((U, HISTORY, X), {"num_impressions": [2, 0, 3]}, "must be an int64 tensor"),
        ((U, HISTORY, X), {"num_impressions": COUNTS.double()}, "must be an int64 tensor"),
        ((U, HISTORY, X), {"num_impressions": COUNTS[:, None]}, "must be an int64 tensor"),
        ((U, HISTORY, X), {"num_impressions": torch.tensor(5)}, "must be an int64 tensor"),
        ((U, HISTORY, X), {"num_impressions": COUNTS[:2]}, "has 2 entries"),
        ((U, HISTORY, X), {"num_impressions": COUNTS + 1}, "sums to 8"),
        ((U, HISTORY, X), {"num_impressions": torch.tensor([6, -1, 0])}, "negative count at request 1"),
        ((U, HISTORY, X), {"num_impressions": torch.tensor([2**63 - 1, 2**63 - 1, 7])}, "sums to 18446744073709551621"),
        ((U, HISTORY, X.sum()), {"num_impressions": COUNTS}, "are single numbers"),
        ((U, HISTORY), {"num_impressions": COUNTS}, "lacks input 'x'"),
        ((U, HISTORY, X, X), {"num_impressions": COUNTS}, "positional arguments"),
        ((U, HISTORY, X), {"num_impressions": COUNTS, "x": X}, "given twice"),
        ((U, HISTORY, X), {"num_impressions": COUNTS, "y": X}, "not in the example"),
        ((U[:2], HISTORY, X), {"num_impressions": COUNTS}, "same number of rows"),
        ((U[:, 0], HISTORY, X), {"num_impressions": COUNTS}, "has 1 dims"),
        ((U.numpy(), HISTORY, X), {"num_impressions": COUNTS}, "must be a tensor"),
        ((None, HISTORY, X), {"num_impressions": COUNTS}, "must be a tensor"),
        (({"u": U}, HISTORY, X), {"num_impressions": COUNTS}, "must be a tensor"),
    ],
)
def test_a_bad_call_is_an_input_error(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    _, model = make()
    with pytest.raises(roo.InputError, match=message):
        model(*args, **kwargs)


class Optional(nn.Module):
    """A mask that may be left out, in a dict of inputs."""

    def forward(self, features: dict[str, Any], x: Tensor, mask: Any = None) -> Tensor:
        y = features["u"].sum(-1) * x
        return y if mask is None else y * mask


def test_what_the_example_does_not_have_is_refused() -> None:
    u, x = torch.randn(4, 3), torch.randn(4)
    model = roo.rewrite(Optional(), ({"u": u}, x), {"mask": None}, spec=roo.FeatureSpec(["u"], ["x"]))
    counts = torch.ones(4, dtype=torch.long)
    with pytest.raises(roo.InputError, match="'mask' is NoneType in the example"):
        model({"u": u}, x, mask=x, num_impressions=counts)
    with pytest.raises(roo.InputError, match="holds 1 values that the example does not have"):
        model({"u": u, "v": u}, x, mask=None, num_impressions=counts)
    with pytest.raises(roo.InputError, match=r"lacks input 'features\.u'"):
        model(u, x, mask=None, num_impressions=counts)


def test_an_array_is_no_input() -> None:
    with pytest.raises(roo.SpecError, match="give tensors"):
        roo.rewrite(Optional(), ({"u": torch.zeros(4, 3).numpy()}, torch.zeros(4)), spec=roo.FeatureSpec([], ["x"]))


def test_rewriting_leaves_the_model_alone() -> None:
    torch.manual_seed(0)
    model = Model(0.5).double().train()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    roo.rewrite(model, batch(torch.ones(6, dtype=torch.long)), spec=SPEC)
    assert torch.equal(state, torch.get_rng_state())
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
