"""Copies of models that hold what `copy.deepcopy` refuses."""

from __future__ import annotations

import copy
import copyreg
import math
import threading
from collections import OrderedDict
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo
from roo_rewrite.copies import deep
from roo_rewrite.errors import CaptureError


class Fields(nn.Module):
    """Fields named by views of dicts, as a data set gives them, behind a lock."""

    def __init__(self) -> None:
        super().__init__()
        kinds = {"user": 5, "item": 7}
        self.fields, self.pairs, self.sizes = kinds.keys(), kinds.items(), MappingProxyType(kinds)
        self.math, self.lock, self.again = math, threading.Lock(), threading.RLock()
        self.tables = nn.ModuleDict({name: nn.Embedding(size, 4) for name, size in self.pairs})
        self.out = nn.Linear(8, 1)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        vectors = [self.tables[name](features[name] % self.sizes[name]) for name in self.fields]
        return self.out(torch.cat(vectors, 1) / self.math.sqrt(len(self.pairs)))


SPEC = roo.FeatureSpec(request=["user"], impression=["item"])


def _example() -> tuple[dict[str, Tensor]]:
    return ({"user": torch.arange(6), "item": torch.arange(6) * 2},)


@pytest.mark.parametrize("train", [False, True])
def test_a_model_that_holds_views_modules_and_locks(train: bool) -> None:
    model = Fields().train(train)
    rewritten = roo.rewrite(model, _example(), spec=SPEC, fanout=8, check=True)
    roo.verify(model, rewritten, batches=4)
    assert rewritten._whole_program().emitted is not None
    assert list(copy.deepcopy(rewritten)._original.fields) == ["user", "item"]


def test_views_and_read_only_mappings_are_copied() -> None:
    inner = {"a": torch.ones(2)}
    held = {"inner": inner, "values": inner.values(), "proxy": MappingProxyType(inner), "items": inner.items()}
    made: dict[str, Any] = deep(held)
    tensor = made["inner"]["a"]
    assert tensor is not inner["a"]
    assert next(iter(made["values"])) is tensor
    assert made["proxy"]["a"] is tensor
    assert dict(made["items"])["a"] is tensor
    assert list(deep(OrderedDict(b=1, a=2).keys())) == ["b", "a"]


def test_modules_and_locks_are_shared() -> None:
    lock = threading.RLock()
    made = deep([math, lock])
    assert made[0] is math
    assert made[1] is lock


def test_what_a_call_may_change_is_refused_and_nothing_is_left_behind() -> None:
    before = dict(copyreg.dispatch_table)
    model = Fields()
    model.numbers = (i for i in range(3))
    with pytest.raises(CaptureError, match="cannot be copied"):
        roo.rewrite(model, _example(), spec=SPEC)
    with pytest.raises(TypeError, match="generator"):
        deep(model)
    assert copyreg.dispatch_table == before


def test_a_recipe_of_somebody_else_stays() -> None:
    copyreg.pickle(MappingProxyType, lambda m: (dict, (list(m.items()),)))
    try:
        assert type(deep(MappingProxyType({"a": 1}))) is dict
        assert MappingProxyType in copyreg.dispatch_table
    finally:
        del copyreg.dispatch_table[MappingProxyType]
