"""family with shared batch norms -> the same with statistics of each model's own."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detachnet.errors import DataError
from detachnet.surgery.detachable import DetachableNet, family_in
from detachnet.surgery.modules import copy_for, weight_of
from detachnet.surgery.routes import folder
from detachnet.text import by

logger = logging.getLogger("detachnet")


def recalibrate(net: DetachableNet, batches: Iterable[Tensor | Sequence[Tensor]]) -> DetachableNet:
    """Measure the batch norms' statistics anew, for each model alone.

    Shared batch norms (the paper's) keep one mean and variance for models whose features differ, and fit none of
    them. The copy this returns has private norms: the same weights, and statistics averaged over all images. Norms
    that are frozen (in evaluation mode while the family trains) are measured like all others; statistics that
    layers of other classes keep are not, which is logged.

    Args:
        net: A family; it is not changed.
        batches: Training images `(B, C, H, W)`, normalized, on the family's device; a few thousand are enough.
            They are gone through once. Of pairs of images and labels, as a `DataLoader` gives them, the images.

    Returns:
        A family with private norms, in evaluation mode; its accuracy is not known.

    Raises:
        DataError: There are no batches or no images in them, or one image alone has no variance.
        TraceError: This is no family.

    Source: precise batch norm, arXiv 2105.07576, section 3; for sub-networks arXiv 1903.05134, section 3.
    """
    fresh = family_in(net).with_private_norms().eval()
    if others := [path for path, parts in fresh._statistics.items() if parts]:
        named = ", ".join(map(repr, others[:4])) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        logger.warning("the statistics of %s stay as they are: only batch norms are measured", named)
    measure_statistics(fresh, batches, fresh.names, own=False)
    fresh.facts = fresh.facts.updated(accuracy={})
    return fresh


def measure_statistics(
    net: DetachableNet, batches: Iterable[Tensor | Sequence[Tensor]], models: Sequence[str], own: bool = True
) -> None:
    """Measure the statistics of some models' batch norms anew, in place.

    Args:
        net: A family with private norms, in evaluation mode; it stays in it.
        batches: As `recalibrate` takes them.
        models: Which models.
        own: Only norms that no other model has: those that are shared with the base-model or an earlier
            sub-model stay as they are.

    Raises:
        DataError: As `recalibrate`.
    """
    parts = [net.detach(name, share=True) for name in models]
    norms = {m for part in parts for m in part.modules() if isinstance(m, _BatchNorm)}
    if own:
        norms &= {m for name in models if hasattr(net.norms, folder(name)) for m in _own_norms(net, name)}
    measured = [norm for norm in norms if norm.track_running_stats]
    weight, num_batches = weight_of(net), 0
    with _averaging(measured), torch.no_grad():
        for images in _images_of(batches, net.plan.input_size):
            num_batches += 1
            for part in parts:
                part(copy_for(weight, images))
    if not num_batches:
        raise DataError("there are no images to measure statistics on")


@contextmanager
def _averaging(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Let norms average their statistics over all images that they see, whatever the size of a batch."""
    seen = dict.fromkeys(norms, 0)

    def weigh(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, _BatchNorm)
        if (count := inputs[0].numel() // inputs[0].shape[1]) < 2:
            raise DataError(
                f"a batch of one image has no variance of features {by(inputs[0].shape[1:])}",
                hint="larger batches; of all images none may be left over alone",
            )
        seen[norm] += count
        norm.momentum = count / seen[norm]

    momenta = [norm.momentum for norm in norms]
    hooks = [norm.register_forward_pre_hook(weigh) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # where nothing calls hooks, an average over batches
        norm.train()
    try:
        yield
    finally:
        for norm, momentum, hook in zip(norms, momenta, hooks, strict=True):
            norm.momentum = momentum
            norm.eval()
            hook.remove()


def _images_of(batches: Iterable[Any], size: tuple[int, ...]) -> Iterator[Tensor]:
    """The images of batches that are those, or pairs of them and labels."""
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise DataError(
            f"these are no batches of images: {type(batches).__name__}",
            hint="pass a DataLoader, or a list of tensors (B, C, H, W)",
        )
    for batch in batches:
        images = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(images, Tensor):
            raise DataError(f"a batch is no tensor of images: {batch!r:.60}")
        if images.shape[1:] != size:
            raise DataError(f"images of {by(images.shape[1:])}, but the family takes {by(size)}")
        if len(images):
            yield images


def _own_norms(net: DetachableNet, name: str) -> Iterable[nn.Module]:
    """The layers below a model's place among the norms."""
    return net.norms.get_submodule(folder(name)).modules()
