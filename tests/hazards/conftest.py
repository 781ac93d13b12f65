"""Small modules with a known truth, each held against the original by a slow oracle of its own.

A hazard is an `nn.Module` with a class attribute `hoists`: whether something of it must run once per
request. Its inputs are drawn by the names of its forward's parameters (see `DRAW`): `u...` are request
inputs, `x...` impression inputs. Optional attributes: `modes` (training flags to try; `MODES` of its file, or
eval), `options` (of `rewrite`), `refused` (a RooError is the right answer), `caught` (the program may fail its
trial), `tolerance`.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import roo_rewrite as roo

sys.path.insert(0, str(Path(__file__).parent))  # for hazard_parts
COUNTS = ([2, 0, 3], [1, 1, 1], [6], [0, 0], [], [1], [0, 4, 0, 3], [9, 0, 7, 1])

DRAW: dict[str, Callable[[int], Tensor]] = {
    "": lambda n: torch.randn(n, 4, dtype=torch.float64),
    "one": lambda n: torch.randn(n, dtype=torch.float64),
    "id": lambda n: torch.randint(6, (n,)),
    "ids": lambda n: torch.randint(6, (n, 5)),
    "seq": lambda n: torch.randn(n, 5, 4, dtype=torch.float64),
    "len": lambda n: torch.randint(1, 6, (n,)),
    "flag": lambda n: torch.rand(n) < 0.5,
    "mask": lambda n: torch.rand(n, 5) < 0.6,
    "label": lambda n: (torch.rand(n) < 0.5).double(),
    "wide": lambda n: torch.randn(n, 7, dtype=torch.float64),
    "positive": lambda n: torch.rand(n, 4, dtype=torch.float64) + 0.1,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `hazard` runs over every module of its file that says whether it hoists."""
    if "hazard" in metafunc.fixturenames:
        found = [
            value
            for value in vars(metafunc.module).values()
            if inspect.isclass(value) and issubclass(value, nn.Module) and "hoists" in vars(value)
        ]
        metafunc.parametrize("hazard", found, ids=lambda c: c.__name__)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small only wait for each other
    yield
    torch.set_num_threads(before)


def names_of(module: nn.Module) -> list[str]:
    return [p for p in inspect.signature(module.forward).parameters if p not in ("args", "kwargs")]


def draw(names: list[str], requests: int, impressions: int) -> dict[str, Tensor]:
    """One drawn tensor an input: R rows for `u...`, I rows for `x...`."""
    rows = {"u": requests, "x": impressions}
    return {n: DRAW[n.partition("_")[2].rstrip("0123456789")](rows[n[0]]) for n in names}


def spec_of(names: list[str]) -> roo.FeatureSpec:
    return roo.FeatureSpec(request=[n for n in names if n[0] == "u"], impression=[n for n in names if n[0] == "x"])


def expand(batch: dict[str, Tensor], counts: list[int]) -> dict[str, Tensor]:
    """F(E U): the row of its request for every impression, one after the other."""
    rows = [r for r, count in enumerate(counts) for _ in range(count)]
    return {n: (torch.stack([t[r] for r in rows]) if rows else t[:0]) if n[0] == "u" else t for n, t in batch.items()}


def leaves(tree: Any) -> list[Any]:
    """The leaves of an output, dataclasses and lists included, in order."""
    if isinstance(tree, dict):
        return [leaf for key in tree for leaf in leaves(tree[key])]
    if isinstance(tree, (list, tuple)):
        return [leaf for part in tree for leaf in leaves(part)]
    if hasattr(tree, "__dataclass_fields__"):
        return leaves(vars(tree))
    return [tree]


def dense(grad: Tensor) -> Tensor:
    return grad.to_dense() if grad.is_sparse else grad


def close(got: Any, want: Any, what: str, relative: float = 1e-8) -> None:
    """Equal beyond rounding; None is a gradient of zeros."""
    assert got is None or want is None or type(got) is type(want) or isinstance(got, Tensor), what
    if not isinstance(want, Tensor):
        if isinstance(got, Tensor):
            assert not dense(got).any(), f"{what}: should be absent"
        else:
            assert got == want, f"{what}: {got!r} is not {want!r}"
        return
    want = dense(want)
    got = torch.zeros_like(want) if got is None else dense(got)
    assert got.shape == want.shape, f"{what}: {list(got.shape)} is not {list(want.shape)}"
    assert got.dtype == want.dtype, f"{what}: {got.dtype} is not {want.dtype}"
    scale = float(want.abs().nan_to_num(0, 0, 0).max()) if want.numel() and want.is_floating_point() else 1.0
    torch.testing.assert_close(
        got, want, rtol=relative, atol=relative * max(scale, 1e-3) / 10, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def run(model: nn.Module, call: Callable[[], Any], wrt: list[Tensor], seed: int) -> tuple[list[Any], list[Any]]:
    """Outputs, and the gradients of a weighted sum of them."""
    torch.manual_seed(seed)
    out = leaves(call())
    generator = torch.Generator().manual_seed(seed)
    tensors = [t for t in out if isinstance(t, Tensor)]
    drawn = [torch.rand(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in tensors]
    terms = [(t * w).sum() for t, w in zip(tensors, drawn) if t.requires_grad]
    if not terms:
        return out, [None] * len(wrt)
    loss = sum(terms)
    for t in wrt:
        t.grad = None
    loss.backward()
    grads = [None if t.grad is None else t.grad.clone() for t in wrt]
    return [t.detach() if isinstance(t, Tensor) else t for t in out], grads


def hold(
    truth: nn.Module, rewritten: Any, names: list[str], counts: list[int], seed: int, tolerance: float = 1e-8
) -> None:
    """Values, gradients and buffers of one call, against the original on the expanded batch."""
    torch.manual_seed(seed + 1000)
    batch = draw(names, len(counts), sum(counts))
    for t in batch.values():
        t.requires_grad_(t.is_floating_point())
    sides = list(batch.values())
    before = copy.deepcopy(truth.state_dict())
    try:
        expanded = expand(batch, counts)
        want, want_grads = run(truth, lambda: truth(*expanded.values()), [*truth.parameters(), *sides], seed)
    except Exception:  # the original cannot take such a batch; nothing to compare with
        truth.load_state_dict(before)
        with contextlib.suppress(Exception):
            rewritten(*batch.values(), num_impressions=torch.tensor(counts, dtype=torch.long))
        rewritten.load_state_dict(before)
        return
    number = torch.tensor(counts, dtype=torch.long)
    got, grads = run(
        rewritten, lambda: rewritten(*batch.values(), num_impressions=number), [*rewritten.parameters(), *sides], seed
    )
    assert len(got) == len(want), f"{counts}: {len(got)} outputs, not {len(want)}"
    for i, (a, b) in enumerate(zip(got, want)):
        close(a, b, f"{counts}: output {i}", tolerance)
    labels = [n for n, _ in truth.named_parameters()] + names
    for label, a, b in zip(labels, grads, want_grads, strict=True):
        close(a, b, f"{counts}: gradient of {label}", tolerance)
    for (label, a), b in zip(rewritten.named_buffers(), truth.buffers()):
        if not label.startswith("_roo."):
            close(a, b, f"{counts}: buffer {label}", tolerance)


def moved(rewritten: Any) -> bool:
    """Whether any operation runs once per request."""
    plan = rewritten._whole_program().plan
    return plan is not None and any(n.op == "call_function" for n in plan.request)


def made(kind: type, training: bool) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().train(training)


@pytest.fixture
def sound() -> Callable[[type], None]:
    """Rewrites a hazard in each of its modes and holds it against the original."""

    def check(kind: type) -> None:
        both = getattr(sys.modules[kind.__module__], "MODES", (False,))
        for training in getattr(kind, "modes", both):
            model, truth = made(kind, training), made(kind, training)
            names = names_of(model)
            example = draw(names, 7, 7)
            try:
                rewritten = roo.rewrite(
                    model, tuple(example.values()), spec=spec_of(names), fanout=64, **getattr(kind, "options", {})
                )
            except roo.RooError:
                assert getattr(kind, "refused", False), "refused although it can be run"
                return
            report = str(rewritten.report)
            assert "failed its check" not in report or getattr(kind, "caught", False), report
            assert "internal error" not in report, report
            assert moved(rewritten) or not kind.hoists, f"nothing is hoisted:\n{report}"
            for (n, a), b in zip(truth.named_buffers(), model.buffers()):
                close(b, a, f"rewrite changed buffer {n}")
            for seed, counts in enumerate(COUNTS):
                hold(truth, rewritten, names, counts, seed, getattr(kind, "tolerance", 1e-8))

    return check
