"""layer -> the parts of it that keep statistics of what they see, as batch norms do, whatever their class.

A layer is run in training on two random batches: what its buffers hold then differs if they are statistics.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.modules.batchnorm import _BatchNorm

from detachnet.errors import TraceError
from detachnet.surgery.graph import TracedGraph
from detachnet.surgery.modules import copy_model, random_states_kept, silence_hooks
from detachnet.surgery.tracer import PREFIX, Spec

IMAGES = 2
"""That a layer is run on: norms need more than one, and memory is taken for them."""
PASSES = 3
"""So many: some begin after a few."""
Statistics = Mapping[str, tuple[str, ...]]
"""Path of a layer in the base-model → paths in it of the parts that keep statistics, batch norms not counted."""


def find_statistics(traced: TracedGraph, base: nn.Module) -> Statistics:
    """The layers of a model that keep statistics, batch norms not counted, by running each of them in training.

    Args:
        traced: The graph of the training mode.
        base: The model with its weights; it is left as it is, the random state too.
    """
    found: dict[str, tuple[str, ...]] = {}
    values: Mapping[fx.Node, Any] = {}
    for node in traced.live:
        path = str(node.target).removeprefix(PREFIX)
        if node.op != "call_module" or path in found or not _could_keep(base.get_submodule(path)):
            continue
        values = values or _values_of_few(traced)
        if parts := _parts_with_statistics(traced, values, node, base.get_submodule(path)):
            found[path] = parts
    return found


def _values_of_few(traced: TracedGraph) -> Mapping[fx.Node, Any]:
    """Node → its value for a few images; for those of the trace where it does not run with so few."""
    try:
        return traced.propagate(IMAGES).values
    except TraceError:
        return traced.values


def _could_keep(layer: nn.Module) -> bool:
    """Whether a layer on a real device has floating-point tensors of its own that no optimizer changes."""
    parts = [part for part in layer.modules() if not isinstance(part, _BatchNorm)]
    users = [part for part in parts if not type(part).__module__.startswith("torch.")]
    frozen = [p for part in users for p in part._parameters.values() if p is not None and not p.requires_grad]
    buffers = [buffer for part in parts for buffer in part._buffers.values() if buffer is not None]
    return any(tensor.is_floating_point() and not tensor.is_meta for tensor in [*buffers, *frozen])


def _parts_with_statistics(
    traced: TracedGraph, values: Mapping[fx.Node, Any], node: fx.Node, layer: nn.Module
) -> tuple[str, ...]:
    """The parts of one layer whose buffers come to depend on what the layer sees; none if it cannot be run."""
    every = [*layer.buffers(), *layer.parameters()]
    like = next((t for t in every if t.is_floating_point()), torch.empty(0))
    meta = traced.module.get_submodule(str(node.target))
    try:
        with random_states_kept(like.device), torch.no_grad():
            one, two = (_buffers_after(values, node, layer, meta, like, seed) for seed in (0, 1))
    except Exception:  # whatever a user's layer raises on random values
        return ()
    owners = [name.rpartition(".")[0] for name, value in one.items() if not torch.equal(value, two[name])]
    if owners and isinstance(layer, torch.jit.ScriptModule):
        path = str(node.target).removeprefix(PREFIX)
        raise TraceError(
            f"{path!r} is a script module with statistics: no sub-model can have its own and share the rest",
            hint="make the family before torch.jit.script; or norm='shared'",
            node=path,
        )
    return tuple(p for p in dict.fromkeys(owners) if not isinstance(layer.get_submodule(p), _BatchNorm))


def _buffers_after(
    values: Mapping[fx.Node, Any], node: fx.Node, layer: nn.Module, meta: nn.Module, like: Tensor, seed: int
) -> dict[str, Tensor]:
    """What no optimizer changes in a copy, after passes in the graph's mode on random values."""
    torch.manual_seed(seed)

    def value(leaf: fx.Node) -> Any:
        return map_aggregate(values[leaf], random_tensor)

    def random_tensor(leaf: Any) -> Any:
        if not isinstance(leaf, Spec):
            return leaf
        dtype = like.dtype if leaf.dtype.is_floating_point else leaf.dtype
        return torch.rand(leaf.shape, device=like.device).mul(3).to(dtype)

    copied = silence_hooks(copy_model(layer))
    for (_, part), (_, original) in zip(copied.named_modules(), meta.named_modules(), strict=True):
        part.training = original.training
    for _ in range(PASSES):
        copied(*fx.node.map_arg(node.args, value), **fx.node.map_arg(node.kwargs, value))
    frozen = [(name, parameter) for name, parameter in copied.named_parameters() if not parameter.requires_grad]
    return {name: tensor for name, tensor in [*copied.named_buffers(), *frozen] if tensor.is_floating_point()}


def own_statistics(layer: nn.Module, parts: Sequence[str], memo: Mapping[int, Any]) -> nn.Module:
    """A copy of a layer with norms, and whatever else keeps statistics, of its own; the rest stays shared.

    Args:
        layer: It.
        parts: Names of what keeps statistics in it besides batch norms; empty for itself.
        memo: What is no part of it, by its id.
    """
    kept = [m for m in layer.modules() if isinstance(m, _BatchNorm)] + [layer.get_submodule(p) for p in parts]
    own = {id(t) for m in kept for t in [*m._parameters.values(), *m._buffers.values()]}
    shared: list[Any] = [t for t in [*layer.parameters(), *layer.buffers()] if id(t) not in own]
    shared += [m for m in layer.modules() if not any(part is one for part in m.modules() for one in kept)]
    return copy.deepcopy(layer, {**memo, **{id(one): one for one in shared}})
