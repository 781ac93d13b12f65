"""A recorded graph as a model that runs in eager, and as the trace that `capture` would make of it."""

from __future__ import annotations

from typing import Any

import sympy
import torch
import torch.fx
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from roo_rewrite.capture import BATCH, Captured
from roo_rewrite.outputs import COMPUTED, COMPUTED_VALUE, flatten_output
from tools.fuzz.recorder import Recorder, Size, Value


class Recorded(nn.Module):
    """A recorded graph, run in eager. Copies share what does not change."""

    recorder: Recorder
    graph: Graph
    result: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorded:
        made = type(self)()
        memo[id(self)] = made
        made.training = self.training
        for store in ("_parameters", "_buffers"):
            made.__dict__[store].update({k: _copied(v, memo) for k, v in self.__dict__[store].items()})
        made.__dict__.update({k: v for k, v in self.__dict__.items() if isinstance(v, Tensor)})
        return made


def _copied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    if id(tensor) not in memo:
        made = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    found: Tensor = memo[id(tensor)]
    return found


def model(recorder: Recorder, result: Any) -> Recorded:
    """The model that returns `result`, a tree of nodes and plain values. What it does not need is left out."""
    graph, copies = Graph(), dict[Node, Node]()
    for node in recorder.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    result = pytree.tree_map_only(Node, copies.__getitem__, result)
    graph.output(result)
    graph.eliminate_dead_code()
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    parts = {"forward": scope["forward"], "recorder": recorder, "graph": graph, "result": result}
    made: Recorded = type("Recorded", (Recorded,), parts)()
    for name in dict.fromkeys(n.target for n in graph.nodes if n.op == "get_attr"):
        value = recorder.tensors[name]
        if isinstance(value, nn.Parameter):
            made.register_parameter(name, value)
        elif name.startswith("buffer"):
            made.register_buffer(name, value)
        else:
            setattr(made, name, value)
    return made


def trace(made: Recorded) -> Captured:
    """What `capture` would make of the model."""
    recorder = made.recorder
    symbols = _Symbols(recorder)
    graph, constants, copies = Graph(), dict[str, Tensor](), dict[Node, Node]()
    for node in made.graph.nodes:
        if node.op == "output":
            continue
        if node.op == "get_attr" and node.target.startswith("constant"):
            constants[name := f"constant_{len(constants)}"] = getattr(made, node.target)
            copies[node] = graph.get_attr(f"_roo.{name}")
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {"val": symbols.traced(node, recorder)}
    graph.output(tuple(copies[n] for n in pytree.tree_leaves(made.result) if isinstance(n, Node)))
    values, tree = flatten_output(pytree.tree_map_only(Node, lambda n: copies[n].meta["val"], made.result))
    outs = [COMPUTED_VALUE if isinstance(v, COMPUTED) else v for v in values]
    copied = made.__deepcopy__({id(p): p for p in made.parameters()})
    batch = {symbols.of["B"].node.expr: BATCH}
    return Captured(copied, graph, nn.Module(), constants, tree, outs, recorder.batch, batch, lambda n: True)


class _Symbols:
    """The symbolic sizes of one trace, and values that have them."""

    def __init__(self, recorder: Recorder) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv())
        self.mode.cache_enabled = False
        self.of = {name: self._symbol(sizes[0]) for name, sizes in recorder.sizes.items()}

    def _symbol(self, size: int) -> torch.SymInt:
        context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        made = self.mode.from_tensor(torch.empty(size), symbolic_context=context).shape[0]
        assert isinstance(made, torch.SymInt)
        assert isinstance(made.node.expr, sympy.Symbol)
        return made

    def traced(self, node: Node, recorder: Recorder) -> Any:
        """The value of a node as a trace holds it."""
        if node.op == "get_attr":
            return self.mode.from_tensor(recorder.tensors[str(node.target)].detach(), static_shapes=True)
        value = node.meta["value"]
        if isinstance(value, Value):
            return self._tensor(value)
        if isinstance(value, Size):
            return self._size(value)
        return [self._of_meta(recorder, *pair) for pair in zip(*value)] if isinstance(value, tuple) else value

    def _of_meta(self, recorder: Recorder, one: Tensor, two: Tensor) -> Tensor:
        shape, stride = recorder.fitted(one, two)
        return self._tensor(Value(shape, stride, one.dtype))

    def _tensor(self, value: Value) -> Tensor:
        with self.mode:
            return torch.empty_strided(
                [self._size(s) for s in value.shape], [self._size(s) for s in value.stride], dtype=value.dtype
            )

    def _size(self, size: int | Size) -> Any:
        return self.of[size.of] * size.times + size.more if isinstance(size, Size) else size
