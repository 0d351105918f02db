"""Two models' images in one batch: where they are in a value, and what each model's half of it is."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from detachnet.surgery.tracer import PROBE_BATCH, Spec, leaves_of

HALF = 2
"""Images of each of the two models."""
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4}
"""Difference relative to the largest value that rounding explains; `_COARSE` for other dtypes."""
_COARSE = 3e-2


def whole_numbers(node: fx.Node) -> list[int]:
    """The whole numbers among a node's arguments."""
    found: list[int] = []

    def note(value: Any) -> Any:
        if isinstance(value, slice):
            for part in (value.start, value.stop, value.step):
                note(part)
        elif type(value) is int:
            found.append(value)
        return value

    map_aggregate((node.args, node.kwargs), note)
    return found


def counts_images(node: fx.Node) -> bool:
    """Whether a node takes images by numbers that so few as are tried here do not reach, or moves them round."""
    if node.target in (operator.getitem, operator.setitem):
        index = node.args[1] if not isinstance(node.args[1], tuple) else next(iter(node.args[1]), None)
        parts = (index.start, index.stop) if isinstance(index, slice) else (index,)
        return any(type(part) is int and abs(part) >= 2 * HALF for part in parts)
    return node.target in ("roll", torch.roll) and _rolls_images(*node.args[1:], **node.kwargs)


def _rolls_images(_: Any = None, dims: Any = None, **__: Any) -> bool:
    of = dims if isinstance(dims, tuple | list) else (dims,)
    return dims is None or len(of) == 0 or 0 in of


class MeetError(Exception):
    """Images meet in a value in a way that no joint pass can express."""


@dataclass(frozen=True)
class Layout:
    """Where the images are in a tensor: an axis of size `outer * B * inner`."""

    axis: int
    outer: int
    inner: int

    def half(self, value: Tensor, which: int) -> Tensor:
        """One model's images."""
        return self.models(value)[which].flatten(self.axis, self.axis + 2)

    def models(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the two models' images, with the axis as three: outer, images, inner."""
        before, after = value.shape[: self.axis], value.shape[self.axis + 1 :]
        images = value.shape[self.axis] // (self.outer * self.inner)
        split = value.reshape(*before, self.outer, images, self.inner, *after)
        one, two = (split.narrow(self.axis + 1, i * HALF, HALF) for i in (0, 1))
        return one, two

    @property
    def is_first(self) -> bool:
        """Whether models are stacked one behind the other along the first axis."""
        return self.axis == 0 and self.outer == 1


def batch_axis(one: Spec, two: Spec) -> tuple[int, int] | None:
    """The axis that follows the batch and its size for one image, known at two batch sizes."""
    differing = [i for i, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
    if not differing:
        return None
    axis = differing[0]
    size = one.shape[axis] // PROBE_BATCH
    if len(differing) > 1 or (one.shape[axis], two.shape[axis]) != (size * PROBE_BATCH, size * (PROBE_BATCH + 1)):
        raise MeetError("gives a value with more than one axis that follows the batch, or one that does so oddly")
    return axis, size


def shape_for(one: Spec, two: Spec, batch: int) -> list[int]:
    """A tensor's shape for so many images."""
    return [a + (b - a) * (batch - PROBE_BATCH) for a, b in zip(one.shape, two.shape, strict=True)]


def factors(size: int) -> list[tuple[int, int]]:
    """Ways to write a size as outer times inner."""
    return [(1, size), (size, 1), *((n, size // n) for n in range(2, size) if size % n == 0)]


def mapped(value: Any, change: Callable[[Any], Any], tensors: bool = False) -> Any:
    """Nested tuples, lists, dicts and slices with their nodes (or tensors) changed."""
    if isinstance(value, fx.Node) or (tensors and isinstance(value, Tensor)):
        return change(value)
    if isinstance(value, slice):
        return slice(*(mapped(part, change, tensors) for part in (value.start, value.stop, value.step)))
    if isinstance(value, dict):
        return {key: mapped(item, change, tensors) for key, item in value.items()}
    if not isinstance(value, tuple | list) or isinstance(value, torch.Size):
        return value
    items = [mapped(item, change, tensors) for item in value]
    return type(value)(*items) if hasattr(value, "_make") else type(value)(items)


def mapped_pair(one: Any, two: Any, change: Callable[[Spec, Spec], Any]) -> Any:
    """What a propagated value is with its tensors' shapes at two batch sizes replaced."""
    if isinstance(one, Spec):
        return change(one, two)
    if isinstance(one, tuple | list):
        return type(one)(mapped_pair(a, b, change) for a, b in zip(one, two, strict=True))
    if isinstance(one, dict):
        return {key: mapped_pair(item, two[key], change) for key, item in one.items()}
    return one


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a value, in order."""
    return [leaf for leaf in leaves_of(value) if isinstance(leaf, Tensor)]


def cloned(value: Any) -> Any:
    """A value with copies of its tensors."""
    return mapped(value, torch.clone, tensors=True)


def halved(value: Any, layouts: list[Layout | None], which: int) -> Any:
    """One model's half of each tensor that has images."""
    rest = iter(layouts)

    def half(leaf: Tensor) -> Tensor:
        layout = next(rest)
        return leaf if layout is None else layout.half(leaf, which)

    return mapped(value, half, tensors=True)


def equal(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are equal but for rounding."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, two)
    finite = two[two.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    bound = _TOLERANCE.get(one.dtype, _COARSE)
    return torch.allclose(one, two, rtol=bound, atol=bound * scale, equal_nan=True)
