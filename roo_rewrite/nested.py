"""What torch's encoder gives at padding where no gradient is asked for.

    encoder(x, padding)  =  norm(at_padding(layers(x, padding), padding))

In eval, without gradients, torch runs `nn.TransformerEncoder` on nested tensors if all padding of the batch lies at the
ends of its rows, and the result of its layers is then 0 there. A trace is made with gradients and would miss that.
The layers are traced; whether there are zeros is a leaf of its own, and torch is asked: by an encoder without layers.
The requests of a batch have the masks that its impressions have, so that the leaf may run once per request.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = nn.TransformerEncoder.forward
_SIGNATURE = inspect.signature(_PLAIN)


def nests(module: nn.Module) -> bool:
    """Whether a module is an encoder that torch may run on nested tensors."""
    if not isinstance(module, nn.TransformerEncoder) or not getattr(module, "use_nested_tensor", False):
        return False
    return not next(module.layers.children()).training


class _Unrun(nn.ModuleList):
    """Layers that may be looked at."""

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(())


def at_padding(out: Tensor, padding: Tensor, encoder: nn.TransformerEncoder) -> Tensor:
    """What the layers gave, [B, T, D], with zeros at padding [B, T] where torch gives them."""
    bare = copy.copy(encoder)
    bare.__dict__.update(layers=_Unrun([next(encoder.layers.children())]), norm=None)  # found before the submodules
    asked = _PLAIN(bare, out, src_key_padding_mask=padding)
    return asked.clone() if asked is out else asked


@contextlib.contextmanager
def _layers_alone(encoder: nn.TransformerEncoder) -> Iterator[None]:
    """The encoder gives no zeros and has no norm meanwhile."""
    held = encoder.__dict__
    before: dict[str, Any] = {name: held[name] for name in ("norm", "use_nested_tensor") if name in held}
    held.update(norm=None, use_nested_tensor=False)
    try:
        yield
    finally:
        del held["norm"]
        held.update(before)


@contextlib.contextmanager
def padding_apart(tracing: bool) -> Iterator[None]:
    """While active, such encoders are their layers, then `at_padding`."""

    def forward(self: nn.TransformerEncoder, *args: Any, **kwargs: Any) -> Any:
        given = _SIGNATURE.bind(self, *args, **kwargs).arguments
        padding = given.get("src_key_padding_mask")
        if not nests(self) or padding is None or given.get("mask") is not None:
            return _PLAIN(self, *args, **kwargs)
        if not getattr(self, "mask_check", True):
            raise RuntimeError("an encoder without mask_check takes any mask for padding at the end")
        base = getattr(self, "get_base", lambda: self)()  # the tracer's stand-in knows its module
        with _layers_alone(base):
            out = _PLAIN(self, *args, **kwargs)
        with contextlib.nullcontext() if tracing else torch._C.DisableTorchFunction():  # a mode has torch give no zeros
            out = at_padding(out, padding, base)
        return out if self.norm is None else self.norm(out)

    nn.TransformerEncoder.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.TransformerEncoder.forward = _PLAIN  # type: ignore[method-assign]
