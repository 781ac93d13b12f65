"""Numbers that forward reads off tensors: a trace takes them for data, known only at run time.

    i, j = torch.triu_indices(n, n, 1)                 [triu_indices] -> [unbind] -> [item]
    for a, b in zip(i.tolist(), j.tolist()):           x[:, 0], x[:, 1] and not x[:, a number of run time]

What factories, literals and buffers alone make is known while the trace runs: the nodes that made it are computed. A
buffer may change afterwards, so those that were read are noted, and each call holds them against what they were.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from roo_rewrite.memory import all_written, behind, writes, written

_ASKED: set[Callable[..., Any]] = {
    getattr(Tensor, name) for name in ("item", "tolist", "__int__", "__index__", "__float__", "__bool__")
}
_LIMIT = 1 << 16  # entries of a value on the way


class WrittenError(Exception):
    """Forward writes the buffers `names`, which numbers were read off."""

    def __init__(self, names: Set[str]):
        super().__init__()
        self.names = names


class ReadNumbers(TorchFunctionMode):
    """While active, a number read off what depends on nothing is that number.

    read: the buffers of `module` that numbers were read off, by name, with their values. written: those that forward
    writes, which are data.
    """

    def __init__(self, module: nn.Module, written: Set[str] = frozenset()):
        super().__init__()
        self.read: dict[str, Tensor] = {}
        self._module = module
        self._registered = {_memory(t) for t in (*module.parameters(), *module.buffers())}
        # a trace puts others in their place
        self._buffers = {name: b for name, b in module.named_buffers() if name not in written}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = self._made_of(args[0]) if func in _ASKED and len(args) == 1 and not kwargs else None
        if made is None:
            return func(*args, **(kwargs or {}))
        order, given, root = made
        with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
            self.read.update({name: self._buffers[name].detach().clone() for name in given.values()})
            return func(_computed(order, {n: self._buffers[name] for n, name in given.items()}, root))

    def _made_of(self, tensor: Tensor) -> tuple[list[Node], dict[Node, str], nn.Module] | None:
        """The nodes that make a value, in order, the buffers among them, and what holds the literals."""
        mode = get_proxy_mode()
        tracer: Any = None if mode is None else mode.tracer
        slot = None if tracer is None else get_proxy_slot(tensor, tracer, None)
        if slot is None:
            return None
        graph, root = slot.proxy.node.graph, tracer.root
        made_of, writers = _with_writes(graph.nodes, slot.proxy.node)
        inputs = [n for n in made_of if n.op == "placeholder"]
        given = self._named(tracer) if inputs else {}
        given = {n: given[n] for n in inputs if n in given}
        if len(given) < len(inputs) or any(self._buffers[name].numel() > _LIMIT for name in given.values()):
            return None
        if any(n not in given and not self._known(n, root) for n in made_of):
            return None
        if any(n.op != "call_function" for w in writers for n in written(w)):  # would be written here, too
            return None
        if given and not all(_of_torch(n) for n in graph.nodes):  # a leaf may write a buffer unseen
            return None
        return [n for n in graph.nodes if n in made_of], given, root

    def _known(self, node: Node, root: nn.Module) -> bool:
        """Whether the node is a literal, or made of its operands alone. A parameter in a list of the model is none."""
        if node.op != "get_attr":
            return _made_of_numbers(node)
        literal = getattr(root, str(node.target), None)
        if not isinstance(literal, Tensor) or isinstance(literal, FakeTensor):
            return False
        return _memory(literal) not in self._registered

    def _named(self, tracer: Any) -> dict[Node, str]:
        found = ((get_proxy_slot(b, tracer, None), name) for name, b in self._module.named_buffers())
        return {slot.proxy.node: name for slot, name in found if slot is not None and name in self._buffers}


def settled_buffers(graph: Graph, read: Collection[str]) -> None:
    """Raises WrittenError where the traced graph writes a buffer of `read`."""
    named = [n for n in graph.nodes if n.op == "get_attr" and n.target in read]
    changed = {str(n.target) for n in named} & {str(n.target) for n in all_written(graph.nodes)}
    if changed:
        raise WrittenError(changed)


def _made_of_numbers(node: Node) -> bool:
    """Whether torch makes the node of its operands alone, of sizes that are numbers."""
    target, value = node.target, node.meta.get("val")
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False
    made = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(t, Tensor) and all(isinstance(s, int) for s in t.shape) and t.numel() <= _LIMIT for t in made)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _of_torch(node: Node) -> bool:
    return not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace == "aten"


def _with_writes(nodes: Iterable[Node], last: Node) -> tuple[set[Node], list[Node]]:
    """All that the last node is made of, with what is written into it on the way; and what writes."""
    writers = [(n, written(n)) for n in nodes if writes(n)]
    made_of, found = behind([last]), list[Node]()
    while more := [n for n, into in writers if n not in found and not made_of.isdisjoint(into)]:
        found += more
        made_of |= behind(more)
    return made_of, found


def _computed(order: Collection[Node], given: Mapping[Node, Tensor], root: nn.Module) -> Any:
    """The value of the last node."""
    values: dict[Node, Any] = dict(given)
    for node in order:
        if node.op == "get_attr":
            values[node] = getattr(root, str(node.target))
        elif node not in values:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]
