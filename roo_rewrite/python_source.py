"""A RequestModel as one Python file that needs torch and nothing else.

    class Model(_Weights):
        def forward(self, user_id, item_id, *, num_impressions): ...     both parts in turn
        def request_part(self, user_id, num_impressions=None): ...       R rows
        def impression_part(self, h, item_id, num_impressions): ...      I rows

Weights lie beside it, in a safetensors file, under the names of the original's `state_dict`.
"""

from __future__ import annotations

import inspect
import math
import re
import types
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from roo_rewrite.capture import Captured
from roo_rewrite.emit import Emitted
from roo_rewrite.errors import EmitError
from roo_rewrite.facts import Provenance
from roo_rewrite.inputs import Inputs
from roo_rewrite.outputs import Shape, unflatten_output
from roo_rewrite.places import place_of
from roo_rewrite.program import LeafCall

_RESERVED = {"torch", "aten", "self", "types", "math"}
_OPERATORS = {"add": "+", "sub": "-", "mul": "*", "floordiv": "//", "mod": "%", "pow": "**"}


def python_source(
    model: torch.nn.Module, inputs: Inputs, captured: Captured, emitted: Emitted, about: dict[str, str]
) -> str:
    """The file's text. about: `title` (one line), and name -> kind of every tensor, see `export.weights`.

    Raises EmitError for what plain torch cannot say: an op or a leaf that lives elsewhere.
    """
    printer = _Printer(model)
    request, impression = emitted.parts
    given = {a.name: n for a, n in zip(inputs.atoms, _names(emitted.graph))}
    parts = [printer.part(request), printer.part(impression)]
    result = printer.result(impression, captured)
    environment = Environment(loader=PackageLoader("roo_rewrite", ""), undefined=StrictUndefined, trim_blocks=True)
    return environment.get_template("model.py.j2").render(
        title=about["title"],
        tensors=[(n, k) for n, k in about.items() if n != "title"],
        helpers=printer.sources(),
        libraries=sorted(printer.libraries),
        leaves=sorted(printer.leaves),
        signature=_signature(inputs),
        unpack=_unpack(inputs, given, [*_names(request), *_names(impression)]),
        request_inputs=[n for n in _names(request) if n != "num_impressions"],
        impression_inputs=[n for n in _names(impression) if n not in (*emitted.residuals, "num_impressions")],
        residuals=[printer.name(n) for n in emitted.residuals],
        impression_residuals=[printer.name(n) for n in emitted.residuals],
        rows=_rows(inputs, given, _names(impression)),
        request=parts[0],
        impression=parts[1],
        result=result,
    )


def _names(graph: Graph) -> list[str]:
    return [n.name for n in graph.nodes if n.op == "placeholder"]


def _signature(inputs: Inputs) -> str:
    """The roots that hold tensors, in the original's order."""
    roots = dict.fromkeys(path[0][1] for leaf, path in zip(inputs.leaves, inputs.paths) if leaf.atoms)
    if any(not str(r).isidentifier() for r in roots):
        raise EmitError(f"arguments {list(roots)} cannot all be parameters of a Python function")
    return ", ".join(roots)


def _unpack(inputs: Inputs, given: Mapping[str, str], used: Collection[str]) -> list[str]:
    """Lines that take the atoms out of the arguments. given: the parameter that stands for each atom."""
    lines = []
    for leaf, path in zip(inputs.leaves, inputs.paths):
        value = str(path[0][1]) if path else ""
        for kind, key in path[1:]:
            value += f".{key}" if kind == "attribute" else f"[{key!r}]"
        targets = [given[a.name] for a in leaf.atoms]
        for i, (target, atom) in enumerate(zip(targets, leaf.atoms)):
            part = _atom(value, len(targets), i, atom.name)
            if target in used and target != part:
                lines.append(f"{target} = {part}")
    return lines


def _atom(value: str, of: int, at: int, name: str) -> str:
    if of == 1:
        return value
    if name.endswith((".values", ".lengths", ".weights")):
        raise EmitError(f"input {name!r} is a KeyedJaggedTensor, which plain torch does not have")
    return f"{value}[{at}]"


def _rows(inputs: Inputs, given: Mapping[str, str], used: Collection[str]) -> str:
    """An impression input that has I rows, or "" where there is none."""
    impression = (a for a in inputs.atoms if a.kind == "dense" and a.provenance is Provenance.IMPRESSION)
    return next((given[a.name] for a in impression if given[a.name] in used), "")


class _Printer:
    """Graphs as lines of Python; remembers what the lines need."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.helpers: dict[str, Any] = {}
        self.leaves: set[str] = set()
        self.libraries: set[str] = set()

    def name(self, name: str) -> str:
        """A node's name, kept apart from functions and modules."""
        return f"{name}_" if name in _RESERVED or name in self.helpers else name

    def part(self, graph: Graph) -> list[str]:
        """Lines of the body, with the user's source as comments; values are freed after their last use."""
        for node in graph.nodes:
            if node.op == "call_function" and _is_ours(node.target):
                self._need(node.target)
        last: dict[Node, Node] = {}
        for node in graph.nodes:
            for source in node.all_input_nodes:
                last[source] = node
        lines: list[str] = []
        where = ""
        for node in graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            place = place_of(node)
            if place.code and str(place) != where:
                where = str(place)
                lines.append(f"# {where}: {place.code}")
            done = [s.name for s in node.all_input_nodes if last[s] is node and s.op not in ("placeholder", "get_attr")]
            freed = f"; del {', '.join(map(self.name, done))}" if done else ""
            lines.append(f"{self.name(node.name)} = {self._call(node)}{freed}")
        return lines

    def result(self, graph: Graph, captured: Captured) -> str:
        """The output in the original's structure; what torch alone does not have becomes a SimpleNamespace."""
        output = next(n for n in graph.nodes if n.op == "output")
        texts = [_Text(self.value(a)) for a in output.args[0]]
        return self.value(unflatten_output(captured.out_values, captured.out_tree, texts))  # type: ignore[arg-type]

    def sources(self) -> list[str]:
        """Source of the helpers, in the order in which they need each other."""
        return [inspect.getsource(h).rstrip() for h in self.helpers.values()]

    def _call(self, node: Node) -> str:
        if node.op == "get_attr":
            return attribute(str(node.target))
        if node.op == "call_module":
            return self._leaf(node)
        name = getattr(node.target, "__name__", "")
        args = [self.value(a) for a in node.args]
        if name == "getitem":
            return f"{args[0]}[{args[1]}]"
        if name in _OPERATORS and not isinstance(node.target, torch._ops.OpOverload):
            return f"{args[0]} {_OPERATORS[name]} {args[1]}"
        args += [f"{k}={self.value(v)}" for k, v in node.kwargs.items()]
        return f"{self._target(node.target)}({', '.join(args)})"

    def _target(self, target: Any) -> str:
        if isinstance(target, torch._ops.OpOverload):
            text = f"torch.ops.{target.namespace}.{target._opname}.{target._overloadname}"
            if target.namespace == "roo":
                raise EmitError(f"{target} lives in roo-rewrite; plain torch does not have it")
            if target.namespace not in ("aten", "prims"):
                self.libraries.add(target.namespace)
            return text.replace("torch.ops.aten.", "aten.", 1)
        module, name = getattr(target, "__module__", "") or "", getattr(target, "__qualname__", str(target))
        if _is_ours(target) or module == "builtins":
            return str(name)
        if module.split(".")[0] not in ("torch", "math", "_operator"):
            raise EmitError(f"{module}.{name} is called; plain torch does not have it")
        return f"{module}.{name}"

    def _leaf(self, node: Node) -> str:
        call = self.model.get_submodule(str(node.target))
        assert isinstance(call, LeafCall)
        site = call.__dict__["_target"][1]
        if site.function is not None:
            raise EmitError(f"{site.label} lives in the user's code; the Python file cannot hold it")
        self.leaves.add(site.path)
        stock = iter([_Text(self.value(a)) for a in node.args])
        values = [next(stock) if isinstance(v, torch.Tensor) else v for v in site.in_values]
        try:
            args, kwargs = pytree.tree_unflatten(values, site.in_tree)
            given = [*map(self.value, args), *(f"{k}={self.value(v)}" for k, v in kwargs.items())]
        except Exception as e:
            raise EmitError(f"{site.label} takes an argument that cannot be written down: {e}") from e
        return f"_tensors(self.get_submodule({site.path!r})({', '.join(given)}))"

    def value(self, value: Any) -> str:
        """An argument as Python."""
        if isinstance(value, Node):
            return self.name(value.name)
        if isinstance(value, torch.device):
            return f"torch.device({str(value)!r})"
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format, _Text)):
            return str(value)
        if isinstance(value, slice):
            return f"slice({self.value(value.start)}, {self.value(value.stop)}, {self.value(value.step)})"
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if hasattr(value, "__dataclass_fields__"):
            return self._namespace({k: getattr(value, k) for k in value.__dataclass_fields__})
        if isinstance(value, (torch.Size, Shape)):
            return f"torch.Size({self.value(tuple(value))})"
        if isinstance(value, tuple) and hasattr(value, "_asdict"):
            return self._namespace(value._asdict())
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self.value(v)}" for k, v in value.items()) + "}"
        if isinstance(value, list):
            return "[" + ", ".join(map(self.value, value)) + "]"
        if isinstance(value, tuple):
            return "(" + "".join(f"{self.value(v)}, " for v in value).rstrip() + ")"
        if value is None or value is Ellipsis or isinstance(value, (bool, int, float, complex, str)):
            return repr(value)
        raise EmitError(f"a {type(value).__name__} cannot be written down in Python")

    def _namespace(self, fields: dict[str, Any]) -> str:
        return "types.SimpleNamespace(" + ", ".join(f"{k}={self.value(v)}" for k, v in fields.items()) + ")"

    def _need(self, helper: Any) -> None:
        """Notes a function or class of this library, and first what it needs itself."""
        if helper.__name__ in self.helpers:
            return
        scope = vars(inspect.getmodule(helper))
        for name in _mentioned(inspect.getsource(helper)):
            other = scope.get(name)
            if other is not helper and _is_ours(other):
                self._need(other)
        self.helpers[helper.__name__] = helper


class _Text(str):
    """Python text that stands for a value."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _is_ours(target: Any) -> bool:
    if not isinstance(target, (types.FunctionType, type)):
        return False
    return target.__module__.split(".")[0] in ("roo_rewrite", "passes")


def _mentioned(source: str) -> Iterable[str]:
    return dict.fromkeys(re.findall(r"\b[A-Za-z_]\w*\b", source))


def attribute(path: str) -> str:
    """`a.0.weight` of self, as Python."""
    text = "self"
    for part in path.split("."):
        text = f"{text}.{part}" if part.isidentifier() else f"getattr({text}, {part!r})"
    return text
