"""MODEL on the command line: a callable, or a `.pt2` file."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from roo_rewrite.errors import CaptureError

Call = tuple[tuple[Any, ...], dict[str, Any]]
FORMS = "package.module:callable, path/file.py:callable, or a .pt2 file"


def load(target: str) -> tuple[nn.Module, Call]:
    """The module MODEL names and one impression-level example. Raises CaptureError."""
    if target.endswith(".pt2"):
        return load_pt2(Path(target))
    where, _, name = target.rpartition(":")
    if not where or not name:
        raise CaptureError(f"MODEL {target!r} is none of {FORMS}")
    return _called(target, _attribute(target, _module(target, where), name))


def _module(target: str, where: str) -> Any:
    try:
        if where.endswith(".py"):
            return _file(Path(where))
        sys.path.insert(0, "")
        return importlib.import_module(where)
    except Exception as e:
        raise CaptureError(f"MODEL {target!r}: cannot import {where}: {type(e).__name__}: {e}") from e


def _file(path: Path) -> Any:
    """The module of a file; its directory and the present one can be imported from, as when it is run."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    sys.path[:0] = [str(path.resolve().parent), ""]
    inside = _package(path)
    if inside is not None:
        return importlib.import_module(inside)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _package(path: Path) -> str | None:
    """The dotted name of a file that lies in packages below the present directory."""
    try:
        parts = path.resolve().relative_to(Path.cwd()).with_suffix("").parts
    except ValueError:
        return None
    folders = [Path(*parts[: i + 1]) for i in range(len(parts) - 1)]
    if not folders or not all((f / "__init__.py").is_file() for f in folders):
        return None
    return ".".join(parts)


def _attribute(target: str, module: Any, name: str) -> Callable[[], Any]:
    try:
        found = getattr(module, name)
    except AttributeError as e:
        raise CaptureError(f"MODEL {target!r}: {e}") from None
    if not callable(found):
        raise CaptureError(f"MODEL {target!r}: {name} is no callable; write a function returning module, args, kwargs")
    return found  # type: ignore[no-any-return]


def _called(target: str, make: Callable[[], Any]) -> tuple[nn.Module, Call]:
    try:
        made = make()
    except Exception as e:
        raise CaptureError(f"MODEL {target!r} raised {type(e).__name__}: {e}") from e
    fits = isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module)
    if not fits or not isinstance(made[1], (tuple, list)):
        what = f"a tuple of {[type(v).__name__ for v in made]}" if isinstance(made, tuple) else type(made).__name__
        raise CaptureError(
            f"MODEL {target!r} must return (module, args, kwargs), one impression-level example; got {what}"
        )
    return made[0], (tuple(made[1]), dict(made[2]) if len(made) == 3 else {})


# -- .pt2


def load_pt2(path: Path) -> tuple[nn.Module, Call]:
    """The impression-level model of an exported program, and the example stored with it. Raises CaptureError."""
    if not path.is_file():
        raise CaptureError(f"no file {path}")
    if not zipfile.is_zipfile(path):
        raise CaptureError(f"{path} is no .pt2: write it with torch.export.save")
    try:
        with _weights_only():
            program = torch.export.load(path)
    except Exception as e:
        raise CaptureError(f"{path} cannot be loaded by torch.export.load: {type(e).__name__}: {e}") from e
    if program.example_inputs is None:
        raise CaptureError(f"{path} holds no example inputs; export and save it again with torch {torch.__version__}")
    _check_dynamic(path, program)
    module = program.module()
    for name in ("train", "eval"):  # these raise on an exported module; its one mode is in its graph
        module.__dict__.pop(name, None)
    args, kwargs = program.example_inputs
    return module, (tuple(args), dict(kwargs))


def _check_dynamic(path: Path, program: torch.export.ExportedProgram) -> None:
    values = [
        n.meta["val"]
        for n in program.graph.nodes
        if n.op == "placeholder" and n.name in program.graph_signature.user_inputs
    ]
    fixed = [v for v in values if isinstance(v, Tensor) and v.ndim and not isinstance(v.shape[0], torch.SymInt)]
    if not fixed:
        return
    args, kwargs = program.example_inputs or ((), {})
    names = list(inspect.signature(program.module().forward).parameters)
    shapes = {n: _shapes(v) for n, v in zip(names, (*args, *kwargs.values()))}
    text = ", ".join(f"{n!r}: {s}" for n, s in shapes.items())
    raise CaptureError(
        f"{path} has a static batch (an input of shape {list(fixed[0].shape)}); export it with a dynamic one, from two "
        f"rows or more: torch.export.export(model, args, kwargs, dynamic_shapes={{{text}}})"
    )


def _shapes(value: Any) -> str:
    dim = "{0: torch.export.Dim.DYNAMIC}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_shapes(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shapes(v) for v in value) + "]"
    return dim if isinstance(value, Tensor) else str(pytree.tree_map(lambda _: None, value))


@contextmanager
def _weights_only() -> Iterator[None]:
    """No code is run from a file: torch.export.load would fall back to plain pickles."""
    original = torch.load

    def load(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "weights_only": True})

    torch.load = load
    try:
        yield
    finally:
        torch.load = original
