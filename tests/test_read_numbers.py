"""read_numbers: numbers read off literals, factories and buffers are known to the trace; those off data are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo

SPEC = roo.FeatureSpec(["u"], ["x"])


class Mixed(nn.Module):
    """A linear map of both sides, of whose columns `read` makes the output."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(40, 3)
        self.register_buffer("order", torch.tensor([0, 2, 1, 0]))
        self.register_buffer("on", torch.tensor(True))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.read(self.mix(torch.cat([u, x], 1)).tanh())

    def read(self, z: Tensor) -> Tensor:
        raise NotImplementedError


class Listed(Mixed):
    def read(self, z: Tensor) -> Tensor:
        i, j = torch.triu_indices(3, 3, 1)
        return torch.stack([z[:, a] * z[:, b] for a, b in zip(i.tolist(), j.tolist())], 1)


class Walked(Mixed):
    def read(self, z: Tensor) -> Tensor:
        return torch.stack([z[:, a] * float(a) for a in torch.arange(3)], 1)


class OffABuffer(Mixed):
    def read(self, z: Tensor) -> Tensor:
        return z[:, int(self.order[1])] * z[:, self.order[2]] if self.on else z[:, int(self.order.max())]


class OffALiteral(Mixed):
    def read(self, z: Tensor) -> Tensor:
        return z[:, int(torch.tensor([2, 0, 1]).cumsum(0)[1])] / torch.tensor([1.0, 3.0]).sum().item()


class OffWhatIsWritten(Mixed):
    def read(self, z: Tensor) -> Tensor:
        places = torch.zeros(3, dtype=torch.long)
        places[1] = 2
        return z[:, places[1]]


class OffACopy(Mixed):
    def read(self, z: Tensor) -> Tensor:
        copy = self.order.clone()
        first = z[:, int(copy[1])]
        copy[1:].add_(2).remainder_(3)
        return first * z[:, int(copy[1])]


class OffACopyOfTheBatch(Mixed):
    def read(self, z: Tensor) -> Tensor:
        places = torch.zeros(3, dtype=torch.long)
        places[1] = (z.detach() > 0).sum() % 3
        return z[:, places[1]]


class WritesAView(Mixed):
    def read(self, z: Tensor) -> Tensor:
        self.order[1:].add_(1).remainder_(3)
        return z[:, self.order.reshape(-1)[1]]


class WritesBefore(Mixed):
    def read(self, z: Tensor) -> Tensor:
        self.order.add_(1).remainder_(3)
        return z[:, self.order[1]]


class WritesAfter(Mixed):
    def read(self, z: Tensor) -> Tensor:
        column = z[:, self.order[1]]
        self.order.add_(1).remainder_(3)
        return column


class OffTheBatch(Mixed):
    def read(self, z: Tensor) -> Tensor:
        return z * (z > 0).sum().item()


class OffAListedParameter(Mixed):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.scales = [self.scale]

    def read(self, z: Tensor) -> Tensor:
        return z * self.scales[0].detach().exp().item()


def _rewritten(kind: type[Mixed]) -> tuple[Mixed, roo.RequestModel]:
    torch.manual_seed(0)
    model = kind().double().eval()
    example = (torch.randn(6, 36, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64))
    return model, roo.rewrite(model, example, spec=SPEC, fanout=64)


def _same(model: Mixed, rewritten: roo.RequestModel) -> None:
    """On one batch and the next, buffers included."""
    for counts in ([2, 0, 3], [0, 0], [4], []):
        u, x = torch.randn(len(counts), 36).double(), torch.randn(sum(counts), 4).double()
        kept = {name: b.clone() for name, b in model.named_buffers()}
        expected = model(u.repeat_interleave(torch.tensor(counts, dtype=torch.long), 0), x)
        after = {name: b.clone() for name, b in model.named_buffers()}
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
        torch.testing.assert_close(rewritten(u, x, num_impressions=torch.tensor(counts, dtype=torch.long)), expected)
        assert all(torch.equal(b, after[name]) for name, b in model.named_buffers())


@pytest.mark.parametrize("kind", [Listed, Walked, OffABuffer, OffALiteral, OffWhatIsWritten, OffACopy])
def test_a_known_number_is_traced_as_one(kind: type[Mixed]) -> None:
    model, rewritten = _rewritten(kind)
    assert not rewritten._whole_program().notes
    assert "linear: 36 of 40 columns per request" in str(rewritten.report)
    roo.verify(model, rewritten)
    _same(model, rewritten)


@pytest.mark.parametrize("kind", [WritesAView, WritesBefore, WritesAfter, OffTheBatch, OffACopyOfTheBatch])
def test_a_number_that_may_differ_is_data(kind: type[Mixed]) -> None:
    model, rewritten = _rewritten(kind)
    assert not any("report it" in note or "check" in note for note in rewritten._whole_program().notes)
    _same(model, rewritten)


class Encoded(nn.Module):
    """nn.TransformerEncoder turns its mask into numbers, in place, and asks whether it is the causal one."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4, 0.0, batch_first=True), 1)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return (self.encoder(u, mask=self.mask)[:, -1] * x).sum(-1)


def test_an_encoder_that_asks_for_its_mask_is_no_leaf() -> None:
    model = Encoded().double()
    rewritten = roo.rewrite(model, (torch.randn(6, 5, 4).double(), torch.randn(6, 4).double()), spec=SPEC)
    assert not rewritten._whole_program().notes
    roo.verify(model, rewritten, batches=4)


def test_a_buffer_that_has_changed_is_read_again() -> None:
    model, rewritten = _rewritten(OffABuffer)
    _same(model, rewritten)
    model.order.copy_(torch.tensor([1, 0, 2, 1]))
    _same(model, rewritten)
    model.on.fill_(False)
    _same(model, rewritten)


def test_a_parameter_in_a_list_is_no_literal() -> None:
    model, rewritten = _rewritten(OffAListedParameter)
    _same(model, rewritten)
    with torch.no_grad():
        model.scale.fill_(3.0)
    _same(model, rewritten)


@pytest.mark.filterwarnings("ignore:Graph break")
@pytest.mark.parametrize(("kind", "name"), [(OffABuffer, "on"), (OffAListedParameter, "scale")])
@torch.no_grad()
def test_compiled_code_reads_each_time(kind: type[Mixed], name: str) -> None:
    model, rewritten = _rewritten(kind)
    compiled = torch.compile(rewritten, backend="eager", dynamic=True)
    u, x, counts = torch.randn(2, 36).double(), torch.randn(5, 4).double(), torch.tensor([2, 3])
    for value in (1, 0):
        getattr(model, name).fill_(value)
        torch.testing.assert_close(compiled(u, x, num_impressions=counts), model(u.repeat_interleave(counts, 0), x))
