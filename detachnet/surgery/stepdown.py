"""(image shape, feature shape) -> StepDown: the layer through which a sub-model takes in the image.

Sizing is a pure function of integers; the module is built from its result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from detachnet.errors import StepDownError
from detachnet.fields import Fields
from detachnet.surgery.modules import evaluating
from detachnet.text import Shape, by

StepDownBuilder = Callable[[Shape, Shape], nn.Module]
"""A user's own step-down: `(image shape, feature shape) -> module`, both without the batch."""
Layout = Literal["channels_first", "channels_last", "tokens", "tokens_last"]
MAX_PREFIX = 8
"""The most tokens besides a grid (class, distillation, registers) that are looked for."""


class Stem(Fields):
    """A deeper entry than one convolution: stages of 3×3 convolutions with batch norm and ReLU, halving the size.

    Attributes:
        depth: Convolutions per stage; the first of them has stride 2.
        width: Channels of all stages but the last, as a multiple of those that double up to the feature's.
    """

    refused_as = {"": StepDownError}

    depth: Annotated[int, Field(gt=0, le=100)] = 1
    width: Annotated[float, Field(gt=0, le=64)] = 1.0


class Convolution(Fields):
    """One convolution of a stem; kernel, stride and padding per spatial axis, in pixels."""

    num_chs: int
    size: Shape
    kernel: Shape
    stride: Shape
    padding: Shape


class StepDown(Fields):
    """What a step-down will be, before it is built.

    Attributes:
        kind: `conv` (a convolution), `stem` (several), `linear` (a fully connected layer on the flattened image),
            `identity` (the flattened image itself) or `custom`.
        image: Shape of the image, `(C, H, W)`.
        feature: Shape of the feature map at the cut.
        kernel: Kernel size per spatial axis, in pixels; empty unless `kind` is `conv`.
        stride: Stride per spatial axis, in pixels.
        padding: Zero padding on both sides per spatial axis, in pixels.
        layout: Where the convolution's channels go: `(C, h, w)`, `(h, w, C)`, `(N, C)` or `(C, N)` with N = h·w.
        source: Where the channels of what it reads are; those of an image come first.
        prefix: Learned tokens in front of those made from the image, such as a class token.
        stem: How the stem was asked for; None unless `kind` is `stem`.
        stages: The stem's convolutions.
        macs: Multiply-accumulates for one image.
        num_params: Number of parameters.
    """

    kind: Literal["conv", "stem", "linear", "identity", "custom"]
    image: Shape
    feature: Shape
    kernel: Shape = ()
    stride: Shape = ()
    padding: Shape = ()
    layout: Layout = "channels_first"
    source: Literal["channels_first", "channels_last"] = "channels_first"
    prefix: int = 0
    stem: Stem | None = None
    stages: tuple[Convolution, ...] = ()
    macs: int = 0
    num_params: int = 0

    @property
    def reduction(self) -> float | None:
        """Pixels of the image per position of the feature map, along its first axis; None where it has no axes."""
        if self.stages:
            return math.prod(stage.stride[0] for stage in self.stages)
        return self.stride[0] if self.stride else None

    def __str__(self) -> str:
        if self.kind not in ("conv", "stem"):
            return self.kind
        if self.stages:
            text = "stem " + "→".join(str(stage.num_chs) for stage in self.stages)
        else:
            text = f"{by(self.kernel)} stride {by(self.stride)}"
            text += f" pad {by(self.padding)}" if any(self.padding) else ""
        return text + (f" + {self.prefix} tokens" if self.prefix else "")


@lru_cache(maxsize=4096)
def plan_stepdown(image: Shape, feature: Shape, kind: str | Stem = "conv") -> StepDown:
    """Size the step-down from an image straight to a feature.

    A feature map with spatial axes, channels first or last, gets one convolution that covers the whole image and
    has exactly the right size; tokens that form a grid get the same with the grid flattened, and learned tokens in
    front if there are more; a flat feature gets a linear layer on the flattened image.

    Args:
        image: `(C, H, W)`, or `(C, T, H, W)` for video.
        feature: `(C, h, w)`, `(h, w, C)`, `(N, C)`, `(C, N)` or `(F,)`.
        kind: `conv`; `stem` or a `Stem` for several convolutions; `identity` for nothing but flattening.

    Raises:
        StepDownError: The feature map is larger than the image, or of a shape no step-down is known for.

    Source: the paper, section 2.2 (kernel = stride = H/h), and arXiv 1908.00763 (`identity`); the rest is ours.
    """
    if kind == "identity":
        return _identity(image, feature)
    if len(feature) == 1:
        macs = math.prod(image) * feature[0]
        return StepDown(kind="linear", image=image, feature=feature, macs=macs, num_params=macs + feature[0])
    if len(feature) == len(image):
        layout, grid, num_chs, prefix = _map_layout(image, feature)
    elif len(feature) == 2:
        layout, grid, num_chs, prefix = _token_layout(image, feature)
    else:
        raise StepDownError(
            f"no step-down is known from an image {by(image)} to a feature of shape {by(feature)}",
            hint="pass stepdown=a function (image shape, feature shape) -> module",
        )
    if kind != "conv":
        stem = kind if isinstance(kind, Stem) else Stem()
        return _plan_stem(stem, image, feature, layout, grid, num_chs, prefix)
    kernel, stride, padding = _solve_axes(image[1:], grid)
    weights = image[0] * num_chs * math.prod(kernel)
    return StepDown(
        kind="conv",
        image=image,
        feature=feature,
        kernel=kernel,
        stride=stride,
        padding=padding,
        layout=layout,
        prefix=prefix,
        macs=weights * math.prod(grid),
        num_params=weights + num_chs + prefix * num_chs,
    )


def plan_bridge(image: Shape, start: Shape, end: Shape) -> StepDown | None:
    """Size what stands for a span inside a network, from the feature in front of it to the one behind it.

    Args:
        image: `(C, H, W)`, whose proportions tell whether channels come first or last.
        start: Shape of the feature that the span begins behind.
        end: Shape of the feature that it ends with.

    Returns:
        One convolution, or a linear layer to a flat feature; None where both shapes are the same.

    Raises:
        StepDownError: The feature behind is larger, or of a shape no step-down is known for.
    """
    if start == end:
        return None
    source: Literal["channels_first", "channels_last"] = "channels_first"
    if len(start) == len(image) and _map_layout(image, start)[0] == "channels_last":
        source, start = "channels_last", (start[-1], *start[:-1])
    try:
        if len(start) == 2 and len(end) > 1:
            raise StepDownError("from tokens only features of the same shape are known")
        return plan_stepdown(start, end).model_copy(update={"source": source})
    except StepDownError as error:
        raise StepDownError(
            f"no bridge is known from a feature {by(start)} to one of shape {by(end)}",
            what=error.summary,
            hint="end the span where the shape is the same, or pass stepdown=a function (shape, shape) -> module",
        ) from error


def _plan_stem(
    stem: Stem, image: Shape, feature: Shape, layout: Layout, grid: Shape, num_chs: int, prefix: int
) -> StepDown:
    """Stages that each halve the size, the last of which has exactly the feature's; channels double up to its."""
    size, before = image[1:], image[0]
    count = max(1, round(math.log2(max(n / h for n, h in zip(size, grid, strict=True)))))
    stages: list[Convolution] = []
    macs = num_params = 0
    for i in range(count):
        left = count - 1 - i
        chs = max(1, round(num_chs * stem.width / 2**left)) if left else num_chs
        for _ in range(stem.depth):
            first = len(stages) == i * stem.depth
            halved = tuple(max(h, -(-n // 2)) for n, h in zip(size, grid, strict=True))
            after = size if not first else halved if left else grid
            kernel, stride, padding = _solve_axes(size, after, smallest=3)
            stages.append(Convolution(num_chs=chs, size=after, kernel=kernel, stride=stride, padding=padding))
            weights = before * chs * math.prod(kernel)
            macs += weights * math.prod(after)
            num_params += weights + 2 * chs
            size, before = after, chs
    if layout != "channels_first":
        num_params -= num_chs  # the last convolution has a bias where the others have a norm
    return StepDown(
        kind="stem",
        image=image,
        feature=feature,
        layout=layout,
        prefix=prefix,
        stem=stem,
        stages=tuple(stages),
        macs=macs,
        num_params=num_params + prefix * num_chs,
    )


def _solve_axes(size: Shape, out: Shape, smallest: int = 1) -> tuple[Shape, Shape, Shape]:
    """`solve` for each axis: kernels, strides, paddings."""
    axes = [solve(n, h, smallest) for n, h in zip(size, out, strict=True)]
    kernel, stride, padding = zip(*axes, strict=True)
    return kernel, stride, padding


def _identity(image: Shape, feature: Shape) -> StepDown:
    """The flattened image itself, where it has the feature's size."""
    if len(feature) != 1 or math.prod(image) != feature[0]:
        raise StepDownError(
            f"the flattened image {by(image)} has {math.prod(image)} values, the feature has shape {by(feature)}",
            hint="stepdown='identity' needs them equal; use stepdown='conv'",
        )
    return StepDown(kind="identity", image=image, feature=feature)


def _map_layout(image: Shape, feature: Shape) -> tuple[Layout, Shape, int, int]:
    """Whether the channels of a feature map come first or last: where the rest has the image's proportions."""
    size = image[1:]
    first, last = feature[1:], feature[:-1]
    fits = [grid for grid in (first, last) if all(h <= n for h, n in zip(grid, size, strict=True))]
    if not fits:
        raise StepDownError(
            f"the feature map {by(feature)} is larger than the image {by(image)}",
            hint="use a larger input_size or a later cut",
        )
    if last in fits and (first not in fits or _distortion(size, last) < _distortion(size, first)):
        return "channels_last", last, feature[-1], 0
    return "channels_first", first, feature[0], 0


def _distortion(size: Shape, grid: Shape) -> float:
    """How much more height or width is reduced than the other; 0 where both are reduced alike."""
    factors = [n / h for n, h in zip(size[-2:], grid[-2:], strict=True)]
    return max(factors) / min(factors) - 1


def _token_layout(image: Shape, feature: Shape) -> tuple[Layout, Shape, int, int]:
    """Which axis is a grid of tokens, the grid, and how many tokens stand in front of it."""
    choices = []
    for axis, layout in ((0, "tokens"), (1, "tokens_last")):
        for prefix in range(MAX_PREFIX + 1 if axis == 0 else 1):
            grid = _grid(image[1:], feature[axis] - prefix)
            if grid is not None:
                choices.append((_distortion(image[1:], grid), axis, prefix, layout, grid))
    if not choices:
        raise StepDownError(
            f"neither axis of the feature {by(feature)} is a grid of tokens of an image {by(image)}",
            hint="pass stepdown=a function (image shape, feature shape) -> module",
        )
    # A class token in front of (N, C) is more usual than (C, N) with a square number of channels.
    _, axis, prefix, layout, grid = min(choices)
    return ("tokens" if layout == "tokens" else "tokens_last"), grid, feature[1 - axis], prefix


def _grid(size: Shape, count: int) -> Shape | None:
    """The grid of `count` positions with the proportions of an image, at most a third off, if there is one."""
    fits = [
        (*([1] * (len(size) - 2)), h, count // h)
        for h in range(1, count + 1)
        if count % h == 0 and h <= size[-2] and count // h <= size[-1]
    ]
    best = min(fits, key=lambda grid: _distortion(size, grid), default=None)
    return best if best is not None and _distortion(size, best) <= 1 / 3 else None


def solve(size: int, out: int, smallest: int = 1) -> tuple[int, int, int]:
    """Kernel, stride and padding of a convolution from `size` pixels to exactly `out`, along one axis.

    `floor((size + 2·padding - kernel) / stride) + 1 == out`, no pixel unread, every window on at least one
    pixel; of all such the smallest kernel (not under `smallest`), then the smallest padding. Where `out` divides
    `size` that is kernel = stride = size / out without padding, the paper's step-down.

    Examples:
        >>> solve(32, 4), solve(299, 35)
        ((8, 8, 0), (9, 9, 8))
    """
    if out == 1:
        return size, size, 0
    steps = out - 1

    def least(stride: int) -> int:
        """The smallest kernel that reads all with this stride, and pads by less than itself."""
        return max(stride, size - steps * stride, steps * stride - size + 2)

    def padding(stride: int) -> int:
        return -(-(steps * stride + kernel - size) // 2)

    cross = max(1, min(-(-size // out), -(-(size - 1) // steps)))  # where the least kernel stops falling
    first = max(min(smallest, size), min(least(stride) for stride in (max(1, cross - 1), cross)))
    for kernel in range(first, min(first + 1, size) + 1):
        lowest = max(1, -(-(size - kernel) // steps))
        fits = [
            s for s in (lowest, lowest + 1) if least(s) <= kernel and (s > 1 or (steps + kernel - size) % 2 == 0)
        ]
        if fits:
            stride = min(fits, key=lambda stride: (padding(stride), -stride))
            return kernel, stride, padding(stride)
    raise StepDownError(f"{out} positions cannot be made from {size} pixels")


class ConvStepDown(nn.Module):
    """A convolution whose output is laid out as the feature at the cut is; `(B, *image)` to `(B, *feature)`."""

    def __init__(self, plan: StepDown) -> None:
        super().__init__()
        num_chs = plan.feature[0] if plan.layout in ("channels_first", "tokens_last") else plan.feature[-1]
        self.conv = _stem(plan) if plan.stages else _convolution(plan, num_chs)
        self.layout = plan.layout
        self.prefix = nn.Parameter(torch.zeros(1, plan.prefix, num_chs)) if plan.prefix else None

    def forward(self, x: Tensor) -> Tensor:
        """The feature, `(B, h, w, C)`, `(B, N, C)` or `(B, C, N)`."""
        x = self.conv(x)
        if self.layout == "channels_last":
            return x.movedim(1, -1)
        x = x.flatten(2)
        if self.layout == "tokens_last":
            return x
        x = x.transpose(1, 2)
        return x if self.prefix is None else torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], 1)


class ChannelsFirst(nn.Module):
    """`(B, h, w, C)` to `(B, C, h, w)`."""

    def forward(self, x: Tensor) -> Tensor:
        """The same values, channels first."""
        return x.movedim(-1, 1)


_CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS: dict[int, Callable[..., nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _convolution(plan: StepDown, num_chs: int) -> nn.Module:
    conv = _CONVOLUTIONS[len(plan.kernel)]
    return conv(plan.image[0], num_chs, plan.kernel, plan.stride, plan.padding)


def _stem(plan: StepDown) -> nn.Module:
    """Convolution, batch norm and ReLU per stage; in front of tokens and channels-last maps the last is linear."""
    layers: list[nn.Module] = []
    before = plan.image[0]
    for i, stage in enumerate(plan.stages, start=1):
        axes = len(stage.kernel)
        linear = i == len(plan.stages) and plan.layout != "channels_first"
        conv = _CONVOLUTIONS[axes]
        layers.append(conv(before, stage.num_chs, stage.kernel, stage.stride, stage.padding, bias=linear))
        layers += [] if linear else [_NORMS[axes](stage.num_chs), nn.ReLU(inplace=True)]
        before = stage.num_chs
    return nn.Sequential(*layers)


def build_stepdown(plan: StepDown) -> nn.Module:
    """The module `plan` describes, with torch's default initialization: `(B, *image)` to `(B, *feature)`."""
    if plan.source == "channels_last":
        inner = build_stepdown(plan.model_copy(update={"source": "channels_first"}))
        return nn.Sequential(ChannelsFirst(), inner)
    if plan.kind == "identity":
        return nn.Flatten()
    if plan.kind == "linear":
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(plan.image), plan.feature[0]))
    if plan.kind in ("conv", "stem"):
        if plan.layout != "channels_first":
            return ConvStepDown(plan)
        return _stem(plan) if plan.stages else _convolution(plan, plan.feature[0])
    raise StepDownError("a custom step-down is built by its own function", hint="pass stepdown=that function")


def build_custom(builder: StepDownBuilder, image: Shape, feature: Shape) -> tuple[StepDown, nn.Module]:
    """Call a user's builder and check what it made.

    Raises:
        StepDownError: Its output has another shape than the feature at the cut.
    """
    module = builder(image, feature)
    with evaluating(module), torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = module(torch.zeros(1, *image))
    if tuple(out.shape[1:]) != feature:
        raise StepDownError(
            f"the step-down made by {getattr(builder, '__name__', builder)!r} gives {by(tuple(out.shape[1:]))}, "
            f"the cut needs {by(feature)}"
        )
    macs, num_params = counter.get_total_flops() // 2, sum(p.numel() for p in module.parameters())
    return StepDown(kind="custom", image=image, feature=feature, macs=macs, num_params=num_params), module
