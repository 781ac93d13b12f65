"""Shared by the compatibility tests: small shapes run fastest on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import roo_rewrite as roo
from roo_rewrite.module import RequestModel


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Rewrite = Callable[..., RequestModel]


@pytest.fixture
def rewritten_and_verified() -> Rewrite:
    """Rewrites with every check on, refuses a silent fall-back, verifies values and gradients."""

    def make(
        model: nn.Module,
        args: Sequence[Any],
        kwargs: dict[str, Any] | None = None,
        *,
        batches: int = 10,
        **options: Any,
    ) -> RequestModel:
        made = roo.rewrite(model, args, kwargs, check=True, **options)
        assert made._whole_program().emitted is not None, str(made.report)
        roo.verify(model, made, batches=batches)
        return made

    return make
