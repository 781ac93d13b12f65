"""Each verb does what it says; each wrong input is one message, exit status 2, and leaves nothing behind."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click.testing
import pytest
import torch
from torch.export import Dim

import roo_rewrite
from roo_rewrite.cli import main
from roo_rewrite.cli.target import load

Run = Callable[..., click.testing.Result]
FILES = ["model.pt2", "model.py", "report.html", "report.json", "report.txt", "weights.safetensors"]


def test_rewrite_writes_every_form_and_they_agree(run: Run, folder: Path) -> None:
    result = run("rewrite", "make", "--out", str(folder / "out"))
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (folder / "out").iterdir()) == FILES
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []
    model, (args, _) = load(f"{folder / 'model.py'}:make")
    user, item = args[0][:3], args[1]
    counts = torch.tensor([2, 0, 5])
    expected = model(user.repeat_interleave(counts, 0), item)
    exported = torch.export.load(folder / "out/model.pt2").module()
    torch.testing.assert_close(exported(user, item, num_impressions=counts), expected)
    one = exported(user[:1], item[:1], num_impressions=torch.tensor([1]))
    torch.testing.assert_close(one, model(user[:1], item[:1]))


def test_written_source_runs_on_torch_alone(run: Run, folder: Path) -> None:
    """In a process where importing this library, its passes or safetensors fails."""
    assert run("rewrite", "make", "--out", str(folder / "out")).exit_code == 0
    model, (args, _) = load(f"{folder / 'model.py'}:make")
    counts = torch.tensor([2, 0, 5])
    expected = model(args[0][:3].repeat_interleave(counts, 0), args[1])
    torch.save((args[0][:3], args[1], counts, expected.detach()), folder / "batch.pt")
    script = """
import sys
for name in ("roo_rewrite", "passes", "safetensors", "networkx", "jinja2"):
    sys.modules[name] = None
sys.path.insert(0, "out")
import torch
from model import load
model = load()
user, item, counts, expected = torch.load("batch.pt", weights_only=True)
torch.testing.assert_close(model(user, item, num_impressions=counts), expected)
part = model.request_part(user)
torch.testing.assert_close(model.impression_part(*part, item, counts), expected)
model(user, item, num_impressions=counts).sum().backward()
assert all(p.grad is not None for p in model.parameters())
for wrong in ([2, 0, 4], [2, -1, 6]):
    try:
        model(user, item, num_impressions=torch.tensor(wrong))
    except ValueError:
        continue
    sys.exit("wrong counts were taken")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_written_weights_have_the_names_of_the_original(run: Run, folder: Path) -> None:
    from safetensors.torch import load_file

    assert run("rewrite", "make", "--out", str(folder / "out")).exit_code == 0
    original = load(f"{folder / 'model.py'}:make")[0].state_dict()
    stored = load_file(folder / "out/weights.safetensors")
    assert set(original) <= set(stored)
    assert all(torch.equal(stored[n], t) for n, t in original.items())


def test_explain_names_the_line_that_keeps_a_value_back(run: Run) -> None:
    result = run("explain", "sorting")
    assert result.exit_code == 0
    line = next(line for line in result.output.splitlines() if "sort" in line and "model.py:" in line)
    assert "user_x.sort(0)" in line


def test_explain_as_json_and_html(run: Run, folder: Path) -> None:
    result = run("explain", "make", "--json", "--code", "--html", str(folder / "report.html"))
    report = json.loads(result.stdout)
    assert report["fanout"] == 16
    assert "def forward" in report["code"]
    assert "<svg" in (folder / "report.html").read_text()


def test_verify_says_equal(run: Run) -> None:
    result = run("verify", "make", "--batches", "2")
    assert result.exit_code == 0
    assert result.output == "equal on 2 batches (seed 0)\n"


def test_verify_exits_with_1_where_models_differ(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held against an original whose bias is another; the smallest batch that shows it is one impression."""
    verb = sys.modules["roo_rewrite.cli.verify"]
    honest = verb.rewritten

    def sabotaged(*given: object) -> object:
        model, call, made = honest(*given)
        model = copy.deepcopy(model)
        model.top.bias.data += 1
        return model, call, made

    monkeypatch.setattr(verb, "rewritten", sabotaged)
    result = run("verify", "make", "--batches", "3")
    assert result.exit_code == 1
    assert "num_impressions = [1]" in result.stderr


def test_bench_prints_a_row_for_each_mode(run: Run) -> None:
    result = run("bench", "make", "--at", "4", "--impressions", "16", "--rounds", "1", "--json")
    rows = json.loads(result.stdout)["rows"]
    assert [(r["fanout"], r["mode"]) for r in rows] == [(4, "scoring"), (4, "training")]
    assert all(r["original"] > 0 and r["rewritten"] > 0 for r in rows)


def test_bench_measures_the_splits(run: Run) -> None:
    found = ("--at", "4", "--impressions", "16", "--rounds", "1")
    splits = json.loads(run("bench", "make", *found, "--splits", "1", "--json").stdout)["splits"]
    assert sum(s["measured"] is not None for s in splits) == min(1, len(splits))
    assert splits
    assert not json.loads(run("bench", "make", *found, "--splits", "0", "--json").stdout)["splits"]
    assert "measured" in run("bench", "make", *found).stdout


def test_a_pt2_is_a_model(run: Run, folder: Path) -> None:
    model, (args, _) = load(f"{folder / 'model.py'}:make")
    shapes = {"user_x": {0: Dim.DYNAMIC}, "item_x": {0: Dim.DYNAMIC}}
    torch.export.save(torch.export.export(model, args, dynamic_shapes=shapes), folder / "given.pt2")
    assert run("verify", str(folder / "given.pt2"), "--batches", "2").exit_code == 0
    assert run("rewrite", str(folder / "given.pt2"), "--out", str(folder / "out")).exit_code == 0
    assert sorted(p.name for p in (folder / "out").iterdir()) == FILES


def test_a_pt2_with_a_static_batch_is_refused_with_the_way_out(run: Run, folder: Path) -> None:
    model, (args, _) = load(f"{folder / 'model.py'}:make")
    torch.export.save(torch.export.export(model, args), folder / "static.pt2")
    result = run("rewrite", str(folder / "static.pt2"), "--out", str(folder / "out"))
    assert result.exit_code == 2
    assert "static batch" in result.stderr
    assert "dynamic_shapes={'user_x': {0: torch.export.Dim.DYNAMIC}" in result.stderr
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("absent", "has no attribute 'absent'"),
        ("alone", "must return (module, args, kwargs)"),
        ("broken", "no weights here"),
        ("wrong_shapes", "cannot be called with the example"),
        ("missing.pt2", "no file"),
        ("no_such_package.models:make", "cannot import no_such_package.models"),
        (":", "is none of"),
    ],
)
def test_a_bad_model_is_one_message(run: Run, folder: Path, name: str, says: str) -> None:
    result = run("rewrite", name, "--out", str(folder / "out"))
    assert result.exit_code == 2
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('reqest = ["user_*"]', "unknown key 'reqest'"),
        ('request = ["user_*"', "is not TOML"),
        ('request = ["user_*"]', "'item_x' is not assigned"),
        ('request = ["*"]\nimpression = ["item_*"]', "assigned to both sides"),
        ('request = ["usr_*", "user_*"]\nimpression = ["item_*"]', "names no input"),
    ],
)
def test_a_bad_spec_is_one_message(run: Run, folder: Path, text: str, says: str) -> None:
    (folder / "bad.toml").write_text(text)
    result = run("rewrite", "make", "--out", str(folder / "out"), spec="bad.toml")
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (folder / "out").exists()


def test_out_is_never_overwritten(run: Run, folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "mine").write_text("kept")
    result = run("rewrite", "make", "--out", str(folder / "out"))
    assert result.exit_code == 2
    assert os.listdir(folder / "out") == ["mine"]


def test_nothing_is_left_where_writing_fails(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: roo_rewrite.Report) -> str:
        raise roo_rewrite.EmitError("the page cannot be made")

    monkeypatch.setattr(roo_rewrite.Report, "to_html", fail)
    before = sorted(folder.iterdir())
    assert run("rewrite", "make", "--out", str(folder / "out")).exit_code == 2
    assert sorted(p for p in folder.iterdir() if p.name != "__pycache__") == before


def test_a_pt2_never_runs_code(run: Run, folder: Path) -> None:
    (folder / "text.pt2").write_text("not an archive")
    result = run("verify", str(folder / "text.pt2"))
    assert result.exit_code == 2
    assert "is no .pt2" in result.stderr


def test_bad_usage_is_2_and_help_names_every_verb() -> None:
    runner = click.testing.CliRunner()
    assert runner.invoke(main, ["rewrite"]).exit_code == 2
    helped = runner.invoke(main, ["--help"]).output
    for verb in ("rewrite", "explain", "verify", "bench", "infer-spec", "data"):
        assert verb in helped
