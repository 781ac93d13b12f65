"""Hypothesis strategies for tests of a rewritten model of your own. Needs `hypothesis`.

from hypothesis import given
from roo_rewrite import testing

@given(testing.batches(model))
def test_scores(batch):
    testing.assert_same(original, model, batch)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from roo_rewrite.closeness import compare
from roo_rewrite.equivalence import draw_batch
from roo_rewrite.errors import EquivalenceError
from roo_rewrite.facts import Provenance
from roo_rewrite.leaves import tensors_of
from roo_rewrite.module import RequestModel

__all__ = ["RequestCall", "assert_same", "batches", "counts"]


@dataclass(frozen=True)
class RequestCall:
    """One call of a rewritten model, and the same call of its original on the expanded batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    num_impressions: Tensor
    expanded_args: tuple[Any, ...]
    expanded_kwargs: dict[str, Any]


def counts(*, max_requests: int = 5, max_impressions: int = 5) -> st.SearchStrategy[list[int]]:
    """Impressions of each request: jagged, with empty requests, and the empty batch."""
    return st.lists(st.integers(0, max_impressions), max_size=max_requests)


@st.composite
def batches(draw: st.DrawFn, model: RequestModel, *, max_requests: int = 5, max_impressions: int = 5) -> RequestCall:
    """Calls of `model`: rows of the example it was rewritten with, floats moved a little, with drawn counts."""
    number = draw(counts(max_requests=max_requests, max_impressions=max_impressions))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    inputs, (example, statics) = model._inputs, model._example
    batch = draw_batch(inputs, example, number, generator)
    args, kwargs = inputs.unflatten(batch.atoms, Provenance.REQUEST, statics)
    expanded = inputs.unflatten(batch.expanded(inputs), Provenance.IMPRESSION, statics)
    return RequestCall(args, kwargs, batch.counts, *expanded)


def assert_same(original: nn.Module, model: RequestModel, call: RequestCall) -> None:
    """Raises EquivalenceError where the scores of `call` differ beyond the rounding of their dtype.

    An original that cannot take the batch says nothing, so nothing is compared then.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            want = tensors_of(original(*call.expanded_args, **call.expanded_kwargs))
        except Exception:  # whatever user code raises
            return
        torch.manual_seed(0)
        got = tensors_of(model(*call.args, num_impressions=call.num_impressions, **call.kwargs))
    found = compare(got, want)
    if found is not None:
        number = call.num_impressions.tolist()
        raise EquivalenceError(f"{found}, num_impressions = {number}", num_impressions=number, where=found)
