"""candidate -> its worth: accuracy on held-out images, its norms measured anew on training images."""

from __future__ import annotations

import hashlib
import math
import pickle
import time
from functools import cached_property
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import nn

from detachnet.data.batches import Batches
from detachnet.data.datasets import Split
from detachnet.errors import MeasurementError, one_line
from detachnet.losses import logits
from detachnet.selection.candidate import Candidate
from detachnet.selection.space import CANDIDATE, Space
from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.modules import in_type_of, weight_of
from detachnet.surgery.plan import BASE
from detachnet.surgery.recalibration import measure_statistics
from detachnet.zoo import import_own, own_files

BATCH = 250
"""Images per run."""


class Worth(NamedTuple):
    """What a candidate is worth.

    Attributes:
        accuracy: On the held-out images, in [0, 1].
        loss: Mean cross entropy there, in nats.
        seconds: What it took to try it.
    """

    accuracy: float
    loss: float
    seconds: float = 0.0


class Judge:
    """Says what candidates are worth; it can be sent to other processes, which keep what they find out for it.

    Args:
        net: The family, trained, with `facts.data`.
        held_out: Images it was not trained on, which decide.
        calibration: Training images that the norms of candidates are measured on; their classes are not read.
        space: Of the family, where it is at hand.
    """

    def __init__(
        self, net: DetachableNet, held_out: Split, calibration: Split, space: Space | None = None
    ) -> None:
        self.net, self.held_out, self.calibration, self._space = net, held_out, calibration, space
        self._building = Lock()

    @cached_property
    def _packed(self) -> tuple[str, bytes]:
        try:
            content = pickle.dumps((self.net, self.held_out, self.calibration))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise MeasurementError(
                "the network cannot be sent to other processes",
                what=one_line(error),
                hint="search in one process, or define the model in a module that can be imported",
            ) from error
        return hashlib.sha256(content).hexdigest(), content

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (*self._packed, own_files(self.net))

    def __call__(self, candidate: Candidate) -> Worth:
        """The worth of a candidate; the same each time."""
        began = time.perf_counter()
        with self._building:  # threads share what is known of the network
            if self._space is None:
                self._space = Space(self.net)
            net = self._space.family(candidate).eval()
        name = BASE if candidate.is_base else CANDIDATE
        worth = judged(net, name, self.held_out, None if candidate.is_base else self.calibration)
        return worth._replace(seconds=round(time.perf_counter() - began, 3))


_here: dict[str, Judge] = {}
"""The judge that was sent to this process last, by what it is of."""


def _received(name: str, content: bytes, files: dict[str, str]) -> Judge:
    """The judge that was packed; the same one each time, as executors send it with every candidate."""
    if name not in _here:
        _here.clear()
        import_own(files)
        _here[name] = Judge(*pickle.loads(content))
    return _here[name]


def judged(net: DetachableNet, name: str, held_out: Split, calibration: Split | None) -> Worth:
    """The worth of one model of a family; its own norms are measured before that, where images are given."""
    weight, info = weight_of(net), net.facts.known_data
    device = weight.device
    if calibration is not None:
        images = (batch for batch, _ in Batches(calibration, info, BATCH, device).epoch())
        measure_statistics(net, images, (name,))
    model, right, loss = net.detach(name, share=True), 0, 0.0
    with torch.no_grad():
        for batch, labels in Batches(held_out, info, BATCH, device).epoch():
            out = logits(model(in_type_of(weight, batch))).float()
            right += int((out.argmax(1) == labels).sum())
            loss += float(nn.functional.cross_entropy(out, labels, reduction="sum"))
    return Worth(right / len(held_out), loss / len(held_out))


def at_chance(worth: Worth, classes: int, images: int) -> bool:
    """Whether an accuracy is no better than guessing: within three standard deviations of it."""
    guess = 1 / classes
    return worth.accuracy <= guess + 3 * math.sqrt(guess * (1 - guess) / images)
