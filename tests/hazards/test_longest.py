"""The largest or smallest number of the batch: it does not matter how often a request counts, but whether it does."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from hazard_parts import Plain
from torch import Tensor, nn

import roo_rewrite as roo


def test_equal_or_refused(hazard: type, sound: Callable[[type], None]) -> None:
    sound(hazard)


class Positions(Plain):
    """Positions up to the longest history, those of each user summed: nothing shorter than the batch's longest."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Embedding(6, 4)

    def seen(self, length: Tensor, longest: int) -> Tensor:
        """[B, 4]: the positions below `length`, those after it counted a little."""
        steps = torch.arange(longest)
        inside = (steps[None, :] < length[:, None]).double() + 0.01
        return inside @ torch.tanh(self.position(steps).double())

    def forward(self, u_len: Tensor, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u) * torch.tanh(self.seen(u_len, u_len.max().item())), x)  # type: ignore[arg-type]


class PositionsOfAnInt(Positions):
    hoists = True

    def forward(self, u_len: Tensor, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u) * torch.tanh(self.seen(u_len, int(u_len.max()))), x)


class ItemPositions(Positions):
    """Negative: the longest of the items is not the request's."""

    hoists = True

    def forward(self, u: Tensor, x_len: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.mix(self.user(u) * self.seen(x_len, x_len.max().item()), x)  # type: ignore[arg-type]


class UserAndItemPositions(Positions):
    """Negative: the user's positions, as many as the longest item has."""

    hoists = True

    def forward(self, u_len: Tensor, u: Tensor, x_len: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.mix(self.user(u) * self.seen(u_len, x_len.max().item()), x)  # type: ignore[arg-type]


class Merged(Positions):
    """The longest history is a dim that the batch is merged with."""

    hoists = True

    def forward(self, u_len: Tensor, u: Tensor, x: Tensor) -> Tensor:
        steps = torch.arange(u_len.max().item())  # type: ignore[arg-type]
        rows = (self.position(steps).double() * self.user(u)[:, None]).reshape(-1, 4)
        return self.mix(torch.tanh(self.a(rows)).reshape(len(u), -1, 4).sum(1), x)


class Share(Plain):
    """A length over the longest, as numbers."""

    hoists = True

    def forward(self, u_len: Tensor, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(torch.tanh(self.a(u * (u_len / u_len.max())[:, None])), x)


class Shortest(Plain):
    hoists = True

    def forward(self, u_len: Tensor, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(torch.tanh(self.a(u * (u_len - u_len.min())[:, None])), x)


class AnyAndAll(Plain):
    hoists = True

    def forward(self, u_flag: Tensor, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(torch.tanh(self.a(u + u_flag.any() + 2 * u_flag.all())), x)


class LargestFloat(Plain):
    """The gradient of a maximum is shared by all that are as large: one that counts twice has two shares."""

    hoists = True

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        h = self.user(u)
        return self.mix(h, x) * h.max()


class LargestOfBoth(Plain):
    """Negative: an item's length may be the largest."""

    hoists = True

    def forward(self, u_len: Tensor, u: Tensor, x_len: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u), x) * torch.maximum(u_len, x_len).max()


OPS_ONCE = [(Positions, "max", True), (Share, "max", True), (Shortest, "min", True), (AnyAndAll, "any", True)]
OPS_ONCE += [(ItemPositions, "max", False), (UserAndItemPositions, "max", False), (LargestFloat, "max", False)]


@pytest.mark.parametrize(("kind", "op", "once"), OPS_ONCE)
def test_only_extremes_of_the_request_are_taken_once(kind: type[Plain], op: str, once: bool) -> None:
    model = kind().double()
    names = list(inspect.signature(model.forward).parameters)
    numbers, flags = torch.randint(1, 6, (7,)), torch.rand(7) < 0.5
    drawn = {n: numbers if "len" in n else flags if "flag" in n else torch.rand(7, 4).double() for n in names}
    spec = roo.FeatureSpec([n for n in names if n[0] == "u"], [n for n in names if n[0] == "x"])
    found = roo.rewrite(model, (), drawn, spec=spec).report
    assert any(n.op.split(".")[0] == op and n.runs == "request" for n in found.nodes) is once, str(found)


def test_the_request_part_asks_which_requests_are_there() -> None:
    model, drawn = Share().eval().double(), (torch.tensor([2, 5, 3, 1]), torch.rand(4, 4).double())
    item, counts = torch.rand(5, 4).double(), torch.tensor([2, 0, 3, 0])
    example = (*(t.repeat(2, *[1] * (t.ndim - 1)) for t in drawn), torch.rand(8, 4).double())
    made = roo.rewrite(model, example, spec=roo.FeatureSpec(["u_len", "u"], ["x"]), fanout=64)
    with pytest.raises(roo.InputError, match="pass num_impressions"):
        made.request_part(*drawn)
    scores = made.impression_part(made.request_part(*drawn, num_impressions=counts), item, num_impressions=counts)
    torch.testing.assert_close(scores, model(*(t.repeat_interleave(counts, 0) for t in drawn), item))


class TrimmedBeforeALeaf(nn.Module):
    """Histories as long as the longest go through a recurrent net, which no trace follows at a width that data decides.

    In a trace the leaf is as wide as it was when the model was run, and so would be whatever meets it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.GRU(4, 4, batch_first=True)

    def forward(self, u_seq: Tensor, u_len: Tensor, x: Tensor) -> Tensor:
        longest = u_len.max().item()
        states, _ = self.net(u_seq[:, :longest])
        return torch.cat([states, x[:, None].expand(-1, longest, -1)], -1).mean(1).sum(1)


class DividedByAWidth(TrimmedBeforeALeaf):
    def forward(self, u_seq: Tensor, u_len: Tensor, x: Tensor) -> Tensor:
        states, _ = self.net(u_seq[:, : u_len.max().item()])
        return (states.sum(1) / states.shape[1] * x).sum(1)


@torch.no_grad()
@pytest.mark.parametrize("kind", [TrimmedBeforeALeaf, DividedByAWidth])
def test_a_width_of_the_example_is_none_of_another_batch(kind: type[TrimmedBeforeALeaf]) -> None:
    torch.manual_seed(0)
    model = kind()
    spec = roo.FeatureSpec(request=["u_*"], impression=["x"])
    example = (torch.randn(6, 5, 4), torch.full((6,), 5), torch.randn(6, 4))
    rewritten = roo.rewrite(model, example, spec=spec)
    refused = "for the number it has in the example" in str(rewritten.report)
    assert refused is (kind is TrimmedBeforeALeaf)
    u, length, x, counts = torch.randn(3, 5, 4), torch.tensor([3, 5, 2]), torch.randn(5, 4), torch.tensor([2, 0, 3])
    want = model(u.repeat_interleave(counts, 0), length.repeat_interleave(counts), x)
    torch.testing.assert_close(rewritten(u, length, x, num_impressions=counts), want)
