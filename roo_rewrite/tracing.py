"""Around a trace: what must not happen in it, and whose fault an error was."""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.nn.modules import module as _module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from roo_rewrite import spelled_out
from roo_rewrite.errors import CaptureError


def brief(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    text = re.sub(r"\s+", " ", lines[0]) if lines else type(e).__name__
    return f"{type(e).__name__}: {text[:200]}"


def size_fixed(error: BaseException) -> bool:
    """Whether the trace holds for one batch size only."""
    return "Constraints violated" in str(error)


def python_only(error: BaseException) -> bool:
    """Whether the trace met what only an interpreter of the model's bytecode follows: a size or a value made an int,
    NumPy."""
    return size_fixed(error) or any(text in str(error) for text in ("numpy", "extract specialized integer"))


class _LostCallError(RuntimeError):
    """Something inside of forward would be lost in the trace."""


@contextlib.contextmanager
def no_lost_calls() -> Iterator[None]:
    """While active, what a trace would lose raises: gradients taken or bent inside of forward, seeding."""

    def refuse(name: str) -> Callable[..., Any]:
        def refused(*args: Any, **kwargs: Any) -> Any:
            raise _LostCallError(f"forward calls {name}, which a trace loses")

        return refused

    places: list[tuple[Any, str]] = [
        (torch.Tensor, "register_hook"),
        (torch.Tensor, "backward"),
        (torch.autograd, "grad"),
        (torch.autograd, "backward"),
        (torch, "manual_seed"),
        (torch.random, "manual_seed"),
    ]
    saved = [getattr(owner, name) for owner, name in places]
    for owner, name in places:
        setattr(owner, name, refuse(name))
    try:
        yield
    finally:
        for (owner, name), original in zip(places, saved):
            setattr(owner, name, original)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """While active, dispatch modes and torch's own module trackers see nothing: a profiler or a counter of FLOPs around
    the call that builds a program would be traced with it. Global hooks of others stay, they may change values."""
    fake = any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack())
    hooks: list[dict[int, Any]] = [_module._global_forward_pre_hooks, _module._global_forward_hooks]
    saved = [dict(found) for found in hooks]
    for found in hooks:
        for key in [k for k, hook in found.items() if _is_tracker(getattr(hook, "__self__", None))]:
            del found[key]
    try:
        with contextlib.nullcontext() if fake else _disable_current_modes():
            yield
    finally:
        for found, before in zip(hooks, saved):
            found.clear()
            found.update(before)


_stance: Any = torch.compiler.set_stance


@contextlib.contextmanager
def as_written() -> Iterator[None]:
    """While active, what was compiled before runs as it was written, so that no trace, hook or mode of ours is compiled
    with it. What is compiled meanwhile still is: torch makes a graph of the branches of `cond` and kin that way."""
    plain: Any = torch.compile

    def compiled(model: Any = None, **options: Any) -> Any:
        made = plain(model, **options)
        if model is None or isinstance(model, torch.nn.Module):
            return made

        @functools.wraps(model)
        def run(*args: Any, **kwargs: Any) -> Any:
            with _stance("default"):
                return made(*args, **kwargs)

        return run

    vars(torch)["compile"] = compiled
    try:
        with _stance("force_eager"):
            yield
    finally:
        vars(torch)["compile"] = plain


def _is_tracker(owner: object) -> bool:
    return type(owner).__module__.startswith(("torch.utils.", "torch.distributed._tools."))


@contextlib.contextmanager
def assignments_allowed() -> Iterator[None]:
    """Models often keep an intermediate for inspection (`self.attn = a`); export alone forbids it."""
    _trace: Any = importlib.import_module("torch.export._trace")
    original = _trace._detect_attribute_assignment
    _trace._detect_attribute_assignment = lambda *a, **k: contextlib.nullcontext()
    try:
        yield
    finally:
        _trace._detect_attribute_assignment = original


@contextlib.contextmanager
def symbolic_len() -> Iterator[None]:
    """While active, `len(x)` of a tensor is `x.shape[0]`; as a plain number it would fix the batch size."""
    original = builtins.len

    def length(of: Any, /) -> Any:
        return of.shape[0] if isinstance(of, torch.Tensor) and of.ndim else original(of)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = original


class _SizeFixedError(RuntimeError):
    """A size was made a plain number."""


@contextlib.contextmanager
def sizes_kept() -> Iterator[None]:
    """While active, making a size of the batch a plain number raises, and so shows where."""
    saved = {name: getattr(torch.SymInt, name) for name in ("__int__", "__index__")}

    def asked(self: torch.SymInt) -> int:
        known = self.node.maybe_as_int()
        if known is None:
            raise _SizeFixedError(f"the size {self} is made a plain number")
        return int(known)

    for name in saved:
        setattr(torch.SymInt, name, asked)
    try:
        yield
    finally:
        for name, original in saved.items():
            setattr(torch.SymInt, name, original)


def _along_known(func: Callable[..., Any]) -> Callable[..., Any]:
    """`func`, which takes a tensor apart along a dim. Raises where its size is symbolic: a trace would fix it."""

    def apart(input: torch.Tensor, dim: int = 0) -> Any:
        size = input.shape[dim] if input.ndim else 1
        if isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None:
            raise _SizeFixedError(f"a tensor of {size} rows is taken apart row by row")
        return func(input, dim)

    return apart


def without_vmap(program: ExportedProgram) -> ExportedProgram:
    """The program with what runs under `vmap` as ops on whole batches. Raises CaptureError where it also writes."""
    if not any("_functorch" in str(getattr(n.target, "__module__", "")) for n in program.graph.nodes):
        return program
    made: ExportedProgram = program.run_decompositions({})
    signature = made.graph_signature
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        raise CaptureError("vmap beside changes in place is not traced")
    return made


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Neither torch nor the model says anything."""
    quiet = logging.getLogger("torch")
    level = quiet.level
    try:
        quiet.setLevel(logging.CRITICAL)
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        quiet.setLevel(level)


class Traceable(TorchFunctionMode):
    """While active, what a trace cannot follow or knows nothing of is said in ops that it follows."""

    INSTEAD: ClassVar[dict[Any, Callable[..., Any]]] = {
        torch.Tensor.data.__get__: torch.Tensor.detach,  # type: ignore[attr-defined]
        torch.take_along_dim: spelled_out.take_along_dim,
        torch.Tensor.take_along_dim: spelled_out.take_along_dim,
        torch.combinations: spelled_out.combinations,
        torch.kron: spelled_out.kron,
        torch.Tensor.kron: spelled_out.kron,
        torch.linalg.multi_dot: spelled_out.multi_dot,
        torch.chain_matmul: spelled_out.chain_matmul,
        torch.cov: spelled_out.cov,
        torch.Tensor.cov: spelled_out.cov,
        torch.corrcoef: spelled_out.corrcoef,
        torch.Tensor.corrcoef: spelled_out.corrcoef,
        torch.vander: spelled_out.vander,
        torch.gradient: spelled_out.gradient,
        torch.Tensor.__iter__: _along_known(lambda x, _: iter(torch.unbind(x))),
        torch.Tensor.unbind: _along_known(torch.unbind),
        torch.unbind: _along_known(torch.unbind),
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.INSTEAD.get(func, func)(*args, **(kwargs or {}))
