"""family -> the same with weights that float16 has, too; float32 numbers -> float16, where that changes none."""

from __future__ import annotations

import numpy as np
import torch

from detachnet.errors import ExportError
from detachnet.surgery.detachable import DetachableNet


def rounded(net: DetachableNet) -> DetachableNet:
    """A copy of a family whose weights are rounded to float16, in float32.

    Weights of convolutions and linear layers, and whatever else has two dimensions or more. Biases and norms
    stay as they are: they are small, and running variances reach further.

    Raises:
        ExportError: A weight is beyond what float16 has.
    """
    net = net.copied()
    for name, weight in net.named_parameters():
        if weight.ndim < 2:
            continue
        near = weight.data.half()
        if not torch.equal(near.isfinite(), weight.data.isfinite()):
            raise ExportError(
                f"{name} has weights above {torch.finfo(torch.float16).max:.0f}, which float16 does not have",
                hint="export in float32",
            )
        weight.data.copy_(near)
    return net


def halved(content: bytes) -> bytes | None:
    """Float32 numbers in float16; None where that would change one."""
    numbers = np.frombuffer(content, np.float32)
    with np.errstate(over="ignore"):
        near = numbers.astype(np.float16)
    return near.tobytes() if np.array_equal(near.astype(np.float32), numbers) else None
