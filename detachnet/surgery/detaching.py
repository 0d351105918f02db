"""family + the graph of one of its models or legs -> DetachedModel."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx, nn

from detachnet.surgery.detached import Code, DetachedModel
from detachnet.surgery.modules import attribute, copies_of_computed_tensors, with_leaves
from detachnet.surgery.ownership import HEADS, NORMS, SLICES, ViewSource
from detachnet.surgery.plan import BASE
from detachnet.surgery.routes import BRIDGES, STEPDOWNS
from detachnet.surgery.tracer import PREFIX
from detachnet.surgery.widths.reading import SlicedLayer, SlicedTensor


def as_module(
    net: nn.Module, graphs: Sequence[fx.Graph], modes: Sequence[ViewSource], label: str, share: bool
) -> DetachedModel:
    """A graph of a family with its layers, or copies of them.

    Args:
        net: The family.
        graphs: The graph, and that of the training mode where it is another one.
        modes: What the two modes are made from: a model may keep a norm in another one.
        label: What the module is called.
        share: Keep the family's own layers and tensors, in the mode they are in.
    """
    memo: dict[int, Any] = copies_of_computed_tensors(net)
    parts = [dict(_parts(net, graph, share, memo)) for graph in graphs]
    written = [graph.python_code("self") for graph in graphs]
    codes = [Code(code.src, code.globals) for code in written]
    only_in_training = sorted(parts[-1].keys() - parts[0].keys())
    others = [
        [path for path, part in mode.traced.root.base.named_modules() if path and part.training != mode.training]
        for mode in modes
    ]
    detached = DetachedModel(label, codes[0], parts[0], codes[-1], only_in_training, others)
    if not share:
        detached.zero_grad()
        return detached.eval()
    detached.training = False
    return detached


def _parts(net: nn.Module, graph: fx.Graph, share: bool, memo: dict[int, Any]) -> Iterator[tuple[str, Any]]:
    """Name in a detached model → part, of a graph that is written in those names, in place."""
    entry, bridge = (_free_name(net.get_submodule(BASE), name) for name in ("stepdown", "bridge"))
    read = dict[fx.Node, Any]()
    for node in list(graph.nodes):
        if node.op in ("call_module", "get_attr"):
            value = attribute(net, str(node.target))
            node.target = detached_name(str(node.target), entry, bridge)
            if isinstance(value, SlicedTensor) and not share:
                (of,) = node.all_input_nodes
                yield str(of.target), value.detached(read[of])
                node.replace_all_uses_with(of)
                graph.erase_node(node)
            elif isinstance(value, SlicedTensor):
                node.target = f"{node.target}_part"
                yield node.target, value
            else:
                own = isinstance(value, SlicedLayer) and not share
                part = value.detached() if own else value if share else copy.deepcopy(value, memo)
                read[node] = with_leaves(part) if isinstance(part, nn.Module) else part
                yield str(node.target), read[node]


def _free_name(base: nn.Module, name: str) -> str:
    """A name that the base-model has no part of."""
    while hasattr(base, name):
        name += "_"
    return name


def detached_name(target: str, entry: str, bridge: str) -> str:
    """A target of a family's graph as it is called in a detached model."""
    place, _, rest = target.partition(".")
    owner, _, inner = rest.partition(".")
    if place == STEPDOWNS:
        return entry
    if place == BRIDGES:
        return f"{bridge}{inner}"
    return inner if place in (NORMS, HEADS, SLICES) and owner else target.removeprefix(PREFIX)
