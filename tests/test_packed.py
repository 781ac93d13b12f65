"""Packed sequences, padded while tracing: the same outputs, states and gradients as packed; what is left to leaves."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import roo_rewrite as roo
from roo_rewrite.packed import Padded, padded_sequences

T, D, H = 5, 3, 4
KINDS = (nn.GRU, nn.LSTM, nn.RNN)


def drawn(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (rows,), generator=generator)
    return torch.randn(rows, T, D, generator=generator, dtype=torch.float64), lengths


def run(layer: nn.RNNBase, x: Tensor, lengths: Tensor, hx: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Steps, lengths and last states, packed."""
    packed = pack_padded_sequence(x, lengths, batch_first=layer.batch_first, enforce_sorted=False)
    out, state = layer(packed, hx)
    steps, known = pad_packed_sequence(out, batch_first=layer.batch_first, **options)
    return steps, known, state[0] if isinstance(state, tuple) else state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [True, False])
def test_padded_is_as_packed(kind: Any, first: bool) -> None:
    for depth, both, bias, given in itertools.product((1, 2), (False, True), (False, True), (False, True)):
        torch.manual_seed(depth)
        layer = kind(D, H, depth, bidirectional=both, bias=bias, batch_first=first).double()
        x, lengths = drawn(6, depth)
        x = (x if first else x.transpose(0, 1).contiguous()).requires_grad_()
        state = torch.randn(depth * (1 + both), 6, H, dtype=torch.float64, requires_grad=True)
        wanted = [x, *layer.parameters(), *([state] if given else [])]
        found = []
        for padded in (False, True):
            hx = ((state, state * 2) if kind is nn.LSTM else state) if given else None
            if padded:
                with padded_sequences():
                    outs = run(layer, x, lengths, hx, total_length=T, padding_value=-2.0)
            else:
                outs = run(layer, x, lengths, hx, total_length=T, padding_value=-2.0)
            loss = (outs[0] * torch.arange(H * (1 + both))).sum() + (outs[2] ** 2).sum()
            found.append([*outs, *torch.autograd.grad(loss, wanted)])
        for want, got in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_the_steps_end_with_the_longest_row() -> None:
    layer, (x, _) = nn.GRU(D, H, batch_first=True).double(), drawn(3)
    lengths = torch.tensor([2, 3, 1])
    want = run(layer, x, lengths, None)
    with padded_sequences():
        got = run(layer, x, lengths, None)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_what_lies_behind_a_row_leaves_no_gradient() -> None:
    layer, (x, _) = nn.GRU(D, H, batch_first=True).double(), drawn(2)
    x[0, 2:] = float("inf")
    x[1, 4:] = float("nan")
    with padded_sequences():
        steps, _, state = run(layer, x.requires_grad_(), torch.tensor([2, 4]), None, total_length=T)
    assert all(
        bool(g.isfinite().all()) for g in torch.autograd.grad(steps.sum() + state.sum(), [x, *layer.parameters()])
    )


@pytest.mark.parametrize("length", [0, T + 1])
def test_a_row_without_steps_or_with_too_many_raises(length: int) -> None:
    layer, (x, _) = nn.GRU(D, H, batch_first=True).double(), drawn(2)
    with padded_sequences(), pytest.raises(IndexError):
        run(layer, x, torch.tensor([2, length]), None)


DECLINED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "lengths out of order": lambda x, n: pack_padded_sequence(x, torch.tensor([2, 3, 1]), batch_first=True),
    "a list of lengths": lambda x, n: pack_padded_sequence(x, n.tolist(), batch_first=True, enforce_sorted=False),
    "the data": lambda x, n: packed(x, n).data + 1,
    "the sizes": lambda x, n: packed(x, n).batch_sizes.max(),
    "a device": lambda x, n: packed(x, n).to("cpu"),
    "the cell state": lambda x, n: nn.LSTM(D, H).double()(packed(x, n))[1][1] + 1,
    "a projection": lambda x, n: nn.LSTM(D, H, proj_size=2).double()(packed(x, n)),
    "dropout between layers": lambda x, n: nn.GRU(D, H, 2, dropout=0.5).double()(packed(x, n)),
    "another length": lambda x, n: pad_packed_sequence(packed(x, n), batch_first=True, total_length=T + 2),
}


def packed(x: Tensor, lengths: Tensor) -> PackedSequence:
    return pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)


@pytest.mark.parametrize("name", DECLINED)
def test_what_only_a_packed_sequence_has_is_declined(name: str) -> None:
    with padded_sequences(), pytest.raises((RuntimeError, TypeError, AttributeError)):
        DECLINED[name](*drawn(3))


def test_packing_is_itself_again() -> None:
    with padded_sequences():
        assert isinstance(packed(*drawn(3)), Padded)
    assert type(packed(*drawn(3))) is PackedSequence
    assert isinstance(nn.GRU(D, H, batch_first=True).double()(packed(*drawn(3)))[0], PackedSequence)


class Session(nn.Module):
    """A history read by a recurrent layer in the model's own forward, and asked by the item."""

    def __init__(self, kind: Any, total: int | None) -> None:
        super().__init__()
        self.items, self.total = nn.Embedding(20, D), total
        self.layer = kind(D, H, batch_first=True, bidirectional=True)
        self.ask, self.top = nn.Linear(2 * H, D), nn.Linear(3, 1)

    def forward(self, history: Tensor, length: Tensor, item: Tensor) -> Tensor:
        steps, _, last = run(self.layer, self.items(history), length.cpu(), None, total_length=self.total)
        asked = self.items(item)
        near = torch.softmax((self.ask(steps) * asked.unsqueeze(1)).sum(-1), 1)
        read = (near.unsqueeze(-1) * self.ask(steps)).sum(1)
        return self.top(read * asked).squeeze(1) + last.sum((0, 2))


@pytest.mark.parametrize(
    ("kind", "total", "training"), [(nn.GRU, T, False), (nn.GRU, T, True), (nn.LSTM, T, False), (nn.GRU, None, False)]
)
def test_a_model_that_packs_in_its_own_forward_is_hoisted(kind: Any, total: int | None, training: bool) -> None:
    torch.manual_seed(0)
    model = Session(kind, total).train(training)
    example = (torch.randint(1, 20, (8, T)), torch.randint(1, T + 1, (8,)), torch.randint(1, 20, (8,)))
    spec = roo.FeatureSpec(["history", "length"], ["item"])
    rewritten = roo.rewrite(model, example, spec=spec, fanout=10, check=True)
    program = rewritten._whole_program()
    assert not program.notes
    assert any("gru" in str(n.target) or "lstm" in str(n.target) for n in program.plan.request)
    roo.verify(model, rewritten, batches=3)


class Reader(nn.Module):
    """Goes through the data of a packed sequence itself; returns a tensor, or a packed sequence again."""

    def __init__(self, again: bool, across: bool) -> None:
        super().__init__()
        self.cell, self.again, self.across = nn.Linear(D, D), again, across

    def forward(self, sequence: PackedSequence) -> Any:
        data = torch.cat([self.cell(sequence.data[i : i + 1]) for i in range(len(sequence.data))])
        made = PackedSequence(data - data.mean(0) if self.across else data, *sequence[1:])
        return made if self.again else pad_packed_sequence(made, batch_first=True, total_length=T)[0]


class WithReader(nn.Module):
    def __init__(self, again: bool, across: bool) -> None:
        super().__init__()
        self.reader = Reader(again, across)

    def forward(self, u: Tensor, length: Tensor, x: Tensor) -> Tensor:
        found = self.reader(packed(u, length.cpu()))
        read = found if isinstance(found, Tensor) else pad_packed_sequence(found, batch_first=True, total_length=T)[0]
        return (read.sum(1) * x).sum(1)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_who_reads_packed_data_gets_it_packed(again: bool, across: bool) -> None:
    model = WithReader(again, across)
    example = (torch.randn(4, T, D), torch.randint(1, T + 1, (4,)), torch.randn(4, D))
    rewritten = roo.rewrite(model, example, spec=roo.FeatureSpec(["u", "length"], ["x"]), fanout=10, check=True)
    roo.verify(model, rewritten, batches=4)
    program = rewritten._whole_program()
    assert program.captured is not None
    assert program.captured.leaves == ("reader",)
    hoisted = any(n.target is torch.ops.roo.leaf.default for n in program.plan.request)
    assert hoisted is not across


class Longer(nn.Module):
    """A leaf of packed steps that gives something as long as the longest row of the batch, beside them."""

    def forward(self, sequence: PackedSequence) -> tuple[Tensor, PackedSequence]:
        assert float(sequence.data.detach().abs().max()) < 1e9
        return pad_packed_sequence(sequence, batch_first=True)[0] + 1, sequence


def test_a_leaf_as_long_as_the_longest_row_is_not_used() -> None:
    model = WithReader(False, False)
    model.reader = Longer()  # type: ignore[assignment]
    model.forward = lambda u, n, x: (model.reader(packed(u, n))[0].sum(1) * x).sum(1)  # type: ignore[method-assign]
    example = (torch.randn(4, T, D), torch.tensor([1, 2, T, 3]), torch.randn(4, D))
    rewritten = roo.rewrite(model, example, spec=roo.FeatureSpec(["u", "n"], ["x"]))
    roo.verify(model, rewritten, batches=4)
    assert rewritten._whole_program().emitted is None
