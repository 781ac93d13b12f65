"""The tensors of a trace, by the names that the model has for them.

A trace takes a parameter or buffer that a module reaches through a list of its own for a constant:

    self.weights.append(self.weight)          placeholder l.weight, unused
    x @ self.weights[0]                       constant lifted_tensor_0, of the same memory

Its gradient would be lost, and so would be what `load_state_dict` puts there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

_Memory = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


def unlifted(program: torch.export.ExportedProgram, model: nn.Module) -> tuple[Graph, dict[str, Tensor]]:
    """The exported graph with parameters and buffers as get_attr of `model`, constants under `_roo`."""
    signature = program.graph_signature
    named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    tensors = dict(signature.inputs_to_lifted_tensor_constants)
    graph, constants, known = Graph(), dict[str, Tensor](), _named(model)
    copies: dict[Node, Node] = {}
    placed: dict[str, Node] = {}
    for node in program.graph_module.graph.nodes:
        if node.op != "placeholder" or node.name not in named | tensors:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            continue
        if node.name in named:
            name = named[node.name].removeprefix("model.")
        else:
            value = program.constants[tensors[node.name]].detach()
            name = known.get(_memory(value)) or f"_roo.constant_{len(constants)}"
            if name.startswith("_roo."):
                constants[name.removeprefix("_roo.")] = value
        if name not in placed:
            placed[name] = graph.get_attr(name)
            placed[name].meta = dict(node.meta)
        copies[node] = placed[name]
    return graph, constants


def _named(model: nn.Module) -> dict[_Memory | None, str]:
    """Names of the parameters and buffers by their memory, but for memory that the model has by another tensor, too.

    The other tensor (`self.weight.detach()`, say) has a gradient of its own, or none.
    """
    own = {id(t): (n, t) for n, t in (*model.named_parameters(), *model.named_buffers())}
    held = [t for m in model.modules() for t in _tensors([v for k, v in vars(m).items() if k not in _REGISTERED])]
    times = Counter(_memory(t) for t in {id(t): t for t in (*held, *(t for _, t in own.values()))}.values())
    return {_memory(t): name for name, t in own.values() if _memory(t) and times[_memory(t)] == 1}


_REGISTERED = ("_parameters", "_buffers", "_modules")


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


def _memory(tensor: Tensor) -> _Memory | None:
    """Where it lies, and as what; None for one of a trace, without memory, or not of plain strides."""
    if type(tensor) not in (Tensor, nn.Parameter) or torch._is_functional_tensor(tensor):
        return None
    if tensor.layout is not torch.strided or not tensor.numel() or tensor.is_meta:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
