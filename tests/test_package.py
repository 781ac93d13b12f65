"""The package as a whole: no import cycles, and public names that are what they say."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import roo_rewrite
import roo_rewrite.data

ROOT = Path(roo_rewrite.__file__).parent.parent
# Need a package of an extra; they are imported by who asks for them.
OPTIONAL = {"pyspark"}


def modules() -> list[str]:
    files = [f for package in ("roo_rewrite", "passes") for f in sorted((ROOT / package).rglob("*.py"))]
    names = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files]
    return [n.removesuffix(".__init__") for n in names]


def test_every_module_can_be_imported() -> None:
    """Whatever module of roo_rewrite is asked for first, its package comes first: their order is always the same."""
    for name in (n for n in modules() if n.startswith("roo_rewrite")):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as e:
            if e.name not in OPTIONAL:
                raise


def test_every_pass_can_be_imported_first() -> None:
    """A cycle shows only in who is first: `passes` brings most in one order, the others are first in a fork each."""
    names = [n for n in modules() if n.startswith("passes")]
    script = f"""
import gc, os, sys
import passes
gc.disable()  # a child would copy all it looks at
failed = []
for name in [n for n in {names!r} if n not in sys.modules]:
    child = os.fork()
    if child == 0:
        try:
            __import__(name)
            os._exit(0)
        except BaseException as e:
            print(name, repr(e), file=sys.stderr, flush=True)
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        failed.append(name)
sys.exit(", ".join(failed) or 0)
"""
    command = [sys.executable, "-W", "ignore", "-c", script]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", ["roo_rewrite", "roo_rewrite.data"])
def test_all_is_what_is_importable(name: str) -> None:
    module = importlib.import_module(name)
    public = {
        n
        for n, value in vars(module).items()
        if not n.startswith("_") and getattr(value, "__module__", "").startswith("roo_rewrite")
    }
    assert sorted(module.__all__) == sorted(public)
    assert list(module.__all__) == sorted(module.__all__)


def test_only_the_pipeline_looks_up() -> None:
    """`passes` imports `roo_rewrite`; in the other direction pass modules only, never names, and from one place."""
    above = {
        f.relative_to(ROOT).as_posix()
        for f in (ROOT / "roo_rewrite").rglob("*.py")
        if any(line.strip().startswith(("import passes", "from passes")) for line in f.read_text().splitlines())
    }
    assert above == {"roo_rewrite/pipeline.py"}
    assert "from passes" not in (ROOT / "roo_rewrite/pipeline.py").read_text()


def test_errors_are_one_tree_drawn_in_the_docstring() -> None:
    errors = importlib.import_module("roo_rewrite.errors")
    for name in ("SpecError", "InputError", "CaptureError", "EquivalenceError", "EmitError", "DataError"):
        assert issubclass(getattr(errors, name), errors.RooError)
        assert name in (errors.__doc__ or "")


def test_templates_are_beside_the_code() -> None:
    assert {f.name for f in (ROOT / "roo_rewrite").glob("*.j2")} == {"model.py.j2", "report.html.j2"}
