"""model + cuts -> DetachableNet: the base-model and its sub-models in one module that shares their weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from detachnet.errors import CutError, StepDownError, TraceError, nearest
from detachnet.facts import Facts
from detachnet.surgery.codegen import Run
from detachnet.surgery.derived import Tracing, derive
from detachnet.surgery.detaching import Names, as_module
from detachnet.surgery.following import follow, way_of
from detachnet.surgery.graph import TracedGraph, TracedModel
from detachnet.surgery.legs import Leg, find_legs
from detachnet.surgery.modules import (
    Folder,
    attribute,
    copies_of_computed_tensors,
    copy_model,
    parameters_in,
    put,
    unwrap,
    weight_of,
)
from detachnet.surgery.own_layers import copied_parts, put_own_layers
from detachnet.surgery.ownership import SLICES, view_sources
from detachnet.surgery.plan import BASE, DetachPlan, ModelPlan
from detachnet.surgery.proof import Check
from detachnet.surgery.rewrite import build_leg, build_view, changes_input
from detachnet.surgery.routes import folder
from detachnet.surgery.statistics import find_statistics
from detachnet.surgery.widths.reading import Pick, SlicedLayer
from detachnet.surgery.widths.storing import Narrowing
from detachnet.text import by
from detachnet.zoo import ModelSource, model_source

Output = Tensor
"""What a model returns; a model that returns something else than one tensor returns that."""
Features = dict[str, tuple[Tensor, Tensor]]
"""Sub-model → the base-model's feature at the end of its last span, and what its bridge made."""


class DetachableNet(nn.Module):
    """A base-model and its sub-models; made by `make_detachable`.

    Attributes:
        base: The base-model, an ordinary module under its original parameter names.
        stepdowns: Sub-model → the layer it takes in the image through, where it drops the front.
        bridges: Sub-model → number of a span inside the network → the layer that stands for it, if one does.
        norms: Sub-model → its own copies of batch norms, under the base-model's names (`norm="private"`).
        heads: Sub-model → its own copy of the layer that makes its output, likewise (`head="private"`).
        slices: Sub-model with fewer filters → what reads its part of the base-model's layers; owns nothing.
        plan: What the family is; prints as a table.
        check: What is compared with the model where that was changed so that it takes another way.
        facts: What it was trained on, which models and how accurate they are, as far as the trainer, a checkpoint
            or the user said so.
    """

    base: nn.Module
    stepdowns: nn.Module
    bridges: nn.Module
    norms: nn.Module
    heads: nn.Module

    def __init__(
        self,
        base: nn.Module,
        plan: DetachPlan,
        bridges: Mapping[str, nn.Module],
        traced: TracedModel,
        narrowing: Narrowing | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.plan = plan
        self.stepdowns = nn.Module()
        self.bridges = nn.Module()
        self.norms = nn.Module()
        self.heads = nn.Module()
        self.facts = Facts()
        self._active = BASE
        self._statistics = find_statistics(traced.train, base) if plan.norm == "private" else {}
        self._kinds: dict[str, str] = {}
        self.check: Check = "none"
        self._tracing = Tracing(
            traced.eval.image.example(), traced.leaves, {False: frozenset(), True: frozenset()}
        )
        self._follows_dtype, self._told_of_autocast = True, False
        self._attach(traced, narrowing)
        self._proven, self._varied = frozenset({way_of(self)}), frozenset[str]()
        like = weight_of(base)
        for path, module in bridges.items():
            module.to(like.device, like.dtype)
            module.train(base.training)
            put(self, path, module)
        self._put_own_layers()
        self._count_own_params()
        self.training = base.training

    def _attach(self, traced: TracedModel, narrowing: Narrowing | None = None) -> None:
        """Take a trace for the family's; nothing of it is saved or copied."""
        self._tracing = replace(self._tracing, example=traced.eval.image.example(), leaves=traced.leaves)
        sources = view_sources(narrowing or Narrowing(traced), self.plan, self._statistics)
        for name, value in traced.constants.items():
            like = next(self.base.parameters(), value)
            self.register_buffer(name, value.to(like.device), persistent=False)
        if self.plan.is_narrow:
            self.slices = Folder()
            for source in [source for both in sources.values() for source in both.values()]:
                for path, part in source.slices(self):
                    put(self, path, part)
        self._derived = derive(self.base, traced, sources, self._tracing.example)

    def _put_own_layers(self, *, anew: bool = False) -> None:
        """Give sub-models the copies of layers that are their own, and have these follow the base-model's."""
        sources = self._derived.sources
        put_own_layers(self, sources, self._statistics, self._kinds, anew=anew)
        self._copied = list(copied_parts(self, sources, self._statistics))

    def _count_own_params(self) -> None:
        """Note in the plan how many parameters each model has that are not the base-model's."""
        models = []
        for model in self.plan.models:
            places = self._derived.sources[model.name][False].own_places(model.name)
            own = {p for place in places for p in self.get_submodule(place).parameters()}
            models.append(model.model_copy(update={"own_params": sum(p.numel() for p in own)}))
        self.plan = self.plan.model_copy(update={"models": tuple(models)})

    def traced(self, training: bool) -> TracedGraph:
        """The base-model's graph in training or in evaluation mode."""
        return self._derived.sources[BASE][training].traced

    def all_traced(self, training: bool) -> list[TracedGraph]:
        """That graph, and one for each other width that sub-models have."""
        return list({id(both): both[training].traced for both in self._derived.sources.values()}.values())

    @property
    def names(self) -> tuple[str, ...]:
        """`("base", "sub0", "sub1", …)`, in the order they were given; cuts go front to back."""
        return self.plan.names

    @property
    def source(self) -> ModelSource | None:
        """The zoo's name and arguments of the base-model; None for a user's own."""
        return model_source(self.base)

    @property
    def input_dtype(self) -> torch.dtype:
        """Of the images that the family was made for; of floating-point numbers, its weights have theirs."""
        return self._tracing.example.dtype

    @property
    def active(self) -> str:
        """The model `net(x)` runs. Setting it copies nothing and needs no data."""
        return self._active

    @active.setter
    def active(self, name: str) -> None:
        self._check(name)
        self._active = name

    @overload
    def forward(self, x: Tensor, which: None = None) -> Output: ...
    @overload
    def forward(self, x: Tensor, which: Literal["all"]) -> dict[str, Output]: ...  # type: ignore[overload-overlap]
    @overload
    def forward(self, x: Tensor, which: str) -> Output: ...  # type: ignore[overload-overlap]
    @overload
    def forward(self, x: Tensor, which: Sequence[str], features: Literal[False] = False) -> dict[str, Output]: ...
    @overload
    def forward(
        self, x: Tensor, which: Sequence[str], features: Literal[True]
    ) -> tuple[dict[str, Output], Features]: ...
    @overload
    def forward(
        self, x: Tensor, which: str | Sequence[str] | None = None, features: bool = False
    ) -> Output | dict[str, Output] | tuple[Output | dict[str, Output], Features]: ...

    def forward(
        self, x: Tensor, which: str | Sequence[str] | None = None, features: bool = False
    ) -> Output | dict[str, Output] | tuple[Output | dict[str, Output], Features]:
        """Run one model, or several in one pass.

        Args:
            x: Images, `(B, C, H, W)`.
            which: A model's name; a sequence of names, or `"all"`: a dict from name to output. By default the
                active model.
            features: Also return, for each sub-model that runs together with the base-model, the base-model's
                feature at the end of its last span and its bridge's output, two tensors of the same shape.

        Returns:
            What the base-model returns, `(B, num_classes)` for a classifier; for several models a dict of that.
            With `features` a pair of that and a dict from sub-model to its two tensors.

        Raises:
            CutError: No model has that name.
            StepDownError: The images have another size than the family was made for.
        """
        single = self._active if which is None else which if isinstance(which, str) and which != "all" else None
        several: object = which
        if single is None and not isinstance(several, Sequence):
            self._check(several)
        models = (single,) if single is not None else self.names if which == "all" else tuple(which or ())
        if models != (BASE,) and tuple(x.shape[1:]) != self.plan.input_size:
            raise StepDownError(
                f"the family is made for images {by(self.plan.input_size)}, not {by(tuple(x.shape[1:]))}",
                hint="make_detachable(model, cuts, input_size=...) makes one for another size",
            )
        is_other = self._derived.asks_for_dtype and x.is_floating_point() != self.input_dtype.is_floating_point
        if is_other and models != (BASE,):
            raise StepDownError(
                f"{self.plan.model} asks for a dtype: the family is made for {self.input_dtype}, not {x.dtype}",
                hint="make_detachable(model, cuts, example_input=images) makes one for these",
            )
        if models == (BASE,) and not features and (is_other or tuple(x.shape[1:]) != self.plan.input_size):
            made = self.base(x)  # a trace holds decisions by the size and the dtype it was made with
        else:
            made = self._view(models, features)(self, x)
            if not torch.compiler.is_compiling():
                for copied in self._copied:
                    copied.passed()
        outputs: Output | dict[str, Output] = made[0] if features else made
        if single is None and len(models) == 1:
            outputs = {models[0]: outputs}  # type: ignore[dict-item]
        return (outputs, made[1]) if features else outputs

    if TYPE_CHECKING:
        __call__ = forward

    def prepare(self, models: Sequence[str], features: bool = False) -> None:
        """Write the pass through some models now, not when it is first run: torch.compile then sees all of it.

        What `torch.compile(net)` has compiled is not told of later changes in `net.base`; this tells it.
        """
        self._view(tuple(models), features)

    def _view(self, models: tuple[str, ...], features: bool = False) -> Run:
        follow(self)
        return self._derived.views.get(self, models, features)

    def _check(self, name: object) -> None:
        if name not in self.names:
            raise CutError(
                f"no model is called {name!r}",
                hint=f"the models are {', '.join(self.names)}",
                nearest=nearest(str(name), self.names),
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
        graphs = [build_view(self._derived.sources[name][True], (name,)) for name in models]
        nodes = [node for graph in graphs for node in graph.nodes]
        read = {
            parameter
            for target in {str(n.target) for n in nodes if n.op in ("call_module", "get_attr")}
            for parameter in parameters_in(_read_by(attribute(self, target)))
        }
        return {name: parameter for name, parameter in self.named_parameters() if parameter in read}

    def own_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """What a sub-model's own layer starts from of a tensor of the base-model's: of its filters alone.

        Args:
            name: Of the sub-model's tensor in the family, `norms.<name>.…` or `heads.<name>.…`.
            tensor: The base-model's.
        """
        place, path = name.split(".", 2)[1:]
        whose = next(model for model in self.names if folder(model) == place)
        return self._derived.sources[whose][False].own_tensor(path, tensor)

    def detach(self, name: str, share: bool = False) -> nn.Module:
        """Take one model out of the family, as a plain module in evaluation mode.

        The base-model comes back as the class it is; a sub-model as a `detached.DetachedModel` with its step-down
        as `stepdown`, the bridge of its span i as `bridge<i>` and everything else under the base-model's names.
        Both pickle, copy, compile and print like any module.

        Args:
            name: Which one.
            share: Keep the family's own layers and tensors instead of copying them, in the mode they are in; one
                with fewer filters does not pickle then.

        Raises:
            CutError: No model has that name.
        """
        self._check(name)
        follow(self)
        if name == BASE and not share:
            base = copy_model(self.base)
            base.zero_grad()
            base.eval()  # a user's may return nothing, and so may `train`
            return base
        modes = [self._derived.sources[name][training] for training in (False, True)]
        differ = modes[0].traced.source != modes[1].traced.source
        graphs = [build_view(mode, (name,)) for mode in modes[: 1 + differ]]
        return as_module(self, graphs, modes, self.plan.model if name == BASE else name, share)

    def parts(self, name: str) -> dict[str, tuple[Tensor, Pick]]:
        """What a model with fewer filters has of the base-model's tensors.

        Args:
            name: Which one.

        Returns:
            Name of a tensor of the detached model → the base-model's tensor, and what is kept of it.
        """
        found: dict[str, tuple[Tensor, Pick]] = {}
        names = Names(self.base)
        for node in build_view(self._derived.sources[name][False], (name,)).nodes:
            if node.op in ("call_module", "get_attr"):
                path, layer = names.of(str(node.target)), attribute(self, str(node.target))
            if node.op == "call_module" and isinstance(layer, SlicedLayer):
                found |= {f"{path}.{tensor}": part for tensor, part in layer.parts.items()}
        return found

    def route_of(self, model: ModelPlan) -> tuple[tuple[object, ...], ...]:
        """What a sub-model of this network leaves out, the same whatever its places are called."""
        names = self._derived.sources[BASE][False].traced.names
        return tuple((names.get(s.start, s.start), names.get(s.end, s.end), s.prepared) for s in model.spans)

    @property
    def legs(self) -> dict[str, tuple[Leg, ...]]:
        """Model → what it runs between the places where models part, front to back; models share legs."""
        found: dict[str, tuple[Leg, ...]] = {}
        for name, both in self._derived.sources.items():
            if name not in found:
                found |= find_legs(both[False], self.plan)
        return found

    def detach_leg(self, leg: Leg, share: bool = False) -> nn.Module:
        """Take a leg out of the family, as `detach` does a model.

        Args:
            leg: One of `legs`.
            share: As of `detach`.

        Returns:
            A module from images or the feature at `leg.start` to the feature at `leg.end` or the output.
        """
        modes = [self._derived.sources[leg.models[0]][training] for training in (False, True)]
        return as_module(self, [build_leg(modes[0], leg)], modes, str(leg), share)

    def changes_input(self, leg: Leg) -> bool:
        """Whether a leg, detached, may change in place what it is given."""
        return changes_input(self._derived.sources[leg.models[0]][False], leg)

    def copied(self) -> DetachableNet:
        """A copy, also where `copy.deepcopy` refuses what hooks have computed."""
        copied = copy_model(self)
        assert isinstance(copied, DetachableNet)
        return copied

    def with_private_norms(self) -> DetachableNet:
        """A copy in which each sub-model has batch norms of its own, equal to those it had."""
        if self.plan.norm == "private":
            return self.copied()
        memo = copies_of_computed_tensors(self)
        places = [path for both in self._derived.sources.values() for path in both[True].bridges]
        bridges = {path: copy.deepcopy(self.get_submodule(path), memo) for path in places}
        plan = self.plan.model_copy(update={"norm": "private"})
        net = DetachableNet(copy_model(self.base), plan, bridges, self.retraced())
        net.heads.load_state_dict(self.heads.state_dict())
        net.facts, net.active, net.check = self.facts, self.active, self.check
        return net

    def train(self, mode: bool = True) -> DetachableNet:
        """Set the mode; a sub-model's own layer follows the layer of the base-model it was copied from."""
        super().train(mode)
        layers = dict(self.base.named_modules())
        for path, module in [*self.norms.named_modules(), *self.heads.named_modules()]:
            _, _, original = path.partition(".")
            if original and not isinstance(module, Folder):
                for inner, part in module.named_modules():
                    like = layers.get(f"{original}.{inner}".rstrip("."))
                    part.training = part.training if like is None else like.training
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_derived"], state["_copied"]
        state["_modules"] = {name: part for name, part in self._modules.items() if name != SLICES}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._attach(self.retraced())
        self._put_own_layers()

    def retraced(self) -> TracedModel:
        """The base-model's trace, made anew."""
        return self._tracing.trace(self.base)

    def extra_repr(self) -> str:
        """The names of the models and the active one."""
        return f"names={list(self.names)}, active={self.active!r}, norm={self.plan.norm!r}"

    def __repr__(self) -> str:
        """One line; `net.plan` is the table of what each costs, `net.base` prints the layers."""
        size = by(self.plan.input_size)
        return f"DetachableNet({self.plan.model} on {size} images, {self.extra_repr()})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the plan."""
        return self.plan._repr_html_()


def family_in(net: Any) -> DetachableNet:
    """The family inside `torch.compile(net)` or DataParallel.

    Raises:
        TraceError: There is none.
    """
    net = unwrap(net)
    if isinstance(net, DetachableNet):
        return net
    inside = isinstance(getattr(net, "module", None), DetachableNet)
    raise TraceError(
        f"this takes a family of networks, not {type(net).__name__}",
        hint="give what is in it, net.module" if inside else "detachnet.make_detachable(model, 2) makes one",
    )


def _read_by(value: Any) -> Any:
    """The layer whose parameters a part of a family reads."""
    return value.layer if isinstance(value, SlicedLayer) else value
