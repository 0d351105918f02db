"""Which layer is whose: what the sub-models share with the base-model, and what each has of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _BatchNorm

from detachnet.errors import CutError, TraceError
from detachnet.surgery.batches import OtherBatches
from detachnet.surgery.coupling import Coupling
from detachnet.surgery.finding import find_coupling
from detachnet.surgery.graph import Root, TracedGraph
from detachnet.surgery.modules import attribute
from detachnet.surgery.plan import BASE, DetachPlan, ModelPlan
from detachnet.surgery.routes import Route, Span, bridge_place, folder, owner
from detachnet.surgery.statistics import Statistics
from detachnet.surgery.tracer import PREFIX, PROBE_BATCH
from detachnet.surgery.whole import hooked
from detachnet.surgery.widths.choice import Kept
from detachnet.surgery.widths.patch import kept_along_axes
from detachnet.surgery.widths.reading import SlicedLayer, SlicedTensor
from detachnet.surgery.widths.slicing import is_cut, narrow_graph, narrow_root, slice_layer
from detachnet.surgery.widths.storing import Narrowing, Stored

SLICES = "slices"
NORMS = "norms"
HEADS = "heads"


@dataclass
class ViewSource:
    """What the views of a family are made from.

    Attributes:
        traced: The graph in one mode.
        training: Which mode that is.
        routes: Model → what it leaves out, in positions of `traced.live`; the base-model first.
        private: Sub-model → paths of the layers it has a copy of its own of → where that is, `norms` or `heads`.
        identities: Models and numbers of their spans for which nothing stands: both ends have one shape.
    """

    traced: TracedGraph
    training: bool
    routes: Mapping[str, Route]
    private: Mapping[str, Mapping[str, str]]
    identities: Collection[tuple[str, int]]
    choice: Kept | None = None
    """Which filters the graph has, where it has fewer than the base-model."""

    def __post_init__(self) -> None:
        self.position = {node: i for i, node in enumerate(self.traced.live)}
        self.coupling = Coupling(self.traced, self.training)
        """What joins the images of a batch."""
        self.is_found = False
        """Whether that is known from running the graph."""

    def owner(self, name: str, node: fx.Node) -> str:
        """Whose layer a model runs a node with, if that layer is private: the first model of the same network."""
        return owner(self.routes, name, self.position[node])

    def kept(self, name: str) -> list[fx.Node]:
        """The nodes that a model runs."""
        route = self.routes[name]
        return [node for i, node in enumerate(self.traced.live) if not any(i in span for span in route)]

    def own(self, name: str) -> list[fx.Node]:
        """The nodes that a model runs as the first of its network, behind where it parts from the others."""
        return [node for node in self.kept(name) if self.owner(name, node) == name]

    def shared(self, name: str, models: Sequence[str]) -> set[str]:
        """The layers, and tensors, that a model has as one network with an earlier one of some models."""
        earlier = models[: models.index(name)]
        routes = {other: self.routes[other] for other in (*earlier, name)}
        return {
            self.target(node, name)
            for node in self.kept(name)
            if node.op in ("call_module", "get_attr") and owner(routes, name, self.position[node]) != name
        }

    def target(self, node: fx.Node, name: str) -> str:
        """The layer `name` runs a node with: a private one if there is one."""
        path, whose = str(node.target).removeprefix(PREFIX), self.owner(name, node)
        places = self.private.get(whose, {})
        if path in places:
            return f"{places[path]}.{folder(whose)}.{path}"
        return self._slices.get(str(node.target), str(node.target))

    def part_of_tensor(self, node: fx.Node) -> str:
        """The module that takes what is kept of a tensor that the graph reads; empty where that is all of it."""
        return self._slices.get(str(node.target), "")

    @cached_property
    def _slices(self) -> dict[str, str]:
        """Target of a layer or tensor that has fewer channels → where what reads a part of it is."""
        if self.choice is None:
            return {}
        first, channels = folder(next(iter(self.routes))), self.choice.channels
        layers = [path for path, layer in channels.layers.items() if is_cut(layer, self.choice)]
        tensors = [path for path, atoms in channels.tensors.items() if kept_along_axes(atoms, self.choice.mask)]
        return {target: f"{SLICES}.{first}.{target.removeprefix(PREFIX)}" for target in (*layers, *tensors)}

    @property
    def sliced_layers(self) -> list[str]:
        """Paths of the base-model's layers that models here read a part of."""
        layers = {} if self.choice is None else self.choice.channels.layers
        paths = (target.removeprefix(PREFIX) for target in self._slices if target in layers)
        return [path for path in paths if not self._is_own(path)]

    def _is_own(self, path: str) -> bool:
        """Whether each model has a layer of its own, so that none reads the base-model's."""
        return all(path in self.private[name] for name in self.routes)

    def slices(self, root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """What reads the parts of a family's layers and tensors, and where that is to be."""
        for target, place in self._slices.items():
            assert self.choice is not None
            channels, value = self.choice.channels, attribute(root, target)
            if value is None:
                raise TraceError(
                    f"{target.removeprefix(PREFIX)!r} is made by the first forward pass",
                    hint="run the model once before it is made detachable",
                )
            if target not in channels.layers:
                yield place, SlicedTensor(value, channels.tensors[target], self.choice)
            elif not self._is_own(target.removeprefix(PREFIX)):
                yield place, SlicedLayer(value, channels.layers[target], self.choice)

    @cached_property
    def layers(self) -> set[str]:
        """Paths of the layers that are run in this mode."""
        return {str(node.target).removeprefix(PREFIX) for node in self.traced.live if node.op == "call_module"}

    def own_layer(self, path: str, layer: nn.Module) -> nn.Module:
        """A copy of a layer for a model of its own, with the filters that there are, in place."""
        if self.choice is None or PREFIX + path not in self.choice.channels.layers:
            return layer
        return slice_layer(layer, self.choice.channels.layers[PREFIX + path], self.choice)

    def own_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """What is kept of a tensor of one of the base-model's layers, by its name there."""
        path, _, last = name.rpartition(".")
        if self.choice is None or PREFIX + path not in self.choice.channels.layers:
            return tensor
        holder = nn.Module()
        holder.register_buffer(last, tensor.clone())
        return getattr(slice_layer(holder, self.choice.channels.layers[PREFIX + path], self.choice), last)  # type: ignore[no-any-return]

    def bridge(self, name: str, number: int) -> str:
        """Where the module is that stands for a model's span."""
        return bridge_place(self.traced, self.routes, name, number)

    def own_places(self, name: str) -> list[str]:
        """Where the layers are that a model runs and the base-model does not have."""
        layers = [self.target(node, name) for node in self.kept(name) if node.op == "call_module"]
        own = [target for target in layers if target.partition(".")[0] in (NORMS, HEADS)]
        return list(dict.fromkeys([*own, *self._bridges_of(name)]))

    @property
    def bridges(self) -> list[str]:
        """Where all modules are that stand for spans."""
        return list(dict.fromkeys(place for name in self.routes for place in self._bridges_of(name)))

    def _bridges_of(self, name: str) -> list[str]:
        spans = range(len(self.routes[name]))
        return [self.bridge(name, i) for i in spans if (name, i) not in self.identities]

    def find_coupling(self, net: nn.Module) -> None:
        """Find what joins the images of a batch by running the graph's nodes on a family's weights, once."""
        if self.is_found:
            return
        hooks = hooked(net)
        if self.choice is not None:
            net = narrow_root(_model_of(net), self.choice)
        found = find_coupling(self.traced, self.second_probe, self.training, net, hooks)
        if found is not None:
            self.coupling, self.is_found = Coupling(self.traced, self.training, found), True

    def is_multiple(self, node: fx.Node) -> bool:
        """Whether a number is the same for every batch size, or a multiple of it."""
        probes = (self.traced.values, self.second_probe)
        elsewhere = OtherBatches(lambda n: (probes[0][n], probes[1][n]), (PROBE_BATCH, PROBE_BATCH + 1))
        return elsewhere.is_multiple(node)

    @cached_property
    def second_probe(self) -> dict[fx.Node, Any]:
        """Values at another batch size, to tell which numbers follow the batch."""
        return self.traced.propagate(PROBE_BATCH + 1).values


def _model_of(net: nn.Module) -> Root:
    """A family's base-model and constants, in what a graph's targets refer to; they are the family's own."""
    root = Root(net.get_submodule(BASE))
    for name, constant in net._buffers.items():
        root.register_buffer(name, constant)
    return root


def _norm_paths(source: ViewSource, name: str, statistics: Statistics) -> list[str]:
    """Paths of the layers, from where a sub-model parts, with batch norms or other statistics."""
    calls = [str(node.target) for node in source.own(name) if node.op == "call_module"]
    layers = {path.removeprefix(PREFIX): source.traced.module.get_submodule(path) for path in calls}
    return [
        path
        for path, layer in layers.items()
        if path in statistics or any(isinstance(part, _BatchNorm) for part in layer.modules())
    ]


def _head_path(source: ViewSource, name: str) -> str:
    """The path of the layer that makes a sub-model's main output: the last one with weights, norms not counted."""
    tail, module = source.own(name), source.traced.module
    leaves: list[fx.Node] = []
    map_aggregate(tail[-1].args, lambda leaf: leaves.append(leaf) if isinstance(leaf, fx.Node) else None)
    read, rest = set(), leaves[:1]  # the first is what losses take
    while rest:
        node = rest.pop()
        if node not in read:
            read.add(node)
            rest += node.all_input_nodes
    for node in reversed([node for node in tail if node in read]):
        if node.op == "get_attr" and isinstance(attribute(module, str(node.target)), nn.Parameter):
            break
        if node.op == "call_module":
            path = str(node.target)
            if any(parameter.ndim > 1 for parameter in module.get_submodule(path).parameters()):
                return path.removeprefix(PREFIX)
    raise CutError(f"{name} has no layer behind its cut that could be its private head", hint="head='shared'")


def view_sources(
    narrowing: Narrowing, plan: DetachPlan, statistics: Statistics
) -> dict[str, dict[bool, ViewSource]]:
    """Model → what the views of each mode are made from, one thing for all models of the same width.

    A span's ends mean the nodes of the same names in both graphs.
    """
    found: dict[str, dict[bool, ViewSource]] = {}
    for model in plan.models:
        if model.name not in found:
            same = [other for other in plan.models if other.kept == model.kept]
            found |= dict.fromkeys(
                (other.name for other in same), _sources(narrowing, plan, same, statistics, model.kept)
            )
    return found


def _sources(
    narrowing: Narrowing,
    plan: DetachPlan,
    models: Sequence[ModelPlan],
    statistics: Statistics,
    stored: Stored,
) -> dict[bool, ViewSource]:
    """The same of models of one width, and what that keeps."""
    identities = {(model.name, i) for model in models for i, span in enumerate(model.spans) if span.bridge is None}
    graphs: dict[bool, tuple[TracedGraph, Kept | None]]
    graphs = {False: (narrowing.traced.eval, None), True: (narrowing.traced.train, None)}
    if stored:
        kept, narrow = narrowing.restore(stored)
        in_training = narrowing.in_training(kept)
        graphs = {False: (narrow, kept), True: (narrow_graph(in_training), in_training)}
    sources = {}
    for training, (graph, choice) in graphs.items():
        sources[training] = ViewSource(graph, training, _routes(graph, models), {}, identities, choice)
    private: dict[str, dict[str, str]] = {model.name: {} for model in models if model.name != BASE}
    for source in sources.values():
        for name, own in private.items():
            if plan.norm == "private":
                own.update(dict.fromkeys(_norm_paths(source, name, statistics), NORMS))
            if plan.head == "private":
                own[_head_path(source, name)] = HEADS
    for source in sources.values():
        source.private = private
    return sources


def _routes(graph: TracedGraph, models: Sequence[ModelPlan]) -> dict[str, Route]:
    """What each model leaves out of a graph."""
    position = {node: i for i, node in enumerate(graph.live)}
    image = next(i for node, i in position.items() if node.op == "placeholder")

    def at(name: str) -> int:
        if name not in graph.names:
            raise CutError(f"the model has {name!r} in evaluation mode only", node=name)
        return position[graph.names[name]]

    return {
        model.name: tuple(Span(at(span.start) if span.start else image, at(span.end)) for span in model.spans)
        for model in models
    }
