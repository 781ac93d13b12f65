"""What the verbs on models share: their options, progress, and rewriting from the command line."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from torch import nn

from roo_rewrite.cli.target import FORMS, Call, load
from roo_rewrite.errors import CaptureError
from roo_rewrite.features import FeatureSpec
from roo_rewrite.module import RequestModel
from roo_rewrite.pipeline import rewrite

Step = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """The options of every verb on a model."""

    target: str
    spec: Path
    fanout: float
    dropout: Any
    leaves: tuple[str, ...]
    train: bool | None
    as_json: bool


def model_options(command: Callable[..., None]) -> Callable[..., None]:
    """MODEL and the options of rewriting it, handed to the command as one `Options`."""

    @click.argument("target", metavar="MODEL")
    @click.option("--spec", type=click.Path(path_type=Path), required=True, help="TOML file: the side of each input.")
    @click.option(
        "--fanout", type=click.FloatRange(min=1), default=16.0, show_default=True, help="Impressions a request."
    )
    @click.option("--dropout", type=click.Choice(["per_impression", "per_request"]), default="per_impression")
    @click.option("--leaf", "leaves", multiple=True, help="Path of a submodule to call as it is; repeatable.")
    @click.option("--train/--eval", "train", default=None, help="Mode to rewrite in. [as MODEL comes]")
    @click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
    @functools.wraps(command)
    def with_options(
        target: str,
        spec: Path,
        fanout: float,
        dropout: str,
        leaves: tuple[str, ...],
        train: bool | None,
        as_json: bool,
        **rest: Any,
    ) -> None:
        command(Options(target, spec, fanout, dropout, leaves, train, as_json), **rest)

    with_options.__doc__ = f"{command.__doc__}\n\nMODEL is {FORMS}; the callable returns (module, args, kwargs)."
    return with_options


def rewritten(options: Options, step: Step, fanout: float | None = None) -> tuple[nn.Module, Call, RequestModel]:
    """The original, its example, and the rewritten model."""
    spec = FeatureSpec.from_toml(options.spec)
    step("loading the model")
    model, (args, kwargs) = load(options.target)
    if options.train is not None:
        if options.target.endswith(".pt2"):
            raise CaptureError("a .pt2 has the mode it was exported in; leave out --train and --eval")
        model.train(options.train)
    step("tracing and checking")
    made = rewrite(
        model,
        args,
        kwargs,
        spec=spec,
        fanout=options.fanout if fanout is None else fanout,
        dropout=options.dropout,
        leaves=options.leaves,
    )
    return model, (args, kwargs), made


@contextmanager
def progress() -> Iterator[Step]:
    """Tells what is being done, on a terminal only."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("starting") as status:
        yield status.update


def show(options: Options, text: str, value: dict[str, Any]) -> None:
    """The result: `text`, or `value` with --json."""
    if options.as_json:
        json.dump(value, sys.stdout, indent=1)
        click.echo()
    else:
        click.echo(text)
