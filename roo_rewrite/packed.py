"""Packed sequences, traced padded and masked.

    pack_padded_sequence(x, lengths)    x and the lengths, kept
    rnn(packed)                         a layer and a direction at a time, over the padded steps
    pad_packed_sequence(packed)         where(step < length, y, padding_value)

Packing sorts a batch by length and runs as many rows a step as are that long: data decides the shapes, and no
trace can follow. Padded, every row is by itself. What comes out is the same:

- a step of a forward layer reads no later step, so those up to the length are right whatever is behind them;
- a backward layer runs forward over each row reversed within its length;
- the last state of a row is the output at its last step, `y[length - 1]`;
- what lies behind the length is put to 0 first, so that no gradient of it is left, not even 0 * inf.

A row of length 0, or one that is too long, raises, as when packed. What is not said here (other fields of a
packed sequence, the cell state, dropout between layers, projections) raises while tracing, and
the module it happens in becomes a leaf. A leaf takes and gives packed sequences as `Steps`: they are packed for its
call and padded after it.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree


class _Unknown:
    """What only a packed sequence has."""


class Padded(rnn.PackedSequence):
    """Stands for a packed sequence while tracing: `steps [B, T, ...]`, `lengths [B]`, `mask [B, T]`."""

    steps: Tensor
    lengths: Tensor
    mask: Tensor

    def __new__(cls, steps: Tensor, lengths: Tensor, mask: Tensor) -> Padded:
        made = tuple.__new__(cls, (_Unknown(),) * 4)
        made.steps, made.lengths, made.mask = steps, lengths, mask
        return made

    def to(self, *args: Any, **kwargs: Any) -> Any:
        raise _untold("to(...) of a packed sequence")


class Steps(NamedTuple):
    """A packed sequence as a leaf takes and gives it: `steps [B, T, ...]`, `lengths [B]`."""

    steps: Tensor
    lengths: Tensor


def loosened(tree: Any, total: int | None = None) -> Any:
    """A pytree with `Steps` for its packed sequences, of a run or of a trace. total: their T, else the longest."""

    def loose(value: Any) -> Any:
        if isinstance(value, Padded):
            return Steps(value.steps, value.lengths.to("cpu", torch.long))
        if not isinstance(value, rnn.PackedSequence):
            return value
        return Steps(*rnn.pad_packed_sequence(value, True, total_length=total))

    return pytree.tree_map(loose, tree, is_leaf=lambda v: isinstance(v, rnn.PackedSequence))


def tightened(tree: Any) -> Any:
    """A pytree with packed sequences for its `Steps`; while tracing, padded ones."""
    return pytree.tree_map(
        lambda v: rnn.pack_padded_sequence(v.steps, v.lengths, True, False) if isinstance(v, Steps) else v,
        tree,
        is_leaf=lambda v: isinstance(v, Steps),
    )


def lengths_of(tree: Any) -> list[int]:
    """T of each of the `Steps` in a pytree."""
    found = pytree.tree_leaves(tree, is_leaf=lambda v: isinstance(v, Steps))
    return [v.steps.shape[1] for v in found if isinstance(v, Steps)]


@torch.library.custom_op("roo::descending", mutates_args=())
def descending(lengths: Tensor) -> Tensor:
    """The lengths, which must be in descending order. Raises RuntimeError as packing does."""
    if len(lengths) and not bool((lengths[1:] <= lengths[:-1]).all()):
        raise RuntimeError("`lengths` array must be sorted in decreasing order when `enforce_sorted` is True")
    return lengths.clone()


@descending.register_fake
def _descending_shape(lengths: Tensor) -> Tensor:
    return torch.empty_like(lengths)


def _untold(what: str) -> RuntimeError:
    return RuntimeError(f"{what} cannot be traced")


def pack(input: Tensor, lengths: Any, batch_first: bool = False, enforce_sorted: bool = True) -> Padded:
    """`pack_padded_sequence` while tracing."""
    if not isinstance(lengths, Tensor):
        raise _untold("packing by a list of lengths")
    if enforce_sorted:
        lengths = torch.ops.roo.descending(lengths)
    steps = input if batch_first else input.transpose(0, 1)
    at = lengths.to(steps.device, torch.long) - 1
    longest = steps.shape[1]
    upto = torch.ones(longest, longest, dtype=torch.bool, device=steps.device).tril()
    mask = upto.index_select(0, at)  # no row of the table for a length of 0, or one too long
    return Padded(_masked(steps, mask, 0.0), lengths, mask)


def pad(
    sequence: Padded, batch_first: bool = False, padding_value: float = 0.0, total_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """`pad_packed_sequence` while tracing."""
    if not isinstance(sequence, Padded):
        raise _untold("a packed sequence that a leaf has made")
    steps, longest = _masked(sequence.steps, sequence.mask, padding_value), sequence.steps.shape[1]
    lengths = sequence.lengths.to("cpu", torch.long)
    if total_length is None:
        stop = lengths.max().item()
        torch._check(stop > 0)  # type: ignore[no-untyped-call]
        torch._check(stop <= longest)  # type: ignore[no-untyped-call]
        steps = steps[:, :stop]
    elif total_length != longest:
        raise _untold("padding to another length than before packing")
    return steps if batch_first else steps.transpose(0, 1), lengths


def _masked(steps: Tensor, mask: Tensor, value: float) -> Tensor:
    return torch.where(mask.view(*mask.shape, *[1] * (steps.ndim - 2)), steps, value)


def _recurrent(layer: nn.RNNBase, packed: Padded, hx: Any) -> tuple[Padded, Any]:
    """A recurrent layer of any depth over a packed sequence."""
    if layer.proj_size or (layer.dropout and layer.training and layer.num_layers > 1):
        raise _untold("a projected state, or dropout between layers, of a packed sequence")
    directions, x, last = 1 + layer.bidirectional, packed.steps, list[Tensor]()
    for depth in range(layer.num_layers):
        outs = []
        for direction in range(directions):
            at = depth * directions + direction
            state = None if hx is None else _at(hx, at)
            outs.append(_one(layer, at, _turned(x, packed) if direction else x, state))
            last.append(_last(outs[-1], packed))
            if direction:
                outs[-1] = _turned(outs[-1], packed)
        x = torch.cat(outs, -1) if len(outs) > 1 else outs[0]
    h_n = torch.stack(last)
    return Padded(x, packed.lengths, packed.mask), (h_n, _Unknown()) if layer.mode == "LSTM" else h_n


def _at(hx: Any, at: int) -> Any:
    return tuple(_at(h, at) for h in hx) if isinstance(hx, tuple) else hx[at : at + 1]


def _one(layer: nn.RNNBase, at: int, x: Tensor, state: Any) -> Tensor:
    """One layer in one direction, as a forward one."""
    if state is None:
        zeros = x.new_zeros(1, x.shape[0], layer.hidden_size)
        state = (zeros, zeros) if layer.mode == "LSTM" else zeros
    runs: dict[str, Callable[..., Any]] = {
        "GRU": torch.gru,
        "LSTM": torch.lstm,
        "RNN_TANH": torch.rnn_tanh,
        "RNN_RELU": torch.rnn_relu,
    }
    made = runs[layer.mode](x, state, layer.all_weights[at], layer.bias, 1, 0.0, layer.training, False, True)
    assert isinstance(made[0], Tensor)
    return made[0]


def _turned(x: Tensor, packed: Padded) -> Tensor:
    """Each row reversed within its length."""
    at = packed.lengths.to(x.device, torch.long).unsqueeze(1) - 1 - torch.arange(x.shape[1], device=x.device)
    return x.gather(1, at.clamp_min(0).unsqueeze(-1).expand(-1, -1, x.shape[2]))


def _last(x: Tensor, packed: Padded) -> Tensor:
    """The entry at each row's last step."""
    at = packed.lengths.to(x.device, torch.long) - 1
    return x.gather(1, at.view(-1, 1, 1).expand(-1, 1, x.shape[2])).squeeze(1)


@contextlib.contextmanager
def padded_sequences() -> Iterator[None]:
    """While active, packing keeps its sequences padded, whoever imported the functions by name."""
    swapped: list[tuple[Any, types.CodeType]] = []
    forwards = [(cls, cls.forward) for cls in (nn.GRU, nn.LSTM, nn.RNN)]

    def handing(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: nn.RNNBase, input: Any, hx: Any = None) -> Any:
            return _recurrent(self, input, hx) if isinstance(input, Padded) else original(self, input, hx)

        return forward

    for function, stand_in in ((rnn.pack_padded_sequence, _pack_code), (rnn.pad_packed_sequence, _pad_code)):
        swapped.append((function, function.__code__))
        function.__code__ = stand_in.__code__
    for cls, original in forwards:
        cls.forward = handing(original)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for function, code in swapped:
            function.__code__ = code
        for cls, original in forwards:
            cls.forward = original  # type: ignore[method-assign]


# Run with the globals of torch.nn.utils.rnn, in the place of its functions.
def _pack_code(input: Any, lengths: Any, batch_first: Any = False, enforce_sorted: Any = True) -> Any:
    from roo_rewrite.packed import pack

    return pack(input, lengths, batch_first, enforce_sorted)


def _pad_code(sequence: Any, batch_first: Any = False, padding_value: Any = 0.0, total_length: Any = None) -> Any:
    from roo_rewrite.packed import pad

    return pad(sequence, batch_first, padding_value, total_length)
