"""TracedGraph -> Channels: the graph run once on atoms, for one image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from detachnet.surgery.graph import TracedGraph, TracedModel
from detachnet.surgery.modules import attribute, evaluating
from detachnet.surgery.tracer import PREFIX, Leaves, Spec, leaves_of, thaw
from detachnet.surgery.widths.channels import CONSTANT, SHARED, Channels, WholeError, lean
from detachnet.surgery.widths.functions import run_function, tensors_of
from detachnet.surgery.widths.layers import MOVES, class_names, is_known, run_layer
from detachnet.surgery.widths.opening import open_layers

_LARGE = 2**18
"""Tensors with more elements have no atom for each: they stay, and what meets them."""


def find_channels(traced: TracedModel) -> Channels:
    """Run a model's graph for evaluation on atoms.

    Operations that only move elements are executed on the atoms and need no rule. Elementwise operations unite the
    atoms that meet. Layers with weights note the atoms they read and make new ones. Whatever is not known keeps
    all that goes into it, with its reason; layers that are not known are traced into first.
    """
    return find_channels_of(traced.eval, traced.leaves)


def find_channels_of(graph: TracedGraph, leaves: Leaves) -> Channels:
    """The same of a graph in either mode; `leaves` is what the user wants kept whole."""
    graph = open_layers(graph, is_known, leaves)
    run = _Run(graph)
    for node in graph.live:
        run.step(node)
    run.keep_layers_read_twice()
    run.unite_rows_not_read()
    return run.channels


class _Run:
    """One pass through the graph."""

    def __init__(self, traced: TracedGraph) -> None:
        self.traced = traced
        self.channels = Channels(traced)
        with evaluating(traced.root):  # a batch norm in training refuses one value for each channel
            self.specs = traced.propagate(1).values

    def step(self, node: fx.Node) -> None:
        """Give a node its value."""
        values = self.channels.values
        args, kwargs = arguments(node, values)
        if node.op == "output":
            self.channels.atoms.freeze(args, "it is the output")
        elif node.op == "placeholder":
            shape = self.specs[node].shape
            values[node] = self.channels.atoms.fixed(1, "it meets the image").reshape(()).expand(shape)
        elif node.op == "get_attr":
            values[node] = self._tensor(str(node.target))
        else:
            values[node] = self._call(node, args, kwargs)

    def unite_rows_not_read(self) -> None:
        """A row of a tensor that no layer's channels meet goes with one that they meet: it is cut as that is."""
        for atoms in self.channels.tensors.values():
            for axis in range(atoms.ndim) if atoms.ndim > 1 else ():
                rows = atoms.movedim(axis, 0).flatten(1)
                is_met = self._met()[rows.clamp_min(CONSTANT)].any(1)
                for row in rows[~is_met] if is_met.any() else ():
                    self.channels.atoms.unite_pairs(rows[is_met][0], row)

    def _met(self) -> Tensor:
        """Atom → whether its class has channels of a layer."""
        roots = self.channels.atoms.roots()
        met = torch.zeros(len(roots), dtype=torch.bool)
        for layer in self.channels.layers.values():
            for _, made in layer.sides():
                met[roots[made.clamp_min(CONSTANT)]] = True
        return met[roots]

    def _tensor(self, target: str) -> Any:
        """A parameter, buffer or constant: new atoms for its elements."""
        value = attribute(self.traced.root, target)
        if not isinstance(value, Tensor):
            return value
        if target not in self.channels.tensors:
            self.channels.tensors[target] = self._elements(value)
        return self.channels.tensors[target]

    def _elements(self, value: Tensor) -> Tensor:
        """Atoms for the elements of a tensor that the graph reads."""
        if value.numel() > _LARGE:
            return self.channels.atoms.fixed(1, "it meets a large tensor").reshape(()).expand(value.shape)
        if value.numel() == 1:
            return torch.full(tuple(value.shape), SHARED)
        return self.channels.atoms.fresh(value.numel()).reshape(value.shape)

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The atoms of a call's value; where there is no rule, its arguments stay whole."""
        try:
            if node.op == "call_module":
                value = self._layer(node, args, kwargs)
            else:
                value = run_function(self.channels, node, args, kwargs, self.specs[node])
            if not self._has_shape(value, self.specs[node]):
                raise WholeError("its channels are not known")
            return value
        except WholeError as error:
            why = str(error)
        except Exception as error:  # whatever an operation raises that does not run on integers
            why = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        self.channels.moves.discard(node)
        return self._whole(node, (args, kwargs), f"{self.traced.describe(node)}: {why}")

    def _layer(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """The atoms of a layer's output."""
        path = str(node.target)
        module, tensors = self.traced.module.get_submodule(path), tensors_of((args, kwargs))
        if len(tensors) != 1 or not isinstance(self.specs[node], Spec):
            raise WholeError(f"{type(module).__name__} takes or gives more than one tensor")
        (x,) = tensors
        if class_names(module).intersection(MOVES):
            self.channels.moves.add(node)
            return lean(module(x))
        return run_layer(self.channels, path, module, x, self.specs[node].shape)

    def _has_shape(self, value: Any, spec: Any) -> bool:
        """Whether each tensor of a value has the shape it should have."""
        pairs = zip(leaves_of(value), leaves_of(spec), strict=True)
        return all(tuple(t.shape) == s.shape for t, s in pairs if isinstance(t, Tensor) and isinstance(s, Spec))

    def _whole(self, node: fx.Node, value: Any, why: str) -> Any:
        """Keep what goes into a node; what comes out is always there."""
        self.channels.atoms.freeze(value, why)
        atom = self.channels.atoms.fixed(1, why)
        return map_aggregate(
            self.specs[node], lambda leaf: atom.reshape(()).expand(leaf.shape) if isinstance(leaf, Spec) else leaf
        )

    def keep_layers_read_twice(self) -> None:
        """A layer whose weights the graph reads itself, too, stays whole."""
        for target, atoms in self.channels.tensors.items():
            path = target.rpartition(".")[0]
            if path in self.channels.layers:
                why = f"{path.removeprefix(PREFIX)!r} is called, and its weights are read elsewhere"
                tensors = [atoms, *(side for _, side in self.channels.layers[path].sides())]
                self.channels.atoms.freeze(tensors, why)


def arguments(node: fx.Node, values: dict[fx.Node, Any]) -> tuple[Any, Any]:
    """A node's arguments, with the values of the nodes among them."""

    def given(leaf: Any) -> Any:
        return values[leaf] if isinstance(leaf, fx.Node) else leaf

    return thaw(map_aggregate(node.args, given)), thaw(map_aggregate(node.kwargs, given))
