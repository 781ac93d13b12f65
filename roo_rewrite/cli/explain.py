"""`roo-rewrite explain`: the report alone."""

from __future__ import annotations

from pathlib import Path

import click

from roo_rewrite.cli.common import Options, model_options, progress, rewritten, show


@click.command("explain")
@click.option("--html", type=click.Path(path_type=Path, dir_okay=False), help="Write the report as a page, too.")
@click.option("--code", is_flag=True, help="Show the emitted code, too.")
@model_options
def explain(options: Options, html: Path | None, code: bool) -> None:
    """Shows what of MODEL would run once per request, what would not and why, and what it saves."""
    with progress() as step:
        _, _, model = rewritten(options, step)
        report = model.report
    if html is not None:
        try:
            html.write_text(report.to_html(), encoding="utf-8")
        except OSError as e:
            raise click.BadParameter(f"cannot write {html}: {e.strerror}", param_hint="--html") from e
    value = report.to_dict() | ({"code": model.code} if code else {})
    show(options, f"{report.text}\n\n{model.code}" if code else report.text, value)
