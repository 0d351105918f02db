"""family + the graph of one of its models or legs -> DetachedModel."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx, nn

from detachnet.surgery.codegen import written
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
    names = Names(net.get_submodule(BASE))
    parts = [dict(_parts(net, graph, share, memo, names)) for graph in graphs]
    codes = [Code(code.src, code.globals) for code in map(written, graphs)]
    only_in_training = sorted(parts[-1].keys() - parts[0].keys())
    others = [
        [
            name
            for path, part in mode.traced.root.base.named_modules()
            if path and part.training != mode.training
            for name in names.of_part(path)
        ]
        for mode in modes
    ]
    detached = DetachedModel(label, codes[0], parts[0], codes[-1], only_in_training, others)
    if not share:
        detached.zero_grad()
        return detached.eval()
    detached.training = False
    return detached


def _parts(
    net: nn.Module, graph: fx.Graph, share: bool, memo: dict[int, Any], names: Names
) -> Iterator[tuple[str, Any]]:
    """Name in a detached model → part, of a graph that is written in those names, in place."""
    read = dict[fx.Node, Any]()
    for node in list(graph.nodes):
        if node.op in ("call_module", "get_attr"):
            value = attribute(net, str(node.target))
            node.target = names.of(str(node.target))
            if isinstance(value, SlicedTensor) and not share:
                (of,) = node.all_input_nodes
                yield str(of.target), value.detached(read[of])
                node.replace_all_uses_with(of)
                graph.erase_node(node)
            else:
                own = isinstance(value, SlicedLayer) and not share
                part = value.detached() if own else value if share else copy.deepcopy(value, memo)
                read[node] = with_leaves(part) if isinstance(part, nn.Module) else part
                yield str(node.target), read[node]


class Names:
    """What a family's parts are called in a detached model: as in the base-model, each by a name of its own.

    Args:
        base: The base-model.
    """

    def __init__(self, base: nn.Module) -> None:
        self._base = base
        self._given: dict[str, str] = {}
        self._around: dict[str, set[str]] = {}
        """Name, or what it begins with up to a dot → where the targets are that have it."""

    def of(self, target: str) -> str:
        """The name of what a target of the family's graphs means; the first one that asks for a name gets it."""
        if target not in self._given:
            original = _original(target)
            name = original or _of_own(target)
            while self._is_taken(name, target) or (name != original and self._has(name)):
                first, dot, rest = name.partition(".")  # out of whatever it may be in
                name = f"{first}_{dot}{rest}"
            self._given[target] = name
            for path in _upwards(name):
                self._around.setdefault(path, set()).add(_place(target))
        return self._given[target]

    def _is_taken(self, name: str, target: str) -> bool:
        """Whether a name is another part's, or that of a part of another's or around one."""
        names, place = self._given.values(), {_place(target)}
        if name in self._around and (name in names or self._around[name] - place):
            return True
        around = (path for path in _upwards(name) if self._around.get(path, place) - place)
        return any(path in names for path in around)

    def _has(self, path: str) -> bool:
        """Whether the base-model has something of that name."""
        try:
            attribute(self._base, path)
        except AttributeError:
            return False
        return True

    def of_part(self, path: str) -> Iterator[str]:
        """The names of a part of the base-model, and of copies of it."""
        yield path
        for target, name in self._given.items():
            original = _original(target)
            if original and name != original and f"{path}.".startswith(f"{original}."):
                yield name + path.removeprefix(original)


def _upwards(name: str) -> Iterator[str]:
    """A dotted name, and the names of what that is in."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _original(target: str) -> str:
    """What the base-model calls that of which a target is a copy or a part, or which it is; else empty."""
    place, _, rest = target.partition(".")
    if place in (NORMS, HEADS, SLICES):
        return rest.partition(".")[2]
    return "" if place in (STEPDOWNS, BRIDGES) else target.removeprefix(PREFIX)


def _place(target: str) -> str:
    """Where a target is, up to the base-model's name of it."""
    return target.removesuffix(_original(target))


def _of_own(target: str) -> str:
    """What stands for a span: `stepdowns.sub0` → `stepdown`, `bridges.sub0.1` → `bridge1`."""
    place, *_, last = target.split(".")
    return "stepdown" if place == STEPDOWNS else f"bridge{last}"
