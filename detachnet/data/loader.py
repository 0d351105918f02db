"""image files -> batches: read and augmented in worker processes by timm's transforms, mixed on the device.

Images that can be read by their number come in an order that (seed, epoch) decides, each is augmented by what
(seed, epoch, its number) decides and a batch is mixed by what (seed, epoch, step) decides: whatever the number of
workers and of processes. Shards are dealt out to workers; see `docs/nodes.md` for what holds there.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.loader import PrefetchLoader
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate, get_worker_info
from torchvision.transforms import Compose

from detachnet.data.batches import mix
from detachnet.data.folders import Files, Sample
from detachnet.data.images import evaluation_transform
from detachnet.errors import DataError, RecipeError
from detachnet.facts import DataInfo

EVAL_BATCH = 100
"""Images per batch and process of an evaluation."""
BUFFER = 1000
"""Images of a shard that a worker holds, not yet decoded, to shuffle them."""
Transform = Callable[[Image.Image], Tensor]
_Item = tuple[Tensor, int] | DataError
"""An image and its label; or why there is none, to be raised in the process that trains."""


@dataclass(frozen=True)
class Augmentation:
    """What happens to training images beyond timm's random crop and mirroring.

    Attributes:
        auto_augment: timm's name of a policy, such as `rand-m9-mstd0.5-inc1`; empty for a jitter of the colours.
        reprob: Probability that a part of an image is erased.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of cutmix; 0 for none. Of the two, one is chosen for each batch.
    """

    auto_augment: str = ""
    reprob: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with one another."""
        return bool(self.mixup or self.cutmix)


class FileBatches:
    """A split of image files, cut into batches of normalized float images.

    Args:
        files: The images.
        info: Mean and standard deviation of their channels, and how they are cropped for an evaluation.
        size: Height and width of the images in a batch.
        batch_size: Images per batch, over all processes together.
        device: Where the batches are; the next one is copied there while one is worked on.
        augmentation: For training: a new order each epoch, full batches only. None for an evaluation: each image
            exactly once, as `info.crop_pct` says.
        num_workers: Processes that read and augment; 0 for this one.
        seed: Decides order and augmentation.
        share: This process's place among all, `(index, count)`; each gets its part of every batch.
        layout: How the images of a batch lie in memory.

    Raises:
        DataError: Fewer images than one batch, or fewer shards than workers.
        RecipeError: timm does not know the augmentation, or mixing leaves an image without a partner.
    """

    def __init__(
        self,
        files: Files,
        info: DataInfo,
        size: tuple[int, int],
        batch_size: int,
        device: torch.device | str = "cpu",
        *,
        augmentation: Augmentation | None = None,
        num_workers: int = 0,
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        training = augmentation is not None
        if training and files.num_images < batch_size:
            raise DataError(f"{files.num_images} training images do not fill a batch of {batch_size}")
        self.files, self.device, self.seed, self.layout = files, torch.device(device), seed, layout
        self.mixup = _mixup(augmentation, files, batch_size, share) if augmentation else None
        transform = _transform(size, info, augmentation)
        pairs = self.mixup is not None
        if files.shards:
            self._order: _Order | _Stream = _Stream(
                files, transform, batch_size, training, seed, share, max(1, num_workers)
            )
            data: dict[str, Any] = {"dataset": self._order, "batch_size": batch_size // share[1]}
        else:
            self._order = _Order(files.num_images, batch_size, training, seed, share, pairs)
            data = {"dataset": _Images(files, transform, seed), "batch_sampler": self._order}
        loader: DataLoader[Any] = DataLoader(
            **data,
            num_workers=num_workers,
            collate_fn=_collate,
            worker_init_fn=_leave_ctrl_c_to_the_trainer,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # the user's stays as it is
        )
        self._batches = PrefetchLoader(_Raising(loader), info.mean, info.std, device=self.device)

    def __len__(self) -> int:
        return len(self._order)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from step `start` on: images `(B, 3, H, W)` float32, labels `(B,)`.

        Where images are mixed the labels are the probability of each class, `(B, num_classes)` float32.

        Raises:
            DataError: An image cannot be read; the message names it.
        """
        self._order.epoch, self._order.start = epoch, start
        for step, (images, labels) in enumerate(self._batches, start):
            batch = images.contiguous(memory_format=self.layout), labels
            if self.mixup is not None:
                with random_state(mix(self.seed, "mixup", epoch, step)):  # the same in all processes
                    batch = self.mixup(*batch)
            yield batch


@contextmanager
def random_state(seed: int) -> Iterator[None]:
    """Python's, NumPy's and PyTorch's (CPU) random numbers from a seed; afterwards they go on as before.

    Not in a worker process, where nobody else draws any: keeping them takes as long as mirroring an image.
    """
    ours = get_worker_info() is None
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state()) if ours else None
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        if before:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


class _Order:
    """The numbers of each batch's images, with the epoch that augments them: a sampler of batches."""

    def __init__(
        self, num_images: int, batch_size: int, training: bool, seed: int, share: tuple[int, int], pairs: bool
    ) -> None:
        self.num_images, self.batch_size, self.training = num_images, batch_size, training
        self.seed, self.share, self.pairs = seed, share, pairs
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return _num_batches(self.num_images, self.batch_size, self.training)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = torch.arange(self.num_images)
        if self.training:
            generator = torch.Generator().manual_seed(mix(self.seed, "order", self.epoch))
            order = torch.randperm(self.num_images, generator=generator)
        for step in range(self.start, len(self)):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size].tolist()
            if mine := deal(batch, self.share, self.pairs):
                yield [(self.epoch, index) for index in mine]


def deal(batch: list[int], share: tuple[int, int], pairs: bool = False) -> list[int]:
    """This process's part of a batch; with `pairs` so that mixing finds the partners one process would find.

    timm mixes the i-th image from the front with the i-th from the back: both go to the same process.
    """
    index, count = share
    if not pairs:
        return batch[index::count]
    half = len(batch) // 2
    return batch[:half][index::count] + batch[half:][::-1][index::count][::-1]


class _Images(Dataset[_Item]):
    """Images by (epoch, number), augmented by what these decide."""

    def __init__(self, files: Files, transform: Transform, seed: int) -> None:
        self.files, self.transform, self.seed = files, transform, seed

    def __getitem__(self, at: tuple[int, int]) -> _Item:
        try:
            image, label = self.files.read(at[1])
        except DataError as error:
            return error
        with random_state(mix(self.seed, "augment", *at)):
            return self.transform(image), label


class _Stream(IterableDataset[_Item]):
    """One worker's part of an epoch of shards.

    In training each worker makes as many batches as any other: one whose shards run out starts on them again.
    """

    def __init__(
        self,
        files: Files,
        transform: Transform,
        batch_size: int,
        training: bool,
        seed: int,
        share: tuple[int, int],
        num_workers: int,
    ) -> None:
        self.files, self.transform, self.training, self.seed = files, transform, training, seed
        self.batch_size, self.share, self.parts = batch_size, share, share[1] * num_workers
        self.epoch = self.start = 0
        if training and len(files.shards) < self.parts:
            raise DataError(
                f"{len(files.shards)} shards are too few for {share[1]} processes with {num_workers} workers each",
                hint="each worker reads shards of its own: set data.num_workers, or make more shards",
            )

    def __len__(self) -> int:
        return _num_batches(self.files.num_images, self.batch_size, self.training)

    def __iter__(self) -> Iterator[_Item]:
        try:
            yield from self._train() if self.training else self._evaluate()
        except DataError as error:
            yield error

    def _place(self, turn: int = 0) -> tuple[int, int, int]:
        """Which worker this is, of how many, and which of all processes' workers."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        number = (number + turn) % workers
        return number, workers, self.share[0] * workers + number

    def _evaluate(self) -> Iterator[_Item]:
        part = self._place()[2]
        for sample in self.files.samples(self.files.shards[part :: self.parts]):
            image, label = self.files.decode(sample)
            yield self.transform(image), label

    def _train(self) -> Iterator[_Item]:
        number, workers, part = self._place(turn=self.start)  # batches come from the workers in turn
        local = self.batch_size // self.share[1]
        done = local * len(range(number, self.start, workers))
        end = local * len(range(number, len(self), workers))
        for place, sample in enumerate(islice(self._shuffled(part), done, end), done):
            image, label = self.files.decode(sample)
            with random_state(mix(self.seed, "augment", self.epoch, part, place)):
                yield self.transform(image), label

    def _shuffled(self, part: int) -> Iterator[Sample]:
        """A worker's samples without end: shards in the epoch's order, samples shuffled within a buffer."""
        for turn in count():
            shards = list(self.files.shards)
            random.Random(mix(self.seed, "order", self.epoch)).shuffle(shards)  # the same in all workers
            choose = random.Random(mix(self.seed, "buffer", self.epoch, part, turn))
            buffer: list[Sample] = []
            for sample in self.files.samples(shards[part :: self.parts]):
                buffer.append(sample)
                if len(buffer) > BUFFER:
                    yield buffer.pop(choose.randrange(len(buffer)))
            if not buffer:
                raise DataError(f"there is no image in {', '.join(shards[part :: self.parts])}")
            choose.shuffle(buffer)
            yield from buffer


class _Raising:
    """A loader's batches; an image that could not be read is an error here, in the process that trains."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            if isinstance(batch, DataError):
                raise batch
            yield batch


class _Erasing:
    """timm's random erasing of an image `(C, H, W)` of bytes: what is erased gets the mean colour."""

    def __init__(self, probability: float, mean: tuple[float, ...]) -> None:
        self.erase = RandomErasing(probability, mode="const", device="cpu")
        self.colour = (255 * torch.tensor(mean)).round().to(torch.uint8).view(-1, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        kept = self.erase(torch.ones(1, *image.shape[1:])) > 0
        return torch.where(kept, image, self.colour)


def _num_batches(num_images: int, batch_size: int, training: bool) -> int:
    full, rest = divmod(num_images, batch_size)
    return full if training or not rest else full + 1


def _transform(size: tuple[int, int], info: DataInfo, augmentation: Augmentation | None) -> Transform:
    """timm's for a picture: to `(3, H, W)`, uint8."""
    if augmentation is None:
        return evaluation_transform(size, info.crop_pct or 1.0)
    try:
        transform: Transform = create_transform(
            size,
            is_training=True,
            auto_augment=augmentation.auto_augment or None,
            interpolation="random",
            mean=info.mean,
            normalize=False,
        )
    except Exception as error:  # timm checks by assertions and by whatever parsing raises
        raise RecipeError(
            f"data.auto_augment = {augmentation.auto_augment!r} is no policy of timm's",
            what=str(error),
            hint="such as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 or original",
        ) from error
    return Compose([transform, _Erasing(augmentation.reprob, info.mean)]) if augmentation.reprob else transform


def _mixup(augmentation: Augmentation, files: Files, batch_size: int, share: tuple[int, int]) -> Mixup | None:
    """timm's mixup and cutmix of a batch; smoothing the labels is the loss's."""
    if not augmentation.mixes:
        return None
    if batch_size % (2 * share[1]):
        raise RecipeError(
            f"mixing needs an even number of images in each of {share[1]} processes",
            what=f"train.batch_size = {batch_size}",
        )
    return Mixup(augmentation.mixup, augmentation.cutmix, label_smoothing=0.0, num_classes=len(files.classes))


def _collate(items: list[_Item]) -> Any:
    """A batch, or the first error in it."""
    for item in items:
        if isinstance(item, DataError):
            return item
    return default_collate(items)


def _leave_ctrl_c_to_the_trainer(_worker: int) -> None:
    """Ctrl-C reaches the workers too: the trainer saves first, then they leave."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
