"""`roo-rewrite rewrite`: the request-level model as files."""

from __future__ import annotations

from pathlib import Path

import click

from roo_rewrite.cli.common import Options, model_options, progress, rewritten, show
from roo_rewrite.export import write


@click.command("rewrite")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write; new or empty.")
@model_options
def rewrite(options: Options, out: Path) -> None:
    """Writes the request-level form of MODEL to a directory: .pt2, Python source, weights, report."""
    with progress() as step:
        _, _, model = rewritten(options, step)
        notes = write(model, out, step)
        report = model.report
    files = sorted(p.name for p in out.iterdir())
    lines = [report.summary, *notes, f"{out}: {', '.join(files)}"]
    show(options, "\n".join(lines), {"out": str(out), "files": files, "notes": notes, "report": report.to_dict()})
