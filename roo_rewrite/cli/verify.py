"""`roo-rewrite verify`: original and rewritten model on drawn batches."""

from __future__ import annotations

import click

from roo_rewrite.cli.common import Options, model_options, progress, rewritten, show
from roo_rewrite.equivalence import verify as check


@click.command("verify")
@click.option("--batches", type=click.IntRange(1), default=20, show_default=True, help="Batches to compare on.")
@click.option("--seed", type=int, default=0, show_default=True, help="The batches drawn.")
@model_options
def verify(options: Options, batches: int, seed: int) -> None:
    """Compares MODEL with its request-level form in float64: values and gradients, on jagged batches.

    Exit status 1, and the smallest failing batch, where they differ.
    """
    with progress() as step:
        original, _, model = rewritten(options, step)
        step(f"comparing on {batches} batches")
        check(original, model, batches=batches, seed=seed)
    show(options, f"equal on {batches} batches (seed {seed})", {"equal": True, "batches": batches, "seed": seed})
