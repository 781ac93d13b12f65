"""Splits operators that mix both sides, so that `hoist` finds their request-level part.

    before                                   after
    x = cat([u, i], 1)                       a = linear(u, W[:, :3])
    y = linear(x, W, b)                      c = linear(i, W[:, 3:], b)
                                             y = add(a, c)

The graph is walked once, in order. Each value is kept in the form in which it is cheapest to continue
(see `forms`): a concatenation or a sum of both sides is not carried out until something needs it whole.
An op says what it makes of forms (`splits`); one with nothing to say gets its operands whole.

Postcondition: still an impression-level graph, equal to its input on any batch, whatever the annotation
said. What was tried, and what it was thought to gain, is in `Split.candidates`.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.fx
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils import _pytree as pytree

from passes.build import Builder
from passes.drawn import draws
from passes.forms import Form, Reshaped, Whole, dtype_of
from passes.functionalize import is_effect
from passes.price import Candidate, Price
from roo_rewrite.capture import Captured
from roo_rewrite.cost import device_of
from roo_rewrite.errors import NotRowWise
from roo_rewrite.facts import AUTOCAST, EFFECT

aten = torch.ops.aten
Mode = Literal["priced", "always", "never"]
Handler = Callable[["Splitter", "Application"], "Form | list[Form] | None"]
HANDLERS: dict[str, Handler] = {}


def handles(*ops: str) -> Callable[[Handler], Handler]:
    """Registers what an op makes of forms; a second handler for an op is an error."""

    def register(handler: Handler) -> Handler:
        for op in ops:
            if op in HANDLERS:
                raise ValueError(f"{op} has a form handler already")
            HANDLERS[op] = handler
        return handler

    return register


@dataclass(frozen=True)
class Application:
    """An op applied to forms: `named` holds its arguments by schema name, tensors as Forms."""

    target: OpOverload
    named: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.named[name]

    def form(self, name: str) -> Form:
        """The tensor argument `name`."""
        found = self.named[name]
        assert isinstance(found, Form)
        return found

    def replaced(self, /, **changes: Any) -> Application:
        """The same op with other arguments."""
        return Application(self.target, {**self.named, **changes})

    def arguments(self, convert: Callable[[Any], Any]) -> tuple[list[Any], dict[str, Any]]:
        """(args, kwargs) of the call, defaults left out, every value through `convert`."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        skipped = False
        for argument in self.target._schema.arguments:
            value = self.named[argument.name]
            if argument.has_default_value() and not isinstance(value, Form) and value == argument.default_value:
                skipped = True
            elif argument.kwarg_only or skipped:
                kwargs[argument.name] = convert(value)
            else:
                args.append(convert(value))
        return args, kwargs


_TOPICS = """blocks joins picks views sums linear chains addmm conv products einsum reductions extremes norms batch_norm
masks attention rnn cells written group_norm cumsum"""


_VIEWED = ("aten.gru_cell.default",)  # whose handlers take views as they are


def _load() -> None:
    """Importing the handler modules registers them."""
    for name in _TOPICS.split():
        importlib.import_module(f"passes.splits.{name}")


@dataclass
class Split:
    """The result: what was considered, in order; of attention that lets the request see the impression, what it would
    see under a mask (by the node of the graph before)."""

    candidates: list[Candidate] = field(default_factory=list)
    unmasked: dict[Node, Tensor] = field(default_factory=dict)


def split(
    captured: Captured, fanout: float, mode: Mode = "priced", otherwise: frozenset[tuple[str, str]] = frozenset()
) -> Split:
    """Splits the annotated graph of `captured` in place; annotate it again afterwards.

    At fan-out 1 every node runs as often as before, so the graph is kept as it is unless all of it gets faster.
    otherwise: keys of candidates to decide the other way.
    """
    _load()
    splitter = Splitter(captured, Price(device_of(captured), fanout, captured.batch, mode, otherwise))
    if mode != "never":
        found = splitter.run()
        if (
            mode == "priced"
            and fanout <= 1
            and splitter.price.together(found) >= splitter.price.together(captured.graph)
        ):
            splitter.price.candidates = [replace(c, taken=False) for c in splitter.price.candidates]
        else:
            captured.graph = found
    return Split(splitter.price.candidates, splitter.unmasked)


class Splitter:
    """One walk over the graph."""

    def __init__(self, captured: Captured, price: Price):
        self.captured = captured
        self.price = price
        self.builder = Builder(captured)
        self.forms: dict[Node, Form | list[Form]] = {}
        self.copies: dict[Node, Node] = {}
        self.unmasked: dict[Node, Tensor] = {}
        self.chains: dict[Node, tuple[OpOverload, list[Node]]] = {}

    def run(self) -> torch.fx.Graph:
        """The split graph."""
        for node in self.captured.graph.nodes:
            self.builder.origin = node
            if node.op == "output":
                self.builder.graph.output(torch.fx.map_arg(node.args[0], self.node_of))
            else:
                self._visit(node)
        graph = self.builder.graph
        graph.eliminate_dead_code(is_impure_node=_keeps)
        graph.lint()
        return graph

    def node_of(self, old: Node) -> Node:
        """The new node with the whole value of `old`."""
        if old not in self.copies:
            form = self.forms[old]
            assert isinstance(form, Form), f"{old} has several values"
            self.copies[old] = self.builder.whole(form)
        return self.copies[old]

    def _visit(self, node: Node) -> None:
        if node.target is operator.getitem and isinstance(self.forms.get(node.args[0]), list):  # type: ignore[arg-type]
            self.forms[node] = self.forms[node.args[0]][node.args[1]]  # type: ignore[index]
            return
        try:
            result = self._split(node) if _may_split(node) else None
        except NotRowWise:  # what a handler would build holds for the traced batch only
            result = None
        if result is not None and _keeps_dtypes(node, result):
            self.forms[node] = result
            return
        made = self._size(node)
        if made is None:
            made = self.builder.graph.node_copy(node, self.node_of)
            self.builder.adopt(made, node)
        self.copies[node] = made
        if isinstance(node.meta.get("val"), Tensor):
            self.forms[node] = Whole(made)

    def _size(self, node: Node) -> Node | None:
        """The size of a value that is not carried out, without carrying it out."""
        if node.target is not aten.sym_size.int or isinstance(self.forms.get(node.args[0]), Whole):  # type: ignore[arg-type]
            return None
        size = node.meta["val"]
        return self.builder.size(size) if isinstance(size, torch.SymInt) else None

    def _split(self, node: Node) -> Form | list[Form] | None:
        inputs = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), (Tensor, list, tuple))]
        if any(not isinstance(self.forms.get(n), Form) for n in inputs):
            return None
        plain = all(isinstance(self.forms[n], Whole) for n in inputs)
        if plain and str(node.target) not in HANDLERS:
            return None
        application = self._application(node)
        lifted, application = self._past_views(application)
        handler = HANDLERS.get(str(node.target))
        result = handler(self, application) if handler is not None and lifted is None else lifted
        return result if result is not None or plain else self.blockwise(application)

    def _application(self, node: Node) -> Application:
        def convert(value: Any) -> Any:
            if isinstance(value, Node):
                form = self.forms.get(value)
                return form if isinstance(form, Form) else self.node_of(value)
            return [convert(v) for v in value] if isinstance(value, (list, tuple)) else value

        assert isinstance(node.target, OpOverload)
        named: dict[str, Any] = {}
        for i, argument in enumerate(node.target._schema.arguments):
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
            named[argument.name] = convert(value)
        return Application(node.target, named)

    def _past_views(self, app: Application) -> tuple[Form | None, Application]:
        """The result of an op below the views of its operands, or the op on what these views give."""
        from passes.splits.reshaped import settled, through
        from passes.splits.views import VIEWS, to_shape

        values = [v for value in app.named.values() for v in (value if isinstance(value, list) else [value])]
        if str(app.target) in (*VIEWS, *_VIEWED) or not any(isinstance(v, Reshaped) for v in values):
            return None, app
        lifted = through(self, app)
        return lifted, settled(app, lambda form, shape: to_shape(self, form, shape)) if lifted is None else app

    # -- for handlers

    def apply(self, application: Application) -> Form:
        """The op on these forms, in the best form known. One tensor out."""
        lifted, application = self._past_views(application)
        handler = HANDLERS.get(str(application.target))
        result = handler(self, application) if handler is not None and lifted is None else lifted
        if result is None:
            result = self.blockwise(application)
        if result is None:
            result = self.plain(application)
        assert isinstance(result, Form)
        return result

    def op(self, target: OpOverload, *args: Any) -> Form:
        """`apply` with positional arguments."""
        names = [a.name for a in target._schema.arguments]
        named = {a.name: a.default_value for a in target._schema.arguments}
        return self.apply(Application(target, {**named, **dict(zip(names, args))}))

    def plain(self, application: Application) -> Form:
        """The op on its operands carried out."""
        args, kwargs = application.arguments(self.carry_out)
        return Whole(self.builder.call(application.target, *args, **kwargs))

    def carry_out(self, value: Any) -> Any:
        """Forms, in lists too, as nodes."""
        if isinstance(value, Form):
            return self.builder.whole(value)
        return [self.carry_out(v) for v in value] if isinstance(value, (list, tuple)) else value

    def take(self, what: str, before: float, after: float) -> bool:
        """Whether a split of the op that is being walked pays; it is written down under the name of the op."""
        return self.price.take(what, before, after, self.builder.origin.name if self.builder.origin is not None else "")

    def blockwise(self, application: Application) -> Form | list[Form] | None:
        """The op part by part, where a row rule says it may; None where it may not."""
        from passes.splits.blocks import blockwise

        try:
            return blockwise(self, application)
        except NotRowWise:
            return None


def _may_split(node: Node) -> bool:
    return (
        isinstance(node.target, OpOverload)
        and EFFECT not in node.meta
        and not any(EFFECT in n.meta for n in node.all_input_nodes)  # must be read where it stands
        and AUTOCAST not in node.meta
        and isinstance(node.meta.get("val"), (Tensor, list, tuple))
        and node.target is not torch.ops.roo.leaf.default
        and not draws(node)
    )


def _keeps_dtypes(node: Node, found: Form | list[Form]) -> bool:
    """Whether what stands for a node's values has their dtypes: of operands of several, torch promotes as it likes."""
    forms = found if isinstance(found, list) else [found]
    return all(dtype_of(f) is v.dtype for f, v in zip(forms, pytree.tree_leaves(node.meta["val"]), strict=False))


def _keeps(node: Node) -> bool:
    trains = node.target is aten.batch_norm.default and bool(node.args[5])
    return is_effect(node) or trains or draws(node)
