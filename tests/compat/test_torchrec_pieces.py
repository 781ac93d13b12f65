"""A KeyedJaggedTensor that forward puts together, splits or permutes: looked up per side where its parts are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo

pytest.importorskip("torchrec")
from torchrec.modules.embedding_configs import EmbeddingBagConfig, EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

KEYS = ["hist", "user", "item"]
ROWS, IDS = 7, 9
SPEC = roo.FeatureSpec(request=["jagged*", "user"], impression=["item"])
PER_SIDE = [("hist", "user"), ("item",)]
Make = Callable[[KeyedJaggedTensor, Tensor, Tensor], KeyedJaggedTensor]


def filled(ids: Tensor) -> Tensor:
    return torch.full((ids.shape[0],), ids.shape[1], dtype=torch.int32)


def joined(jagged: KeyedJaggedTensor, user: Tensor, item: Tensor) -> KeyedJaggedTensor:
    values = torch.cat([jagged.values(), user.reshape(-1), item])
    return KeyedJaggedTensor(KEYS, values, lengths=torch.cat([jagged.lengths(), filled(user), torch.ones_like(item)]))


def synced(jagged: KeyedJaggedTensor, user: Tensor, item: Tensor) -> KeyedJaggedTensor:
    lengths = [jagged.lengths(), filled(user), filled(item[:, None])]
    return KeyedJaggedTensor.from_lengths_sync(
        KEYS, torch.cat([jagged.values(), user.flatten(), item]), torch.cat(lengths)
    )


def concatenated(jagged: KeyedJaggedTensor, user: Tensor, item: Tensor) -> KeyedJaggedTensor:
    dense = [
        KeyedJaggedTensor([key], ids.reshape(-1), lengths=filled(ids))
        for key, ids in (("user", user), ("item", item[:, None]))
    ]
    return KeyedJaggedTensor.concat([jagged, *dense])


def other_order(jagged: KeyedJaggedTensor, user: Tensor, item: Tensor) -> KeyedJaggedTensor:
    lengths = [filled(user), jagged.lengths(), torch.ones_like(item)]
    return KeyedJaggedTensor(KEYS, torch.cat([jagged.values(), user.reshape(-1), item]), lengths=torch.cat(lengths))


def written_lengths(jagged: KeyedJaggedTensor, user: Tensor, item: Tensor) -> KeyedJaggedTensor:
    ones = torch.ones_like(item)
    ones[item > 4] = 0
    values = torch.cat([jagged.values(), user.reshape(-1), item[item <= 4]])
    return KeyedJaggedTensor(KEYS, values, lengths=torch.cat([jagged.lengths(), filled(user), ones]))


def written_values(jagged: KeyedJaggedTensor, user: Tensor, item: Tensor) -> KeyedJaggedTensor:
    own = item.clone()
    made = joined(jagged, user, own)
    own += 1
    return made


def of_the_batch(jagged: KeyedJaggedTensor, user: Tensor, item: Tensor) -> KeyedJaggedTensor:
    return joined(jagged, user, item.flip(0))


class Model(nn.Module):
    def __init__(self, make: Make) -> None:
        super().__init__()
        torch.manual_seed(0)
        tables = [EmbeddingConfig(name=k, embedding_dim=4, num_embeddings=IDS + 1, feature_names=[k]) for k in KEYS]
        self.make, self.embed = make, EmbeddingCollection(tables=tables)

    def forward(self, jagged: KeyedJaggedTensor, user: Tensor, item: Tensor) -> Tensor:
        found = self.embed(self.make(jagged, user, item))
        hist, user, item = (found[key].to_padded_dense(3).sum(1) for key in KEYS)
        return (hist.tanh() * user * item).sum(1)


def example() -> tuple[KeyedJaggedTensor, Tensor, Tensor]:
    ids, lengths = torch.arange(ROWS * 3) % IDS, torch.tensor([2, 0, 3, 1, 0, 2, 1])
    return KeyedJaggedTensor(["hist"], ids[:9], lengths=lengths), ids[: 2 * ROWS].reshape(ROWS, 2), ids[:ROWS]


@pytest.mark.parametrize("make", [joined, synced, concatenated])
def test_pieces_are_looked_up_per_side(make: Make, rewritten_and_verified: Any) -> None:
    made = rewritten_and_verified(Model(make).eval(), example(), spec=SPEC)
    captured = made._whole_program().captured
    assert not captured.leaves
    assert [site.keys for site in captured.sites] == PER_SIDE
    assert any(n.name.startswith("leaf") for n in made._whole_program().plan.request)


@pytest.mark.parametrize("make", [other_order, written_lengths, written_values])
def test_what_may_be_no_piece_leaves_a_leaf(make: Make, rewritten_and_verified: Any) -> None:
    made = rewritten_and_verified(Model(make).eval(), example(), spec=SPEC)
    program = made._whole_program()
    assert program.captured is None or program.captured.leaves == ("embed",)


def test_rows_that_change_places_stay_per_impression(rewritten_and_verified: Any) -> None:
    rewritten_and_verified(Model(of_the_batch).eval(), example(), spec=SPEC)


class Masked(nn.Module):
    """The ids of each side that are not padding; `lengths` counts them, or something else."""

    def __init__(self, lengths: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        tables = [EmbeddingBagConfig(name=k, embedding_dim=4, num_embeddings=IDS, feature_names=[k]) for k in KEYS[1:]]
        self.lengths, self.embed = lengths, EmbeddingBagCollection(tables=tables)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        masks = [user != 0, item != 0]
        values = torch.cat([user[masks[0]], item[masks[1]]])
        lengths = torch.cat([self.lengths(mask) for mask in masks])
        found = self.embed(KeyedJaggedTensor.from_lengths_sync(KEYS[1:], values, lengths))
        return (found["user"].tanh() * found["item"]).sum(1)


@pytest.mark.parametrize("known", [True, False])
def test_what_a_mask_keeps_is_looked_up_per_side(known: bool, rewritten_and_verified: Any) -> None:
    count = (lambda m: m.sum(dim=1).to(torch.int32)) if known else (lambda m: m.flip(0).sum(1).flip(0))
    ids = torch.arange(2 * ROWS).reshape(ROWS, 2) % 3
    spec = roo.FeatureSpec(request=["user"], impression=["item"])
    made = rewritten_and_verified(Masked(count).eval(), (ids, ids.flip(1)), spec=spec)
    captured = made._whole_program().captured
    assert captured.leaves == (() if known else ("embed",))
    assert not known or [site.keys for site in captured.sites] == [("user",), ("item",)]


@pytest.mark.parametrize("take", [lambda k: k.split([1, 2])[1], lambda k: k.permute([2, 1])], ids=["split", "permute"])
def test_parts_of_an_input_keep_their_sides(take: Callable[[Any], Any], rewritten_and_verified: Any) -> None:
    lengths = torch.arange(3 * ROWS) % 4
    features = KeyedJaggedTensor(KEYS, torch.arange(int(lengths.sum())) % IDS, lengths=lengths)
    spec = roo.FeatureSpec(request=["*hist", "*user"], impression=["*item"])
    made = rewritten_and_verified(Two(take).eval(), (features,), spec=spec)
    captured = made._whole_program().captured
    assert not captured.leaves
    assert sorted(site.keys for site in captured.sites) == [("item",), ("user",)]


class Two(nn.Module):
    def __init__(self, take: Callable[[Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        tables = [EmbeddingConfig(name=k, embedding_dim=4, num_embeddings=IDS, feature_names=[k]) for k in KEYS[1:]]
        self.take, self.embed = take, EmbeddingCollection(tables=tables)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        found = self.embed(self.take(features))
        user, item = (found[key].to_padded_dense(3).sum(1) for key in KEYS[1:])
        return (user.tanh() * item).sum(1)
