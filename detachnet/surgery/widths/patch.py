"""Numbers written into a graph that follow the width: node + what is kept -> Patch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from detachnet.surgery.widths.channels import CONSTANT, Layer, compress
from detachnet.surgery.widths.functions import operation

_SPLITS = ("chunk", "split", "split_with_sizes", "tensor_split")
_SIZED = ("view", "reshape", "expand")


class NoProductError(Exception):
    """What is kept of a tensor is no product of what is kept along its axes; never leaves this wing."""


@dataclass(frozen=True)
class Patch:
    """What a node calls in a narrower network."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, values: dict[fx.Node, Any]) -> Any:
        """Call it on atoms."""

        def value(leaf: Any) -> Any:
            return values[leaf] if isinstance(leaf, fx.Node) else leaf

        args: Any = map_aggregate(self.args, value)
        kwargs: Any = map_aggregate(self.kwargs, value)
        if isinstance(self.target, str):
            return getattr(args[0], "reshape" if self.target == "view" else self.target)(*args[1:], **kwargs)
        return self.target(*args, **kwargs)


def patch_move(node: fx.Node, args: Any, kwargs: Any, full: tuple[Any, Any], kept: Tensor) -> Patch | None:
    """A move with the numbers it must have.

    Args:
        node: It.
        args: Its arguments, narrower.
        kwargs: Its named arguments, narrower.
        full: The first of its values at full width, and its own.
        kept: Atom → whether it is kept.
    """
    if node.op == "call_module":
        return None
    name, (source, value) = operation(node), full
    if name in _SPLITS:
        return _split(node, args, kwargs, value, kept)
    if name == "getitem":
        return _slices(node, args, source, kept)
    return _sizes(node, value, kept) if name in _SIZED else None


def patch_norm(node: fx.Node, layer: Layer, count: int, given: Any) -> Patch:
    """The call of a norm with the size it must have; `given` is the one it was called with."""
    of = len(layer.reads)
    name = "num_groups" if layer.kind == "group norm" else "normalized_shape"
    size: Any = max(1, int(given) * count // of) if layer.kind == "group norm" else (count,)
    if len(node.args) > 1:
        return Patch(node.target, (node.args[0], size, *node.args[2:]), dict(node.kwargs))
    return Patch(node.target, node.args, {**node.kwargs, name: size})


def kept_along_axes(atoms: Tensor, kept: Tensor) -> dict[int, Tensor]:
    """Axis → the kept indices, for the axes along which some go.

    Raises:
        NoProductError: What is kept is no product of what is kept along each axis.
    """
    mask = kept[compress(atoms).clamp_min(CONSTANT)]
    if not mask.any():
        raise ValueError("nothing of it is kept")
    picks, product = {}, torch.ones((), dtype=torch.bool)
    for axis in range(mask.ndim):
        some = mask
        for other in range(mask.ndim):
            some = some.any(other, keepdim=True) if other != axis else some
        product = product & some
        if mask.shape[axis] > 1 and not bool(some.all()):
            picks[axis] = some.flatten().nonzero().flatten()
    if not torch.equal(product.expand_as(mask), mask):
        raise NoProductError
    return picks


def narrowed(atoms: Tensor, kept: Tensor) -> Tensor:
    """The kept part of a tensor of atoms.

    Raises:
        NoProductError: It is no product of what is kept along each axis.
    """
    for axis, pick in kept_along_axes(atoms, kept).items():
        atoms = atoms.index_select(axis, pick)
    return atoms


def _split(node: fx.Node, args: Any, kwargs: Any, full: Any, kept: Tensor) -> Patch | None:
    """`chunk` and `split` by the sizes of what is kept."""
    axis = kwargs.get("dim", args[2] if len(args) > 2 else 0)
    sizes = [narrowed(part, kept).shape[axis] for part in full]
    if 0 in sizes or sum(sizes) != args[0].shape[axis]:
        return None
    return Patch(torch.split, (node.args[0], sizes, axis))


def _slices(node: fx.Node, args: Any, source: Tensor, kept: Tensor) -> Patch | None:
    """`x[:, a:b]` and `x[:, a]` by the numbers of what is kept in front of a and b."""
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if Ellipsis in index:
        return None
    picks, new = kept_along_axes(source, kept), list[Any]()

    def follow(axis: int, part: Any) -> Any:
        if axis in picks and isinstance(part, int):
            return int((picks[axis] < part % source.shape[axis]).sum())
        if axis not in picks or not isinstance(part, slice) or part.step not in (None, 1):
            return part
        start, stop, _ = part.indices(source.shape[axis])
        return slice(*(int((picks[axis] < end).sum()) for end in (start, stop)))

    for part in index:
        new.append(follow(sum(given is not None for given in new), part))
    return Patch(node.target, (node.args[0], tuple(new)))


def _sizes(node: fx.Node, full: Tensor, kept: Tensor) -> Patch | None:
    """`x.view(n, 4, 16, h, w)` by the sizes of what is kept."""
    wanted = narrowed(full, kept).shape
    nested = len(node.args) == 2 and isinstance(node.args[1], list | tuple)
    sizes: Any = node.args[1] if nested else node.args[1:]
    if node.kwargs or len(sizes) != len(wanted):
        return None
    new = [size if size == -1 or full.shape[i] == wanted[i] else wanted[i] for i, size in enumerate(sizes)]
    return Patch(node.target, (node.args[0], tuple(new)) if nested else (node.args[0], *new))
