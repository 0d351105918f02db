"""Images in memory -> batches, augmented a batch at a time.

Every random choice is a function of (seed, epoch, step), so a run resumes at any step exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from operator import length_hint
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from detachnet.data.datasets import Split
from detachnet.errors import DataError
from detachnet.facts import DataInfo, scale_and_shift


@runtime_checkable
class BatchSource(Protocol):
    """What a training and an evaluation read: normalized float images on a device, and their labels."""

    @property
    def device(self) -> torch.device:
        """Where the batches are."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from step `start` on: images `(B, C, H, W)`, labels `(B,)`.

        The labels of mixed images are the probability of each class instead, `(B, num_classes)`.
        """


class Batches:
    """A split on a device, cut into batches of normalized float images.

    Args:
        split: The images.
        info: Their channel-wise mean and standard deviation.
        batch_size: Images per batch.
        device: Where the images live and are augmented.
        pad: Zero padding in pixels around an image before a random crop of its own size; 0 for no crop.
        flip: Mirror each image left to right with probability one half; `alternating`: with that probability in
            the first epoch and from then on in every other one.
        shuffle: A new order each epoch, full batches only; else the order of the split, all of it.
        seed: Decides order and augmentation together with epoch and step.
        share: This process's place among all, `(index, count)`; each gets its part of every batch.
        layout: How the images of a batch lie in memory.

    Raises:
        DataError: Fewer images than one batch.
    """

    def __init__(
        self,
        split: Split,
        info: DataInfo,
        batch_size: int,
        device: torch.device | str = "cpu",
        *,
        pad: int = 0,
        flip: bool | Literal["alternating"] = False,
        shuffle: bool = False,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        if shuffle and len(split) < batch_size:
            raise DataError(f"{len(split)} training images do not fill a batch of {batch_size}")
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.scale, self.shift = (constant.to(device) for constant in scale_and_shift(info))
        self.batch_size = batch_size
        self.pad, self.flip, self.shuffle, self.seed, self.share = pad, flip, shuffle, seed, share
        self.layout = layout

    @property
    def device(self) -> torch.device:
        """Where the images live."""
        return self.images.device

    def __len__(self) -> int:
        full, rest = divmod(len(self.labels), self.batch_size)
        return full if self.shuffle or not rest else full + 1

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from step `start` on: images `(B, C, H, W)` float32, labels `(B,)`."""
        order = self._order(epoch)
        index, count = self.share
        for step in range(start, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size][index::count]
            yield self._prepare(batch, epoch, step), self.labels[batch]

    @cached_property
    def _first(self) -> Tensor:
        """Which images are mirrored in the first epoch, if that alternates, `(N,)`."""
        generator = torch.Generator(self.device).manual_seed(mix(self.seed, "flip"))
        return torch.rand(len(self.labels), generator=generator, device=self.device) < 0.5

    def _order(self, epoch: int) -> Tensor:
        device = self.images.device
        if not self.shuffle:
            return torch.arange(len(self.labels), device=device)
        generator = torch.Generator(device).manual_seed(mix(self.seed, "order", epoch))
        return torch.randperm(len(self.labels), generator=generator, device=device)

    def _prepare(self, batch: Tensor, epoch: int, step: int) -> Tensor:
        images = self.images.index_select(0, batch)
        if self.pad or self.flip:
            seed = mix(self.seed, "augment", epoch, step, 0)  # one stream for all processes
            generator = torch.Generator(images.device).manual_seed(seed)
            flip = self.flip if isinstance(self.flip, bool) else self._first[batch] ^ bool(epoch % 2)
            images = augment(images, self.pad, flip, generator, self.share)
        images = images.float().mul_(self.scale).sub_(self.shift)
        return images.contiguous(memory_format=self.layout)


class GivenBatches:
    """Batches that somebody else makes, such as a `DataLoader`, on a device.

    Args:
        batches: Normalized images `(B, C, H, W)` and labels `(B,)`, each time it is iterated over.
        device: Where they are wanted.

    Raises:
        DataError: It is nothing of that kind.
    """

    def __init__(self, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu") -> None:
        if not isinstance(batches, Iterable):
            raise DataError(f"these are no batches of images and labels: {type(batches).__name__}", hint=_BATCHES)
        self._batches, self.device = batches, torch.device(device)

    def __len__(self) -> int:
        return length_hint(self._batches)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:  # noqa: ARG002
        """Yield the batches in their order, in every epoch the same; copies, since some models change theirs."""
        for batch in islice(self._batches, start, None):
            match batch:
                case [Tensor() as images, Tensor() as labels] if images.shape[:1] == labels.shape[:1]:
                    if labels.ndim != 1 or labels.is_floating_point():
                        said = f"{tuple(labels.shape)} of {labels.dtype}"
                        raise DataError(
                            f"labels are the number of each image's class, (B,), not {said}", hint=_BATCHES
                        )
                    yield images.to(self.device, copy=True), labels.to(self.device).long()
                case _:
                    raise DataError(f"a batch is no pair of images and labels: {batch!r:.60}", hint=_BATCHES)


_BATCHES = "pass a Split, as load_data gives it, or a DataLoader of (images, labels)"


def augment(
    images: Tensor, pad: int, flip: bool | Tensor, generator: torch.Generator, share: tuple[int, int] = (0, 1)
) -> Tensor:
    """Random crop after zero padding, and random mirroring, drawn for each image; `(B, C, H, W)` to the same.

    Or `flip` says which are mirrored, `(B,)`.

    `share` says which images of a batch these are, where it is dealt out to several processes: an image is
    augmented alike whatever their number.
    """
    batch, _, height, width = images.shape
    device = images.device
    index, count = share
    corners = torch.randint(0, 2 * pad + 1, (2, batch * count, 1), generator=generator, device=device)
    top, left = corners[:, index::count, 0]
    each = torch.arange(batch, device=device)
    windows = F.pad(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    cropped = windows.permute(0, 2, 3, 1, 4, 5)[each, top, left]
    if flip is False:
        return cropped
    if flip is True:
        flip = torch.rand(batch * count, 1, generator=generator, device=device)[index::count, 0] < 0.5
    both = torch.cat([cropped, cropped.flip(3)])
    return both.index_select(0, each + batch * flip)


def mix(*parts: object) -> int:
    """A seed that depends on all parts; the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
