"""TracedGraph -> CutAnalysis: which nodes a network can be cut at, why not at the others, what is around."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Literal

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from detachnet.errors import CutError, nearest
from detachnet.surgery.graph import TracedGraph
from detachnet.surgery.preparation import Preparation, find_preparation
from detachnet.surgery.stepdown import StepDown
from detachnet.surgery.tracer import PROBE_BATCH, Spec
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
        return self._count([node for node, at in self.position.items() if runs(at)], set())

    def _count(self, pending: list[fx.Node], counted: set[object]) -> tuple[int, int]:
        """MACs and parameters of nodes and what they need that no pixels go into, without what is counted."""
        macs = num_params = 0
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

    def has_norms(self, runs: Callable[[int], bool]) -> bool:
        """Whether there are batch norms at some positions."""
        layers = {self.module_of(node) for node, at in self.position.items() if runs(at)} - {None}
        return any(isinstance(part, _BatchNorm) for layer in layers if layer for part in layer.modules())

    @cached_property
    def _tails(self) -> dict[fx.Node, tuple[int, int]]:
        """Node -> MACs and parameters of everything that runs after it."""
        tails: dict[fx.Node, tuple[int, int]] = {}
        macs = num_params = 0
        counted: set[object] = set()
        for node in reversed(self.traced.live):
            tails[node] = (macs, num_params)
            more = self._count([node], counted)
            macs, num_params = macs + more[0], num_params + more[1]
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
            inside = [valid for valid in valid_names if valid.startswith(f"{name}.")] if name in modules else []
            if node is None and name in modules:
                why = "only what is in it is called" if inside else "it is not called, or returns no single tensor"
                what = f"there is such a module, but {why}"
            raise CutError(
                f"cannot cut {model} at {name!r}: no node has that name",
                what=what,
                hint="detachnet.find_cuts(model) lists the valid cuts",
                nearest=inside[:-4:-1] or nearest(name, valid_names) or nearest(name, traced.names),
                node=name,
            )
        if node in self.valid:
            return node
        raise CutError(
            f"cannot cut {model} at {name!r}: {self.objection(node)}",
            where=self._where(node),
            hint=f"detachnet.find_cuts(model) lists the {len(self.valid)} valid cuts"
            if self.valid
            else "it has no valid cuts; sub-models without inner layers or with fewer filters need none",
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
            readers = [user for user in crossing[0].users if self.position.get(user, -1) > self.position[node]]
            is_output = all(user.op == "output" for user in readers)
            why = "one of the model's outputs" if is_output else "a skip connection or a parallel branch"
            return f"{names[0]}{more} also crosses it ({why})"
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
        """Whether a module around a cut is more than a holder of blocks one after another, or of all weights."""
        path = self.traced.name_of.get(cut, "").split(".")
        around = [".".join(path[:i]) for i in range(1, len(path))]
        found = [self._modules[name] for name in around if name in self._modules]
        return not all(_is_stage(module) or self._is_all(module) for module in found)

    def _is_all(self, module: nn.Module) -> bool:
        """Whether a module has all weights: what is around it prepares the image, say."""
        return {*module.parameters()} >= self._parameters

    @cached_property
    def _parameters(self) -> set[nn.Parameter]:
        return {*self.traced.root.base.parameters()}

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
