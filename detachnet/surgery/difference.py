"""Two tensors -> whether they are equal but for rounding; a model and its graph -> where they part.

The modules of a copy are listened to while it runs, and compared in the order in which they return with the nodes
of the same names.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from detachnet.surgery.generators import generators_kept, generators_of
from detachnet.surgery.graph import TracedGraph
from detachnet.surgery.modules import copies_of_computed_tensors
from detachnet.surgery.outside import Outside
from detachnet.surgery.tracer import leaves_of, thaw

if TYPE_CHECKING:
    from detachnet.surgery.detachable import DetachableNet

_SEED = 771_204_913
"""One that nobody uses: numbers that a trace has baked in would be those of a common one."""


def twin(net: DetachableNet, memo: dict[int, Any]) -> DetachableNet:
    """A copy that is not traced again."""
    made: DetachableNet = type(net).__new__(type(net))
    shared = {name: value for name, value in vars(net).items() if name not in ("_modules", "_buffers")}
    both: dict[str, Any] = copy.deepcopy({"_modules": net._modules, "_buffers": net._buffers}, memo)
    vars(made).update(shared | both)
    made._derived = net._derived.settled(both["_modules"]["base"])  # nothing changes while a copy runs
    made._tracing = replace(net._tracing, others={False: frozenset(), True: frozenset()})
    made._follows_dtype = net._derived.asks_for_dtype  # but for the precision that it is compared in
    return made


def tensors(value: Any) -> list[Tensor]:
    """The tensors in what a model returns, or several do; those in objects with attributes among them."""
    found = list[Tensor]()
    for leaf in leaves_of(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) or (leaf is value and hasattr(leaf, "__dict__")):
            found += tensors(vars(leaf))
    return found


def close(one: Tensor, two: Tensor, bound: float) -> bool:
    """Whether two tensors are equal but for rounding; numbers that are none are equal to each other."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if torch.equal(one, two) or not one.is_floating_point():
        return torch.equal(one, two)
    return difference(one, two) <= bound


def difference(one: Tensor, two: Tensor) -> float:
    """The largest difference relative to the largest value."""
    one, two = one.detach().double().nan_to_num(), two.detach().double().nan_to_num()
    return (
        float((one - two).abs().max() / one.abs().max().clamp_min(1e-12)) if one.shape == two.shape else torch.inf
    )


def first_difference(
    net: DetachableNet, traced: TracedGraph, training: bool, images: Tensor, bound: float
) -> tuple[str, str] | None:
    """The first module whose output is another in the graph, and the module whose forward is to blame."""
    calls = _record_modules(net, training, images)
    values = _Recorder(net, traced).recorded(training, images)
    seen: dict[str, int] = {}
    for path, inputs, outputs in calls:
        count = seen[path] = seen.get(path, -1) + 1
        nodes = traced.calls.get(path, [])
        if len(nodes) <= count:
            continue
        node = nodes[count]
        if all(close(*pair, bound) for pair in zip(outputs, values.get(node, []), strict=False)):
            continue
        args = [n for n in node.all_input_nodes if node.op == "call_module" and n in values][:1]
        fed = [close(a, b, bound) for n in args for a, b in zip(inputs, values[n][:1], strict=False)]
        return path, path if all(fed) else path.rpartition(".")[0]
    return None


def graph_outputs(net: DetachableNet, traced: TracedGraph, training: bool, images: Tensor) -> list[Tensor]:
    """What a traced graph gives, its operations in the order of the trace."""
    values = _Recorder(net, traced).recorded(training, images)
    return next(values[node] for node in reversed(traced.graph.nodes) if node.op == "output")


def _record_modules(
    net: DetachableNet, training: bool, images: Tensor
) -> list[tuple[str, list[Tensor], list[Tensor]]]:
    """Path, first input and outputs of each call of a submodule, in the order in which they return."""
    calls: list[tuple[str, list[Tensor], list[Tensor]]] = []
    given: dict[str, list[Tensor]] = {}

    def before(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any) -> None:
            given[path] = [t.detach().clone() for t in tensors(args)[:1]]

        return hook

    def after(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            calls.append((path, given[path], [t.detach().clone() for t in tensors(out)]))

        return hook

    copied = twin(net, copies_of_computed_tensors(net))
    for path, module in copied.base.named_modules():
        if path and not isinstance(module, torch.jit.ScriptModule):  # those take no hooks
            module.register_forward_pre_hook(before(path))
            module.register_forward_hook(after(path))
    _seeded_run(copied, training, lambda: copied.base(images.clone()))
    return calls


def seed_all() -> None:
    """Give the random numbers of Python, NumPy and torch one seed."""
    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)


def _seeded_run(net: DetachableNet, training: bool, run: Callable[[], Any]) -> None:
    net.train(training)
    seed_all()
    kept = generators_kept(generators_of(net)), Outside(net.base).kept()
    with kept[0], kept[1], torch.set_grad_enabled(training):  # some models ask
        run()


class _Recorder(fx.Interpreter):
    """Runs a traced graph and keeps what each node gave."""

    def __init__(self, net: DetachableNet, traced: TracedGraph) -> None:
        super().__init__(net, graph=traced.graph)
        self.kept: dict[fx.Node, list[Tensor]] = {}

    def recorded(self, training: bool, images: Tensor) -> dict[fx.Node, list[Tensor]]:
        """Each node's tensors."""
        net: Any = self.module
        _seeded_run(net, training, lambda: self.run(images.clone()))
        return self.kept

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """A node's arguments, in types that may be changed."""
        return thaw(super().fetch_args_kwargs_from_env(n))

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; keep its tensors."""
        out = super().run_node(n)
        self.kept[n] = [t.detach().clone() for t in tensors(out)]
        return out


def other_gradient(expected: dict[str, Tensor | None], found: dict[str, Tensor | None], bound: float) -> str:
    """The parameter nearest to the output whose gradient is another; empty if there is none.

    A gradient that is zero but for rounding, as a bias has in front of a batch norm, is compared with the largest.
    """
    norms = [float(gradient.norm()) for gradient in expected.values() if gradient is not None]
    least = 0.01 * max([norm for norm in norms if norm < torch.inf], default=0.0) + 1e-12
    for name in reversed(expected):
        one, two = expected[name], found[name]
        if (one is None) != (two is None) and not _is_zero(one) and not _is_zero(two):
            return name
        if one is not None and two is not None and not torch.equal(one, two):
            error = float((one - two).nan_to_num().norm()) / max(float(one.nan_to_num().norm()), least)
            if error > bound:
                return name
    return ""


def _is_zero(gradient: Tensor | None) -> bool:
    return gradient is not None and not gradient.any()


def other_buffer(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], bound: float) -> str:
    """The first buffer with another value; empty if there is none."""
    return next((n for n, value in expected.items() if n not in found or not close(value, found[n], bound)), "")
