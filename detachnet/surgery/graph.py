"""TracedGraph: a traced graph and what flows along each of its edges."""

from __future__ import annotations

import operator
import warnings
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import PythonCode
from torch.fx.node import map_aggregate
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from detachnet.errors import TraceError
from detachnet.surgery.codegen import written
from detachnet.surgery.modules import attribute, copy_model, random_states_kept
from detachnet.surgery.outside import Outside
from detachnet.surgery.tracer import NO_LEAVES, PROBE_BATCH, Leaves, Spec, leaves_of, thaw
from detachnet.surgery.whole import Reason

LARGE_BYTES = 1 << 26
"""Inputs of a layer for which memory is taken only where it is clear that their shapes do not do."""


def has_tensor(value: Any) -> bool:
    """Whether a propagated value is, or contains, a tensor."""
    return any(isinstance(leaf, Spec) for leaf in leaves_of(value))


def has_torch_names(value: Any) -> bool:
    """Whether a value is what torch's functions return several values with names in, as `topk` does."""
    return type(value).__module__ == "torch.return_types"


def _to_specs(value: Any) -> Any:
    specs = map_aggregate(value, _to_spec)
    return type(value)(specs) if has_torch_names(value) else specs


def _to_spec(leaf: Any) -> Any:
    return Spec(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


class Root(nn.Module):
    """Holds the model as `base`, so that traced targets read `base.features.0` and extra inputs keep defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base = model

    def forward(self, x: Any) -> Any:
        """What the model returns."""
        return self.base(x)


class _Interpreted(fx.GraphModule):
    """A graph with its modules that is never run as code, so that none is compiled."""

    def recompile(self) -> PythonCode:
        """Write the code, as torch.fx does where a graph is set."""
        return written(self.graph)


class _Propagator(fx.Interpreter):
    """Runs a graph on the meta device and keeps every node's value and, inside its counter, MACs."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[fx.Node, Any] = {}
        self.macs: dict[fx.Node, int] = {}
        self.needs_values: set[fx.Node] = set()
        self.changing: set[fx.Node] = set()
        self.counter = FlopCounterMode(display=False)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """A node's arguments, in types that may be changed."""
        return thaw(super().fetch_args_kwargs_from_env(n))

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; keep its value's shape and its MACs."""
        before = self.counter.get_total_flops()
        given = [self.env[arg] for arg in n.all_input_nodes if isinstance(self.env.get(arg), torch.Tensor)]
        versions = [tensor._version for tensor in given]
        try:
            out = super().run_node(n)
            if n.op == "call_module" and versions != [tensor._version for tensor in given]:
                self.changing.add(n)
        except (RuntimeError, NotImplementedError) as error:
            large = sum(tensor.nbytes for tensor in given) > LARGE_BYTES
            if n.op not in ("call_module", "call_function") or (large and not _misses_values(error)):
                raise
            out = self._run_on_zeros(n)
        # torch counts a multiply-add as two operations, and PROBE_BATCH images went through.
        self.macs[n] = (self.counter.get_total_flops() - before) // (2 * PROBE_BATCH)
        self.values[n] = _to_specs(out)
        return out

    def _run_on_zeros(self, n: fx.Node) -> Any:
        """Run a layer or a function that needs its input's values, with zeros for weights and inputs."""
        layer: Any = n.target
        if n.op == "call_module":
            layer = copy_model(self.fetch_attr(str(n.target)))
            if not isinstance(layer, torch.jit.ScriptModule):  # which has its tensors where it was compiled
                layer = layer.to_empty(device="cpu")
                for tensor in [*layer.parameters(), *layer.buffers()]:
                    tensor.zero_()
        args, kwargs = self.fetch_args_kwargs_from_env(n)

        def zeros(leaf: Any) -> Any:
            return torch.zeros_like(leaf, device="cpu") if isinstance(leaf, torch.Tensor) else leaf

        with torch.device("cpu"):
            out = layer(*map_aggregate(args, zeros), **map_aggregate(kwargs, zeros))
        self.needs_values.add(n)
        return map_aggregate(out, lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf)


class _ShapesOfNorms(TorchFunctionMode):
    """A batch norm's output has its input's shape: on the meta device torch works that out in Python, a dozen
    operations for each, which is half the time of a pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm and _fits(*args, **(kwargs or {})):
            return torch.empty_like(args[0] if args else kwargs["input"])
        return func(*args, **(kwargs or {}))


def _fits(input: Any, running_mean: Any, running_var: Any, weight: Any = None, *_: Any, **__: Any) -> bool:
    """Whether a batch norm has a value for each channel; if not, torch says what is wrong."""
    channels = {len(each) for each in (running_mean, running_var, weight) if each is not None}
    return input.ndim > 1 and channels <= {input.shape[1]}


_NEEDS_GRADIENTS = (
    "it must run without gradients, and take none itself: shapes are worked out inside torch.no_grad()"
)


def _misses_values(error: Exception) -> bool:
    """Whether an operation fails on the meta device because that has no values: torch says so in words."""
    return isinstance(error, NotImplementedError) or "meta" in str(error).lower()


class UnrunnableError(TraceError):
    """A graph that fails on shapes alone, at any number of images."""


@dataclass
class TracedGraph:
    """One traced graph and what is known of its nodes.

    Attributes:
        root: The module the graph's targets refer to, on the meta device.
        graph: The graph; one placeholder, one output.
        names: Dotted name → node. A module's path means its output; where it is called again, `path_1`, ….
        image: What the placeholder takes.
        calls: Path of a module or operation → its nodes, one per call.
        whole: Path of a module that is kept whole for what its forward does → what that is.
    """

    root: Root
    graph: fx.Graph
    names: dict[str, fx.Node]
    image: Spec
    calls: dict[str, list[fx.Node]]
    whole: dict[str, str] = field(default_factory=dict)

    @cached_property
    def module(self) -> fx.GraphModule:
        """The graph with its modules, on the meta device."""
        return _Interpreted(self.root, self.graph)

    @cached_property
    def source(self) -> str:
        """The graph as Python."""
        return written(self.graph).src

    @cached_property
    def _probe(self) -> _Propagator:
        return self.propagate(PROBE_BATCH, counts=True)

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

    def changes_input(self, node: fx.Node) -> bool:
        """Whether a node changes what it is given: an operation in place, or a layer that does such a thing."""
        return writes_in_place(node) or node in self._probe.changing

    def is_changed(self, node: fx.Node) -> bool:
        """Whether a value is changed in place, itself or through a view of it."""
        pending, seen = [node], set[fx.Node]()
        while pending:
            current = pending.pop()
            for user in [user for user in current.users if user not in seen]:
                seen.add(user)
                if self.changes_input(user) and user.args[:1] == (current,):
                    return True
                if self._may_view(user):
                    pending.append(user)
        return False

    def _may_view(self, node: fx.Node) -> bool:
        """Whether a node's value may share its memory with what it is given."""
        if node.op == "call_module":
            name = type(self.module.get_submodule(str(node.target))).__name__
            return name in ("Identity", "Flatten", "Unflatten", "DropPath") or name.startswith("Dropout")
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        return name in _VIEWS

    def propagate(self, batch: int, counts: bool = False) -> _Propagator:
        """Run the graph on the meta device with `batch` images; count MACs, too, which takes most of the time."""
        propagator = _Propagator(self.module)
        try:
            self._run(propagator, batch, counts)
        except Exception as error:
            raise self._unrunnable(propagator, batch, counts, error) from error
        return propagator

    def _run(self, propagator: _Propagator, batch: int, counts: bool) -> None:
        counting: AbstractContextManager[object] = propagator.counter if counts else nullcontext()
        kept = random_states_kept(), Outside(self.root).kept(), warnings.catch_warnings()
        modes = torch.inference_mode(False), torch.no_grad(), torch.device("meta"), _ShapesOfNorms()
        with kept[0], kept[1], kept[2], modes[0], modes[1], modes[2], counting, modes[3]:
            warnings.simplefilter("ignore")  # what a layer has to say of a pass without values or gradients
            propagator.run(self.image.example(batch))

    def _unrunnable(self, propagator: _Propagator, batch: int, counts: bool, error: Exception) -> TraceError:
        """Why the model does not run."""
        failed = next((n for n in self.graph.nodes if n not in propagator.values), None)
        node = self.describe(failed) if failed else "the input"
        name, said = type(self.root.base).__name__, str(error).splitlines()[0]
        with suppress(Exception):
            self._run(_Propagator(self.module), batch + 1, counts)
            return TraceError(
                f"{name} runs on {batch + 1} images but not on {batch}: it fails at {node}",
                what=said,
                hint="a family's models take any number of images: pair or group them outside of the model",
                node=node,
            )
        shape = "×".join(map(str, self.image.shape[1:]))
        size = f"pass the input_size=(C, H, W) the model is made for{self._meant()}"
        summary = f"{name} does not run on {shape} images: it fails at {node}"
        if "grad" in said:
            return TraceError(summary, what=said, hint=_NEEDS_GRADIENTS, node=node)
        return UnrunnableError(summary, what=said, hint=size, node=node)

    def _meant(self) -> str:
        """What may be meant by an image of other axes than C, H and W, or of other channels than the model's."""
        layers = (layer for layer in self.root.base.modules() if isinstance(layer, _ConvNd))
        taken = next((layer.in_channels for layer in layers), 1)
        match tuple(self.image.shape[1:]):
            case (_, *size) if len(size) == 3:
                return f"; without the batch that is {tuple(size)}"
            case (height, width, 1 | 3 | 4 as channels) if min(height, width) > channels:
                return f"; with the channels first that is {(channels, height, width)}"
            case (1 | 3 | 4 as channels, side):
                return f"; with height and width that is {(channels, side, side)}"
            case (height, width):
                return f"; with the model's channels that is {(taken, height, width)}"
            case (1 | 3 | 4 as channels, height, width) if channels != taken:
                return f"; its first convolution takes {(taken, height, width)}"
        return ""

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
        leaves: What is kept whole besides what is anyway: what the user wanted, and `whole`.
        whole: Path of a module that is kept whole for what its forward does → what that is.
        lost: The same of the model's own forward, which cannot be kept whole.
        modal: Paths of the modules whose `training` may be read.
        read: Path of an opened module → names of attributes that its methods may read; a trace holds their values.
        of_layers: The same of layers that such methods read attributes of.
        filled: Path of an opened module → what its pass leaves otherwise than it was.
    """

    train: TracedGraph
    eval: TracedGraph
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    class_name: str = ""
    leaves: Leaves = NO_LEAVES
    whole: dict[str, str] = field(default_factory=dict)
    lost: tuple[Reason, ...] = ()
    read: dict[str, frozenset[str]] = field(default_factory=dict)
    of_layers: dict[str, frozenset[str]] = field(default_factory=dict)
    filled: dict[str, Reason] = field(default_factory=dict)
    modal: tuple[str, ...] = ()


_IN_PLACE = {
    operator.setitem,
    *(getattr(operator, name) for name in dir(operator) if name[0] == "i" and hasattr(operator, f"__{name}__")),
} - {operator.index, operator.inv, operator.invert}
_VIEWS = {
    *(
        "as_strided",
        "chunk",
        "contiguous",
        "data",
        "detach",
        "diagonal",
        "dropout",
        "expand",
        "expand_as",
        "flatten",
    ),
    *(
        "float",
        "getattr",
        "getitem",
        "movedim",
        "narrow",
        "permute",
        "ravel",
        "real",
        "reshape",
        "select",
        "split",
    ),
    *("squeeze", "swapaxes", "swapdims", "t", "tensor_split", "to", "transpose", "type", "type_as", "unbind"),
    *(
        "unflatten",
        "unfold",
        "unsqueeze",
        "view",
        "view_as",
        "H",
        "T",
        "mH",
        "mT",
        "iadd",
        "isub",
        "imul",
        "itruediv",
    ),
}
"""Operations whose result may share its memory with what they are given."""


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node changes one of its arguments (`x.add_(y)`, `x += y`, `out=`, `inplace=True`)."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = node.op == "call_method" and name.endswith("_") and not name.endswith("__")
    operator_in_place = node.op == "call_function" and node.target in _IN_PLACE
    return (
        in_place or operator_in_place or node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None
    )
