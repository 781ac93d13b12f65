"""`roo-rewrite infer-spec`: the spec of a log, told from its data."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from roo_rewrite.cli.data import memory_option
from roo_rewrite.data.infer import Inference, infer


@click.command("infer-spec")
@click.argument("data")
@click.option("--request-id", required=True, help="Column that names the request of an impression.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="TOML file to write.")
@click.option("--user-id", help="Column of the user: also tell what is constant per user.")
@click.option("--session-id", help="Column of the session: also tell what is constant per session.")
@click.option(
    "--nearly", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="Share still worth a word."
)
@memory_option
def infer_spec(
    data: str, request_id: str, out: Path, user_id: str | None, session_id: str | None, nearly: float, memory: int
) -> None:
    """Tells which columns of DATA (Parquet) are constant within every request, and writes the spec to OUT.

    Columns that vary in a few requests only go to the impression side; they are shown with examples.
    """
    found = infer(data, request_id, user=user_id, session=session_id, memory=memory)
    found.write(out, nearly)
    Console(width=120).print(_table(found))
    for column in found.nearly(nearly):
        click.echo(f"nearly request-level: {column.name}, for example in request")
        for example in column.examples:
            click.echo(f"  {example}")
    saved = sum(found.saves(c, found.levels[0]) for c in found.columns)
    whole = sum(c.bytes for c in found.columns)
    click.echo(f"{out}: once per request saves {saved / max(1, whole):.0%} of the bytes in memory")


def _table(found: Inference) -> Table:
    table = Table(title=f"{found.rows:,} impressions")
    table.add_column("column")
    table.add_column("type")
    for level in found.levels:
        table.add_column(f"varies in {level.name}s\n({level.repeated:,} of 2 or more)", justify="right")
        table.add_column(f"once per {level.name}\nsaves MB", justify="right")
    for column in found.columns:
        cells = [column.name, column.type]
        for level in found.levels:
            varies = column.varies[level.name]
            cells.append(f"{found.share(column, level):.2%}" if varies else "never")
            cells.append("" if varies else f"{found.saves(column, level) / 1e6:,.1f}")
        table.add_row(*cells)
    return table
