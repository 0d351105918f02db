"""module -> TracedModel: the graph of a model, dotted names for its nodes, and what flows along each edge.

A model is traced twice, in training and in evaluation mode, because `self.training` is baked into a trace. Both
traces are made on a copy on the meta device, so the model itself is never run, moved or touched.
"""

from __future__ import annotations

import copy
import random
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate
from torch.utils.flop_counter import FlopCounterMode

from detachnet.errors import TraceError
from detachnet.tracer import NO_LEAVES, PREFIX, PROBE_BATCH, Leaves, Spec, Tracer, attribute, leaves_of, thaw
from detachnet.zoo import default_input_size


def has_tensor(value: Any) -> bool:
    """Whether a propagated value is, or contains, a tensor."""
    return any(isinstance(leaf, Spec) for leaf in leaves_of(value))


def _to_spec(leaf: Any) -> Any:
    return Spec(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


class _Root(nn.Module):
    """Holds the model as `base`, so that traced targets read `base.features.0` and extra inputs keep defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base = model

    def forward(self, x: Any) -> Any:
        return self.base(x)


class _Propagator(fx.Interpreter):
    """Runs a graph on the meta device and keeps every node's value and MACs."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}
        self.macs: dict[fx.Node, int] = {}
        self.needs_values: set[fx.Node] = set()
        self.counter = FlopCounterMode(display=False)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """A node's arguments, in types that may be changed."""
        return thaw(super().fetch_args_kwargs_from_env(n))

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; keep its value's shape and its MACs."""
        before = self.counter.get_total_flops()
        try:
            out = super().run_node(n)
        except (RuntimeError, NotImplementedError):
            if n.op not in ("call_module", "call_function"):
                raise
            out = self._run_on_zeros(n)
        # torch counts a multiply-add as two operations, and PROBE_BATCH images went through.
        self.macs[n] = (self.counter.get_total_flops() - before) // (2 * PROBE_BATCH)
        self.values[n] = map_aggregate(out, _to_spec)
        return out

    def _run_on_zeros(self, n: fx.Node) -> Any:
        """Run a layer or a function that needs its input's values, with zeros for weights and inputs."""
        layer: Any = n.target
        if n.op == "call_module":
            layer = copy.deepcopy(self.fetch_attr(str(n.target))).to_empty(device="cpu")
            for tensor in [*layer.parameters(), *layer.buffers()]:
                tensor.zero_()
        args, kwargs = self.fetch_args_kwargs_from_env(n)

        def zeros(leaf: Any) -> Any:
            return torch.zeros_like(leaf, device="cpu") if isinstance(leaf, torch.Tensor) else leaf

        with torch.device("cpu"):
            out = layer(*map_aggregate(args, zeros), **map_aggregate(kwargs, zeros))
        self.needs_values.add(n)
        return map_aggregate(out, lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf)


@dataclass
class TracedGraph:
    """One traced graph and what is known of its nodes.

    Attributes:
        root: The module the graph's targets refer to, on the meta device.
        graph: The graph; one placeholder, one output.
        names: Dotted name → node. A module's path means its output; where it is called again, `path_1`, ….
        image: What the placeholder takes.
        calls: Path of a module or operation → its nodes, one per call.
    """

    root: _Root
    graph: fx.Graph
    names: dict[str, fx.Node]
    image: Spec
    calls: dict[str, list[fx.Node]]

    @cached_property
    def module(self) -> fx.GraphModule:
        """The graph with its modules, on the meta device."""
        return fx.GraphModule(self.root, self.graph)

    @cached_property
    def _probe(self) -> _Propagator:
        return self.propagate(PROBE_BATCH)

    @property
    def values(self) -> dict[fx.Node, Any]:
        """Node → value at batch size `PROBE_BATCH`, each tensor replaced by its `Spec`."""
        return self._probe.values

    @property
    def macs(self) -> dict[fx.Node, int]:
        """Node → multiply-accumulates for one image."""
        return self._probe.macs

    @property
    def needs_values(self) -> set[fx.Node]:
        """The layers that decide by their input's values, so that its shape is not enough to run them."""
        return self._probe.needs_values

    def propagate(self, batch: int) -> _Propagator:
        """Run the graph on the meta device with `batch` images."""
        propagator = _Propagator(self.module)
        node = "the input"
        try:
            with torch.device("meta"), propagator.counter, torch.no_grad():
                propagator.run(self.image.example(batch))
        except Exception as error:
            failed = next((n for n in self.graph.nodes if n not in propagator.values), None)
            node = self.describe(failed) if failed else node
            shape = "×".join(map(str, self.image.shape[1:]))
            raise TraceError(
                f"{type(self.root.base).__name__} does not run on {shape} images: it fails at {node}",
                what=str(error).splitlines()[0],
                hint="pass the input_size=(C, H, W) the model is made for",
                node=node,
            ) from error
        return propagator

    @cached_property
    def name_of(self) -> dict[fx.Node, str]:
        """Node → its dotted name: the outermost module whose output it is, else the innermost operation."""
        best: dict[fx.Node, str] = {}
        for name, node in self.names.items():
            if node not in best or (name.count("."), len(name)) < (best[node].count("."), len(best[node])):
                best[node] = name
        return best

    def describe(self, node: fx.Node) -> str:
        """A node's dotted name, or its name in the graph where it has none."""
        return repr(self.name_of.get(node, node.name))

    @cached_property
    def live(self) -> list[fx.Node]:
        """The nodes the output needs, and those that change a value in place, in order of execution."""
        needed: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if node in needed or node.op in ("output", "placeholder") or writes_in_place(node):
                needed.add(node)
                needed.update(node.all_input_nodes)
        return [node for node in self.graph.nodes if node in needed]

    @cached_property
    def data(self) -> set[fx.Node]:
        """The nodes whose value is a tensor that depends on the image's pixels, not only on its shape."""
        found: set[fx.Node] = set()
        for node in self.live:
            if node.op == "placeholder" or (
                any(arg in found for arg in node.all_input_nodes) and has_tensor(self.values[node])
            ):
                found.add(node)
        return found

    @cached_property
    def readers(self) -> set[fx.Node]:
        """The live nodes that read pixels-dependent values: all but the ones that only ask for a shape."""
        return {n for n in self.live if n in self.data or n.op == "output" or writes_in_place(n)}

    def parameters_of(self, node: fx.Node) -> list[nn.Parameter]:
        """The parameters a node reads itself."""
        if node.op == "call_module":
            return list(self.module.get_submodule(str(node.target)).parameters())
        if node.op == "get_attr":
            value = attribute(self.root, str(node.target))
            return [value] if isinstance(value, nn.Parameter) else []
        return []


@dataclass
class TracedModel:
    """A model's two graphs and the constants they refer to.

    Attributes:
        train: The graph in training mode.
        eval: The graph in evaluation mode; cut points are looked for here.
        constants: Tensors that the forward pass makes from no input, by their name in the graphs.
        class_name: The model's class, for messages.
        leaves: What the user wanted kept whole.
    """

    train: TracedGraph
    eval: TracedGraph
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    class_name: str = ""
    leaves: Leaves = NO_LEAVES


def trace(
    model: nn.Module,
    input_size: tuple[int, ...] | None = None,
    example_input: torch.Tensor | None = None,
    leaves: Leaves = NO_LEAVES,
) -> TracedModel:
    """Trace a model without running or changing it.

    Args:
        model: Any module with one image input, on any device.
        input_size: Shape of one image, `(C, H, W)`. By default what the model declares.
        example_input: A batch `(B, ...)` instead, for inputs of another rank or dtype.
        leaves: Modules and functions to keep whole.

    Raises:
        TraceError: Its forward pass decides by a tensor's values, does not run at that size, or no size is known.
    """
    image = _image_spec(model, input_size, example_input)
    graphs = {}
    constants: dict[str, torch.Tensor] = {}
    with _random_state_kept():
        for training in (False, True):
            root = _Root(_meta_twin(model)).train(training)
            tracer = Tracer(leaves, image)
            graph = _trace_root(tracer, root)
            graphs[training] = TracedGraph(root, graph, _flatten(tracer.calls), image, tracer.calls)
            constants |= _take_constants(root, graph, "train" if training else "eval")
    return TracedModel(graphs[True], graphs[False], constants, type(model).__name__, leaves)


def _trace_root(tracer: Tracer, root: _Root) -> fx.Graph:
    """Run the tracer; turn whatever the forward pass raises into a TraceError with the user's source line."""
    try:
        return _inline_named_tuples(tracer.trace(root))
    except Exception as error:
        path = (tracer.stack[-1] if tracer.stack else "base").removeprefix(PREFIX)
        owner = root.base if path == "base" else root.base.get_submodule(path)
        decides = isinstance(error, fx.proxy.TraceError | TypeError)
        keep_whole = f"make_detachable(..., leaf_modules=[{type(owner).__name__}]) keeps that module whole"
        backbone = "make its backbone detachable: make_detachable(model.backbone, ...)"
        move = "move the decision out of forward, or into a submodule without children (those are kept whole)"
        raise TraceError(
            f"cannot trace {type(root.base).__name__}: the forward pass of "
            f"{'the model' if path == 'base' else repr(path)} ({type(owner).__name__}) "
            f"{'needs values that are not there while tracing' if decides else 'fails'}",
            what=str(error).splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__,
            where=_source_line(error),
            hint=backbone if hasattr(root.base, "backbone") else move if path == "base" else keep_whole,
            node=path,
        ) from error


def _take_constants(root: _Root, graph: fx.Graph, mode: str) -> dict[str, torch.Tensor]:
    """Tensors the forward pass made from no input, under names of their mode; the root keeps only their shape."""
    constants = {f"{mode}{name}": t for name, t in vars(root).items() if isinstance(t, torch.Tensor)}
    for name, value in constants.items():
        setattr(root, name, value.to("meta"))
    for node in graph.nodes:
        if node.op == "get_attr" and f"{mode}{node.target}" in constants:
            node.target = f"{mode}{node.target}"
    return constants


def _inline_named_tuples(graph: fx.Graph) -> fx.Graph:
    """Make a named tuple of outputs (auxiliary heads) part of the output, not a node that joins its fields."""
    for node in list(graph.nodes):
        is_tuple = isinstance(node.target, type) and issubclass(node.target, tuple)
        if is_tuple and all(user.op == "output" for user in node.users):
            fields = node.target(*node.args, **node.kwargs)
            for user in list(node.users):
                user.args = _replace(user.args, node, fields)
            graph.erase_node(node)
    return graph


def _replace(args: Any, node: fx.Node, value: Any) -> Any:
    return map_aggregate(args, lambda leaf: value if leaf is node else leaf)


def _source_line(error: BaseException) -> str:
    """File, line and text of the innermost frame that is neither torch's nor ours."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _image_spec(model: nn.Module, input_size: tuple[int, ...] | None, example_input: torch.Tensor | None) -> Spec:
    """The input's shape at PROBE_BATCH and its dtype (that of the model's first floating-point parameter)."""
    if example_input is not None:
        return Spec((PROBE_BATCH, *example_input.shape[1:]), example_input.dtype)
    if not isinstance(model, nn.Module):
        raise TraceError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    if isinstance(input_size, int):
        raise TraceError(f"input_size is the shape of one image, (C, H, W), not {input_size}")
    size = tuple(input_size) if input_size is not None else default_input_size(model)
    if size is None:
        raise TraceError(
            f"the image size of {type(model).__name__} is not known",
            hint="pass input_size=(C, H, W), for example input_size=(3, 224, 224)",
        )
    if not size or any(not isinstance(n, int) or n < 1 for n in size):
        raise TraceError(f"input_size is the shape of one image, (C, H, W), not {size}")
    floating = (p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    return Spec((PROBE_BATCH, *size), next(floating, torch.float32))


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile(model)`, `DataParallel` or `DistributedDataParallel`."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def copy_model(model: nn.Module) -> nn.Module:
    """A copy with its own weights; tensors that `deepcopy` refuses (weights computed by hooks) are cloned."""
    return copy.deepcopy(model, copies_of_computed_tensors(model))


def copies_of_computed_tensors(model: nn.Module) -> dict[int, Any]:
    """A memo for `deepcopy` with the tensors it refuses."""
    return {id(t): t.detach().clone() for t in _computed_tensors(model)}


def _computed_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Plain tensor attributes that autograd computed, as the weights of `torch.nn.utils.weight_norm` are."""
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                yield value


def _meta_twin(model: nn.Module) -> nn.Module:
    """A copy of a model without its weights: parameters and buffers on the meta device, no hooks."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for tensor in [*model.buffers(), *_computed_tensors(model)]:
        memo[id(tensor)] = tensor.detach().to("meta")
    twin = copy.deepcopy(model, memo)
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Leave torch's and Python's random state as found."""
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(state)


def _flatten(calls: dict[str, list[fx.Node]]) -> dict[str, fx.Node]:
    """`path`, `path_1`, … for the first, second, … time a name occurs; real names win over made-up ones."""
    names = {path: nodes[0] for path, nodes in calls.items()}
    for path, nodes in calls.items():
        for i, node in enumerate(nodes[1:], start=1):
            name = f"{path}_{i}"
            while name in names:
                name += "_"
            names[name] = node
    return names


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node changes one of its arguments (`x.add_(y)`, `out=`, `inplace=True`)."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = node.op == "call_method" and name.endswith("_") and not name.endswith("__")
    setitem = node.op == "call_function" and name == "setitem"
    return in_place or setitem or node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None
