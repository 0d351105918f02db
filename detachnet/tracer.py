"""The torch.fx tracer: what is kept whole, what a dotted name means, and decisions that only need shapes.

torch.fx refuses every decision a forward pass makes about a traced value. Most decisions are about shapes
(`if x.ndim == 4`, `range(x.shape[1])`), which are known: the tracer works them out on the meta device, at two
batch sizes, and refuses only what depends on the pixels or on the batch size.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _BatchNorm

PREFIX = "base."
"""Where the traced model sits below the module that runs its graphs (`DetachableNet.base`)."""

PROBE_BATCH = 11
"""Batch size of the shape propagation; a number that no other axis is likely to have."""

_RANDOM = ("rand", "randint", "randn", "randperm")
_FACTORIES = (*_RANDOM, "arange", "empty", "eye", "full", "linspace", "ones", "zeros")


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
        modules: Classes of modules.
        functions: Functions that a traced module calls by a global name.
    """

    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()


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
        self.notrace = (*get_notrace_modules(), *leaves.modules)
        self.stack: list[str] = []
        self.calls: dict[str, list[fx.Node]] = {}
        self._probes = [_Probe(self, image.example(batch)) for batch in (PROBE_BATCH, PROBE_BATCH + 1)]
        self.probing = False
        self._image = image

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Trace with factory functions (`torch.zeros(x.shape[0], …)`) as operations of the graph."""
        with _factories_traced(self):
            return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is kept whole."""
        if module_qualified_name == PREFIX.rstrip("."):
            return False
        return (
            isinstance(m, (_BatchNorm, *self.notrace))
            or super().is_leaf_module(m, module_qualified_name)
            or next(m.children(), None) is None
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace a module's call and note what its path means."""
        if self.probing:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        self.stack.append(path)
        out = super().call_module(m, forward, args, kwargs)
        self.stack.pop()
        if isinstance(out, fx.Proxy):
            self._name(path, out.node)
        return out

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A module's attribute; as it is while shapes are worked out."""
        return attr_val if self.probing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a node and note its dotted name."""
        node = super().create_node(kind, target, *args, **kwargs)
        if kind in ("call_function", "call_method"):
            op = target if isinstance(target, str) else getattr(target, "__name__", str(target))
            self._name(".".join([*self.stack[-1:], op]), node)
        return node

    def _name(self, path: str, node: fx.Node) -> None:
        calls = self.calls.setdefault(path.removeprefix(PREFIX), [])
        if node not in calls:
            calls.append(node)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A traced value that can be asked about its shape."""
        return _ShapeProxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide by a value that depends on shapes alone."""
        known, value = self.known(obj.node)
        return bool(value) if known else super().to_bool(obj)

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
            values = [probe.value(node) for probe in self._probes]
            if length_only:
                values = [len(value) for value in values]
            elif isinstance(values[0], bool) and self._asks_for_batch(node):
                values += [_Probe(self, self._image.example(batch)).value(node) for batch in (1, 2, 64)]
        except Exception:  # whatever an operation raises where there are shapes only
            return False, None
        finally:
            self.probing = False
        plain = not any(isinstance(value, torch.Tensor) for value in values)
        return plain and all(value == values[0] for value in values), values[0]

    def _asks_for_batch(self, node: fx.Node) -> bool:
        """Whether a number that follows the batch size went into a value."""
        pending, seen = list(node.all_input_nodes), set[fx.Node]()
        while pending:
            current = pending.pop()
            if current in seen:
                continue
            seen.add(current)
            one, other = (probe.values.get(current) for probe in self._probes)
            if isinstance(one, int | float) and one != other:
                return True
            pending += [n for n in current.all_input_nodes if not isinstance(one, torch.Tensor)]
        return False


class _Probe:
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
                return root.get_submodule(str(node.target))(*args, **kwargs)
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
        return _ShapeAttribute(self, k)

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
        if not known:
            raise fx.proxy.TraceError("a traced value that does not follow from shapes is used as a number")
        return value


class _ShapeAttribute(fx.proxy.Attribute, _ShapeProxy):
    """An attribute of a traced value, such as `x.ndim`."""


@contextmanager
def _factories_traced(tracer: Tracer) -> Iterator[None]:
    """Make factory functions with traced arguments nodes; torch.fx sees functions of tensors only."""

    def traced(factory: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            follows = any(isinstance(leaf, fx.Proxy) for leaf in leaves_of((args, kwargs)))
            if tracer.probing or not (follows or factory.__name__ in _RANDOM):
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


def attribute(root: nn.Module, target: str) -> Any:
    """The module, parameter or buffer a dotted target names."""
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value
