"""family + device -> how the images it is trained on lie in memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.tracer import PREFIX

logger = logging.getLogger("detachnet")
_CONV2D = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_FEW_CHANNELS = range(2, 8)
"""Input channels for which oneDNN's backward pass of a strided 1×1 convolution writes past its memory."""


def image_layout(net: DetachableNet, device: torch.device) -> torch.memory_format:
    """Channels-last, in which convolutions are faster; channels-first where a CPU cannot train the family so.

    On a CPU the backward pass of a strided, not grouped 1×1 convolution of 2 to 7 input channels, fed
    channels-last images, corrupts the heap (oneDNN, seen with torch 2.11 to 2.14). Other strides, kernels, numbers
    of channels and groups are right, and so is every forward pass.

    Source: ours, by trying kernels, strides, channels, groups and sizes in processes of their own.
    """
    if device.type != "cpu":
        return torch.channels_last
    thin = next(_thin_convolutions(net), None)
    if thin is None:
        return torch.channels_last
    logger.warning(
        "images are trained on channels-first: %s is a strided 1×1 convolution of under 8 channels, "
        "which torch cannot train channels-last on a CPU",
        thin,
    )
    return torch.contiguous_format


def _thin_convolutions(net: DetachableNet) -> Iterator[str]:
    """The names of the layers and traced functions that such a backward pass breaks."""
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and _is_thin(module.weight.shape, module.stride, module.groups):
            yield repr(name.removeprefix(PREFIX))
    for traced in net.all_traced(training=True):
        for node in traced.live:
            if node.op == "call_function" and node.target is F.conv2d:
                given: dict[str, Any] = dict(zip(_CONV2D, node.args, strict=False)) | node.kwargs
                stride = given.get("stride", 1)
                steps = stride if isinstance(stride, tuple | list) else (stride,)
                if _is_thin(traced.values[given["weight"]].shape, steps, given.get("groups", 1)):
                    yield traced.describe(node)
    for traced in net.all_traced(training=True)[1:]:
        for name, module in traced.root.named_modules():
            if isinstance(module, nn.Conv2d) and _is_thin(module.weight.shape, module.stride, module.groups):
                yield f"{name.removeprefix(PREFIX)!r} of a narrower sub-model"


def _is_thin(weight: Sequence[int], stride: Sequence[Any], groups: Any) -> bool:
    """Whether a convolution of weights `(out, in, h, w)` is one of those."""
    _, in_chs, *kernel = weight
    return kernel == [1, 1] and in_chs in _FEW_CHANNELS and groups == 1 and any(step != 1 for step in stride)
