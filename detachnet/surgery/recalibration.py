"""family with shared batch norms -> the same with statistics of each model's own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from detachnet.errors import DataError
from detachnet.surgery.detachable import DetachableNet


def recalibrate(net: DetachableNet, batches: Iterable[Tensor]) -> DetachableNet:
    """Measure the batch norms' statistics anew, for each model alone.

    Shared batch norms (the paper's) keep one mean and variance for models whose features differ, and fit none of
    them. The copy this returns has private norms: the same weights, and statistics averaged over `batches`. Norms
    that are frozen (in evaluation mode while the family trains) are measured like all others.

    Args:
        net: A family; it is not changed.
        batches: Training images `(B, C, H, W)`, normalized, on the family's device; a few thousand are enough.
            They are gone through once.

    Returns:
        A family with private norms, in evaluation mode; its accuracy is not known.

    Raises:
        DataError: There are no batches.

    Source: precise batch norm, arXiv 2105.07576, section 3; for sub-networks arXiv 1903.05134, section 3.
    """
    fresh = net.with_private_norms().eval()
    parts = {name: fresh.detach(name, share=True) for name in fresh.names}
    norms = {m for part in parts.values() for m in part.modules() if isinstance(m, _BatchNorm)}
    measured = [norm for norm in norms if norm.track_running_stats]
    momenta = {norm: norm.momentum for norm in measured}
    for norm in measured:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over all batches
        norm.train()
    num_batches = 0
    with torch.no_grad():
        for images in batches:
            num_batches += 1
            for part in parts.values():
                part(images)
    if not num_batches:
        raise DataError("there are no images to measure statistics on")
    for norm, momentum in momenta.items():
        norm.momentum = momentum
    fresh.facts = fresh.facts.updated(accuracy={})
    return fresh.eval()
