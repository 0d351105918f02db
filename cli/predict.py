"""`detachnet predict`."""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detachnet.errors import DataError

from .console import friendly, note, print_json, show_error
from .opening import fastest_device, open_family
from .options import AsJson, Checkpoint, ModelFile

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from detachnet.evaluation import Prediction
    from detachnet.surgery.detachable import DetachableNet

BATCH = 64
STDIN = "-"


@friendly
def predict(
    checkpoint: Checkpoint,
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE...", help="Image files, folders of them, or - for standard input."),
    ],
    model: Annotated[str | None, typer.Option(help="The model to run; the largest if not given.")] = None,
    budget_ms: Annotated[
        float | None,
        typer.Option(help="Run the most accurate model that takes at most so long here, as profile measured it."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 5,
    as_json: AsJson = False,
    model_file: ModelFile = None,
) -> None:
    """Say what is on pictures. Those that cannot be read are named and skipped, and the exit code is then 1."""
    if budget_ms is not None and not 0 < budget_ms < math.inf:
        raise typer.BadParameter(f"{budget_ms:g} is no positive number of ms", param_hint="--budget-ms")
    if model is not None and budget_ms is not None:
        raise typer.BadParameter("name the model or give a budget, not both", param_hint="--budget-ms")
    path, net = open_family(checkpoint, model_file)
    net.to(fastest_device())
    largest_first = sorted(net.names, key=lambda name: -net.plan[name].macs)
    name = net.facts.model(largest_first, model) if budget_ms is None else _within(budget_ms, path, net)
    reader = _Reader(net)
    answers = list(_answers(net, name, top, reader.tensors(images)))
    if as_json:
        print_json(
            {
                "checkpoint": str(path),
                "model": name,
                "images": [_record(image, answer) for image, answer in answers],
                "skipped": [{"image": image, "error": error.summary} for image, error in reader.skipped],
            }
        )
    elif answers:
        _print_answers(f"{name} of {path}", answers)
    if reader.skipped:
        raise typer.Exit(1 if answers else 2)


def _within(budget_ms: float, path: Path, net: DetachableNet) -> str:
    """The most accurate model that keeps a budget by the profile beside the checkpoint."""
    from detachnet.deploy.backends import TorchBackend
    from detachnet.deploy.family import Family
    from detachnet.deploy.profile import read_profile

    measured = read_profile(path)
    family = Family(TorchBackend(net, measured.rows[0].threads if measured else None), path, measured)
    return family.choose(latency_ms=budget_ms)


class _Reader:
    """Pictures as tensors, and those that could not be read."""

    def __init__(self, net: DetachableNet) -> None:
        self.net = net
        self.skipped: list[tuple[str, DataError]] = []

    def tensors(self, sources: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield each picture's name and tensor; tell of those that cannot be read."""
        from detachnet.data.images import to_tensor

        data, input_size = self.net.facts.known_data, self.net.plan.input_size
        for source in sources:
            try:
                names = _expand(source)
            except DataError as error:
                self._skip(source, error)
                continue
            for name in names:
                try:
                    image = _read(name)
                except DataError as error:
                    self._skip(name, error)
                    continue
                yield name, to_tensor(image, data, input_size)

    def _skip(self, name: str, error: DataError) -> None:
        self.skipped.append((name, error))
        show_error(error, "Skipped")


def _expand(source: str) -> list[str]:
    """A source's pictures by name; more than one for a folder."""
    from detachnet.data.images import find_images

    return [source] if source == STDIN else [str(path) for path in find_images([source])]


def _read(name: str) -> Image.Image:
    """A file, or standard input."""
    from detachnet.data.images import read_image

    if name != STDIN:
        return read_image(name)
    content = sys.stdin.buffer.read()
    if not content:
        raise DataError("standard input is empty", hint="detachnet predict CHECKPOINT - < IMAGE")
    return read_image(io.BytesIO(content), "standard input")


def _answers(
    net: DetachableNet, model: str, top: int, tensors: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Prediction]]:
    """Run the pictures in batches."""
    from itertools import islice

    import torch

    from detachnet.evaluation import predict

    while batch := list(islice(tensors, BATCH)):
        names, images = zip(*batch, strict=True)
        yield from zip(names, predict(net, torch.stack(images), model, top), strict=True)


def _record(image: str, answer: Prediction) -> dict[str, object]:
    pairs = zip(answer.labels, answer.probabilities, strict=True)
    return {"image": image, "classes": [{"name": label, "probability": share} for label, share in pairs]}


def _print_answers(title: str, answers: list[tuple[str, Prediction]]) -> None:
    from detachnet.text import Table

    header = ("image", "answer", "probability", "then" if len(answers[0][1].labels) > 1 else "")
    rows = []
    for image, answer in answers:
        texts = [f"{100 * share:.1f} %" for share in answer.probabilities]
        rest = ", ".join(f"{label} {text}" for label, text in zip(answer.labels[1:], texts[1:], strict=True))
        rows.append((image, answer.labels[0], texts[0], rest))
    note(title)
    for line in Table(header, tuple(rows)).lines():
        note(line)
