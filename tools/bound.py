"""How far a model can be hoisted, found without a compiler: the scalar bound.

The model runs several times on the same request inputs with other impression inputs, one impression per request, and
the operands of every matrix product are kept. An element that is the same in every run depends on the request alone.
Of the multiply-adds of those products,

    net      belong to a product whose output never changes: what hoisting whole operators can reach
    scalar   have two factors that never change: what splitting operators can reach

and run once per request, the rest once per impression; products of weights alone, whose shapes do not depend on the
batch, run once per call on either side. Linearity and expands may regroup a product and go below.

    python -m tools.bound fixtures/din.py:example_model --spec fixtures/din.toml --fanout 10
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from roo_rewrite.copies import deep
from roo_rewrite.errors import InputError, RooError
from roo_rewrite.facts import Provenance
from roo_rewrite.features import FeatureSpec
from roo_rewrite.inputs import Inputs, bind_inputs

aten = torch.ops.aten
RUNS = 6
Bilinear = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Bound:
    """Multiply-adds, as FLOPs (2 each), at `rows` requests of one impression.

    total: all of them; net, scalar: those that could run once per request, see the module. `*_left`: FLOPs at
    `fanout` impressions per request over the original's, in [0, 1].
    """

    total: int
    net: int
    scalar: int
    fanout: float
    rows: int

    def left(self, per_request: int) -> float:
        """What is left where `per_request` FLOPs of `total` run once per request."""
        return 1.0 if not self.total else 1 - per_request / self.total * (1 - 1 / self.fanout)

    @property
    def net_left(self) -> float:
        return self.left(self.net)

    @property
    def scalar_left(self) -> float:
        return self.left(self.scalar)


@dataclass
class Product:
    """One matrix product: `run(a, b)`, and where `a`, `b` and the output were the same in every run so far.

    per_call: whether its shapes are the same for a batch of any size.
    """

    name: str
    run: Bilinear
    values: tuple[Tensor, Tensor, Tensor]
    same: tuple[Tensor, Tensor, Tensor]
    per_call: bool = False

    def compare(self, other: Product) -> Product:
        if self.name != other.name or any(a.shape != b.shape for a, b in zip(self.values, other.values)):
            shapes = [[list(v.shape) for v in p.values[:2]] for p in (self, other)]
            raise InputError(
                f"the model runs other products on other impressions: {self.name} {shapes[0]}, then {other.name} "
                f"{shapes[1]}; the bound needs shapes that do not depend on the impression inputs"
            )
        same = tuple(s & _equal(a, b) for s, a, b in zip(self.same, self.values, other.values))
        return Product(self.name, self.run, self.values, same)

    def flops(self) -> tuple[int, int, int]:
        """(total, net, scalar): the product of two indicators counts pairs of factors."""
        a, b, out = (s.double() for s in self.same)
        total = 2 * int(self.run(torch.ones_like(a), torch.ones_like(b)).sum())
        if self.per_call:
            return total, 0, 0
        return total, total if bool(out.all()) else 0, 2 * int(self.run(a, b).sum())


def _equal(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


_PLAIN = {f: f for f in (aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default, aten.vdot.default)}
_ADDED = {  # (input, a, b): the product alone
    aten.addmm.default: aten.mm.default,
    aten.addmm_.default: aten.mm.default,
    aten.baddbmm.default: aten.bmm.default,
    aten.baddbmm_.default: aten.bmm.default,
    aten.addbmm.default: aten.bmm.default,
    aten.addmv.default: aten.mv.default,
}
_DEAD = {  # units that are flat where they are off: floor of each
    aten.relu: lambda x, *rest: 0.0,
    aten.relu_: lambda x, *rest: 0.0,
    aten.clamp_min: lambda x, low, *rest: low,
    aten.clamp_min_: lambda x, low, *rest: low,
    aten.threshold: lambda x, low, *rest: low,
    aten.threshold_: lambda x, low, *rest: low,
    aten.hardtanh: lambda x, low=-1.0, *rest: low,
    aten.hardtanh_: lambda x, low=-1.0, *rest: low,
}


class Record(TorchDispatchMode):
    """Keeps every matrix product in `products`; runs ReLU and its kin as softplus, so that no unit is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Product] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        floor = _DEAD.get(func.overloadpacket)
        if floor is not None and args[0].is_floating_point() and not isinstance(floor(*args), Tensor):
            low = floor(*args)
            out = F.softplus(args[0] - low) + low
            return args[0].copy_(out) if func.overloadpacket.__name__.endswith("_") else out
        found = _operands(func, args)
        kept = [x.detach().clone() for x in found[1]] if found else []
        out = func(*args, **(kwargs or {}))
        if found:
            a, b, result = *kept, out.detach().clone()
            same = tuple(torch.ones_like(x, dtype=torch.bool) for x in (a, b, result))
            self.products.append(Product(func.__name__, found[0], (a, b, result), same))
        return out


def _operands(func: Any, args: tuple[Any, ...]) -> tuple[Bilinear, tuple[Tensor, Tensor]] | None:
    """The bilinear map of `func` and its two operands, if it is a matrix product."""
    if func in _PLAIN:
        return func, (args[0], args[1])
    if func in _ADDED:
        return _ADDED[func], (args[1], args[2])
    if func is aten.convolution.default:
        rest = args[3:]
        return lambda x, w: aten.convolution.default(x, w, None, *rest), (args[0], args[1])
    if func is aten._trilinear.default:
        # F.bilinear, weight [o, n, m]: the products of its two inputs are one factor.
        pairs = (args[0].unsqueeze(2) * args[2].unsqueeze(1)).flatten(1)
        return torch.mm, (pairs, args[1].flatten(1).t())
    return None


@contextmanager
def decomposed() -> Iterator[None]:
    """Attention, recurrent layers and transformer layers run as the products they are made of."""
    fastpath, mkldnn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch._C._set_mkldnn_enabled(mkldnn)


def products(model: nn.Module, inputs: Inputs, atoms: Sequence[Tensor], runs: int = RUNS) -> list[Product]:
    """Every matrix product of `model`, compared over `runs` runs on the atoms of an impression-level call.

    Fresh impression inputs are the example's own rows, moved round. Raises InputError for an example of too few rows
    and for a model whose products depend on the impressions.
    """
    rows = inputs.rows(atoms, Provenance.IMPRESSION)
    if rows is None or rows < runs:
        raise InputError(f"the bound moves {runs} runs' impressions round: give an example of {runs} rows, not {rows}")
    model = deep(model).eval()
    seen: list[Product] = []
    for run in range(runs):
        moved = inputs.select(atoms, torch.arange(rows).roll(run), [Provenance.IMPRESSION])
        found = _recorded(model, inputs, moved)
        if run and len(found) != len(seen):
            raise InputError(
                f"the model runs {len(seen)} products on some impressions and {len(found)} on others; "
                f"the bound needs a program that does not depend on the impression inputs"
            )
        seen = [p.compare(q) for p, q in zip(seen, found)] if run else found
    fewer = inputs.select(atoms, torch.arange(rows - 1), [Provenance.REQUEST, Provenance.IMPRESSION])
    few = _recorded(model, inputs, fewer)
    if len(few) == len(seen):
        for p, q in zip(seen, few):
            p.per_call = all(a.shape == b.shape for a, b in zip(p.values, q.values))
    return seen


def _recorded(model: nn.Module, inputs: Inputs, atoms: Sequence[Tensor]) -> list[Product]:
    """The products of one impression-level call."""
    args, kwargs = inputs.unflatten([a.clone() for a in atoms], Provenance.IMPRESSION)
    with decomposed(), Record() as record:
        model(*args, **kwargs)
    return record.products


def bound(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], spec: FeatureSpec, fanout: float, runs: int = RUNS
) -> Bound:
    """The bound of an impression-level model for this example (at least `runs` rows) at `fanout` = I/R, at least 1."""
    if fanout < 1:
        raise InputError(f"fanout is impressions per request, at least 1, got {fanout}")
    inputs = bind_inputs(model.forward, args, kwargs, spec)
    atoms, _ = inputs.flatten(args, kwargs, Provenance.IMPRESSION)
    counts = [p.flops() for p in products(model, inputs, atoms, runs)]
    total, net, scalar = (sum(c) for c in zip(*counts)) if counts else (0, 0, 0)
    return Bound(total, net, scalar, fanout, inputs.rows(atoms, Provenance.IMPRESSION) or 0)


def load_model(reference: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """`package.module:callable` or `path/file.py:callable`, which returns a module and one example."""
    where, _, name = reference.rpartition(":")
    if not where:
        raise click.BadParameter(f"{reference!r}: write package.module:callable or file.py:callable")
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"_model_{Path(where).stem}", where)
            if spec is None or spec.loader is None:
                raise ImportError(f"{where} is no Python file")
            module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        made = getattr(module, name)()
    except (ImportError, OSError, AttributeError) as e:
        raise click.BadParameter(f"{reference!r}: {e}") from e
    model, args, kwargs = made
    return model, tuple(args), dict(kwargs)


def render(found: Bound, console: Console) -> None:
    table = Table(title=f"FLOPs left at fan-out {found.fanout:g}")
    for column in ("", "FLOPs once per request", "left"):
        table.add_column(column, justify="right" if column else "left")
    for name, flops in (("as it is", 0), ("net bound", found.net), ("scalar bound", found.scalar)):
        table.add_row(name, f"{flops:,} of {found.total:,}", f"{found.left(flops):.3f}")
    console.print(table)


@click.command()
@click.argument("model")
@click.option("--spec", "spec_file", required=True, type=click.Path(exists=True, dir_okay=False), help="TOML spec file")
@click.option("--fanout", default=10.0, show_default=True, help="impressions per request")
@click.option("--runs", default=RUNS, show_default=True, type=click.IntRange(2), help="runs on other impressions")
@click.option("--json", "as_json", is_flag=True, help="one JSON object on stdout")
def main(model: str, spec_file: str, fanout: float, runs: int, as_json: bool) -> None:
    """FLOPs of MODEL (package.module:callable or file.py:callable) that could run once per request."""
    module, args, kwargs = load_model(model)
    try:
        found = bound(module, args, kwargs, FeatureSpec.from_toml(spec_file), fanout, runs)
    except RooError as e:
        raise click.UsageError(str(e)) from e
    if as_json:
        click.echo(json.dumps({**asdict(found), "net_left": found.net_left, "scalar_left": found.scalar_left}))
    else:
        render(found, Console())


if __name__ == "__main__":
    main()
