"""model + cuts -> DetachableNet: the base-model and its sub-models in one module that shares their weights."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _BatchNorm

from detachnet.data import DataInfo
from detachnet.detached import DetachedModel, Folder, Run, compile_graph, put
from detachnet.errors import CutError, StepDownError, nearest
from detachnet.plan import BASE, Cuts, DetachPlan, Head, Norm, make_plan
from detachnet.stepdown import Stem, StepDownBuilder, by
from detachnet.trace import TracedModel, copies_of_computed_tensors, copy_model, trace, unwrap
from detachnet.tracer import PREFIX, Leaves, attribute
from detachnet.views import HEADS, NORMS, STEPDOWNS, JointError, ViewSource, build_view
from detachnet.zoo import ModelSource, model_source

logger = logging.getLogger("detachnet")


class DetachableNet(nn.Module):
    """A base-model and its sub-models; made by `make_detachable`.

    Attributes:
        base: The base-model, an ordinary module under its original parameter names.
        stepdowns: Sub-model → the layer it takes in the image through.
        norms: Sub-model → its own copies of batch norms, under the base-model's names (`norm="private"`).
        heads: Sub-model → its own copy of the layer that makes its output, likewise (`head="private"`).
        plan: What the family is; prints as a table.
        data: What it was trained on, if the trainer or a checkpoint said so.
        trained: The models that were trained, likewise.
        accuracy: Model → its test accuracy, in [0, 1], when it was last measured; empty if it was not.
    """

    base: nn.Module
    stepdowns: nn.Module
    norms: nn.Module
    heads: nn.Module

    def __init__(
        self, base: nn.Module, plan: DetachPlan, stepdowns: Mapping[str, nn.Module], traced: TracedModel
    ) -> None:
        super().__init__()
        self.base = base
        self.plan = plan
        self.stepdowns = nn.Module()
        self.norms = nn.Module()
        self.heads = nn.Module()
        self.data: DataInfo | None = None
        self.trained: tuple[str, ...] = ()
        self.accuracy: dict[str, float] = {}
        self._active = BASE
        self._attach(traced)
        like = next(base.parameters(), torch.empty(0))
        for name, module in stepdowns.items():
            self.stepdowns.add_module(name, module.to(like.device, like.dtype).train(base.training))
        for name in self.names[1:]:
            for path, place in sorted(self._sources[False].private[name].items()):
                layer = base.get_submodule(path)
                own = _own_norms(layer) if place == NORMS else copy.deepcopy(layer)
                put(self.get_submodule(place), f"{name}.{path}", own)
        self.training = base.training

    def _attach(self, traced: TracedModel) -> None:
        """Derive from a trace what is needed to build views; nothing of it is saved or copied."""
        self._example, self._leaves = traced.eval.image.example(), traced.leaves
        self._sources = _view_sources(traced, self.plan)
        self._views: dict[tuple[tuple[str, ...], bool, bool], Run] = {}
        for name, value in traced.constants.items():
            like = next(self.base.parameters(), value)
            self.register_buffer(name, value.to(like.device), persistent=False)

    @property
    def names(self) -> tuple[str, ...]:
        """`("base", "sub0", "sub1", …)`, in the order of the cuts through the network."""
        return self.plan.names

    @property
    def source(self) -> ModelSource | None:
        """The zoo's name and arguments of the base-model; None for a user's own."""
        return model_source(self.base)

    @property
    def active(self) -> str:
        """The model `net(x)` runs. Setting it copies nothing and needs no data."""
        return self._active

    @active.setter
    def active(self, name: str) -> None:
        self._check(name)
        self._active = name

    def forward(self, x: Tensor, which: str | Sequence[str] | None = None, features: bool = False) -> Any:
        """Run one model, or several in one pass.

        Args:
            x: Images, `(B, C, H, W)`.
            which: A model's name; a sequence of names, or `"all"`: a dict from name to output. By default the
                active model.
            features: Also return, for each sub-model that runs together with the base-model, the base-model's
                feature at its cut and the step-down's output, two tensors of the same shape.

        Returns:
            What the base-model returns, `(B, num_classes)` for a classifier; for several models a dict of that.
            With `features` a pair of that and a dict from sub-model to its two tensors.

        Raises:
            CutError: No model has that name.
            StepDownError: The images have another size than the family was made for.
        """
        single = self._active if which is None else which if isinstance(which, str) and which != "all" else None
        models = (single,) if single is not None else self.names if which == "all" else tuple(which or ())
        if models != (BASE,) and tuple(x.shape[1:]) != self.plan.input_size:
            raise StepDownError(
                f"the family is made for images {by(self.plan.input_size)}, not {by(tuple(x.shape[1:]))}",
                hint="make_detachable(model, cuts, input_size=...) makes one for another size",
            )
        out = self._view(models, features)(self, x)
        out, found = out if features else (out, None)
        out = out if single is not None or len(models) > 1 else {models[0]: out}
        return (out, found) if features else out

    def prepare(self, models: Sequence[str], features: bool = False) -> None:
        """Write the pass through some models now, not when it is first run: torch.compile then sees all of it."""
        self._view(tuple(models), features)

    def _view(self, models: tuple[str, ...], features: bool = False) -> Run:
        key = (models, self.training, features)
        if key not in self._views:
            self._views[key] = self._build(models, features)
        return self._views[key]

    def _build(self, models: tuple[str, ...], features: bool) -> Run:
        """The function that runs `models`; separate passes where they cannot share one batch."""
        for name in models:
            self._check(name)
        if not models or list(models) != sorted(set(models), key=self.names.index):
            raise CutError(f"name each model once and in order, {list(self.names)}, not {list(models)}")
        try:
            label = f"{'+'.join(models)} {'train' if self.training else 'eval'}"
            return compile_graph(build_view(self._sources[self.training], models, features), label)
        except JointError as error:
            if len(models) == 1 or features:
                raise
            logger.warning("%s models run one after another, not in one pass: %s", self.plan.model, error)
            singles = {name: self._view((name,)) for name in models}
            return lambda net, x: {name: run(net, x) for name, run in singles.items()}

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise CutError(
                f"no model is called {name!r}",
                hint=f"the models are {', '.join(self.names)}",
                nearest=nearest(name, self.names),
            )

    def parameters_of(self, models: Sequence[str]) -> dict[str, nn.Parameter]:
        """The parameters that some models read in training, by their names in the family.

        Raises:
            CutError: No model has one of the names.
        """
        if isinstance(models, str):
            models = self.names if models == "all" else (models,)
        for name in models:
            self._check(name)
        graphs = [build_view(self._sources[True], (name,)) for name in models]
        nodes = [node for graph in graphs for node in graph.nodes]
        read = {
            parameter
            for target in {str(n.target) for n in nodes if n.op in ("call_module", "get_attr")}
            for parameter in _parameters(attribute(self, target))
        }
        return {name: parameter for name, parameter in self.named_parameters() if parameter in read}

    def detach(self, name: str, share: bool = False) -> nn.Module:
        """Take one model out of the family, as a plain module in evaluation mode.

        The base-model comes back as the class it is; a sub-model as a `detached.DetachedModel` with its step-down
        as `stepdown` and everything else under the base-model's names. Both pickle, copy, compile and print like
        any module.

        Args:
            name: Which one.
            share: Keep the family's own layers and tensors instead of copying them, in the mode they are in.

        Raises:
            CutError: No model has that name.
        """
        self._check(name)
        if name == BASE and not share:
            base = copy_model(self.base)
            base.zero_grad()
            return base.eval()
        graph = build_view(self._sources[False], (name,))
        memo: dict[int, Any] = copies_of_computed_tensors(self)
        root: dict[str, Any] = {}
        entry = "stepdown"
        while hasattr(self.base, entry):
            entry += "_"
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                value = attribute(self, str(node.target))
                node.target = _detached_name(str(node.target), name, entry)
                root[node.target] = value if share else copy.deepcopy(value, memo)
        code = graph.python_code("self")
        detached = DetachedModel(self.plan.model if name == BASE else name, code.src, code.globals, root)
        if not share:
            detached.zero_grad()
            return detached.eval()
        detached.training = False
        return detached

    def with_private_norms(self) -> DetachableNet:
        """A copy in which each sub-model has batch norms of its own, equal to those it had."""
        if self.plan.norm == "private":
            return copy.deepcopy(self)
        memo = copies_of_computed_tensors(self)
        stepdowns = {name: copy.deepcopy(self.stepdowns.get_submodule(name), memo) for name in self.names[1:]}
        plan = self.plan.model_copy(update={"norm": "private"})
        net = DetachableNet(copy_model(self.base), plan, stepdowns, self._trace())
        net.heads.load_state_dict(self.heads.state_dict())
        net.data, net.trained = self.data, self.trained
        return net

    def train(self, mode: bool = True) -> DetachableNet:
        """Set the mode; a sub-model's own layer follows the layer of the base-model it was copied from."""
        super().train(mode)
        for path, module in [*self.norms.named_modules(), *self.heads.named_modules()]:
            _, _, original = path.partition(".")
            if original and not isinstance(module, Folder):
                like = dict(self.base.get_submodule(original).named_modules())
                for inner, part in module.named_modules():
                    part.training = like[inner].training
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_views"], state["_sources"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._attach(self._trace())

    def _trace(self) -> TracedModel:
        """The base-model's trace, made anew."""
        example = self._example
        # The family may have another dtype by now; what is no floating-point input has not.
        example_input = None if example.is_floating_point() else example
        return trace(self.base, tuple(example.shape[1:]), example_input, self._leaves)

    def extra_repr(self) -> str:
        """The names of the models and the active one."""
        return f"names={list(self.names)}, active={self.active!r}, norm={self.plan.norm!r}"


def make_detachable(
    model: nn.Module,
    cuts: Cuts,
    input_size: tuple[int, ...] | None = None,
    *,
    norm: Norm = "private",
    head: Head = "shared",
    stepdown: str | Stem | StepDownBuilder = "conv",
    example_input: Tensor | None = None,
    leaf_modules: Sequence[type[nn.Module]] = (),
    leaf_functions: Sequence[Callable[..., Any]] = (),
) -> DetachableNet:
    """Turn a CNN into a family of networks that share its weights.

    Sub-model k drops everything up to and including cut k and takes in the image through a step-down
    convolution sized from the traced shapes. The model itself is copied and left as it is, the random state too.

    Args:
        model: Any CNN with one image input, on any device.
        cuts: Names of modules or traced nodes, front to back (`find_cuts` lists them); a dict from own names of
            sub-models to them; a number of sub-models, or `"auto"` for two, spread evenly in MACs; or fractions
            of the base-model's MACs to keep, such as `[0.7, 0.3]`.
        input_size: Shape of one image, `(C, H, W)`; by default what the model declares.
        norm: `private` gives each sub-model its own batch norms; `shared` is the paper's.
        head: `private` gives each sub-model its own copy of the last layer with weights, that of its
            main output.
        stepdown: `conv`; `stem` or a `detachnet.Stem`, several convolutions with norms; `identity`, the flattened
            image itself where the feature has its size; or a function `(image shape, feature shape) -> module`.
        example_input: A batch `(B, ...)` instead of `input_size`.
        leaf_modules: Classes of modules to keep whole, as those that cannot be traced must be.
        leaf_functions: Functions to keep whole, which a traced module calls by a global name.

    Raises:
        TraceError: The model cannot be traced, or does not run at that size.
        CutError: A cut is unknown, crossed by another path, repeated, out of order or at the output.
        StepDownError: The feature map is larger than the image, or of a rank no step-down is known for.

    Examples:
        >>> net = detachnet.make_detachable(model, cuts=["features.6", "features.20"], input_size=(3, 32, 32))
        >>> net(images, which="sub1").shape
        torch.Size([8, 10])

    Source: Fuengfusin & Tamukoh, JRNAL 8(1), 2021; the rewriting of graphs and private norms are ours.
    """
    if norm not in ("private", "shared"):
        raise CutError(f"norm is 'private' or 'shared', not {norm!r}")
    if head not in ("private", "shared"):
        raise CutError(f"head is 'private' or 'shared', not {head!r}")
    known = stepdown in ("conv", "stem", "identity") if isinstance(stepdown, str) else callable(stepdown)
    is_class = isinstance(stepdown, type) and issubclass(stepdown, Stem)
    if is_class or not (known or isinstance(stepdown, Stem)):
        raise CutError(
            "stepdown is 'conv', 'stem', 'identity', a Stem or a function "
            f"(image shape, feature shape) -> module, not {stepdown!r}"
        )
    model = unwrap(model)
    traced = trace(model, input_size, example_input, Leaves(tuple(leaf_modules), tuple(leaf_functions)))
    with torch.random.fork_rng(devices=[]):
        plan, stepdowns = make_plan(traced, cuts, norm, stepdown, head)
    return DetachableNet(copy_model(model), plan, stepdowns, traced)


def _own_norms(module: nn.Module) -> nn.Module:
    """A copy of a layer with batch norms of its own; whatever else it holds stays shared."""
    own = {id(t) for m in module.modules() if isinstance(m, _BatchNorm) for t in [*m.parameters(), *m.buffers()]}
    shared = [t for t in [*module.parameters(), *module.buffers()] if id(t) not in own]
    return copy.deepcopy(module, {id(t): t for t in shared})


def _view_sources(traced: TracedModel, plan: DetachPlan) -> dict[bool, ViewSource]:
    """What the views of each mode are made from; a cut means the node of the same name in both graphs."""
    sources = {}
    for training, graph in ((False, traced.eval), (True, traced.train)):
        for model in plan.models[1:]:
            if model.cut not in graph.names:
                raise CutError(f"the model has {model.cut!r} in evaluation mode only", node=model.cut)
        cuts = {model.name: graph.names[str(model.cut)] for model in plan.models[1:]}
        sources[training] = ViewSource(graph, training, cuts, {})
    private: dict[str, dict[str, str]] = {name: {} for name in plan.names[1:]}
    for source in sources.values():
        for name, own in private.items():
            if plan.norm == "private":
                own.update(dict.fromkeys(_norm_paths(source, name), NORMS))
            if plan.head == "private":
                own[_head_path(source, name)] = HEADS
    for source in sources.values():
        source.private = private
    return sources


def _norm_paths(source: ViewSource, name: str) -> list[str]:
    """Paths of the layers with batch norms in a sub-model's tail."""
    calls = [str(node.target) for node in _tail(source, name) if node.op == "call_module"]
    layers = {path: source.traced.module.get_submodule(path) for path in calls}
    normed = [path for path, layer in layers.items() if any(isinstance(m, _BatchNorm) for m in layer.modules())]
    return [path.removeprefix(PREFIX) for path in normed]


def _head_path(source: ViewSource, name: str) -> str:
    """The path of the layer that makes a sub-model's main output: the last one with weights, norms not counted."""
    tail, module = _tail(source, name), source.traced.module
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


def _tail(source: ViewSource, name: str) -> list[fx.Node]:
    """What runs behind a sub-model's cut."""
    return source.traced.live[source.traced.live.index(source.cuts[name]) + 1 :]


def _parameters(value: Any) -> list[nn.Parameter]:
    """The parameters in what a graph's target names."""
    if isinstance(value, nn.Module):
        return list(value.parameters())
    return [value] if isinstance(value, nn.Parameter) else []


def _detached_name(target: str, name: str, entry: str) -> str:
    """A target of a family's graph as it is called in a detached model."""
    if target == f"{STEPDOWNS}.{name}":
        return entry
    return target.removeprefix(f"{NORMS}.{name}.").removeprefix(f"{HEADS}.{name}.").removeprefix(PREFIX)
