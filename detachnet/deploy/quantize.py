"""plain module + images -> an ONNX graph in int8: static quantization with ONNX Runtime."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from numpy import ndarray
from torch import Tensor

from detachnet.data.batches import Batches
from detachnet.data.datasets import Split
from detachnet.deploy.formats import INPUT, Piece, Runner, Written
from detachnet.deploy.onnx_session import open_onnx
from detachnet.deploy.onnx_writer import OnnxWriter, onnx_model
from detachnet.deploy.verify import compare
from detachnet.facts import DataInfo

CALIBRATION_IMAGES = 256
"""Training images from which the ranges of the activations are taken."""
_BATCH = 32


class Int8Writer(OnnxWriter):
    """Writes graphs in int8, with batch norms folded first.

    Models with norms of their own share only the tensors that rounding leaves equal. Each graph is compared with
    its module before it is quantized, and measured afterwards.

    Args:
        folder: Where the graphs will be, with their file of weights.
        training: A training split, to calibrate with.
        test: A test split, to measure on.
        info: How their images are normalized.
    """

    def __init__(self, folder: Path, training: Split, test: Split, info: DataInfo) -> None:
        super().__init__(folder, "int8")
        self._training, self._test, self._info = training, test, info
        self.num_test = len(test)

    def write(self, piece: Piece, path: Path) -> Written:
        """Write a module's graph, compare it in float32, and measure it there and in int8 on the same images."""
        model = onnx_model(piece, fold=True)
        path.write_bytes(model.SerializeToString())
        before = open_onnx(path)
        compare(piece, before)
        float_accuracy = accuracy(before, self._test, self._info)
        model = quantize(model, calibration(self._training, self._info))
        num_bytes = self._write(model, piece.metadata, path)
        return Written(num_bytes, accuracy(open_onnx(path), self._test, self._info), float_accuracy)


def quantize(model: Any, images: Batches) -> Any:
    """An `onnx.ModelProto` with weights and activations in int8 (symmetric, weights per channel).

    Args:
        model: In float32, with batch norms folded and its weights inside.
        images: Calibration images; the range of each activation is the smallest and largest value seen.

    Source: ONNX Runtime's static quantization, in its QDQ form.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    with TemporaryDirectory() as folder, _quiet():
        source, target = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        quantize_static(
            source,
            target,
            _Reader(images),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(target)


def calibration(split: Split, info: DataInfo) -> Batches:
    """The images to calibrate with: spread evenly over a split, normalized, not augmented."""
    count = min(len(split), CALIBRATION_IMAGES)
    chosen = [i * len(split) // count for i in range(count)]
    few = Split(split.images[chosen], split.labels[chosen], split.classes)
    return Batches(few, info, _BATCH)


def accuracy(run: Runner, split: Split, info: DataInfo) -> float:
    """Share of a split's images that a graph classifies rightly, in [0, 1]."""
    right = 0
    for images, labels in Batches(split, info, _BATCH).epoch():
        right += int((run(images).argmax(1) == labels).sum())
    return right / len(split)


class _Reader:
    """Hands out batches as ONNX Runtime's calibration asks for them."""

    def __init__(self, images: Batches) -> None:
        self._batches = images.epoch()

    def get_next(self) -> dict[str, ndarray[Any, Any]] | None:
        """The next batch; None at the end."""
        batch: tuple[Tensor, Tensor] | None = next(self._batches, None)
        return None if batch is None else {INPUT: batch[0].to(torch.float32).numpy()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice on preprocessing that ONNX Runtime logs to everybody: batch norms are folded already."""
    root = logging.getLogger()
    was = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(was)
