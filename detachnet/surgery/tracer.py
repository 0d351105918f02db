"""The torch.fx tracer: what is kept whole, what a dotted name means, and decisions that only need shapes.

torch.fx refuses every decision a forward pass makes about a traced value. Most decisions are about shapes
(`if x.ndim == 4`, `range(x.shape[1])`), which are known: the tracer works them out on the meta device, at two
batch sizes, and refuses only what depends on the pixels or on the batch size.
"""

from __future__ import annotations

import math
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _BatchNorm

from detachnet.errors import TraceError
from detachnet.surgery.batches import OtherBatches
from detachnet.surgery.listening import answer_builtins, watching
from detachnet.surgery.modules import attribute, inner_model, random_states_kept
from detachnet.surgery.variables import is_users
from detachnet.surgery.whole import Watch

PREFIX = "base."
"""Where the traced model sits below the module that runs its graphs (`DetachableNet.base`)."""
PROBE_BATCH = 11
"""Batch size of the shape propagation; a number that no other axis is likely to have."""
_RANDOM = ("rand", "randint", "randn", "randperm")
_FACTORIES = (*_RANDOM, "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "tensor", "zeros")
_BATCH_NORMS = (F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm)


@dataclass(frozen=True)
class Spec:
    """Shape `(B, ...)` and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def example(self, batch: int = PROBE_BATCH) -> torch.Tensor:
        """A batch of that shape and dtype without content, on the meta device."""
        return torch.empty(batch, *self.shape[1:], dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class Leaves:
    """What a user wants kept whole.

    Besides what is anyway: torch.nn's own layers, timm's list, batch norms, and modules without children.

    Attributes:
        modules: Classes of modules, and paths of single ones.
        functions: Functions that a traced module calls by a global name.
        opened: Paths of modules that are not kept whole for what changes no values: hooks, checkpointing.
    """

    modules: tuple[type[nn.Module] | str, ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    opened: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        kept = tuple(f for f in self.functions if not isinstance(f, torch.jit.ScriptFunction))
        object.__setattr__(self, "functions", kept)  # script functions are kept whole anyway

    @classmethod
    def given(cls, modules: Iterable[type[nn.Module] | str], functions: Iterable[Callable[..., Any]]) -> Leaves:
        """What a user gives.

        Raises:
            TraceError: One in the place of a list.
        """
        for name, value in (("leaf_modules", modules), ("leaf_functions", functions)):
            if isinstance(value, str) or callable(value):
                said = repr(value) if isinstance(value, str) else getattr(value, "__name__", repr(value))
                raise TraceError(f"{name} is a list, not {said}", hint=f"{name}=[{said}]")
        return cls(tuple(modules), tuple(functions))

    def with_paths(self, paths: Iterable[str]) -> Leaves:
        """These, and some single modules."""
        return replace(self, modules=(*self.modules, *(path for path in paths if path not in self.modules)))

    def opening(self, path: str) -> Leaves:
        """These, with a module opened that would be kept whole."""
        return replace(self, opened=(*self.opened, path))

    @property
    def classes(self) -> tuple[type[nn.Module], ...]:
        """The classes among the modules."""
        return tuple(module for module in self.modules if not isinstance(module, str))

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths among the modules."""
        return tuple(module for module in self.modules if isinstance(module, str))


NO_LEAVES = Leaves()


class Tracer(fx.Tracer):
    """Traces a module that lives on the meta device.

    Attributes:
        stack: Paths of the modules whose forward pass is running, outermost first.
        calls: Path of a module or operation → its nodes, one per call.
    """

    proxy_buffer_attributes = True

    def __init__(self, leaves: Leaves, image: Spec) -> None:
        functions: list[Callable[..., Any]] = get_notrace_functions()
        super().__init__(autowrap_modules=(math,), autowrap_functions=(*functions, *leaves.functions))
        self.notrace = (*get_notrace_modules(), *leaves.classes, torch.jit.ScriptModule)
        self.paths = {f"{PREFIX}{path}" for path in leaves.paths}
        self.watch = Watch(self, leaves.opened)
        self.thread = threading.get_ident()
        self.augmented: dict[fx.Node, Callable[..., Any]] = {}
        """Node → the operator in place (`operator.iadd`) that it is written as."""
        self.without_gradients: list[fx.Node] = []
        """The nodes inside `torch.no_grad`."""
        self.stack: list[str] = []
        self.calls: dict[str, list[fx.Node]] = {}
        self._probes = [Probe(self, image.example(batch)) for batch in (PROBE_BATCH, PROBE_BATCH + 1)]
        self._elsewhere = OtherBatches(self._values, (PROBE_BATCH, PROBE_BATCH + 1))
        self.probing = False
        self.refused: fx.proxy.TraceError | None = None
        """What was raised where a forward pass decides by values."""
        self._image = image
        self._thread = threading.get_ident()

    @property
    def aside(self) -> bool:
        """Whether what runs now is no part of the trace: shapes are worked out, or another thread runs it."""
        return self.probing or threading.get_ident() != self._thread

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace with factory functions (`torch.zeros(x.shape[0], …)`) as operations of the graph."""
        self.with_gradients = torch.is_grad_enabled()
        with watching(self.watch), _factories_traced(self), self.watch.listening():
            graph = super().trace(root, concrete_args)
        if self.refused is not None:  # and the forward pass went on behind an `except`
            raise self.refused
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is kept whole."""
        if module_qualified_name == PREFIX.rstrip("."):
            return False
        if inner_model(m) is not None and module_qualified_name not in self.paths:
            return False
        return (
            isinstance(m, (_BatchNorm, *self.notrace))
            or module_qualified_name in self.paths
            or super().is_leaf_module(m, module_qualified_name)
            or next(m.children(), None) is None
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a module's call and note what its path means."""
        if self.aside or self._is_made_in_passing(m):
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        self.stack.append(path)
        out = super().call_module(m, self._opened(m, path, forward), args, kwargs)
        self.stack.pop()
        if isinstance(out, fx.Proxy):
            self._name(path, out.node)
            if out.node.target == path and is_users(type(m).__module__):
                self.watch.calls(out.node, path.removeprefix(PREFIX))
        return out

    def _is_made_in_passing(self, m: nn.Module) -> bool:
        """Whether a forward pass has made a module of layers that the model has, or that have no tensors.

        `self.features[:16](x)`, say, or `nn.ReLU()(x)`.
        """
        if m in self._parts:
            return False
        made = [part for part in m.modules() if part not in self._parts]
        return not any(
            tensor is not None for part in made for tensor in (*part._parameters.values(), *part._buffers.values())
        )

    @cached_property
    def _parts(self) -> set[nn.Module]:
        """The modules of what is traced."""
        return set(self.root.modules())

    def _opened(self, m: nn.Module, path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A module's forward while its watch listens; that of what is inside a wrapper such as DataParallel."""

        def run(*args: Any, **kwargs: Any) -> Any:
            answer_builtins(m)
            with self.watch.inside(m, (path + ".").removeprefix(PREFIX).rstrip(".")):
                inner = inner_model(m)
                return forward(*args, **kwargs) if inner is None else inner(*args, **kwargs)

        return run

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A module's attribute; as it is where it is no part of the trace."""
        return attr_val if self.aside else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node and note its dotted name."""
        if kind != "get_attr":
            self.watch.step()
        node = super().create_node(kind, target, *args, **kwargs)
        if kind in ("call_function", "call_method"):
            op = target if isinstance(target, str) else getattr(target, "__name__", str(target))
            self._name(".".join([*self.stack[-1:], op]), node)
            if kind == "call_method" and op in _NUMBERS:
                self.watch.note(f".{op}() of a tensor", decides=True)
            elif kind == "call_method" and op.endswith("_") and not op.endswith("__"):
                self.watch.writes(node.args[0])
            elif target is torch.autograd.grad:
                self.watch.note("gradients of its own", decides=True)
            elif target in _BATCH_NORMS and len(node.args) > 1 and self.root.training:
                self.watch.writes(node.args[1])
        if kind not in ("get_attr", "output") and self.with_gradients and not torch.is_grad_enabled():
            self.without_gradients.append(node)
        return node

    def create_arg(self, a: Any) -> Any:
        """An argument of a node; a number of NumPy's as one of Python's, which can be written down."""
        if isinstance(a, torch.Generator):
            self.watch.note("random numbers of its own", decides=True)
        elif isinstance(a, torch.Tensor) and a.requires_grad and not isinstance(a, nn.Parameter):
            self.watch.takes_gradient()
        elif self._is_of_the_twin(a):
            made = "a tensor made of weights, or on their device, as no trace holds it"
            said = "a question about the device of a weight" if isinstance(a, torch.device) else made
            self.watch.note(said, decides=True)
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)

    def _is_of_the_twin(self, a: object) -> bool:
        """Whether an argument is the device of what is traced, or a tensor made there, none of the model's own."""
        if not isinstance(a, torch.Tensor):
            return isinstance(a, torch.device) and a.type == "meta"
        held = (
            t
            for m in self.root.modules()
            for t in [*m._parameters.values(), *m._buffers.values(), *vars(m).values()]
        )
        return a.is_meta and not any(a is each for each in held)

    def _name(self, path: str, node: fx.Node) -> None:
        calls = self.calls.setdefault(path.removeprefix(PREFIX), [])
        if node not in calls:
            calls.append(node)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A traced value that can be asked about its shape."""
        return _ShapeProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide by a value that depends on shapes alone."""
        self.watch.decides(obj.node)
        known, value = self.known(obj.node)
        if known:
            return bool(value)
        try:
            return super().to_bool(obj)
        except fx.proxy.TraceError as error:
            self.refused = error
            raise

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Unpack a value whose length depends on shapes alone."""
        known, value = self.known(obj.node, length_only=True)
        items: Any = obj
        return iter([items[i] for i in range(value)]) if known else super().iter(obj)

    def known(self, node: fx.Node, length_only: bool = False) -> tuple[bool, Any]:
        """Whether a value is the same for every image and batch size, and that value (or its length)."""
        if self.probing:
            return False, None
        self.probing = True
        try:
            values = self._values(node)
            follows = not (self._elsewhere.is_as_long(node) if length_only else self._elsewhere.is_same(node))
            values = (len(values[0]), len(values[1])) if length_only else values
            self.watch.asks_shape_of(node)
        except Exception:  # whatever an operation raises where there are shapes only
            return False, None
        finally:
            self.probing = False
        plain = not any(isinstance(value, torch.Tensor | fx.Proxy) for value in values)
        alike = plain and bool(values[0] == values[1])
        if follows and (alike or isinstance(values[0], bool)):
            self.watch.note("a decision by the batch size", decides=True)
        return alike and not follows, values[0]

    def _values(self, node: fx.Node) -> tuple[Any, Any]:
        """What a node gives at two batch sizes."""
        one, two = (probe.value(node) for probe in self._probes)
        return one, two

    def class_of(self, obj: fx.Proxy) -> type:
        """The class of a traced value, if its shapes tell."""
        if self.probing:
            return type(obj)
        self.probing = True
        try:
            return type(self._probes[0].value(obj.node))
        except Exception:  # whatever an operation raises where there are shapes only
            return type(obj)
        finally:
            self.probing = False

    def probe(self) -> Probe:
        """Works out values after the trace, each node once."""
        self.probing = True
        return Probe(self, self._image.example())


class Probe:
    """Works out values on the meta device while tracing goes on, each node once."""

    def __init__(self, tracer: Tracer, image: torch.Tensor) -> None:
        self.tracer, self.image = tracer, image
        self.values: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """What a node gives for the example image."""
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [n for n in current.all_input_nodes if n not in self.values]
            pending += missing
            if not missing:
                pending.pop()
                if current not in self.values:
                    self.values[current] = self._run(current)
        return self.values[node]

    def _run(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self.image
        root: Any = self.tracer.root
        if node.op == "get_attr":
            return attribute(root, str(node.target))
        args: Any = thaw(map_aggregate(node.args, self._given))
        kwargs: Any = thaw(map_aggregate(node.kwargs, self._given))
        with torch.device("meta"), torch.no_grad():
            if node.op == "call_module":
                module = root.get_submodule(str(node.target))
                if type(module).__module__.startswith("torch."):
                    return module(*args, **kwargs)
                with random_states_kept():  # what a layer draws here is no doing of the forward that is traced
                    return module(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            target: Any = node.target
            return target(*args, **kwargs)

    def _given(self, leaf: Any) -> Any:
        return self.values[leaf] if isinstance(leaf, fx.Node) else leaf


class _ShapeProxy(fx.Proxy):
    """A traced value that answers as a number or a sequence where its shape is enough."""

    tracer: Tracer

    def __getattr__(self, k: str) -> Any:
        if k.startswith("__") and k.endswith("__"):
            raise AttributeError(k)  # what NumPy and others ask for to see whether this is an array
        self.tracer.watch.asks(k)
        return _ShapeAttribute(self, k)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OF_A_PROXY:
            self.tracer.watch.note(f".{name} of a tensor assigned", counts=True)
        super().__setattr__(name, value)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self._known(), dtype=dtype)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __index__(self) -> int:
        return operator.index(self._known())

    def __int__(self) -> int:
        return int(self._known())

    def __float__(self) -> float:
        return float(self._known())

    def __len__(self) -> int:
        known, value = self.tracer.known(self.node, length_only=True)
        if not known:
            raise fx.proxy.TraceError("the length of a traced value does not follow from shapes")
        return int(value)

    def _known(self) -> Any:
        known, value = self.tracer.known(self.node)
        if not known and isinstance(value, int | float):
            raise fx.proxy.TraceError(
                "a traced number that follows the batch size is used as a plain one, as by int() or range(); "
                "a // b in the place of int(a / b) stays a traced one"
            )
        if not known:
            raise fx.proxy.TraceError("a traced value that does not follow from shapes is used as a number")
        return value


_NUMBERS = ("item", "tolist", "numpy")
"""What makes numbers of a tensor's values, which are not there while tracing."""
_OF_A_PROXY = {"tracer", "node", "root", "attr", "_node"}
"""The attributes that torch.fx gives a traced value."""
_AUGMENTED = (
    "add",
    "and_",
    "floordiv",
    "lshift",
    "matmul",
    "mod",
    "mul",
    "or_",
    "pow",
    "rshift",
    "sub",
    "truediv",
    "xor",
)


def _augmented(name: str) -> Callable[[_ShapeProxy, Any], Any]:
    """`x += y` as a node like that of `x + y`, which is remembered: in place is a matter of who reads x then."""
    out_of_place, in_place = getattr(operator, name), getattr(operator, f"i{name.rstrip('_')}")

    def method(self: _ShapeProxy, other: Any) -> Any:
        made = self.tracer.create_proxy("call_function", out_of_place, (self, other), {})
        self.tracer.augmented[made.node] = in_place
        return made

    return method


for _name in _AUGMENTED:
    setattr(_ShapeProxy, f"__i{_name.rstrip('_')}__", _augmented(_name))


class _ShapeAttribute(fx.proxy.Attribute, _ShapeProxy):
    """An attribute of a traced value, such as `x.ndim`."""

    def __hash__(self) -> int:
        if self.attr in ("dtype", "device"):  # looked up in a set or a dict, where it is not
            self.tracer.watch.cannot_tell(self.attr)
        return super().__hash__()


@contextmanager
def _factories_traced(tracer: Tracer) -> Iterator[None]:
    """Make factory functions with traced arguments nodes; torch.fx sees functions of tensors only.

    Other threads call the replaced functions too, and get what they always get.
    """

    def traced(factory: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if tracer.aside:
                return factory(*args, **kwargs)
            follows = any(isinstance(leaf, fx.Proxy) for leaf in leaves_of((args, kwargs)))
            if not (follows or factory.__name__ in _RANDOM):
                return factory(*args, **kwargs)
            return tracer.create_proxy("call_function", factory, args, kwargs)

        return call

    originals = {name: getattr(torch, name) for name in _FACTORIES}
    try:
        for name, factory in originals.items():
            setattr(torch, name, traced(factory))
        yield
    finally:
        for name, factory in originals.items():
            setattr(torch, name, factory)


def leaves_of(value: Any) -> Iterator[Any]:
    """Every leaf of nested tuples, lists and dicts."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from leaves_of(item)
    elif isinstance(value, dict):
        yield from leaves_of(list(value.values()))
    else:
        yield value


def thaw(value: Any) -> Any:
    """Arguments as a function expects them: torch.fx keeps lists and dicts in types that cannot be changed."""
    if isinstance(value, list):
        return [thaw(item) for item in value]
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return type(value)(thaw(item) for item in value)
    if isinstance(value, dict):
        return {key: thaw(item) for key, item in value.items()}
    return value
