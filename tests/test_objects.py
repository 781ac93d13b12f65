"""Batch objects as arguments: their tensors are inputs, named by entry or attribute."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import roo_rewrite as roo
from roo_rewrite.errors import InputError, SpecError
from roo_rewrite.objects import register_objects

SPEC = roo.FeatureSpec(request=["user"], impression=["item"])
ROWS = 6


class Attributes:
    def __init__(self, user: Tensor, item: Tensor):
        self.user, self.item = user, item
        self.source = "log"

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)


class Entries(dict[str, Tensor]):
    def __init__(self, user: Tensor, item: Tensor):
        super().__init__(user=user, item=item)
        self.source = "log"


class Ordered(OrderedDict[str, Tensor]):
    def __init__(self, user: Tensor, item: Tensor):
        super().__init__(user=user, item=item)


class Wrapped:
    """A dict in an attribute, and how many rows it has: RecBole's Interaction."""

    def __init__(self, user: Tensor, item: Tensor):
        self.held = {"user": user, "item": item}
        self.length = max(len(user), len(item))

    def __getitem__(self, key: str) -> Tensor:
        return self.held[key]

    def __len__(self) -> int:
        return self.length


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.user, self.item = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, batch: Any) -> Tensor:
        user, item = self.user(self.embedding(batch["user"])), self.item(self.embedding(batch["item"]))
        scores = (user * item).sum(1)
        return scores / len(batch) if isinstance(batch, Wrapped) else scores


def ids(rows: int) -> Tensor:
    return torch.arange(rows) % 9


def user_dict(user: Tensor, item: Tensor) -> UserDict[str, Tensor]:
    return UserDict(user=user, item=item)


@pytest.mark.parametrize("batch", [Attributes, Entries, Ordered, Wrapped, user_dict])
def test_a_batch_object_is_taken_apart(batch: Any) -> None:
    original = Scores()
    model = roo.rewrite(original, (batch(ids(ROWS), ids(ROWS)),), spec=SPEC, fanout=10)
    roo.verify(original, model, batches=2)
    counts = torch.tensor([2, 0, 5])
    users, items = torch.tensor([3, 1, 4]), ids(7)
    expected = original(batch(users.repeat_interleave(counts), items))
    torch.testing.assert_close(model(batch(users, items), num_impressions=counts), expected)


def test_the_number_of_rows_is_no_setting_of_the_program() -> None:
    model = roo.rewrite(Scores(), (Wrapped(ids(ROWS), ids(ROWS)),), spec=SPEC)
    for items in (7, 9, 12):
        model(Wrapped(ids(3), ids(items)), num_impressions=torch.tensor([2, items - 3, 1]))
    assert len(model._programs) == 1


def test_a_number_that_was_the_rows_by_chance_is_refused() -> None:
    model = roo.rewrite(Scores(), (Wrapped(ids(ROWS), ids(ROWS)),), spec=SPEC)
    batch = Wrapped(ids(3), ids(7))
    batch.length = 5
    with pytest.raises(InputError, match=r"number of rows, 6"):
        model(batch, num_impressions=torch.tensor([2, 4, 1]))


def test_an_object_that_holds_itself_or_no_tensor_is_no_node() -> None:
    class Around:
        def __init__(self) -> None:
            self.user, self.me = ids(ROWS), self

    class Empty:
        def __init__(self) -> None:
            self.name = "x"

    values = [Around(), Empty(), nn.Linear(2, 2)]
    register_objects(values)
    assert all(a is b for a, b in zip(pytree.tree_leaves(values), values))


def test_what_an_object_holds_is_assigned_like_any_input() -> None:
    with pytest.raises(SpecError, match=r"'batch[.]item' is not assigned"):
        roo.rewrite(Scores(), (Attributes(ids(ROWS), ids(ROWS)),), spec=roo.FeatureSpec(request=["user"]))
