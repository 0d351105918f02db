"""Family + split -> accuracy and loss of each of its models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detachnet.data import Batches, BatchSource, Split
from detachnet.detachable import DetachableNet
from detachnet.errors import CheckpointError
from detachnet.losses import logits

EVAL_BATCH = 500
"""Images per batch of an evaluation."""


def evaluate(
    net: DetachableNet, images: Split | BatchSource, device: torch.device | str = "cpu"
) -> dict[str, dict[str, float]]:
    """Test accuracy, in [0, 1], and mean cross entropy of each trained model of a family.

    Args:
        net: A family with `data`, as the trainer writes it.
        images: Of the same classes; batches must be on the device.
        device: Where to run.

    Raises:
        CheckpointError: The family does not know what it was trained on.
    """
    if net.data is None:
        raise CheckpointError("the family does not know how its images are normalized: it has no data info")
    models = net.trained or net.names
    batches = Batches(images, net.data, EVAL_BATCH, device) if isinstance(images, Split) else images
    return scores(score_batches(net.to(device), batches, models), models)


def score_batches(model: nn.Module, batches: BatchSource, models: Sequence[str]) -> Tensor:
    """Number of right answers, sum of losses and number of images, per model: `(len(models), 3)`, float64."""
    was = model.training
    model.eval()
    device = batches.device
    rows = torch.zeros(len(models), 3, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    criterion = nn.CrossEntropyLoss(reduction="sum")
    with torch.no_grad():
        for images, labels in batches.epoch():
            outputs = model(images, which=tuple(models))
            rows[:, 2] += len(labels)
            for i, name in enumerate(models):
                out = logits(outputs[name]).float()
                rows[i, 0] += (out.argmax(1) == labels).sum().to(rows.device)
                rows[i, 1] += criterion(out, labels).to(rows.device)
    model.train(was)
    return rows


def scores(totals: Tensor, models: Sequence[str]) -> dict[str, dict[str, float]]:
    """What `score_batches` counted, as shares: accuracy in [0, 1] and mean loss of each model."""
    return {
        name: {"accuracy": right / count, "loss": loss / count}
        for name, (right, loss, count) in zip(models, totals.tolist(), strict=True)
    }
