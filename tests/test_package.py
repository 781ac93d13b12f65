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


def test_every_module_can_be_imported_first() -> None:
    """A fork before each: a cycle shows only in who is first. What is not ours is imported before, once."""
    script = f"""
import importlib, os, sys
ours = ("roo_rewrite", "passes")
def forked(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as e:
            missing = isinstance(e, ModuleNotFoundError) and e.name in {OPTIONAL!r}
            missing or print(repr(e), file=sys.stderr, flush=True)
            os._exit(0 if missing else 1)
        os._exit(0)
    return os.waitpid(child, 0)[1]
read, write = os.pipe()
def others():
    import roo_rewrite, roo_rewrite.data
    os.write(write, " ".join(m for m in sys.modules if m.split(".")[0] not in ours).encode()[:60000])
failed = ["roo_rewrite"] if forked(others) else []
for name in os.read(read, 65536).decode().split()[:-1]:
    try:
        importlib.import_module(name)
    except Exception:
        pass
failed += [name for name in {modules()!r} if forked(lambda: importlib.import_module(name))]
sys.exit(", ".join(failed))
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True)
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
