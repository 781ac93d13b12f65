"""A rewritten model leaves Python: torch.compile without breaks, torch.export with R and I dynamic, plain files."""

from __future__ import annotations

import copy
import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fixtures
import roo_rewrite as roo
from roo_rewrite.export import export_program, write

SPEC = roo.FeatureSpec(request=["user"], impression=["item"])
COUNTS = ([2, 0, 3, 4], [1, 1, 1], [5], [1])
NAMES = ("two_tower", "din", "late_stage", "multitask")


def rewritten(model: nn.Module, width: int = 4, **options: Any) -> roo.RequestModel:
    torch.manual_seed(0)
    return roo.rewrite(model, (torch.randn(7, width), torch.randn(7, 3)), spec=SPEC, **options)


def same(found: Any, expected: Any) -> None:
    for got, want in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-5)


@pytest.fixture(scope="module", params=NAMES)
def fixture(request: pytest.FixtureRequest) -> tuple[fixtures.Fixture, roo.RequestModel]:
    made = fixtures.load_small(request.param)
    args, kwargs = made.example()
    return made, roo.rewrite(made.model, args, kwargs, spec=made.spec)


def test_exported_with_both_row_counts_dynamic(fixture: tuple[fixtures.Fixture, roo.RequestModel]) -> None:
    """R = I = 1 and R = 1 too, although the trace has seen neither."""
    made, model = fixture
    exported = export_program(model).module()
    for counts in (*COUNTS, [0, 0]):
        args, kwargs = made.batch(torch.tensor(counts))
        same(
            exported(*args, num_impressions=torch.tensor(counts), **kwargs),
            model(*args, num_impressions=torch.tensor(counts), **kwargs),
        )


def test_compiled_without_a_break(fixture: tuple[fixtures.Fixture, roo.RequestModel]) -> None:
    """fullgraph raises on a break; dynamic sizes share a graph, but for one more where a guard on sizes asks for it."""
    made, model = fixture
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        for counts in ([2, 0, 3, 4], [1, 5], [2, 2, 2], [7, 1]):
            args, kwargs = made.batch(torch.tensor(counts))
            same(
                compiled(*args, num_impressions=torch.tensor(counts), **kwargs),
                model(*args, num_impressions=torch.tensor(counts), **kwargs),
            )
    assert 1 <= len(graphs) <= 2


def test_written_files_are_checked_and_complete(
    fixture: tuple[fixtures.Fixture, roo.RequestModel], tmp_path: Path
) -> None:
    """`write` compares each form with the model; no note means that both were kept."""
    assert write(fixture[1], tmp_path / "out") == []
    assert (tmp_path / "out" / "model.pt2").is_file()
    assert (tmp_path / "out" / "model.py").is_file()


@dataclasses.dataclass
class Scores:
    click: Tensor
    extra: dict[str, Tensor]


class Tied(nn.Module):
    """Shared and frozen parameters, buffers of both kinds, a constant, an output of its own class."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(3, 4)])
        self.layers[1].weight = self.layers[0].weight
        self.layers[1].bias.requires_grad_(False)
        self.register_buffer("kept", torch.arange(4.0))
        self.register_buffer("unsaved", torch.ones(4), persistent=False)

    def forward(self, user: Tensor, item: Tensor) -> Scores:
        user = self.layers[1](torch.relu(self.layers[0](user))) * self.kept
        both = user + self.layers[2](item) * self.unsaved + torch.tensor([1.0, 2.0, 3.0, float("inf")])
        return Scores(both.clamp(max=9).sum(1), {"max": both.amax(1)})


def test_shared_frozen_and_unsaved_tensors_survive(tmp_path: Path) -> None:
    model = rewritten(Tied().eval())
    notes = write(model, tmp_path / "out")
    assert [n[:44] for n in notes] == ["model.pt2 is not written: the exported model"]  # its output is the user's class
    scope: dict[str, Any] = _run(tmp_path / "out" / "model.py")
    loaded = scope["load"]()
    assert loaded.layers._modules["1"].weight is loaded.layers._modules["0"].weight
    assert not loaded.get_parameter("layers.1.bias").requires_grad
    original = model.state_dict()
    assert set(loaded.state_dict()) == set(original)
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in original.items())
    counts = torch.tensor([2, 1])
    found = loaded(torch.ones(2, 4), torch.ones(3, 3), num_impressions=counts)
    expected = model(torch.ones(2, 4), torch.ones(3, 3), num_impressions=counts)
    same([found.click, found.extra["max"]], [expected.click, expected.extra["max"]])


def _run(path: Path) -> dict[str, Any]:
    import runpy

    return runpy.run_path(str(path), run_name="written")


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Linear(4, 1), nn.Linear(3, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.user(user) + self.item(item)


class Stubborn(nn.Module):
    """Row-wise, and closed to every tracer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row * self.weight if row.sum().item() > 0 else row for row in x])


class WithLeaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.top = nn.ModuleDict({"leaf": Stubborn()}), nn.Linear(7, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.top(torch.cat([self.inner["leaf"](user), item], 1)).squeeze(1)


def test_a_leaf_that_cannot_be_exported_is_said_so_and_python_is_written(tmp_path: Path) -> None:
    model = rewritten(WithLeaf().eval())
    notes = write(model, tmp_path / "out")
    assert len(notes) == 1
    assert notes[0].startswith("model.pt2 is not written: torch.export does not take")
    assert not (tmp_path / "out" / "model.pt2").exists()
    scope = _run(tmp_path / "out" / "model.py")
    assert scope["LEAVES"] == ["inner.leaf"]
    with pytest.raises(ValueError, match=r"inner\.leaf"):
        scope["load"]()
    loaded = scope["load"](leaves={"inner.leaf": Stubborn()})
    counts = torch.tensor([2, 0, 1])
    user, item = torch.randn(3, 4), torch.randn(3, 3)
    same(loaded(user, item, num_impressions=counts), model(user, item, num_impressions=counts))


def test_where_no_form_is_possible_nothing_is_written(tmp_path: Path) -> None:
    class Branching(nn.Module):
        def forward(self, user: Tensor, item: Tensor) -> Tensor:
            return user[:, :3] * 2 + item if float(user.sum()) > 0 else user[:, :3] - item

    model = rewritten(Branching())
    with pytest.raises(roo.EmitError, match="no form of the model can be written"):
        write(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_form_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are written wrong are found when the file is loaded again."""
    export = sys.modules["roo_rewrite.export"]
    honest = export.weights

    def sabotaged(model: roo.RequestModel) -> Any:
        kinds, values = honest(model)
        return kinds, {n: v + 1 for n, v in values.items()}

    monkeypatch.setattr(export, "weights", sabotaged)
    notes = write(rewritten(Plain().eval()), tmp_path / "out")
    assert notes[-1].startswith("model.py is not written: it differs from the model")
    assert not (tmp_path / "out" / "weights.safetensors").exists()


def test_packed_columns_and_training_mode(tmp_path: Path) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).squeeze(1)

    spec = roo.FeatureSpec(columns={"x": {"request": [(0, 2), (4, 5)]}})
    model = roo.rewrite(Packed().train(), (torch.randn(8, 6),), spec=spec)
    before = copy.deepcopy(model.state_dict())
    assert write(model, tmp_path / "out") == []
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


class Reordered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([5, 0, 4, 1, 3, 2, 6]))
        self.layer = nn.Linear(7, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return self.layer(torch.cat([user, item], 1)[:, self.order])


@torch.no_grad()
def test_compiled_code_raises_where_a_buffer_it_was_built_on_has_changed() -> None:
    torch._dynamo.reset()
    original = Reordered().eval()
    model = rewritten(original)
    counts, batch = torch.tensor([2, 3]), (torch.randn(2, 4), torch.randn(5, 3))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    same(compiled(*batch, num_impressions=counts), model(*batch, num_impressions=counts))
    original.order.copy_(original.order.flip(0))
    with pytest.raises(RuntimeError, match="'order' has changed"):
        compiled(*batch, num_impressions=counts)
    want = original(batch[0].repeat_interleave(counts, 0), batch[1])
    same(model(*batch, num_impressions=counts), want)
    same(compiled(*batch, num_impressions=counts), want)
