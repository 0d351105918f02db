"""(image shape, feature shape) -> StepDown: the layer through which a sub-model takes in the image.

Sizing is a pure function of integers; the module is built from its result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from detachnet.errors import StepDownError

Shape = tuple[int, ...]
StepDownBuilder = Callable[[Shape, Shape], nn.Module]
"""A user's own step-down: `(image shape, feature shape) -> module`, both without the batch."""


class StepDown(BaseModel):
    """What a step-down will be, before it is built.

    Attributes:
        kind: `conv` (a convolution), `linear` (a fully connected layer on the flattened image) or `custom`.
        image: Shape of the image, `(C, H, W)`.
        feature: Shape of the feature map at the cut.
        kernel: Kernel size per spatial axis, in pixels; empty unless `kind` is `conv`.
        stride: Stride per spatial axis, in pixels.
        padding: Zero padding on both sides per spatial axis, in pixels.
        macs: Multiply-accumulates for one image.
        num_params: Number of parameters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["conv", "linear", "custom"]
    image: Shape
    feature: Shape
    kernel: Shape = ()
    stride: Shape = ()
    padding: Shape = ()
    macs: int = 0
    num_params: int = 0

    def __str__(self) -> str:
        if self.kind != "conv":
            return self.kind
        text = f"{_by(self.kernel)} stride {_by(self.stride)}"
        return f"{text} pad {_by(self.padding)}" if any(self.padding) else text


def plan_stepdown(image: Shape, feature: Shape) -> StepDown:
    """Size the step-down from an image straight to a feature map.

    A feature map with spatial axes gets one convolution that covers the whole image and has exactly the
    right size; a flat feature gets a linear layer on the flattened image.

    Args:
        image: `(C, H, W)`.
        feature: `(C, h, w)` or `(F,)`.

    Raises:
        StepDownError: The feature map is larger than the image, or of a rank no step-down is known for.

    Source: the paper, section 2.2 (kernel = stride = H/h); the sizes that do not divide are ours.
    """
    if len(feature) == 1:
        macs = math.prod(image) * feature[0]
        return StepDown(kind="linear", image=image, feature=feature, macs=macs, num_params=macs + feature[0])
    if len(feature) != len(image) or len(feature) < 3:
        raise StepDownError(
            f"no step-down is known from an image {_by(image)} to a feature of shape {_by(feature)}",
            hint="pass stepdown=a function (image shape, feature shape) -> module",
        )
    if any(h > size for size, h in zip(image[1:], feature[1:], strict=True)):
        raise StepDownError(
            f"the feature map {_by(feature)} is larger than the image {_by(image)}",
            hint="use a larger input_size or a later cut",
        )
    axes = [solve(size, h) for size, h in zip(image[1:], feature[1:], strict=True)]
    kernel, stride, padding = (tuple(axis[i] for axis in axes) for i in range(3))
    weights = image[0] * feature[0] * math.prod(kernel)
    return StepDown(
        kind="conv",
        image=image,
        feature=feature,
        kernel=kernel,
        stride=stride,
        padding=padding,
        macs=weights * math.prod(feature[1:]),
        num_params=weights + feature[0],
    )


def solve(size: int, out: int) -> tuple[int, int, int]:
    """Kernel, stride and padding of a convolution from `size` pixels to exactly `out`, along one axis.

    `floor((size + 2·padding - kernel) / stride) + 1 == out`, no pixel unread, every window on at least one
    pixel; of all such the smallest kernel, then the smallest padding. Where `out` divides `size` that is
    kernel = stride = size / out without padding, the paper's step-down.

    Examples:
        >>> solve(32, 4), solve(299, 35)
        ((8, 8, 0), (9, 9, 8))
    """
    for kernel in range(1, size + 1):
        best: tuple[int, int, int] | None = None
        for stride in range(kernel, 0, -1):
            span = (out - 1) * stride + kernel
            padding = max(0, -((size - span) // 2))
            exact = (size + 2 * padding - kernel) // stride + 1 == out
            if exact and padding < kernel and span - padding >= size and (best is None or padding < best[2]):
                best = (kernel, stride, padding)
        if best is not None:
            return best
    raise StepDownError(f"{out} positions cannot be made from {size} pixels")


def build_stepdown(plan: StepDown) -> nn.Module:
    """The module `plan` describes, with torch's default initialization: `(B, *image)` to `(B, *feature)`."""
    if plan.kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(plan.image), plan.feature[0]))
    if plan.kind == "conv":
        conv: Callable[..., nn.Module] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(plan.kernel)]
        return conv(plan.image[0], plan.feature[0], plan.kernel, plan.stride, plan.padding)
    raise StepDownError("a custom step-down is built by its own function", hint="pass stepdown=that function")


def build_custom(builder: StepDownBuilder, image: Shape, feature: Shape) -> tuple[StepDown, nn.Module]:
    """Call a user's builder and check what it made.

    Raises:
        StepDownError: Its output has another shape than the feature at the cut.
    """
    module = builder(image, feature)
    with torch.no_grad():
        was = module.training
        out = module.eval()(torch.zeros(1, *image))
        module.train(was)
    if tuple(out.shape[1:]) != feature:
        raise StepDownError(
            f"the step-down made by {getattr(builder, '__name__', builder)!r} gives {_by(tuple(out.shape[1:]))}, "
            f"the cut needs {_by(feature)}"
        )
    num_params = sum(p.numel() for p in module.parameters())
    return StepDown(kind="custom", image=image, feature=feature, num_params=num_params), module


def _by(shape: Shape) -> str:
    """`2×2` for (2, 2)."""
    return "×".join(map(str, shape))
