"""Channels + kept atoms -> what must follow: the moves run again on what is kept, at the smaller sizes.

A narrower network runs the same graph. Where an operation would give other channels than those that are kept of
the full result, numbers written into the graph follow, or the node is a fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from detachnet.surgery.tracer import leaves_of
from detachnet.surgery.widths.channels import Channels
from detachnet.surgery.widths.functions import (
    ELEMENTWISE,
    asks_for_shape,
    broadcast,
    execute,
    operation,
    tensors_of,
)
from detachnet.surgery.widths.patch import NoProductError, Patch, narrowed, patch_move, patch_norm
from detachnet.surgery.widths.propagation import arguments


@dataclass(frozen=True)
class Fault:
    """The first node that would do something else.

    Attributes:
        node: The node.
        why: What it would do.
        couples: Whether what is kept of its value is no product of axes.
    """

    node: fx.Node
    why: str
    couples: bool = False


def check_width(channels: Channels, kept: Tensor) -> dict[fx.Node, Patch] | Fault:
    """Run the graph on the kept atoms, without weights or pixels.

    Args:
        channels: The network's.
        kept: Atom → whether it is kept.

    Returns:
        The nodes whose numbers must follow, or the first that cannot.
    """
    check = _Check(channels, kept)
    for node in channels.traced.live:
        if node.op == "output":
            continue
        try:
            why = check.step(node)
        except NoProductError:
            return Fault(node, "what is kept is no product of axes", couples=True)
        except Exception as error:  # whatever an operation raises at sizes it is not made for
            why = _first_line(error)
        if why:
            return Fault(node, why)
    return check.patches


class _Check:
    """One pass."""

    def __init__(self, channels: Channels, kept: Tensor) -> None:
        self.channels, self.kept = channels, kept
        self.values: dict[fx.Node, Any] = {}
        self.patches: dict[fx.Node, Patch] = {}

    def step(self, node: fx.Node) -> str:
        """Give a node its narrower value; what is wrong with it, if anything is."""
        full = self.channels.values[node]
        self.values[node] = map_aggregate(full, self._narrowed)
        if node.op in ("placeholder", "get_attr"):
            return ""
        if node in self.channels.norms:
            return self._norm(node)
        args, kwargs = arguments(node, self.values)
        if node in self.channels.moves:
            return self._move(node, args, kwargs)
        if node.op == "call_module":
            return self._layer(node, args, kwargs)
        if asks_for_shape(node, args) or not tensors_of((args, kwargs, full)):
            if not tensors_of(full):
                self.values[node] = execute(node, args, kwargs)  # a number of the narrower network
            return ""
        return self._other(node, args, kwargs)

    def _narrowed(self, leaf: Any) -> Any:
        return narrowed(leaf, self.kept) if isinstance(leaf, Tensor) else leaf

    def _norm(self, node: fx.Node) -> str:
        """The size that is written into the call of a norm follows."""
        layer = self.channels.norms[node]
        count = int(self.kept[layer.reads].sum())
        if layer.kind != "norm" and count < len(layer.reads):
            args, kwargs = arguments(node, self.channels.values)
            given = args[1] if len(args) > 1 else kwargs.get("num_groups")
            self.patches[node] = patch_norm(node, layer, count, given)
        return ""

    def _layer(self, node: fx.Node, args: Any, kwargs: Any) -> str:
        """A layer's input is smaller along its channels alone."""
        layer = self.channels.layers.get(str(node.target))
        pairs = zip(tensors_of((args, kwargs)), tensors_of(arguments(node, self.channels.values)), strict=True)
        for narrow, full in pairs if layer is not None else ():
            shape = [n for n, m in zip(narrow.shape, full.shape, strict=True) if n != m]
            if shape and layer is not None and shape != [narrow.shape[layer.axis]]:
                return "its input is smaller along another axis, too"
        return ""

    def _move(self, node: fx.Node, args: Any, kwargs: Any) -> str:
        """A move gives what is kept of the full result, or does so with other numbers."""
        expected, why = self.values[node], "other channels would come out"
        try:
            if same(self._moved(node, args, kwargs), expected):
                return ""
        except Exception as error:  # whatever an operation raises at sizes it is not made for
            why = _first_line(error)
        source = self.channels.values[node.all_input_nodes[0]]
        patch = patch_move(node, args, kwargs, (source, self.channels.values[node]), self.kept)
        if patch is None or not same(patch.run(self.values), expected):
            return why
        self.patches[node] = patch
        return ""

    def _moved(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op != "call_module":
            return execute(node, args, kwargs)
        return self.channels.traced.module.get_submodule(str(node.target))(*args, **kwargs)

    def _other(self, node: fx.Node, args: Any, kwargs: Any) -> str:
        """Functions that are no moves: their tensors meet, and their numbers are the same."""
        if list(_numbers((args, kwargs))) != list(_numbers(arguments(node, self.channels.values))):
            return "a number that goes into it follows the width"
        tensors = tensors_of((args, kwargs))
        if len(tensors) > 1 and operation(node) in ELEMENTWISE:
            return "" if broadcast(tensors) == tuple(self.values[node].shape) else "shapes do not meet"
        return ""


def same(out: Any, expected: Any) -> bool:
    """Whether two values have the same atoms in the same places."""
    pairs = list(zip(leaves_of(out), leaves_of(expected), strict=True))
    return all(
        one.shape == other.shape and torch.equal(one, other) for one, other in pairs if isinstance(one, Tensor)
    )


def _numbers(value: Any) -> Iterator[float]:
    return (leaf for leaf in leaves_of(value) if isinstance(leaf, int | float))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:100]
