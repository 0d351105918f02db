"""Batch norms of several models on one stacked batch, each on its own model's part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def norm_parts(x: Tensor, norms: Sequence[Any]) -> Tensor:
    """Split a batch `(len(norms) * B, C, ...)`, run each part through its own layer, stack the results.

    Compiled, the layers of a training are one computation: torch.compile would make kernels for the mean, the
    output and the gradients of each.
    """
    several_values = x.numel() > len(norms) * x.shape[1]  # a batch norm refuses one
    if torch.compiler.is_compiling() and several_values and _alike(norms):
        return _normalized(x, norms)
    return torch.cat([norm(part) for norm, part in zip(norms, x.chunk(len(norms)), strict=True)])


def _alike(norms: Sequence[Any]) -> bool:
    """Whether all are plain batch norms in training that differ in nothing but their tensors."""
    first = norms[0]
    return all(
        type(norm) in _PLAIN
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and (norm.eps, norm.momentum) == (first.eps, first.momentum)
        and not (norm._forward_hooks or norm._forward_pre_hooks)
        for norm in norms
    )


def _normalized(x: Tensor, norms: Sequence[Any]) -> Tensor:
    """What layers that are `_alike` make, in their precision; their running statistics follow."""
    parts = x.view(len(norms), -1, *x.shape[1:]).to(torch.promote_types(x.dtype, norms[0].weight.dtype))
    axes = [1, *range(3, parts.ndim)]
    variance, mean = torch.var_mean(parts, axes, correction=0, keepdim=True)
    weight = torch.stack([norm.weight for norm in norms]).view_as(mean)
    bias = torch.stack([norm.bias for norm in norms]).view_as(mean)
    out: Tensor = (parts - mean) * (torch.rsqrt(variance + norms[0].eps) * weight) + bias
    count = x.numel() // mean.numel()
    _follow(norms, mean.detach().flatten(1), variance.detach().flatten(1) * (count / (count - 1)))
    return out.to(x.dtype).flatten(0, 1)


def _follow(norms: Sequence[Any], means: Tensor, variances: Tensor) -> None:
    """Move running statistics towards those of each part, `(len(norms), C)`; all at once where they differ."""
    at_once = len(norms) if len({id(norm) for norm in norms}) == len(norms) else 1
    for first in range(0, len(norms), at_once):
        some = norms[first : first + at_once]
        running = [norm.running_mean for norm in some] + [norm.running_var for norm in some]
        seen = [*means[first : first + at_once], *variances[first : first + at_once]]
        torch._foreach_mul_(running, 1 - some[0].momentum)
        torch._foreach_add_(running, seen, alpha=some[0].momentum)
        torch._foreach_add_([norm.num_batches_tracked for norm in some], 1)
