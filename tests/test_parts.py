"""The halves of a call belong to one program; compiling inlines only a program that holds for the batch."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo

F64 = torch.float64
SPEC = roo.FeatureSpec(request=["u"], impression=["x"])
COUNTS = torch.tensor([2, 0, 3])


class Averages(nn.Module):
    """The number of entries of the history, and a plain argument, are constants of a trace."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, u: Tensor, x: Tensor, scale: float) -> Tensor:
        return (torch.tanh(self.a(u).sum(1)) * self.b(x)).sum(-1) / u.shape[1] * scale


def averages() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Averages().double().eval()
    example = (torch.randn(6, 5, 4, dtype=F64), torch.randn(6, 4, dtype=F64), 1.0)
    return model, roo.rewrite(model, example, spec=SPEC)


def batch(length: int, counts: Tensor = COUNTS) -> tuple[Tensor, Tensor]:
    torch.manual_seed(length)
    return torch.randn(len(counts), length, 4, dtype=F64), torch.randn(int(counts.sum()), 4, dtype=F64)


def expected(model: nn.Module, u: Tensor, x: Tensor, scale: float, counts: Tensor = COUNTS) -> Tensor:
    out: Tensor = model(u.repeat_interleave(counts, 0), x, scale)
    return out


def test_parts_are_of_the_program_for_their_shapes_and_plain_arguments() -> None:
    model, made = averages()
    users = {}
    for length in (5, 9, 3):
        for scale in (1.0, 4.0):
            u, x = batch(length)
            users[length, scale] = made.request_part(u, x, scale)
    for (length, scale), user in users.items():
        u, x = batch(length)
        found = made.impression_part(user, x, num_impressions=COUNTS)
        torch.testing.assert_close(found, expected(model, u, x, scale))
        found = made.impression_part(user, u, x, scale, num_impressions=COUNTS)
        torch.testing.assert_close(found, expected(model, u, x, scale))
        with pytest.raises(roo.RooError, match="run request_part again"):
            made.impression_part(user, u, x, scale + 1, num_impressions=COUNTS)


def test_a_plain_dict_serves_where_only_one_program_can_be_meant() -> None:
    model, made = averages()
    u, x = batch(5)
    stored = pickle.loads(pickle.dumps(made.request_part(u)))
    assert type(stored) is dict
    found = made.impression_part(stored, x, num_impressions=COUNTS)
    torch.testing.assert_close(found, expected(model, u, x, 1.0))
    made.request_part(batch(9)[0])
    with pytest.raises(roo.RooError, match="several request shapes"):
        made.impression_part(stored, x, num_impressions=COUNTS)


def test_parts_of_another_mode_are_refused() -> None:
    _, made = averages()
    u, x = batch(5)
    user = made.request_part(u)
    made.train()
    with pytest.raises(roo.RooError, match="the mode"):
        made.impression_part(user, x, num_impressions=COUNTS)


@pytest.mark.parametrize(
    ("user", "counts", "message"),
    [
        (None, COUNTS, "must be what request_part returned"),
        ({}, COUNTS, "does not belong"),
        ("own", torch.tensor([2, 3]), "2 entries, the request inputs have 3 rows"),
        ("own", torch.tensor([2, 0, 4]), "sums to 6"),
        ("own", torch.tensor([-1, 3, 3]), "negative count at request 0"),
        ("own", [2, 0, 3], "must be an int64 tensor"),
        ("own", None, "1 entries, the request inputs have 3 rows"),
    ],
)
def test_misuse_of_parts_is_told(user: Any, counts: Any, message: str) -> None:
    _, made = averages()
    u, x = batch(5)
    given = made.request_part(u) if user == "own" else user
    with pytest.raises(roo.RooError, match=message):
        made.impression_part(given, x, num_impressions=counts)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return (self.norm(self.a(u)) * x).sum(-1)


def test_batch_norm_in_training_needs_the_counts() -> None:
    model = Norm().double()
    truth = copy.deepcopy(model)
    made = roo.rewrite(model, (torch.randn(6, 4, dtype=F64), torch.randn(6, 4, dtype=F64)), spec=SPEC)
    u, x = torch.randn(3, 4, dtype=F64), torch.randn(5, 4, dtype=F64)
    with pytest.raises(roo.RooError, match="pass num_impressions"):
        made.request_part(u)
    with pytest.raises(roo.RooError, match="2 entries"):
        made.request_part(u, num_impressions=COUNTS[:2])
    user = made.request_part(u, num_impressions=COUNTS)
    torch.testing.assert_close(
        made.impression_part(user, x, num_impressions=COUNTS), truth(u.repeat_interleave(COUNTS, 0), x)
    )

    for stored in (user, pickle.loads(pickle.dumps(user))):
        with pytest.raises(roo.RooError, match=r"num_impressions=\[2, 0, 3\], and its values depend on them"):
            made.impression_part(stored, x, num_impressions=torch.tensor([1, 1, 3]))
    made.eval()
    user = made.request_part(u, num_impressions=COUNTS)  # no value depends on them: serve as many as you like
    made.impression_part(user, x, num_impressions=torch.tensor([1, 1, 3]))


class Longest(nn.Module):
    """How many entries a history has shows in the widest of the batch."""

    def forward(self, u: Tensor, n: Tensor, x: Tensor) -> Tensor:
        return (u.sin().cos() * (n[:, None] / n.max())).sum(-1) * x.sum(-1)


def test_an_extreme_of_the_batch_asks_for_the_same_requests_not_the_same_counts() -> None:
    u, n, x = torch.randn(3, 4, dtype=F64), torch.tensor([2, 5, 3]), torch.randn(5, 4, dtype=F64)
    spec = roo.FeatureSpec(request=["u", "n"], impression=["x"])
    example = (torch.randn(6, 4, dtype=F64), torch.arange(1, 7), torch.randn(6, 4, dtype=F64))
    made = roo.rewrite(Longest(), example, spec=spec, fanout=64)
    user = made.request_part(u, n, num_impressions=COUNTS)
    other = torch.tensor([4, 0, 1])
    want = Longest()(u.repeat_interleave(other, 0), n.repeat_interleave(other), x)
    torch.testing.assert_close(made.impression_part(user, x, num_impressions=other), want)
    with pytest.raises(roo.RooError, match="run request_part with these counts"):
        made.impression_part(user, x, num_impressions=torch.tensor([2, 1, 2]))


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, u: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return (torch.relu(self.a(u) * t) * x).sum(-1) / t


@pytest.mark.parametrize("side", ["request", "impression"])
def test_a_tensor_without_rows_goes_with_the_request_part(side: str) -> None:
    model = Temperature().double()
    spec = roo.FeatureSpec(request=["u", "t"], impression=["x"])
    if side == "impression":
        spec = roo.FeatureSpec(request=["u"], impression=["x", "t"])
    t = torch.tensor(2.0, dtype=F64)
    made = roo.rewrite(model, (torch.randn(6, 4, dtype=F64), torch.randn(6, 4, dtype=F64), t), spec=spec)
    u, x, t = torch.randn(3, 4, dtype=F64), torch.randn(5, 4, dtype=F64), torch.tensor(0.3, dtype=F64)
    want = expected(model, u, x, t)  # type: ignore[arg-type]
    torch.testing.assert_close(made(u, x, t, num_impressions=COUNTS), want)
    torch.testing.assert_close(made.impression_part(made.request_part(u, t), x, num_impressions=COUNTS), want)
    torch.testing.assert_close(made.impression_part(made.request_part(u, x, t), u, x, t, num_impressions=COUNTS), want)


class Branches(nn.Module):
    """Other scores for a large batch, and for a single impression."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        scale = 2.0 if x.shape[0] > 100 else 3.0 if x.shape[0] == 1 else 1.0
        return (self.a(u) * x).sum(-1) * scale


def branches() -> tuple[nn.Module, Any]:
    model = Branches().double()
    made = roo.rewrite(model, (torch.randn(6, 4, dtype=F64), torch.randn(6, 4, dtype=F64)), spec=SPEC)
    assert not made.report.fallback
    return model, made


def test_parts_refuse_a_batch_their_program_does_not_hold_for() -> None:
    model, made = branches()
    for counts in ([1], [40, 61], [3, 2]):
        number = torch.tensor(counts)
        u, x = torch.randn(len(counts), 4, dtype=F64), torch.randn(sum(counts), 4, dtype=F64)
        want = model(u.repeat_interleave(number, 0), x)
        torch.testing.assert_close(made(u, x, num_impressions=number), want)
        if counts == [3, 2]:
            torch.testing.assert_close(made.impression_part(made.request_part(u), x, num_impressions=number), want)
            continue
        with pytest.raises(roo.RooError, match="call the model itself"):
            made.impression_part(made.request_part(u), x, num_impressions=number)


def test_compiled_a_branch_on_the_batch_size_is_kept() -> None:
    model, made = branches()
    compiled = torch.compile(made, dynamic=True, backend="eager", fullgraph=True)
    for counts in ([3, 2], [40, 61], [1]):
        number = torch.tensor(counts)
        u, x = torch.randn(len(counts), 4, dtype=F64), torch.randn(sum(counts), 4, dtype=F64)
        torch.testing.assert_close(compiled(u, x, num_impressions=number), model(u.repeat_interleave(number, 0), x))
    torch._dynamo.reset()


def test_compiled_another_length_of_the_history_is_its_own() -> None:
    model, made = averages()
    compiled = torch.compile(made, dynamic=True, backend="eager", fullgraph=True)
    for length in (5, 9, 3):
        for scale in (1.0, 3.0):
            u, x = batch(length)
            torch.testing.assert_close(compiled(u, x, scale, num_impressions=COUNTS), expected(model, u, x, scale))
    torch._dynamo.reset()


def test_a_model_that_changed_since_serves_no_older_state() -> None:
    """A hook on the item's side would otherwise be passed over."""
    model, made = averages()
    u, x = batch(5)
    user = made.request_part(u)
    handle = model.register_forward_hook(lambda m, given, out: out * 3)
    with pytest.raises(roo.RooError, match="run request_part again"):
        made.impression_part(user, x, num_impressions=COUNTS)
    handle.remove()
    torch.testing.assert_close(
        made.impression_part(made.request_part(u), x, num_impressions=COUNTS), expected(model, u, x, 1.0)
    )


def test_state_of_another_model_or_dtype_is_refused() -> None:
    _, made = averages()
    _, other = averages()
    u, x = batch(5)
    user = made.request_part(u)
    for model, state in ((other, user), (made, {n: t.half() for n, t in user.items()})):
        with pytest.raises(roo.RooError, match="run request_part again"):
            model.impression_part(state, x, num_impressions=COUNTS)
    with pytest.raises(roo.RooError, match="must hold tensors"):
        made.impression_part(dict.fromkeys(user, 1), x, num_impressions=COUNTS)
    torch.testing.assert_close(
        copy.deepcopy(made).impression_part(user, x, num_impressions=COUNTS),
        made.impression_part(user, x, num_impressions=COUNTS),
    )


def test_the_parts_follow_the_model_to_another_dtype() -> None:
    model = Norm().double().eval()
    made = roo.rewrite(model, (torch.randn(6, 4, dtype=F64), torch.randn(6, 4, dtype=F64)), spec=SPEC, fanout=64)
    made.float()
    u, x = torch.randn(3, 4), torch.randn(5, 4)
    user = made.request_part(u)
    assert {t.dtype for t in user.values()} == {torch.float32}
    assert "u" not in user
    torch.testing.assert_close(
        made.impression_part(user, x, num_impressions=COUNTS), model(u.repeat_interleave(COUNTS, 0), x)
    )
