"""A RequestModel as files: a `.pt2`, Python source with a safetensors file, and its report.

    write(model, "out")     out/model.pt2, out/model.py, out/weights.safetensors, out/report.{txt,json,html}

What is written has been loaded again and compared with the model. A form that is not possible is left out
and named; nothing is written where none is.
"""

from __future__ import annotations

import inspect
import logging
import re
import runpy
import shutil
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from roo_rewrite.closeness import compare
from roo_rewrite.copies import deep
from roo_rewrite.equivalence import draw_batch
from roo_rewrite.errors import EmitError
from roo_rewrite.facts import Provenance
from roo_rewrite.module import RequestModel
from roo_rewrite.program import Program
from roo_rewrite.python_source import python_source

_COUNTS = [2, 0, 3, 1, 5, 4, 4]
_CHECKED = ([3, 0, 2], [1, 1, 1, 1], [5])


def export_program(model: RequestModel) -> ExportedProgram:
    """The model in its present mode through torch.export, R and I dynamic. Raises EmitError where that fails."""
    _program(model)
    args, kwargs, counts = _call(model, _COUNTS)
    given = {**kwargs, "num_impressions": counts}
    bound = inspect.signature(model.forward).bind(*args, **given).arguments
    rest = next((p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is p.VAR_KEYWORD), None)
    if rest in bound:
        raise EmitError(f"torch.export cannot name the dims of **{rest}; give forward named parameters")
    with _quiet():
        try:
            return torch.export.export(model, args, given, dynamic_shapes=_dynamic(dict(bound)), strict=False)
        except Exception as e:
            raise EmitError(f"torch.export does not take the rewritten model: {_brief(e)}") from e


def write(model: RequestModel, out: str | Path, step: Callable[[str], None] = lambda text: None) -> list[str]:
    """Writes every form of the model that is possible to directory `out`, at once; returns what was left out and why.

    `out` must not exist, or be empty. step: told what is being done. Raises EmitError where `out` is taken or
    neither a `.pt2` nor Python source is possible.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EmitError(f"{out} exists and is not an empty directory; name another one")
    if not out.parent.is_dir():
        raise EmitError(f"{out.parent} is no directory; make it first")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        made = Path(temporary) / "out"
        made.mkdir()
        notes: list[str] = []
        for name, form in (("model.pt2", _write_program), ("model.py", _write_source)):
            step(f"writing {name}")
            try:
                notes += [f"{name}: {note}" for note in form(model, made)]
            except EmitError as e:
                notes.append(f"{name} is not written: {e}")
        if not any(made.iterdir()):
            raise EmitError("no form of the model can be written:\n  " + "\n  ".join(notes))
        step("writing report")
        report = model.report
        for ending, text in (("txt", report.text), ("json", report.to_json()), ("html", report.to_html())):
            (made / f"report.{ending}").write_text(text + "\n", encoding="utf-8")
        if out.exists():
            out.rmdir()
        shutil.move(made, out)
    return notes


def _program(model: RequestModel) -> Program:
    """The program of the present mode. Raises EmitError where the original runs in its place."""
    program = model._whole_program()
    if program.emitted is None or program.captured is None:
        raise EmitError("nothing could be proved, so the rewritten model is the original: " + "; ".join(program.notes))
    return program


def _write_program(model: RequestModel, out: Path) -> list[str]:
    exported = export_program(model)
    with _quiet():
        try:
            torch.export.save(exported, out / "model.pt2")
            loaded = torch.export.load(out / "model.pt2").module()
        except Exception as e:
            (out / "model.pt2").unlink(missing_ok=True)
            raise EmitError(f"the exported model cannot be saved and loaded again: {_brief(e)}") from e
    return _checked(model, loaded, out / "model.pt2")


def _write_source(model: RequestModel, out: Path) -> list[str]:
    program = _program(model)
    assert program.emitted is not None
    assert program.captured is not None
    kinds, values = weights(model)
    title = f"{model.report.model}, request-level, {'train' if model.training else 'eval'} mode."
    source = python_source(model, model._inputs, program.captured, program.emitted, {"title": title, **kinds})
    (out / "model.py").write_text(source, encoding="utf-8")
    save_file(values, out / "weights.safetensors")
    (out / "weights.safetensors").chmod(0o644)
    try:
        return _checked(model, _loaded(model, out / "model.py"), out / "model.py")
    except EmitError:
        (out / "weights.safetensors").unlink()
        raise


def _loaded(model: RequestModel, path: Path) -> nn.Module:
    """The model of a file just written, its leaves copied from the model."""
    try:
        written = runpy.run_path(str(path), run_name="model")
        leaves = {p: deep(model.get_submodule(p)) for p in written["LEAVES"]}
        made: nn.Module = written["load"](leaves=leaves).train(model.training)
    except Exception as e:
        raise EmitError(f"the file does not load: {_brief(e)}") from e
    return made


def _checked(model: RequestModel, loaded: nn.Module, path: Path) -> list[str]:
    """Compares a form with the model, and removes it where it differs. A batch of one may differ: that is noted."""
    compared = False
    for counts in _CHECKED:
        expected = _outputs(model, model, counts)
        if isinstance(expected, str):  # the model itself cannot take such a batch
            continue
        compared = True
        found = _difference(model, loaded, counts, expected)
        if found is not None:
            path.unlink()
            raise EmitError(f"it differs from the model: {found}, num_impressions={counts}")
    if not compared:
        path.unlink()
        raise EmitError("it cannot be compared with the model, which runs on none of the batches drawn")
    expected = _outputs(model, model, [1])
    one = None if isinstance(expected, str) else _difference(model, loaded, [1], expected)
    return [] if one is None else [f"a batch of one impression differs from the original: {one}"]


def _difference(model: RequestModel, loaded: nn.Module, counts: list[int], expected: list[Tensor]) -> str | None:
    found = _outputs(model, loaded, counts)
    return f"it fails: {found}" if isinstance(found, str) else compare(found, expected)


def _outputs(model: RequestModel, module: nn.Module, counts: list[int]) -> list[Tensor] | str:
    """Output tensors of `module` on a batch of `model`, or how it fails."""
    args, kwargs, number = _call(model, counts)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _kept(module):
        torch.manual_seed(0)
        try:
            return list(_tensors(module(*args, num_impressions=number, **kwargs)))
        except Exception as e:
            return _brief(e)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of an output; a SimpleNamespace stands for a class that plain torch does not have."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, types.SimpleNamespace):
            yield from (t for v in vars(leaf).values() for t in _tensors(v))
        elif isinstance(leaf, Tensor):
            yield leaf


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Buffers are put back: a training run moves them."""
    saved = [(b, b.detach().clone()) for b in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in saved:
            buffer.detach().copy_(value)


def _call(model: RequestModel, counts: list[int]) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """A request-level call with these counts, its rows drawn from the example."""
    example, statics = model._example
    batch = draw_batch(model._inputs, example, counts, torch.Generator().manual_seed(0))
    args, kwargs = model._inputs.unflatten(batch.atoms, Provenance.REQUEST, statics)
    return args, kwargs, batch.counts


def _dynamic(value: Any) -> Any:
    """dim 0 of every tensor dynamic, in the structure torch.export wants: containers of its own become lists."""
    if isinstance(value, Tensor):
        return {0: Dim.DYNAMIC} if value.ndim else None
    if type(value) is dict:
        return {k: _dynamic(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_dynamic(v) for v in value)
    leaves = pytree.tree_flatten(value, is_leaf=lambda v: v is not value)[0]
    return [_dynamic(v) for v in leaves] if leaves and leaves[0] is not value else None


def weights(model: RequestModel) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Name -> kind of every tensor of the model, and the tensors to store.

    Kinds: parameter, frozen (no gradient), buffer, unsaved (a buffer outside the state_dict), `=name` (shared).
    """
    kinds: dict[str, str] = {}
    values: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    saved = model.state_dict(keep_vars=True)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            kinds[name] = f"={first[id(parameter)]}"
            continue
        first[id(parameter)] = name
        kinds[name] = "parameter" if parameter.requires_grad else "frozen"
        values[name] = parameter.detach().cpu().contiguous().clone()
    constants = model._roo.named_buffers(prefix="_roo", remove_duplicate=False)
    for name, buffer in (*model.named_buffers(remove_duplicate=False), *constants):
        kinds[name] = "buffer" if name in saved else "unsaved"
        values[name] = buffer.detach().cpu().contiguous().clone()
    return kinds, values


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export warns and logs about much that the error raised says again."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _brief(error: BaseException) -> str:
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = re.sub(r"\s+", " ", lines[0])[:200] if lines else ""
    return f"{type(error).__name__}: {first}"
