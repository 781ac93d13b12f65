"""Functions and methods that no trace can follow: leaves where arguments and results are all there is to them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hazard_parts import Plain
from torch import Tensor, nn

import roo_rewrite as roo


def by_row(ids: Tensor, *, step: int = 1) -> Tensor:
    """Row by row, in NumPy: which entries are the first of their id, counted in steps."""
    rows = [[step * (list(row).index(i) == at) for at, i in enumerate(row)] for row in ids.numpy()]
    return torch.tensor(np.array(rows).reshape(-1, ids.shape[1]), dtype=torch.float64)


class ByRow(Plain):
    """A method that calls a function of its module; the smaller one is the leaf."""

    hoists = True

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)

    def weights(self, u_ids: Tensor) -> Tensor:
        return by_row(u_ids, step=2) + 1

    def forward(self, u_ids: Tensor, x: Tensor) -> Tensor:
        h = (self.embed(u_ids) * self.weights(u_ids).unsqueeze(-1)).sum(1)
        return self.mix(self.user(h), x)


class Loops(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return torch.stack([row * (2.0 if row[0] > 0 else 1.0) for row in h])


class BesideAModule(ByRow):
    """A function, and a module that is a leaf too."""

    def __init__(self) -> None:
        super().__init__()
        self.loops = Loops()

    def forward(self, u_ids: Tensor, x: Tensor) -> Tensor:
        h = (self.embed(u_ids) * self.weights(u_ids).unsqueeze(-1)).sum(1)
        return self.mix(self.loops(self.user(h)), x)


class OfAnObject(ByRow):
    """A static method, of positional and named arguments, within no_grad."""

    @staticmethod
    def last(ids: Tensor, lengths: Tensor, fill: int = 0) -> Tensor:
        made = ids.clone()
        for row, length in zip(made, lengths):
            row[int(length) - 1] = fill
        return made

    def forward(self, u_ids: Tensor, u_len: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        with torch.no_grad():
            ids = self.last(u_ids, lengths=u_len, fill=3)
        return self.mix(self.user(self.embed(ids).sum(1)), x)


class WithParameters(Plain):
    """A loop over the rows that uses parameters, in a method that asks its base class: gradients flow through it."""

    hoists = True

    def user(self, u: Tensor) -> Tensor:
        rows = [super(WithParameters, self).user(row) * float(row[0] > 0) for row in u]
        return torch.stack(rows)


class AcrossRows(Plain):
    """In NumPy, less the mean of the batch: not row-wise, so per impression."""

    hoists = True

    def centred(self, u: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(u.detach()) - np.asarray(u.detach()).mean(0))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u) + self.centred(u), x)


class AskedOfBoth(ByRow):
    """Rows of both sides in one call."""

    hoists = False

    def forward(self, u_ids: Tensor, x_id: Tensor) -> Tensor:
        both = torch.cat([u_ids, x_id.unsqueeze(1)], 1)
        return (self.embed(both) * by_row(both).unsqueeze(-1)).sum((1, 2))


class ReadsWhatForwardLeft(ByRow):
    """The method takes the embeddings from an attribute, which only forward sets."""

    hoists = False

    def weights(self, u_ids: Tensor) -> Tensor:
        return torch.tensor(np.asarray(u_ids) % 2).double() * self.kept.sum(-1)

    def forward(self, u_ids: Tensor, x: Tensor) -> Tensor:
        self.kept = self.embed(u_ids).detach()
        return self.mix(self.user((self.embed(u_ids) * self.weights(u_ids).unsqueeze(-1)).sum(1)), x)


class ReadsFromADict(ReadsWhatForwardLeft):
    """The same by way of an object that both know."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf: dict[str, Any] = {"kept": None}

    def weights(self, u_ids: Tensor) -> Tensor:
        return torch.tensor(np.asarray(u_ids) % 2).double() * self.shelf["kept"].sum(-1)

    def forward(self, u_ids: Tensor, x: Tensor) -> Tensor:
        self.shelf["kept"] = self.embed(u_ids).detach()
        h = (self.embed(u_ids) * self.weights(u_ids).unsqueeze(-1)).sum(1)
        self.shelf["kept"] = None
        return self.mix(self.user(h), x)


class LeavesItsResult(ByRow):
    """The method gives nothing; forward reads what it left."""

    hoists = False

    def prepare(self, u_ids: Tensor) -> None:
        self.kept = by_row(u_ids).detach()
        float(self.kept.sum())

    def forward(self, u_ids: Tensor, x: Tensor) -> Tensor:
        self.prepare(u_ids)
        return self.mix(self.user((self.embed(u_ids) * self.kept.unsqueeze(-1)).sum(1)), x)


class ReadsAWrittenBuffer(ByRow):
    """Forward writes a buffer, then a method that cannot be traced reads it."""

    hoists = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def weights(self, u_ids: Tensor) -> Tensor:
        return by_row(u_ids) * self.scale

    def forward(self, u_ids: Tensor, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.copy_(u_ids.double().mean().reshape(1))
        return super().forward(u_ids, x)


class AsLongAsTheLongest(ByRow):
    """Cut to the longest history of the batch."""

    hoists = False

    def cut(self, u_ids: Tensor, u_len: Tensor) -> Tensor:
        return torch.tensor(np.asarray(u_ids)[:, : int(np.asarray(u_len).max(initial=1))])

    def forward(self, u_ids: Tensor, u_len: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.mix(self.user(self.embed(self.cut(u_ids, u_len)).mean(1)), x)


class GivesANumber(Plain):
    """The largest length of the batch, as a number."""

    hoists = False

    def longest(self, u_len: Tensor) -> int:
        return int(np.asarray(u_len).max(initial=0))

    def forward(self, u: Tensor, u_len: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.mix(self.user(u), x) * self.longest(u_len)


class TakesANumber(Plain):
    """A module that cannot be traced takes a number which depends on the batch."""

    hoists = False

    class Picky(nn.Module):
        def forward(self, h: Tensor, longest: int) -> Tensor:
            return torch.stack([row * longest if float(row.sum()) > 0 else row for row in h])

    def __init__(self) -> None:
        super().__init__()
        self.picky = self.Picky()

    def forward(self, u: Tensor, u_len: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.mix(self.picky(self.user(u), int(u_len.max())), x)


class GivesAView(ByRow):
    """What comes back shares memory with what was given, and is written to."""

    hoists = False

    def same(self, h: Tensor) -> Tensor:
        assert float(h.detach().sum()) < 1e9
        return h[:, :2]

    def forward(self, u_ids: Tensor, x: Tensor) -> Tensor:
        h = self.embed(u_ids).sum(1) * 2
        self.same(h).mul_(3)
        return self.mix(self.user(h), x)


class WritesIntoItsInput(ByRow):
    """A function that changes what it is given."""

    hoists = False

    def mark(self, h: Tensor) -> Tensor:
        for row in h:
            row[0] = float(row[1]) if float(row[1]) > 0 else 1.0
        return h * 1

    def forward(self, u_ids: Tensor, x: Tensor) -> Tensor:
        h = self.embed(u_ids).sum(1).detach() * 1
        return self.mix(self.user(h + self.mark(h)), x)


class Draws(Plain):
    """Noise of a row that cannot be traced is an impression's own."""

    hoists = True

    def noisy(self, h: Tensor) -> Tensor:
        return torch.stack([row + torch.rand(4, dtype=row.dtype) * float(row[0] > 0) for row in h])

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.noisy(self.user(u)), x)


class MakesTheSizeANumber(Plain):
    """A list as long as the batch: the trace would hold for one size, and says so at its end only."""

    hoists = True

    def at_step(self, h: Tensor) -> Tensor:
        step = torch.tensor([2] * h.shape[0])
        return h / step.unsqueeze(1)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.at_step(self.user(u)), x)


class DividesByTheSize(MakesTheSizeANumber):
    """The same, and the numbers of a row depend on it: per impression."""

    hoists = True

    def at_step(self, h: Tensor) -> Tensor:
        return h / torch.tensor([h.shape[0]] * h.shape[0]).unsqueeze(1)


def test_a_function_that_cannot_be_traced_is_sound(hazard: type, sound: Callable[[type], None]) -> None:
    sound(hazard)


@pytest.mark.parametrize(
    ("kind", "name"), [(ByRow, "by_row"), (OfAnObject, "OfAnObject.last"), (WithParameters, "WithParameters.user")]
)
def test_the_report_names_the_function(kind: type[nn.Module], name: str) -> None:
    ids, lengths, dense = torch.randint(6, (5, 3)), torch.full((5,), 2), torch.randn(5, 4, dtype=torch.float64)
    given = {"u_ids": ids, "u_len": lengths, "u": dense, "x": dense}
    example = {n: given[n] for n in inspect.signature(kind.forward).parameters if n != "self"}
    spec = roo.FeatureSpec(request=[n for n in example if n != "x"], impression=["x"])
    model = roo.rewrite(kind().double(), (), example, spec=spec)
    assert f"function {name!r} is kept as an opaque leaf" in str(model.report)


class WiderInRareBatches(Plain):
    """As wide as a batch with a number above a hundred makes it."""

    def widened(self, h: Tensor) -> Tensor:
        rows = np.asarray(h.detach())
        return torch.from_numpy(np.repeat(rows, 5 if (rows > 100).any() else 3, axis=1))

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.user(u) * self.widened(u).mean(1, keepdim=True), x)


class WiderAfterNorm(WiderInRareBatches):
    """The same once a buffer has been written."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, u: Tensor, x: Tensor) -> Tensor:
        return self.mix(self.norm(x) * self.widened(u).mean(1, keepdim=True), x)


@pytest.mark.parametrize("kind", [WiderInRareBatches, WiderAfterNorm])
def test_a_batch_in_which_a_function_gives_other_sizes_runs_on_the_original(kind: type[nn.Module]) -> None:
    model, counts = kind().double(), torch.tensor([2, 0, 3])
    u, x = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    spec = roo.FeatureSpec(request=["u"], impression=["x"])
    rewritten = roo.rewrite(model, (u, x), spec=spec)
    truth = copy.deepcopy(model)
    assert "widened" in str(rewritten.report)
    for factor in (1, 1000, 1):
        given = u[:3] * factor
        want = truth(given.repeat_interleave(counts, 0), x[:5])
        torch.testing.assert_close(rewritten(given, x[:5], num_impressions=counts), want)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), truth.buffers()))
