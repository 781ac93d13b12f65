"""What a trace read of a model beside parameters and buffers: submodules, hooks, settings in objects and lists.

A trace holds these for constants. Where one is replaced or changed between two calls, the programs are built anew.
Only what a forward reads is watched, so that a trainer may keep its books in the model. Every mutable container is
kept with a shallow copy: comparing the two costs a pointer an entry. Most are empty: those are asked for nothing else.
"""

from __future__ import annotations

import contextlib
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_ABSENT = object()
_OWN = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"}
_PLAIN = (int, float, complex, str, bytes, type(None), type, ModuleType, nn.Module)
_DEPTH, _MOST, _LONG = 5, 4096, 10_000
_CHEAP = 1 << 16  # entries of a tensor that is compared at every call
_OF_TORCH = (tuple, FunctionType, BuiltinFunctionType)  # settings of torch's own modules; numbers are `Setting`s
_ASKED: dict[str, Callable[[Any], Any]] = {
    "dtype": operator.attrgetter("dtype"),
    "shape": operator.attrgetter("shape"),
    "requires_grad": operator.attrgetter("requires_grad"),
}


# Path of a module, name of its parameter or buffer, what is asked of it.
Ask = tuple[str, str, str]


@dataclass
class Outlook:
    """attributes: namespace, key and value; containers: each with its copy; empty: those without an entry; tensors:
    with their version, small ones with a copy too; cells; modules: with their classes; registered: parameters and
    buffers by module, with whether each is None; asked: namespace, key, what was asked of the tensor there, and the
    answer, for the paths and keys of `asks`."""

    attributes: list[tuple[dict[str, Any], str, Any]] = field(default_factory=list)
    containers: list[tuple[Any, Any]] = field(default_factory=list)
    empty: list[Any] = field(default_factory=list)
    tensors: list[tuple[Tensor, int, Tensor | None]] = field(default_factory=list)
    cells: list[tuple[CellType, Any]] = field(default_factory=list)
    modules: list[nn.Module] = field(default_factory=list)
    classes: list[type] = field(default_factory=list)
    registered: list[dict[str, Any]] = field(default_factory=list)
    absent: list[bool] = field(default_factory=list)
    asked: list[tuple[dict[str, Any], str, str, Any]] = field(default_factory=list)
    asks: set[Ask] = field(default_factory=set)
    seen: set[int] = field(default_factory=set)
    leaves: tuple[str, ...] = ()
    keys: dict[str, set[str]] = field(default_factory=dict)
    statics: list[Any] = field(default_factory=list)

    def look(
        self,
        model: nn.Module,
        leaves: Sequence[str],
        keys: dict[str, set[str]],
        statics: Sequence[Any],
        asks: Iterable[Ask] = (),
    ) -> None:
        """Adds the tree of `model`, the attributes `keys` of its modules by path, and plain arguments of the call."""
        self.leaves = tuple(dict.fromkeys((*self.leaves, *leaves)))
        self.statics += statics
        self._tree(model, self.leaves)
        self._ask(model, asks)
        for path, module in model.named_modules():
            own = keys.get(path, set())
            if type(module).__module__.startswith("torch."):
                own = {key for key in own if isinstance(vars(module).get(key), _OF_TORCH)}
            self.keys[path] = self.keys.get(path, set()) | own
            self._read(module, own)
        for value in statics:
            self._value(value, _DEPTH)

    def of(self, model: nn.Module) -> Outlook:
        """The same, of a copy of the model."""
        made = Outlook()
        made.look(model, self.leaves, self.keys, self.statics, self.asks)
        return made

    def _ask(self, model: nn.Module, asks: Iterable[Ask]) -> None:
        """Adds what was asked of parameters and buffers."""
        modules = dict(model.named_modules())
        for path, key, what in set(asks) - self.asks:
            module = modules.get(path)
            for held in (module._parameters, module._buffers) if module is not None else ():
                if isinstance(held.get(key), Tensor):
                    self.asks.add((path, key, what))
                    self.asked.append((held, key, what, _ASKED[what](held[key])))

    def _tree(self, model: nn.Module, leaves: Sequence[str]) -> None:
        """Adds the submodules and their hooks; a leaf is called as it is and may be replaced."""
        self.modules, self.registered = [], []
        for path, module in model.named_modules():
            if any(path == leaf or path.startswith(f"{leaf}.") for leaf in leaves):
                continue
            if isinstance(module, torch.jit.ScriptModule):  # its attributes are not Python's
                continue
            own = vars(module)
            inner = [k for k in module._modules if (f"{path}.{k}" if path else k) in leaves]
            self.modules.append(module)
            self.registered += [held for held in (module._parameters, module._buffers) if held]
            backward = (module._backward_hooks, module._backward_pre_hooks)
            for hooks in (module._forward_hooks, module._forward_pre_hooks, *backward):
                self._contents(hooks, hooks.copy())
            if not inner:
                self._contents(module._modules, dict(module._modules))
            else:
                self.attributes += [(module._modules, k, m) for k, m in module._modules.items() if k not in inner]
            self.attributes.append((own, "forward", own.get("forward", _ABSENT)))
        self.classes, self.absent = self._tree_now()

    def _tree_now(self) -> tuple[list[type], list[bool]]:
        """The class of each module, and whether each parameter and buffer is None; there may be hundreds."""
        values = chain.from_iterable(map(dict.values, self.registered))
        return list(map(type, self.modules)), list(map(operator.is_, values, repeat(None)))

    def _contents(self, live: Any, known: Any) -> None:
        """Adds a list, dict or set with its copy."""
        if known:
            self.containers.append((live, known))
        else:
            self.empty.append(live)

    def _read(self, module: nn.Module, keys: Iterable[str]) -> None:
        """Adds the attributes `keys` of a module, as deep as they go."""
        own = vars(module)
        for key in keys:
            value = own.get(key, _ABSENT)
            if key in _OWN or key.endswith("_hooks") or (value is _ABSENT and hasattr(module, key)):
                continue
            if value is _ABSENT:  # a buffer may come by that name
                self.attributes += [(held, key, _ABSENT) for held in (module._parameters, module._buffers)]
            self.attributes.append((own, key, value))
            self._value(value, _DEPTH)

    def _value(self, value: Any, depth: int) -> None:
        """Adds what can change within a value."""
        many = len(self.containers) + len(self.empty) > _MOST
        if isinstance(value, _PLAIN) or id(value) in self.seen or not depth or many:
            return
        self.seen.add(id(value))
        inner: Iterable[Any] = ()
        if isinstance(value, Tensor):
            if not value.is_inference():
                self.tensors.append((value, value._version, _copy(value)))
        elif isinstance(value, FunctionType):
            filled = [(c, c.cell_contents) for c in value.__closure__ or () if c != CellType()]
            self.cells += filled
            inner = [content for _, content in filled]
        elif isinstance(value, MethodType):
            inner = (value.__self__,)
        elif isinstance(value, (list, dict, set)) and len(value) <= _LONG:
            self._contents(value, value.copy())
            inner = value.values() if isinstance(value, dict) else value
        elif isinstance(value, (tuple, frozenset)) and len(value) <= _LONG:
            inner = value
        elif hasattr(value, "__array_interface__") and getattr(value, "size", _LONG) < _LONG:
            self.containers.append((_Bytes(value), value.tobytes()))
        elif _users(value):
            self._contents(vars(value), dict(vars(value)))
            inner = vars(value).values()
        for part in list(inner):
            self._value(part, depth - 1)

    def _stale(self) -> Iterator[bool]:
        yield from (_differ(live, known) for live, known in self.containers)
        yield from (tensor._version != version or _written(tensor, was) for tensor, version, was in self.tensors)
        yield from (cell.cell_contents is not value for cell, value in self.cells)
        yield from (_ASKED[what](held[key]) != value for held, key, what, value in self.asked)

    def changed(self) -> bool:
        """Whether anything is not as it was."""
        if any(self.empty) or self._tree_now() != (self.classes, self.absent):
            return True
        for own, key, value in self.attributes:
            if own.get(key, _ABSENT) is not value:
                return True
        return any(self._stale())


class _Bytes:
    """An array that is compared by its bytes."""

    def __init__(self, array: Any):
        self.array = array

    def __eq__(self, other: object) -> bool:
        return bool(self.array.tobytes() == other)

    __hash__ = None  # type: ignore[assignment]


def _copy(tensor: Tensor) -> Tensor | None:
    """What a small tensor holds: written through `.data` or NumPy, it has the version that it had."""
    cheap = tensor.numel() <= _CHEAP and tensor.device.type == "cpu" and tensor.layout is torch.strided
    return tensor.detach().clone() if cheap and type(tensor) in (Tensor, nn.Parameter) else None


def _written(tensor: Tensor, was: Tensor | None) -> bool:
    """Whether a tensor no longer holds what it held."""
    if was is None:
        return False
    if (tensor.dtype, tensor.shape) != (was.dtype, was.shape):
        return True
    return not torch.equal(tensor, was) and not torch.isclose(tensor, was, rtol=0.0, atol=0.0, equal_nan=True).all()


def _differ(live: Any, known: Any) -> bool:
    try:
        return bool(live != known)
    except Exception:  # entries that cannot be compared, unlike identical ones, are others
        return True


def _users(value: Any) -> bool:
    """Whether it is an object of a class that is neither Python's nor torch's."""
    root = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and root not in sys.stdlib_module_names - {"__main__"} and root != "torch"


@contextlib.contextmanager
def reads() -> Iterator[dict[int, set[str]]]:
    """While active, notes the names of the attributes that are read of each module, by its id.

    One that was set before, like an intermediate kept for a later line, is no news from outside.
    """
    found: dict[int, set[str]] = {}
    made: dict[int, set[str]] = {}
    plain = nn.Module.__setattr__

    def noting(self: nn.Module, name: str) -> Any:
        if name not in made.get(id(self), ()):
            found.setdefault(id(self), set()).add(name)
        return object.__getattribute__(self, name)

    def setting(self: nn.Module, name: str, value: Any) -> None:
        if name not in found.get(id(self), ()):
            made.setdefault(id(self), set()).add(name)
        plain(self, name, value)

    nn.Module.__getattribute__ = noting  # type: ignore[method-assign,assignment]
    nn.Module.__setattr__ = setting  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del nn.Module.__getattribute__
        nn.Module.__setattr__ = plain  # type: ignore[method-assign]


class Asked(TorchFunctionMode):
    """While active, notes what is asked of each tensor but its entries, by its id; not what torch asks by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, set[str]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        what = _GETTERS.get(func)
        if what is not None:
            self.found.setdefault(id(args[0]), set()).add(what)
        return func(*args, **(kwargs or {}))

    def of(self, model: nn.Module) -> set[Ask]:
        """What was asked of the parameters and buffers of `model`."""
        return {
            (path, key, what)
            for path, module in model.named_modules()
            for key, value in (*module._parameters.items(), *module._buffers.items())
            for what in self.found.get(id(value), ())
        }


_GETTERS: dict[Any, str] = {
    Tensor.dtype.__get__: "dtype",  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__: "requires_grad",  # type: ignore[attr-defined]
    **dict.fromkeys((Tensor.shape.__get__, Tensor.size, Tensor.numel, Tensor.__len__), "shape"),  # type: ignore[attr-defined]
}
