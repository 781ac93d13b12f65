"""Jagged pairs as inputs: lengths, and offsets with and without the total; looked up and reduced once per request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import roo_rewrite as roo

ROWS, IDS, WIDTH = 6, 20, 4


def pair(kind: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids of a jagged history and its lengths or offsets; some rows are empty."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([2, 0, 3, 1, 0, 2])
    values = torch.randint(0, IDS, (int(lengths.sum()),), generator=g)
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    return values, {"lengths": lengths, "offsets": offsets[:-1], "offsets_total": offsets}[kind]


def item() -> Tensor:
    return torch.arange(ROWS) * 3 % IDS


class Model(nn.Module):
    """`reduce(weight, values, rows)` of the history, beside the item; the `rows` are what the caller passes."""

    def __init__(self, reduce: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(IDS, WIDTH)
        self.out = nn.Linear(2 * WIDTH, 1)
        self.reduce = reduce

    def forward(self, hist_values: Tensor, hist_rows: Tensor, item: Tensor) -> Tensor:
        pooled = self.reduce(self.table.weight, hist_values, hist_rows)
        return self.out(torch.cat([pooled, self.table(item)], 1)).squeeze(1)


def fbgemm() -> Any:
    pytest.importorskip("fbgemm_gpu")
    return torch.ops.fbgemm


def padded(weight: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    ops = fbgemm()
    return ops.jagged_to_padded_dense(
        F.embedding(values, weight), [ops.asynchronous_complete_cumsum(lengths)], [3]
    ).sum(1)


def there_and_back(weight: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    ops = fbgemm()
    dense = ops.jagged_to_padded_dense(F.embedding(values, weight), [offsets], [3])
    jagged, _ = ops.dense_to_jagged(torch.tanh(dense), [offsets])
    return ops.jagged_to_padded_dense(jagged, [offsets], [3]).amax(1)


def products(weight: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
    ops = fbgemm()
    ids = F.embedding(values, weight)
    gram = ops.jagged_jagged_bmm(ids, ids, offsets, 3)
    jagged, _ = ops.jagged_dense_bmm(ids, offsets, gram, 3)
    return ops.jagged_to_padded_dense(jagged, [offsets], [3]).sum(1)


CASES: dict[str, tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "bag_sum": ("offsets", lambda w, v, o: F.embedding_bag(v, w, o, mode="sum")),
    "bag_mean": ("offsets", lambda w, v, o: F.embedding_bag(v, w, o, mode="mean")),
    "bag_max": ("offsets", lambda w, v, o: F.embedding_bag(v, w, o, mode="max")),
    "bag_total": ("offsets_total", lambda w, v, o: F.embedding_bag(v, w, o, include_last_offset=True)),
    "bag_of_lengths": ("lengths", lambda w, v, n: F.embedding_bag(v, w, n.cumsum(0) - n, mode="sum")),
    "segments": (
        "offsets_total",
        lambda w, v, o: torch.segment_reduce(F.embedding(v, w), "sum", lengths=o.diff(), unsafe=True, initial=0),
    ),
    "padded": ("lengths", padded),
    "there_and_back": ("offsets_total", there_and_back),
    "products": ("offsets_total", products),
}


@pytest.mark.parametrize("side", ["request", "impression"])
@pytest.mark.parametrize("name", CASES)
def test_is_rewritten_and_verified(name: str, side: str, rewritten_and_verified: Any) -> None:
    kind, reduce = CASES[name]
    history = ["hist_*"]
    spec = roo.FeatureSpec(
        request=history if side == "request" else ["item"],
        impression=["item"] if side == "request" else history,
        jagged={"hist_values": "hist_rows"},
    )
    made = rewritten_and_verified(Model(reduce).eval(), (*pair(kind), item()), spec=spec)
    if side == "request":
        moved = " ".join(str(n.target) for n in made._whole_program().plan.request)
        assert "aten.embedding" in moved, str(made.report)


@pytest.mark.parametrize("kind", ["lengths", "offsets", "offsets_total"])
def test_a_request_level_call_takes_what_the_original_takes(kind: str) -> None:
    reduce = {
        "lengths": lambda w, v, n: F.embedding_bag(v, w, n.cumsum(0) - n, mode="sum"),
        "offsets": lambda w, v, o: F.embedding_bag(v, w, o, mode="sum"),
        "offsets_total": lambda w, v, o: F.embedding_bag(v, w, o, mode="sum", include_last_offset=True),
    }[kind]
    model = Model(reduce).eval()
    spec = roo.FeatureSpec(["hist_*"], ["item"], jagged={"hist_values": "hist_rows"})
    made = roo.rewrite(model, (*pair(kind), item()), spec=spec, check=True)
    values = torch.tensor([4, 1, 7])
    rows = {"lengths": [1, 0, 2], "offsets": [0, 1, 1], "offsets_total": [0, 1, 1, 3]}[kind]
    wide = {"lengths": [1, 1, 0, 2], "offsets": [0, 1, 2, 2], "offsets_total": [0, 1, 2, 2, 4]}[kind]
    got = made(values, torch.tensor(rows), torch.arange(4), num_impressions=torch.tensor([2, 1, 1]))
    want = model(torch.tensor([4, 4, 1, 7]), torch.tensor(wide), torch.arange(4))
    torch.testing.assert_close(got, want)


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bag = nn.EmbeddingBag(IDS, WIDTH, mode="sum")
        self.table = nn.Embedding(IDS, WIDTH)

    def forward(self, ids: Tensor, weights: Tensor, starts: Tensor, item: Tensor) -> Tensor:
        return (self.bag(ids, starts, per_sample_weights=weights) * self.table(item)).sum(1)


def test_bags_with_sample_weights(rewritten_and_verified: Any) -> None:
    values, offsets = pair("offsets")
    weights = torch.rand(len(values), generator=torch.Generator().manual_seed(1))
    spec = roo.FeatureSpec(
        request=["ids", "weights", "starts"], impression=["item"], jagged={"ids": "starts", "weights": "starts"}
    )
    made = rewritten_and_verified(Weighted().eval(), (values, weights, offsets, item()), spec=spec)
    assert any("embedding_bag" in str(n.target) for n in made._whole_program().plan.request)


class WeightedByItem(nn.Module):
    """The ids of a request, and where they begin, cross to the impressions."""

    def __init__(self, total: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.total = nn.Embedding(IDS, WIDTH), total

    def forward(self, ids: Tensor, lengths: Tensor, item: Tensor) -> Tensor:
        weights = self.table(item)[:, 0].repeat_interleave(lengths, 0, output_size=ids.shape[0])
        ends = lengths.cumsum(0)
        places = F.pad(ends, (1, 0)) if self.total else ends - lengths
        bag = F.embedding_bag(
            ids, self.table.weight, places, mode="sum", per_sample_weights=weights, include_last_offset=self.total
        )
        return bag.sum(1)


@pytest.mark.parametrize("total", [True, False])
def test_offsets_cross_with_and_without_the_total(total: bool, rewritten_and_verified: Any) -> None:
    spec = roo.FeatureSpec(request=["ids", "lengths"], impression=["item"], jagged={"ids": "lengths"})
    made = rewritten_and_verified(WeightedByItem(total).eval(), (*pair("lengths"), item()), spec=spec)
    assert "jagged_select" in made.code


def test_offsets_of_unequal_pairs_are_refused() -> None:
    spec = roo.FeatureSpec(["hist_*"], ["item"], jagged={"hist_values": "hist_rows"})
    model = Model(lambda w, v, o: F.embedding_bag(v, w, o)).eval()
    with pytest.raises(roo.SpecError, match=r"neither lengths .* nor offsets"):
        roo.rewrite(model, (torch.arange(4), torch.tensor([3, 1, 2, 0, 0, 9]), item()), spec=spec)


class TargetPerValue(nn.Module):
    """The item is repeated for each value of the history: the impressions need the number of values, no value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(IDS, 1)  # narrower than an id, so that ids do not cross

    def forward(self, hist_values: Tensor, hist_rows: Tensor, item: Tensor) -> Tensor:
        target = self.table(item)
        target = target - target.mean(0)
        wide = target.repeat_interleave(hist_rows, 0, output_size=hist_values.shape[0])
        return torch.segment_reduce((self.table(hist_values) * wide).sum(1), "sum", lengths=hist_rows)


def test_the_number_of_values_is_known_on_both_sides() -> None:
    values, lengths = pair("lengths")
    spec = roo.FeatureSpec(request=["hist*"], impression=["item"], jagged={"hist_values": "hist_rows"})
    model = TargetPerValue()
    rewritten = roo.rewrite(model, (values, lengths, item()), spec=spec, fanout=16, check=True)
    roo.verify(model, rewritten)
    counts = torch.tensor([2, 1, 0, 3, 0, 0])
    user = rewritten.request_part(values, lengths, num_impressions=counts)
    found = rewritten.impression_part(user, item(), num_impressions=counts)
    torch.testing.assert_close(found, rewritten(values, lengths, item(), num_impressions=counts))
