"""The command line: one file per verb.

Exit status: 0 done, 1 not equivalent, 2 bad usage or input. Errors are one message on stderr.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import click

from roo_rewrite.cli.bench import bench
from roo_rewrite.cli.data import data
from roo_rewrite.cli.explain import explain
from roo_rewrite.cli.infer_spec import infer_spec
from roo_rewrite.cli.rewrite import rewrite
from roo_rewrite.cli.verify import verify
from roo_rewrite.errors import EquivalenceError, RooError


class _Group(click.Group):
    """Turns the library's errors into a message and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the verb."""
        try:
            return super().invoke(ctx)
        except EquivalenceError as e:
            click.echo(f"not equivalent: {e}", err=True)
            sys.exit(1)
        except RooError as e:
            click.echo(f"error: {e}", err=True)
            sys.exit(2)


@click.group(cls=_Group)
@click.version_option(package_name="roo-rewrite")
def main() -> None:
    """Rewrites an impression-level PyTorch recommender into an equivalent request-level one."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


for verb in (rewrite, explain, verify, bench, infer_spec, data):
    main.add_command(verb)
