"""Asks the tests of a fault, in a process forked from one that has collected the suite.

A fault inside a function is put in its place there. One in what runs when the module is imported (a constant, a
decorator, a signature) needs the product and the tests imported anew.
"""

from __future__ import annotations

import ast
import gc
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import CodeType, FunctionType

import pytest
import torch

from tools.mutate.reach import PLAIN, enclosing, first_line, imported
from tools.mutate.seeds import Fault

COLD = ("roo_rewrite", "passes", "tools", "tests")
GREEN = (pytest.ExitCode.OK, pytest.ExitCode.INTERRUPTED)  # all of them passed, or those that the budget allowed
HANGS = 90  # seconds of CPU past the budget
Items = Mapping[str, pytest.Item]


class Collected:
    """Works with the tests that a run has collected, in place of running them."""

    def __init__(self, work: Callable[[Items], None]) -> None:
        self.work = work

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.work({item.nodeid: item for item in session.items})
        return True


class Chosen:
    """Runs the named tests, in their order, until one fails or the budget (seconds of CPU) is spent."""

    def __init__(self, names: Sequence[str], budget: float) -> None:
        self.place = {name: i for i, name in enumerate(names)}
        self.budget = budget
        self.failed = ""
        self.ran = 0

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if item.nodeid in self.place]
        items[:] = sorted(chosen, key=lambda item: self.place[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed = self.failed or report.nodeid

    def pytest_runtest_logfinish(self) -> None:
        self.ran += 1

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if time.process_time() > self.budget:
            item.session.shouldstop = "the budget is spent"

    def run(self, items: Items) -> None:
        order = [items[name] for name in self.place]
        order[0].config.pluginmanager.register(self)
        for item, following in zip(order, [*order[1:], None]):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed or item.session.shouldstop:
                break

    def run_anew(self, tree: Path) -> None:
        forget(tree)
        sys.dont_write_bytecode = True
        code = pytest.main([*PLAIN, "-x", *sorted({name.split("::")[0] for name in self.place})], plugins=[self])
        if code not in GREEN:
            self.failed = self.failed or f"pytest ended with {code}"


def forget(tree: Path) -> None:
    """The product and its tests will be imported anew; all else stays as it was imported, and is looked at no more."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in COLD or str(getattr(module, "__file__", None)).startswith(f"{tree}{os.sep}"):
            del sys.modules[name]
    gc.freeze()  # a fork that looks at all objects copies them


def forked(tree: Path, work: Callable[[], str], limit: float) -> str:
    """What `work` answers in a child that stands in the tree; what it raised, or how it ended, where it did not."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            settle(tree, limit)
            os.write(writer, work().encode())
            code = 0
        except Exception:
            os.write(writer, f"{traceback.format_exc()}\t0".encode())
        finally:
            os._exit(code)
    os.close(writer)
    with open(reader, "rb") as answers:
        answer = answers.read().decode()
    _, status = os.waitpid(child, 0)
    return answer or f"ended with {os.waitstatus_to_exitcode(status)}\t0"


def settle(tree: Path, limit: float) -> None:
    os.setsid()
    os.chdir(tree)
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silence, stream)
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit), resource.getrlimit(resource.RLIMIT_CPU)[1]))
    sys.path.insert(0, str(tree))
    torch.set_num_threads(1)


def placed(file: Path, text: str, line: int) -> bool:
    """Gives the function around the line its code in the text; False where none is."""
    tree = ast.parse(file.read_text())
    path = [n for n in enclosing(tree, line) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    function = next((i for i, n in enumerate(path) if isinstance(n, ast.FunctionDef)), None)
    if function is None or imported(tree, line):
        return False
    name = ".".join(n.name for n in path[: function + 1])
    new = {(c.co_qualname, c.co_firstlineno): c for c in codes(compile(text, str(file), "exec"))}
    old = [
        f
        for f in gc.get_objects()
        if type(f) is FunctionType and f.__code__.co_filename == str(file) and f.__code__.co_qualname == name
    ]
    old = [f for f in old if f.__code__.co_firstlineno == first_line(path[function])]
    for found in old:
        found.__code__ = new[name, found.__code__.co_firstlineno]
    return bool(old)


def codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from codes(inner)


def judge(tree: Path, text: str, fault: Fault, names: Sequence[str], items: Items, budget: float) -> Fault:
    """The fault with what the named tests say of it; the file is as before afterwards."""
    if not names:
        return fault
    target = tree / fault.file
    original, stamp = target.read_text(), target.stat()

    def asked() -> str:
        chosen = Chosen(names, time.process_time() + budget)
        if placed(target, text, fault.line):
            chosen.run(items)
        else:
            target.write_text(text)
            os.utime(target, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 2 * 10**9))  # else its bytecode passes for new
            chosen.run_anew(tree)
        return f"{chosen.failed}\t{chosen.ran}"

    try:
        failed, ran = forked(tree, asked, budget + HANGS).rsplit("\t", 1)
    finally:
        target.write_text(original)
        os.utime(target, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    return replace(fault, caught_by=failed or None, left=0 if failed else len(names) - int(ran))
