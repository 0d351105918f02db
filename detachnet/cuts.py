"""TracedModel -> CutPoints: which nodes a model can be cut at, and why not at the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detachnet.errors import CutError, StepDownError, nearest
from detachnet.stepdown import StepDown, plan_stepdown
from detachnet.trace import Spec, TracedGraph, TracedModel, trace


@dataclass(frozen=True)
class CutPoint:
    """A node every path from the image to the output passes through.

    Attributes:
        name: What to pass to `make_detachable`.
        shape: Shape of the feature there, `(C, h, w)`, without the batch.
        stepdown: The step-down a sub-model enters through.
        macs: Multiply-accumulates of that sub-model for one image, the step-down's included.
        num_params: Its number of parameters, the step-down's included.
    """

    name: str
    shape: tuple[int, ...]
    stepdown: StepDown
    macs: int
    num_params: int


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
            if is_inner and reach <= self.position[node] and isinstance(self.traced.values[node], Spec):
                found.append(node)
            reach = max(reach, self.last_read[node])
        return found

    def crossing(self, cut: fx.Node) -> list[fx.Node]:
        """The earlier values that are read after `cut`."""
        at = self.position[cut]
        return [n for n, last in self.last_read.items() if self.position[n] < at < last]

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
            f"cannot cut {model} at {name!r}: {self._objection(node)}",
            where=self._where(node),
            hint=f"detachnet.find_cuts(model) lists the {len(self.valid)} valid cuts",
            nearest=self._neighbours(node),
            node=name,
        )

    def _objection(self, node: fx.Node) -> str:
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
        return "its value is not a single tensor"

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

    def splits_norm(self, cut: fx.Node) -> bool:
        """Whether the next layer is a batch norm, which then belongs to the sub-model alone."""
        users = [u for u in cut.users if u in self.traced.readers]
        return len(users) == 1 and isinstance(self.module_of(users[0]), _BatchNorm)

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The module a node calls, on the meta device."""
        return self.traced.module.get_submodule(str(node.target)) if node.op == "call_module" else None


def cut_points(traced: TracedModel) -> list[CutPoint]:
    """Every valid cut of a traced model that a step-down exists for, front to back."""
    analysis = CutAnalysis(traced.eval)
    image = traced.eval.image.shape[1:]
    points = []
    for node in analysis.valid:
        try:
            stepdown = plan_stepdown(image, analysis.shape(node))
        except StepDownError:
            continue
        points.append(
            CutPoint(
                name=traced.eval.name_of[node],
                shape=analysis.shape(node),
                stepdown=stepdown,
                macs=stepdown.macs + analysis.tail_macs(node),
                num_params=stepdown.num_params + analysis.tail_params(node),
            )
        )
    return points


def find_cuts(
    model: nn.Module, input_size: tuple[int, ...] | None = None, *, example_input: Tensor | None = None
) -> list[CutPoint]:
    """List the places a model can be cut at, front to back.

    Args:
        model: Any CNN; it is not run, moved or changed.
        input_size: Shape of one image, `(C, H, W)`; by default what the model declares.
        example_input: A batch `(B, ...)` instead.

    Returns:
        The valid cuts: every path from the image to the output passes through each of them.

    Raises:
        TraceError: The model cannot be traced at that size.

    Examples:
        >>> [point.name for point in detachnet.find_cuts(torchvision.models.resnet18())][-4:]
        ['layer3', 'layer4.0', 'layer4', 'avgpool']
    """
    return cut_points(trace(model, input_size, example_input))
