"""family -> the same family, whose batch norms take their statistics over all processes of a training."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

if TYPE_CHECKING:
    from detachnet.surgery.detachable import DetachableNet

logger = logging.getLogger("detachnet")


_KINDS: tuple[tuple[Any, type[nn.SyncBatchNorm]], ...] = (
    (_BatchNorm, nn.SyncBatchNorm),
    (BatchNormAct2d, SyncBatchNormAct),
)
"""Whose forward pass is that of which, over all processes."""


def synchronize_norms(net: DetachableNet) -> None:
    """Have batch norms of a family, in place, take statistics of all processes' images on CUDA.

    They stay layers of the names, and with the attributes, that they have, so that it is the same network that is
    traced and written; torch's conversion and timm's put other layers in their places. Norms with a forward pass
    of their own are left, and named in a warning.
    """
    left = []
    for path, norm in net.named_modules():
        if found := [over_all for kind, over_all in _KINDS if type(norm).forward is kind.forward]:
            norm.__class__ = _over_all(type(norm), found[0])  # type: ignore[arg-type]  # classes have a hash
        elif isinstance(norm, _BatchNorm) and not isinstance(norm, nn.SyncBatchNorm):
            left.append(path)
    if left:
        logger.warning(
            "each process has statistics of its own images in %s: its forward pass is its own", ", ".join(left)
        )


@cache
def _over_all(kind: type[_BatchNorm], synchronized: type[nn.SyncBatchNorm]) -> type[nn.SyncBatchNorm]:
    """A kind of norms that is synchronized on CUDA, where torch can, and is what it was elsewhere."""

    def forward(norm: nn.SyncBatchNorm, x: Tensor) -> Tensor:
        out: Tensor = synchronized.forward(norm, x) if x.is_cuda else kind.forward(norm, x)
        return out

    said = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (synchronized, kind), {**said, "forward": forward, "process_group": None})
