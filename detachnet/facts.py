"""What is known of a trained family: what it was trained on, which models, how accurate they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detachnet.errors import CheckpointError, DataError, nearest
from detachnet.fields import Fields


class DataInfo(Fields):
    """What a family was trained on; kept in its checkpoint.

    Attributes:
        name: The data set.
        classes: Name of each class.
        mean: Mean of each channel over the training images, of values in [0, 1].
        std: Standard deviation of each channel.
        num_test: Number of test images that accuracies are measured on.
        train_split: Where the training images are, in a data set of image files; empty in older files.
        test_split: Where the test images are there.
        test_share: Share of each class that the test images are, where the data set is not divided: chosen by
            `test_seed`. 0 where it is.
        test_seed: Decides which ones.
        crop_pct: Share of the resized picture's side that is kept for an evaluation, as timm resizes and crops;
            None where pictures are brought to the input size directly.
    """

    refused_as = {"": DataError}

    name: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_test: int = 0
    train_split: str = ""
    test_split: str = ""
    test_share: float = 0.0
    test_seed: int = 0
    crop_pct: float | None = None


def scale_and_shift(info: DataInfo) -> tuple[Tensor, Tensor]:
    """What `uint8 * scale - shift` normalizes each channel with; both `(1, C, 1, 1)`, float32."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (info.mean, info.std))
    return (1 / (255 * std)).float(), (mean / std).float()


class Facts(Fields):
    """What is known of a family's training; `DetachableNet.facts`, kept in its file.

    Attributes:
        data: What it was trained on, if that is known.
        trained: The models that were trained; empty if that is not known.
        accuracy: Model → its test accuracy, in [0, 1], when it was last measured.
    """

    refused_as = {"": CheckpointError}

    data: DataInfo | None = None
    trained: tuple[str, ...] = ()
    accuracy: dict[str, float] = {}

    @property
    def known_data(self) -> DataInfo:
        """What the family was trained on.

        Raises:
            CheckpointError: It does not say.
        """
        if self.data is None:
            raise CheckpointError(
                "the family does not say what it was trained on: its classes and normalization are unknown",
                hint="net.facts = detachnet.Facts(data=detachnet.DataInfo(...)); train writes files that say it",
            )
        return self.data

    def models(self, names: Sequence[str]) -> Sequence[str]:
        """Of a family's models those that were trained; all where that is not known."""
        return self.trained or names

    def model(self, names: Sequence[str], name: str | None = None) -> str:
        """One of a family's models that was trained: the one named, else the first of the names.

        Raises:
            CheckpointError: There is no such model, or it was not trained.
        """
        models = [model for model in names if model in self.models(names)]
        if name is None:
            return models[0]
        if name not in models:
            missing = f"{name!r} was not trained" if name in names else f"the family has no model {name!r}"
            raise CheckpointError(
                missing, hint=f"the models are {', '.join(models)}", nearest=nearest(name, models)
            )
        return name

    def updated(self, **changes: object) -> Facts:
        """The same with other values."""
        return Facts(**(dict(self) | changes))
