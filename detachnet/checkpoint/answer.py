"""model -> what it answers to one image: two models may have the same layers and weights and compute otherwise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.generators import generators_kept, generators_of
from detachnet.surgery.modules import copy_model, random_states_kept, silence_hooks, weight_of
from detachnet.surgery.outside import Outside
from detachnet.surgery.plan import BASE
from detachnet.surgery.tracer import Spec, leaves_of

Answer = tuple[float, float]
"""The mean size of what a model answers, and a mean that tells most answers of that size from each other."""
TOLERANCE = 1e-3
"""Relative to the mean size: what other devices, or another order of additions, may make of an answer."""
MOST_MACS, MOST_VALUES = 20e9, 1 << 24
"""Multiply-accumulates, and values of one feature, of the largest model that is asked: a second of one core."""


def is_asked(net: DetachableNet) -> bool:
    """Whether the base-model of a family is small enough; a stranger's file may describe a larger one."""
    traced = net.traced(training=False)
    sizes = [
        math.prod(leaf.shape[1:])
        for v in traced.values.values()
        for leaf in leaves_of(v)
        if isinstance(leaf, Spec)
    ]
    return net.plan[BASE].macs <= MOST_MACS and max(sizes) <= MOST_VALUES


def answer(model: nn.Module, input_size: tuple[int, ...]) -> Answer | None:
    """What a model answers to one image, always the same one, in evaluation mode.

    Args:
        model: It is copied and left as it is; hooks are not called.
        input_size: The image's shape, `(C, H, W)`.

    Returns:
        None where that says nothing: without weights or in half precision, of a model that fails, draws random
        numbers or takes no such image.
    """
    like = weight_of(model)
    if like.is_meta or like.dtype not in (torch.float32, torch.float64):
        return None
    numbers = torch.arange(math.prod(input_size), dtype=torch.float64)
    image = torch.sin(numbers * 0.7).view(1, *input_size).to(like)
    try:
        asked = silence_hooks(copy_model(model))
        asked.eval()
        with _left_as_found(asked, like.device), torch.no_grad():
            first, second = (_summary(asked(image.clone())) for _ in range(2))
    except Exception:  # whatever the forward pass of a user's model raises: it is asked, not used
        return None
    return first if first == second else None


def is_alike(one: Answer | None, two: Answer | None) -> bool:
    """Whether two answers are equal but for rounding; those that say nothing are."""
    if one is None or two is None:
        return True
    return all(abs(a - b) <= TOLERANCE * max(one[0], two[0]) for a, b in zip(one, two, strict=True))


@contextmanager
def _left_as_found(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Random states, and what the model's code writes elsewhere, as found afterwards."""
    exact = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
    kept = random_states_kept(device), generators_kept(generators_of(model)), Outside(model).kept()
    with kept[0], kept[1], kept[2], exact, torch.autocast(device.type, enabled=False):
        yield


def _summary(output: object) -> Answer | None:
    """Of the first tensor of numbers in an output."""
    for leaf in leaves_of(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
            values = leaf.double().cpu().flatten()
            weighed = values * torch.linspace(1, 2, len(values), dtype=torch.double)
            found = _rounded(values.abs().mean()), _rounded(weighed.mean())
            return found if all(map(math.isfinite, found)) else None
    return None


def _rounded(value: Tensor) -> float:
    """To six digits: equal families are equal files, whatever order their sums were added in."""
    return float(f"{float(value):.6g}")
