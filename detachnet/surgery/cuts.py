"""TracedModel -> CutPoints: which nodes a model can be cut at, and why not at the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from detachnet.errors import CutError, StepDownError, nearest
from detachnet.surgery.graph import TracedGraph, TracedModel
from detachnet.surgery.modules import unwrap
from detachnet.surgery.preparation import Preparation, find_preparation
from detachnet.surgery.stepdown import Stem, StepDown, plan_stepdown
from detachnet.surgery.trace import trace
from detachnet.surgery.tracer import PROBE_BATCH, Leaves, Spec
from detachnet.surgery.whole import is_soft
from detachnet.text import si

Place = Literal["activation", "module", "inner"]
_ACTIVATIONS = {
    "relu",
    "relu_",
    "relu6",
    "silu",
    "gelu",
    "elu",
    "leaky_relu",
    "hardswish",
    "hardtanh",
    "mish",
    "selu",
}
_NEAR = 0.15
"""How far from the wanted share of MACs a sub-model may be, and a better place be preferred."""
_PLACES = ("activation", "module", "inner")
TOLD = 0.05
"""How far from the wanted share of MACs a sub-model may be without a word."""


@dataclass(frozen=True)
class CutPoint:
    """A node every path from the image to the output passes through.

    Attributes:
        name: What to pass to `make_detachable`.
        shape: Shape of the feature there, `(C, h, w)`, without the batch.
        stepdown: The step-down a sub-model enters through.
        macs: Multiply-accumulates of that sub-model for one image, the step-down's included.
        num_params: Its number of parameters, the step-down's included.
        macs_of_base: `macs` divided by the base-model's.
        place: `activation`, the output of a module that ends in an activation or pooling, the best place to cut;
            `module`, that of another module; `inner`, in the middle of one, or in front of its batch norm.
        in_block: Whether it is in the middle of a block, as between the layers of an inverted residual.
        caution: Why a cut chosen for you is never this one; empty where it may be.
    """

    name: str
    shape: tuple[int, ...]
    stepdown: StepDown
    macs: int
    num_params: int
    macs_of_base: float
    place: Place
    in_block: bool = False
    caution: str = ""

    @property
    def rank(self) -> float:
        """How good a place it is, the less the better: ends of blocks before the middle of one."""
        return _PLACES.index(self.place) + 1.5 * self.in_block


class CutAnalysis:
    """The one linear sweep behind every question about cuts.

    A node is a cut if no earlier value that depends on the image's pixels is read after it. Parameters,
    buffers and values that depend on the image's shape alone may cross; a tail makes them again.
    """

    def __init__(self, traced: TracedGraph) -> None:
        self.traced = traced
        self.position = {node: i for i, node in enumerate(traced.live)}
        self.last_read = {
            node: max((self.position[user] for user in node.users if user in traced.readers), default=-1)
            for node in traced.live
            if node in traced.data
        }

    @cached_property
    def valid(self) -> list[fx.Node]:
        """The nodes a model can be cut at, front to back; the image and the output are not among them."""
        found, reach = [], -1
        end = len(self.traced.live) - 1
        for node in self.traced.live:
            if node not in self.traced.data:
                continue
            is_inner = node.op not in ("placeholder", "output") and self.last_read[node] < end
            if is_inner and reach <= self.position[node] and self._is_batch(node):
                found.append(node)
            reach = max(reach, self.last_read[node])
        return found

    @cached_property
    def preparation(self) -> Preparation:
        """What is done to the image in front of the first layer with weights."""
        return find_preparation(self.traced, self.valid)

    def _is_batch(self, node: fx.Node) -> bool:
        """Whether a value is one tensor with the images along its first axis."""
        value = self.traced.values[node]
        return isinstance(value, Spec) and len(value.shape) > 1 and value.shape[0] == PROBE_BATCH

    def crossing(self, cut: fx.Node) -> list[fx.Node]:
        """The earlier values that are read after `cut`."""
        at = self.position[cut]
        return [n for n, last in self.last_read.items() if self.position[n] < at < last]

    def costs(self, runs: Callable[[int], bool]) -> tuple[int, int]:
        """MACs and parameters of the nodes at some positions, and of what they need that no pixels go into."""
        macs = num_params = 0
        counted: set[object] = set()
        pending = [node for node, at in self.position.items() if runs(at)]
        while pending:
            node = pending.pop()
            if node in counted:
                continue
            counted.add(node)
            macs += self.traced.macs[node]
            for parameter in self.traced.parameters_of(node):
                num_params += 0 if parameter in counted else parameter.numel()
                counted.add(parameter)
            pending += [n for n in node.all_input_nodes if n not in self.traced.data]
        return macs, num_params

    def norm_params(self, runs: Callable[[int], bool]) -> int:
        """Parameters of the batch norms at some positions."""
        layers = {self.module_of(node) for node, at in self.position.items() if runs(at)} - {None}
        norms = {part for layer in layers if layer for part in layer.modules() if isinstance(part, _BatchNorm)}
        return sum(parameter.numel() for norm in norms for parameter in norm.parameters())

    @cached_property
    def _tails(self) -> dict[fx.Node, tuple[int, int]]:
        """Node -> MACs and parameters of everything that runs after it."""
        tails: dict[fx.Node, tuple[int, int]] = {}
        macs = num_params = 0
        counted: set[object] = set()
        for node in reversed(self.traced.live):
            tails[node] = (macs, num_params)
            pending = [node]  # the node, and the values independent of the pixels that a tail makes again
            while pending:
                current = pending.pop()
                if current in counted:
                    continue
                counted.add(current)
                macs += self.traced.macs[current]
                for parameter in self.traced.parameters_of(current):
                    num_params += 0 if parameter in counted else parameter.numel()
                    counted.add(parameter)
                pending += [n for n in current.all_input_nodes if n not in self.traced.data]
        return tails

    def tail_macs(self, cut: fx.Node) -> int:
        """Multiply-accumulates for one image of everything after `cut`."""
        return self._tails[cut][0]

    def tail_params(self, cut: fx.Node) -> int:
        """Number of parameters of everything after `cut`."""
        return self._tails[cut][1]

    @cached_property
    def all_costs(self) -> tuple[int, int]:
        """MACs and parameters of everything that runs."""
        return self.costs(lambda _: True)

    @cached_property
    def _last_work(self) -> int:
        """Position of the last layer that works on more than one position: what follows is a classifier."""
        return max((at for node, at in self.position.items() if self._works_on_a_map(node)), default=-1)

    def _works_on_a_map(self, node: fx.Node) -> bool:
        """Whether a node multiplies at several positions, or would on a larger image."""
        if not self.traced.macs[node] or node not in self.traced.data:
            return False
        module, value = self.module_of(node), self.traced.values[node]
        if isinstance(module, _ConvNd) and math.prod(module.kernel_size) > 1:
            return True
        return isinstance(value, Spec) and sum(size > 1 for size in value.shape[1:]) > 1

    def caution(self, cut: fx.Node, stepdown: StepDown) -> str:
        """Why nobody should cut there without a reason of his own; empty if there is nothing to say."""
        macs, num_params = self.all_costs
        replaced = num_params - self.tail_params(cut)
        if self.position[cut] >= self._last_work:
            return "behind the last convolution: only the classifier is left"
        if stepdown.num_params > replaced:
            return f"its step-down has {si(stepdown.num_params)} parameters in place of {si(replaced)}"
        if stepdown.macs + self.tail_macs(cut) >= macs:
            return "costs no less than the base-model"
        return ""

    def shape(self, cut: fx.Node) -> tuple[int, ...]:
        """Shape of the value at a valid cut, without the batch."""
        value = self.traced.values[cut]
        return tuple(value.shape[1:])

    def find(self, name: str) -> fx.Node:
        """The node a cut's name means.

        Raises:
            CutError: No such name, or it is no cut; the nearest names and what crosses are in the message.
        """
        traced = self.traced
        model = type(traced.root.base).__name__
        valid_names = [traced.name_of[n] for n in self.valid if n in traced.name_of]
        node = traced.names.get(name)
        if node is None or node not in self.position:
            for path, why in traced.whole.items():
                if name.startswith(f"{path}."):
                    raise CutError(
                        f"cannot cut {model} at {name!r}: {path!r} is kept whole ({why})",
                        hint=f"cut at {path!r}, or take that out of its forward",
                        nearest=nearest(name, valid_names),
                        node=name,
                    )
            what = "" if node is None else "it exists, but its output is not used"
            modules = dict(traced.root.base.named_modules())
            if node is None and name in modules:
                what = "there is such a module, but it is not called, or returns no single tensor"
            raise CutError(
                f"cannot cut {model} at {name!r}: no node has that name",
                what=what,
                hint="detachnet.find_cuts(model) lists the valid cuts",
                nearest=nearest(name, valid_names) or nearest(name, traced.names),
                node=name,
            )
        if node in self.valid:
            return node
        raise CutError(
            f"cannot cut {model} at {name!r}: {self.objection(node)}",
            where=self._where(node),
            hint=f"detachnet.find_cuts(model) lists the {len(self.valid)} valid cuts",
            nearest=self._neighbours(node),
            node=name,
        )

    def objection(self, node: fx.Node) -> str:
        """Why a node is no cut."""
        if node.op == "placeholder":
            return "that is the image itself"
        if node not in self.traced.data:
            return "its value does not depend on the image's pixels"
        crossing = self.crossing(node)
        if crossing:
            names = [self.traced.describe(n) for n in crossing]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"{names[0]}{more} also crosses it (a skip connection or a parallel branch)"
        if self.last_read[node] == len(self.traced.live) - 1:
            return "that is the output, nothing would be left of the model"
        return "its value is not a single tensor with the batch as its first axis"

    def _where(self, node: fx.Node) -> str:
        """The node in the graph and the submodule it belongs to."""
        path = self.traced.name_of.get(node, "").rpartition(".")[0]
        try:
            owner = type(self.traced.root.base.get_submodule(path)).__name__
        except AttributeError:
            owner = "?"
        return f"node %{node.name}, in {repr(path) if path else 'the model'} ({owner})"

    def _neighbours(self, node: fx.Node) -> list[str]:
        """The last valid cut before a node and the first one after it."""
        at = self.position[node]
        before = [n for n in self.valid if self.position[n] < at][-1:]
        after = [n for n in self.valid if self.position[n] > at][:1]
        return [self.traced.name_of[n] for n in before + after if n in self.traced.name_of]

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.traced.root.base.named_modules())

    def place(self, cut: fx.Node) -> Place:
        """What a cut stands behind."""
        if self.traced.name_of.get(cut) not in self._modules or self.splits_norm(cut):
            return "inner"
        module = self.module_of(cut)
        if module is not None:
            act = getattr(module, "act", None)
            home = type(module).__module__
            ends = "activation" in home or "pool" in home or (act is not None and not isinstance(act, nn.Identity))
        else:
            name = cut.target if isinstance(cut.target, str) else getattr(cut.target, "__name__", "")
            ends = name in _ACTIVATIONS or "pool" in name
        return "activation" if ends else "module"

    def in_block(self, cut: fx.Node) -> bool:
        """Whether a module around a cut is more than a holder of blocks one after another."""
        path = self.traced.name_of.get(cut, "").split(".")
        around = [".".join(path[:i]) for i in range(1, len(path))]
        return not all(name not in self._modules or _is_stage(self._modules[name]) for name in around)

    def call_count(self, name: str) -> int:
        """How often a module or operation of that name is called."""
        return len(self.traced.calls.get(name, ()))

    def splits_norm(self, cut: fx.Node) -> bool:
        """Whether the next layer is a batch norm, which then belongs to the sub-model alone."""
        users = [u for u in cut.users if u in self.traced.readers]
        return len(users) == 1 and isinstance(self.module_of(users[0]), _BatchNorm)

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The module a node calls, on the meta device."""
        return self.traced.module.get_submodule(str(node.target)) if node.op == "call_module" else None


def _is_stage(module: nn.Module) -> bool:
    """Whether a module only holds blocks one after another: a list of them, or a stage, as libraries call it."""
    return type(module) in (nn.Sequential, nn.ModuleList) or "Stage" in type(module).__name__


def prepared_at(traced: TracedModel, analysis: CutAnalysis) -> str:
    """The cut behind which the image is prepared for the first layer, in both modes; empty if nothing is done."""
    end = analysis.preparation.end
    return end if end in traced.train.names else ""


def cut_points(traced: TracedModel, entry: str | Stem = "conv") -> list[CutPoint]:
    """Every valid cut of a traced model that a step-down exists for, front to back; `entry` is its kind."""
    analysis = CutAnalysis(traced.eval)
    prepared = prepared_at(traced, analysis)
    image = analysis.shape(analysis.find(prepared)) if prepared else traced.eval.image.shape[1:]
    points = []
    for node in analysis.valid:
        try:
            stepdown = plan_stepdown(image, analysis.shape(node), entry)
        except StepDownError:
            continue
        points.append(
            CutPoint(
                name=traced.eval.name_of[node],
                shape=analysis.shape(node),
                stepdown=stepdown,
                macs=stepdown.macs + analysis.tail_macs(node),
                num_params=stepdown.num_params + analysis.tail_params(node),
                macs_of_base=(stepdown.macs + analysis.tail_macs(node)) / max(1, sum(traced.eval.macs.values())),
                place=analysis.place(node),
                in_block=analysis.in_block(node),
                caution=analysis.caution(node, stepdown),
            )
        )
    return points


def every_node(traced: TracedModel) -> list[tuple[str, tuple[int, ...], str]]:
    """Each value that depends on the pixels: its name, its shape without the batch, and why it is no cut."""
    analysis = CutAnalysis(traced.eval)
    valid = set(analysis.valid)
    nodes = [n for n in traced.eval.live if n in traced.eval.data and n.op not in ("placeholder", "output")]
    return [
        (
            traced.eval.name_of.get(node, node.name),
            tuple(value.shape[1:]) if isinstance(value := traced.eval.values[node], Spec) else (),
            "" if node in valid else analysis.objection(node),
        )
        for node in nodes
    ]


def choose_cuts(traced: TracedModel, keep: Sequence[float], entry: str | Stem = "conv") -> list[str]:
    """The cuts whose sub-models come nearest to shares of the base-model's MACs, at the best places near them.

    A sub-model keeps a convolution, its step-down has no more parameters than what it replaces, and each costs
    less than the one before it, by at least half of what was asked for.

    Args:
        traced: The model.
        keep: Shares of the base-model's MACs, each in (0, 1), falling.
        entry: The step-down that will be built, which is what the costs are of.

    Raises:
        CutError: A share is out of range, or no cuts are near enough.
    """
    if any(not 0 < share < 1 for share in keep) or list(keep) != sorted(keep, reverse=True):
        raise CutError(
            f"cuts={list(keep)}: shares of the base-model's MACs lie between 0 and 1 and fall from front to back",
            hint="cuts=[0.7, 0.3]",
        )
    points = [point for point in cut_points(traced, entry) if point.stepdown.kind != "linear"]
    sound = [point for point in points if not point.caution]
    chosen = _nearest_chain(sound, keep)
    if chosen is None:
        raise _no_chain(traced.class_name, points, keep, entry)
    return [point.name for point in chosen]


def spread(count: int, most: float = 0.85, least: float = 0.15) -> list[float]:
    """Shares of MACs to keep for `count` sub-models, evenly between two of them."""
    return [most - (most - least) * (i + 1) / (count + 1) for i in range(count)]


def _nearest_chain(points: Sequence[CutPoint], keep: Sequence[float]) -> list[CutPoint] | None:
    """One point near each share, falling, whose distances and ranks add up to least; None if there are none."""
    best: dict[CutPoint | None, tuple[float, list[CutPoint]]] = {None: (0.0, [])}
    before = 1.0
    for share in keep:
        longer: dict[CutPoint | None, tuple[float, list[CutPoint]]] = {}
        for i, point in enumerate(points):
            if (distance := abs(point.macs_of_base - share)) > _NEAR:
                continue
            behind = [
                (cost, chain)
                for cost, chain in best.values()
                if (not chain or chain[-1] in points[:i])
                and (chain[-1].macs_of_base if chain else 1.0) - point.macs_of_base >= (before - share) / 2
                and (not chain or chain[-1].macs > point.macs)
            ]
            if behind:
                cost, chain = min(behind, key=lambda pair: pair[0])
                longer[point] = (cost + distance + point.rank, [*chain, point])
        best, before = longer, share
    return min(best.values(), key=lambda pair: pair[0])[1] if best else None


def _no_chain(model: str, points: Sequence[CutPoint], keep: Sequence[float], entry: str | Stem) -> CutError:
    """Why no cuts are near the shares that were asked for, and what to do."""
    shares = sorted({round(100 * point.macs_of_base) for point in points if not point.caution}, reverse=True)
    if shares:
        some = shares if len(shares) <= 8 else [*shares[:4], *shares[-4:]]
        what = f"sub-models that drop the front keep {', '.join(map(str, some))} % of the MACs"
        what += ", and each is to cost clearly less than the one before it" if len(keep) > 1 else ""
    elif points:
        least = min(points, key=lambda point: point.macs)
        what = f"no cut pays; {least.name!r}, the cheapest: {least.caution}"
    else:
        what = "there is none that a convolution could take in the image at"
    cheaper = "" if entry == "conv" else "; or stepdown='conv', or a Stem of less width, which costs less"
    count = len(keep)
    near = f"cuts near {', '.join(f'{100 * share:.0f} %' for share in keep)} of its MACs"
    return CutError(
        f"{model} has no {near if count <= 4 else f'{count} cuts spread over its MACs'}",
        what=what,
        hint=f"sub_models={min(count, 16)} leaves out blocks inside instead{cheaper}",
    )


def find_cuts(
    model: nn.Module,
    input_size: tuple[int, ...] | None = None,
    *,
    example_input: Tensor | None = None,
    leaf_modules: Sequence[type[nn.Module] | str] = (),
    leaf_functions: Sequence[Callable[..., Any]] = (),
) -> list[CutPoint]:
    """List the places a model can be cut at, front to back.

    Args:
        model: Any CNN; it is not run, moved or changed.
        input_size: Shape of one image, `(C, H, W)`; by default what the model declares.
        example_input: A batch `(B, ...)` instead.
        leaf_modules: Classes of modules to keep whole, or names of single modules.
        leaf_functions: Functions to keep whole.

    Returns:
        The valid cuts: every path from the image to the output passes through each of them.

    Raises:
        TraceError: The model cannot be traced at that size.

    Examples:
        >>> [point.name for point in detachnet.find_cuts(torchvision.models.resnet18())][-4:]
        ['layer3', 'layer4.0', 'layer4', 'avgpool']
    """
    leaves = Leaves(tuple(leaf_modules), tuple(leaf_functions))
    traced = trace(unwrap(model), input_size, example_input, leaves)
    while soft := [path for path, why in traced.whole.items() if is_soft(why)]:  # opened where a cut is inside
        traced = trace(unwrap(model), input_size, example_input, leaves := leaves.opening(soft[0]))
    return cut_points(traced)
