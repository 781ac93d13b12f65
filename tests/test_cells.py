"""Recurrent cells of a model's own over packed sequences: the rest of the model is hoisted and split around them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import roo_rewrite as roo

T, D = 6, 4
SPEC = roo.FeatureSpec(request=["history", "length"], impression=["item"])


class Gated(nn.Module):
    """A gated step, whose state moves by the weight of the step; `across` lets a row see the first one."""

    def __init__(self, across: bool = False) -> None:
        super().__init__()
        self.given, self.held, self.across = nn.Linear(D, 2 * D), nn.Linear(D, 2 * D), across

    def forward(self, x: Tensor, state: Tensor, weight: Tensor) -> Tensor:
        (reset, new), (kept, old) = self.given(x).chunk(2, 1), self.held(state).chunk(2, 1)
        moved = torch.tanh(new + torch.sigmoid(reset + kept) * old) - state
        return state + weight.view(-1, 1) * (moved - moved[:1] if self.across else moved)


class Evolving(nn.Module):
    """Runs a cell over packed steps; gives the states, packed, and the last of each row."""

    def __init__(self, across: bool = False) -> None:
        super().__init__()
        self.cell = Gated(across)

    def forward(self, steps: PackedSequence, weights: PackedSequence) -> tuple[PackedSequence, Tensor]:
        data, sizes, order, back = steps
        state = torch.zeros(int(sizes[0]), D)
        last, outs, at = torch.zeros(int(sizes[0]), D), torch.zeros(data.size(0), D), 0
        for size in sizes.tolist():  # numbers, which no trace has
            state = self.cell(data[at : at + size], state[:size], weights.data[at : at + size])
            outs[at : at + size] = state
            last[:size] = state
            at += size
        return PackedSequence(outs, sizes, order, back), last[back]


class Evolution(nn.Module):
    """Interests of a history, extracted by a GRU, evolve towards an item; rows without a history are left out."""

    def __init__(self, across: bool = False, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.items = nn.Embedding(20, D)
        self.targets = self.items if shared else nn.Embedding(20, D)
        self.extract = nn.ModuleList([nn.GRU(D, D, batch_first=True)])
        self.evolve = nn.ModuleList([Evolving(across)])
        self.top = nn.Linear(2 * D, 1)

    def forward(self, history: Tensor, length: Tensor, item: Tensor) -> Tensor:
        some = length > 0
        steps, lengths, target = self.items(history)[some], length[some].cpu(), self.targets(item)
        packed = pack_padded_sequence(steps, lengths, batch_first=True, enforce_sorted=False)
        packed, _ = self.extract[0](packed)
        interests, _ = pad_packed_sequence(packed, batch_first=True, total_length=T)
        scores = (interests * target[some].unsqueeze(1)).sum(2)
        weights = pack_padded_sequence(scores, lengths, batch_first=True, enforce_sorted=False)
        out = torch.zeros(length.shape[0], D)
        out[some] = self.evolve[0](packed, weights)[1]
        return self.top(torch.cat([out, target], 1)).squeeze(1)


def example() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    history, item = torch.randint(20, (8, T), generator=generator), torch.randint(20, (8,), generator=generator)
    return history, torch.tensor([0, 3, 6, 1, 0, 2, 4, 5]), item


@pytest.mark.parametrize("shared", [False, True])
def test_a_cell_of_its_own_is_a_leaf_and_the_rest_is_hoisted(shared: bool) -> None:
    """Where a module is known by two names, the tracer runs stand-ins for modules: the leaf is found all the same."""
    model = Evolution(shared=shared).eval()
    rewritten = roo.rewrite(model, example(), spec=SPEC, fanout=10, check=True)
    program = rewritten._whole_program()
    assert program.captured is not None
    assert program.captured.leaves == ("evolve.0",)
    assert program.captured.kept
    assert any("gru" in str(n.target) for n in program.plan.request)
    roo.verify(model, rewritten, batches=2)


def test_rows_that_see_others_are_not_kept() -> None:
    model = Evolution(across=True).eval()
    rewritten = roo.rewrite(model, example(), spec=SPEC, fanout=10)
    program = rewritten._whole_program()
    assert program.captured is None or not program.captured.kept
    roo.verify(model, rewritten, batches=2)


class Unsteady(nn.Module):
    """Blows rounding up by a factor of a million and more where its steps are large."""

    def __init__(self, across: bool) -> None:
        super().__init__()
        self.map, self.across = nn.Linear(D, D), across

    def forward(self, x: Tensor) -> Tensor:
        state = self.map(x)
        for _ in range(12):
            state = 1.9 * state - state.roll(1, 1) * torch.sin(3 * state)
            state = state - 1e-3 * state[:1] if self.across else state
        return state


class WithUnsteady(nn.Module):
    def __init__(self, across: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.odd, self.top = Unsteady(across), nn.Linear(D, 1)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.top(self.odd(u) * 1e-3 * x).squeeze(1)


@pytest.mark.parametrize("across", [False, True])
def test_rounding_that_a_leaf_blows_up_is_no_sight_of_other_rows(across: bool) -> None:
    model = WithUnsteady(across).eval()
    spec = roo.FeatureSpec(["u"], ["x"])
    model.odd.register_full_backward_hook(lambda *a: None)  # a leaf
    rewritten = roo.rewrite(model, (torch.randn(6, D), torch.randn(6, D)), spec=spec, fanout=10)
    program = rewritten._whole_program()
    hoisted = any(n.target is torch.ops.roo.leaf.default for n in program.plan.request)
    assert hoisted is not across
