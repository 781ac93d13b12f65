"""What a forward does besides returning a value: Python state, random numbers, hooks on gradients.

A trace sees one call. What the next call finds changed by it is lost in the trace, so a model that
remembers is not traced: the original runs, and remembers.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from roo_rewrite.copies import deep
from roo_rewrite.errors import CaptureError
from roo_rewrite.python_draws import counted

_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_OWN = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
_SHOWN = {"training", "in_features", "out_features", "num_embeddings", "embedding_dim", "num_features", "inplace"}
_LONG = 1000
DRAWS = "forward draws from Python's or NumPy's random generator"


def twin(model: nn.Module) -> nn.Module:
    """A copy of `model` with the same parameters, but buffers and Python state of its own.

    Raises CaptureError where it holds something that cannot be copied.
    """
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    memo.update({id(t): t for t in kept(model)})
    try:
        copied = deep(model, memo)
    except Exception as e:
        raise CaptureError(f"the model cannot be copied, so not be tried out: {type(e).__name__}: {e}") from e
    assert isinstance(copied, nn.Module)
    return copied


def duplicate(model: nn.Module) -> nn.Module:
    """A copy of `model`, parameters included."""
    memo: dict[int, Any] = {id(t): t for t in kept(model)}
    made = deep(model, memo)
    assert isinstance(made, nn.Module)
    for name, module in model._modules.items():
        if name not in made._modules:  # a GraphModule's own copy has only what its code reads
            made._modules[name] = deep(module, memo)
    return made


def kept(model: nn.Module) -> list[Tensor]:
    """Results of former calls that modules keep as attributes; torch cannot copy them, so copies share them."""
    values = [v for m in model.modules() for v in vars(m).values()]
    inner = [
        w for v in values if isinstance(v, (list, tuple, dict)) for w in (v.values() if isinstance(v, dict) else v)
    ]
    return [t for t in (*values, *inner) if isinstance(t, Tensor) and not t.is_leaf]


def _tensors(model: nn.Module) -> list[Tensor]:
    """Tensors kept as plain attributes."""
    return [v for m in model.modules() for v in vars(m).values() if isinstance(v, Tensor)]


def state(model: nn.Module) -> dict[str, Any]:
    """The Python state of every module by path: plain values, containers and objects of them, in depth."""
    return {f"{p}.{k}".lstrip("."): _value(v, 4) for p, m in model.named_modules() for k, v in _attributes(m)}


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((k, v) for k, v in vars(module).items() if k not in _OWN and not k.endswith("_hooks"))


def _value(value: Any, depth: int) -> Any:
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, nn.Module) or callable(value) or depth == 0:
        return "opaque"
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, Mapping):
        return {repr(k): _value(v, depth - 1) for k, v in list(value.items())[:_LONG]}, len(value)
    if isinstance(value, (list, tuple, set, frozenset)) or type(value).__name__ == "deque":
        return [_value(v, depth - 1) for v in list(value)[:_LONG]], len(value)
    if hasattr(value, "bit_generator"):
        return repr(value.bit_generator.state)
    if hasattr(value, "__dict__"):
        return _value(vars(value), depth - 1)
    return repr(value) if type(value).__module__ == "itertools" else "opaque"


def settings(model: nn.Module, ran: nn.Module) -> list[tuple[str, str]]:
    """Path of a module and name of an attribute, for all plain values a call may read and does not change.

    ran: a twin of `model` after a call. What torch's own modules keep for show is left out.
    """
    others = {path: vars(m) for path, m in ran.named_modules()}  # without those that the call took out or put twice
    return [
        (path, key)
        for path, m in model.named_modules()
        for key, value in _attributes(m)
        if isinstance(value, (int, float, str, type(None))) and key not in _SHOWN
        if path in others and others[path].get(key) == value
    ]


def _generators() -> tuple[Any, Any]:
    numpy = sys.modules.get("numpy")
    return random.getstate(), repr(numpy.random.get_state(legacy=False)) if numpy is not None else None


@contextlib.contextmanager
def random_kept() -> Iterator[None]:
    """Puts the random states of torch (CPU), Python and NumPy back as they were."""
    numpy = sys.modules.get("numpy")
    saved = random.getstate(), numpy.random.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(saved[0])
        if numpy is not None:
            numpy.random.set_state(saved[1])


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch (CPU), Python and NumPy, and puts their random states back."""
    numpy = sys.modules.get("numpy")
    with random_kept():
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy is not None:
            numpy.random.seed(seed)
        yield


def untraceable(
    model: nn.Module, first: Callable[[nn.Module], Any], second: Callable[[nn.Module], Any]
) -> tuple[str | None, int]:
    """Why one trace cannot stand for every call of `model`; None where nothing speaks against it but the numbers that
    a call draws from Python's or NumPy's generator, which are counted: they must reach nothing (`python_draws`).

    first, second: run a given copy of the model on two different batches, and return what it returned.
    """
    if model._backward_hooks or model._backward_pre_hooks:
        return "the model has backward hooks of its own", 0
    fresh = twin(model)
    with random_kept(), torch.no_grad():
        torch.manual_seed(0)
        before = _generators()
        with counted(1):
            ran = _after(model, first)
        _spoil(ran)
        known, buffers = state(ran), dict(ran.named_buffers())
        versions = [(t, t._version) for t in _tensors(ran)]
        changed = [name for name, value in buffers.items() if name not in dict(fresh.named_buffers())]
        _load(fresh, buffers)
        torch.manual_seed(0)
        with counted(2) as draws:
            one = second(ran)
        if draws.others or _generators() != before:
            return DRAWS, 0
        torch.manual_seed(0)
        with counted(2):
            two = second(fresh)
    changed += [n for n, v in state(ran).items() if known.get(n) != v]
    changed += [n for n, b in ran.named_buffers() if b is not buffers.get(n)]
    if any(t._version != version for t, version in versions):
        return "forward writes into a tensor that is not a buffer", 0
    if changed:
        return f"forward keeps state in {changed[0]!r}; make it a buffer that is written in place", 0
    if not _same(one, two):
        return "what forward returns depends on the calls before", 0
    return None, draws.count


def _after(model: nn.Module, first: Callable[[nn.Module], Any]) -> nn.Module:
    """A twin after a call, with gradients where the model runs with them: they tell what it keeps of its parameters."""
    ran = twin(model)
    try:
        with torch.enable_grad():
            first(ran)
    except Exception:  # whatever user code raises
        ran = twin(model)
        first(ran)
    return ran


def _spoil(ran: nn.Module) -> None:
    """NaN for what calls left in attributes and a gradient would flow through: a trace would not know to read it."""
    left = {id(t) for t in kept(ran)}

    def spoiled(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.full_like(value, torch.nan) if id(value) in left else value
        inner = value.values() if type(value) is dict else value if type(value) in (list, tuple) else ()
        if not any(id(v) in left for v in inner):
            return value
        return {k: spoiled(v) for k, v in value.items()} if type(value) is dict else type(value)(map(spoiled, value))

    for module in ran.modules():
        vars(module).update({key: spoiled(value) for key, value in _attributes(module)})


def _load(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if name in buffers and buffer.shape == buffers[name].shape:
            buffer.copy_(buffers[name])


def _same(one: Any, two: Any) -> bool:
    if len(one) != len(two):
        return False
    for a, b in zip(one, two):
        if a.shape != b.shape or not torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True):
            return False
    return True
