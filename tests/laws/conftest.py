"""A law as a theorem: a tiny model, split wherever it may be, against the original on the expanded batch.

The names of a model's inputs say their side: `u...` belongs to the request, anything else to the impression.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import roo_rewrite as roo

sys.path.insert(0, str(Path(__file__).parent))  # for law_parts
COUNTS = ([2, 0, 3], [1, 1, 1], [6], [0, 0], [], [1], [0, 4, 0, 3], [9, 0, 7, 1], [3, 3])
Inputs = dict[str, Tensor]
Draw = Callable[[int], Tensor]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small only wait for each other
    yield
    torch.set_num_threads(before)


def drawn(shape: Sequence[int]) -> Draw:
    """Draws n rows of this shape."""
    return lambda n: torch.randn(n, *shape, dtype=torch.float64)


@dataclass
class Law:
    """A model and its rewrite. `inputs` draws each input by name."""

    original: nn.Module
    model: Any
    inputs: dict[str, Draw]

    def batch(self, counts: Sequence[int]) -> Inputs:
        """A request-level batch; floats ask for gradients."""
        made = {n: draw(len(counts) if n[0] == "u" else sum(counts)) for n, draw in self.inputs.items()}
        return {n: t.requires_grad_() if t.is_floating_point() else t for n, t in made.items()}

    def expand(self, batch: Inputs, counts: Sequence[int]) -> Inputs:
        """The same batch, each request's row copied for each of its impressions, one by one."""
        rows = [r for r, n in enumerate(counts) for _ in range(n)]
        return {n: t[rows] if n[0] == "u" else t for n, t in batch.items()}

    def equal(self) -> None:
        """Values and gradients on every batch."""
        for counts in COUNTS:
            self.equal_on(counts)

    def equal_on(self, counts: Sequence[int]) -> None:
        batch = self.batch(counts)
        torch.manual_seed(0)
        try:
            want = _results(self.original, self.original(**self.expand(batch, counts)), batch)
        except (RuntimeError, ValueError, IndexError):
            few = 1 if self.original.training else 0  # batch norm has no statistics of one row
            assert sum(counts) <= few, "the original fails on a batch with impressions"
            return
        torch.manual_seed(0)
        got = _results(self.original, self.model(**batch, num_impressions=torch.tensor(counts).long()), batch)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, equal_nan=True, msg=lambda m: f"{counts}: {m}")

    def precise(self) -> None:
        """In fp32 and bf16: the distance of each value and gradient to a float64 truth, at most twice the original's.

        Half a unit in the last place is no error.
        """
        for dtype in (torch.float32, torch.bfloat16):
            original = copy.deepcopy(self.original).to(dtype)
            counts = [8, 0, 5, 20]
            batch = {n: t.detach().to(dtype).requires_grad_() for n, t in self.batch(counts).items()}
            example = {n: t[torch.tensor([0, 1, 0, 1, 2])].detach() for n, t in batch.items()}
            made = roo.rewrite(original, (), example, spec=self.model._inputs.spec, fanout=4, split="always")
            exact = {n: t.detach().double().requires_grad_() for n, t in batch.items()}
            truth = copy.deepcopy(original).double()
            want = _results(truth, truth(**self.expand(exact, counts)), exact)
            own = _results(original, original(**self.expand(batch, counts)), batch)
            got = _results(original, made(**batch, num_impressions=torch.tensor(counts)), batch)
            for a, b, t in zip(got, own, want, strict=True):
                slack = torch.finfo(dtype).eps / 2 * t.norm()
                assert (a - t).norm() <= 2 * (b - t).norm() + slack, f"{dtype}: {(a - t).norm()} > {(b - t).norm()}"

    def flops(self, requests: int = 3, each: int = 4) -> tuple[int, int]:
        """FLOPs of matrix products on an even batch: of the original, and of the rewrite."""
        counts = [each] * requests
        batch = self.batch(counts)
        expanded = self.expand(batch, counts)
        return _flops(lambda: self.original(**expanded)), _flops(
            lambda: self.model(**batch, num_impressions=torch.tensor(counts))
        )

    def moved(self) -> list[Any]:
        """What runs per request: the ATen ops, in order."""
        request = self.model._whole_program().plan.request
        return [n.target for n in request if n.op == "call_function"]

    def took(self) -> list[str]:
        """The priced splits that were made."""
        return [c.what for c in self.model._whole_program().candidates if c.taken]

    def code(self) -> str:
        return str(self.model.code)


def _results(original: nn.Module, out: Any, batch: Inputs) -> list[Tensor]:
    outputs = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
    floats = [t for t in outputs if t.requires_grad]
    weights = [torch.linspace(0.5, 1.5, t.numel(), dtype=t.dtype).view(t.shape) for t in floats]
    loss = sum((t * w).sum() for t, w in zip(floats, weights))
    asking = [*(p for p in original.parameters() if p.requires_grad), *(t for t in batch.values() if t.requires_grad)]
    if not isinstance(loss, Tensor) or not asking:
        return [t.detach() for t in outputs]
    grads = torch.autograd.grad(loss, asking, allow_unused=True)
    return [t.detach() for t in outputs] + [torch.zeros_like(p) if g is None else g for p, g in zip(asking, grads)]


def _flops(run: Callable[[], Any]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.fixture(scope="session")
def law() -> Callable[..., Law]:
    """law(model, u=shape, x=shape or a draw, ...): rewrites, checks every pass, and holds it against the original."""

    def make(model: nn.Module, /, *, training: bool = False, equal: bool = True, **inputs: Any) -> Law:
        model = model.double().train(training)
        draws = {n: d if callable(d) else drawn(d) for n, d in inputs.items()}
        example = {n: draw(5) for n, draw in draws.items()}
        names = list(draws)
        spec = roo.FeatureSpec(request=[n for n in names if n[0] == "u"], impression=[n for n in names if n[0] != "u"])
        rewritten = roo.rewrite(model, (), example, spec=spec, fanout=4, check=True, split="always")
        made = Law(model, rewritten, draws)
        if equal:
            made.equal()
        return made

    return make
