"""net or export folder -> models that run, behind the face that every runtime has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from detachnet.data import DataInfo
from detachnet.detachable import DetachableNet
from detachnet.errors import ExportError
from detachnet.export import MANIFEST, read_manifest
from detachnet.graphs import check_installed
from detachnet.losses import logits
from detachnet.plan import BASE

Runtime = Literal["torch", "onnx"]


class Costs(NamedTuple):
    """What is known of a model without running it; the fields of a measurement of the same names."""

    model: str
    macs: int
    num_params: int
    num_bytes: int
    accuracy: float | None


class Backend(Protocol):
    """The models of a family, ready to run.

    Attributes:
        runtime: `torch`, or `onnx` for ONNX Runtime.
        device: Where it runs.
        threads: Threads of the CPU per run.
        names: The models, the base-model first.
        input_size: Shape of one image, `(C, H, W)`.
        data: What it was trained on, if that is known.
    """

    runtime: Runtime
    device: torch.device
    threads: int
    names: tuple[str, ...]
    input_size: tuple[int, ...]
    data: DataInfo | None

    def costs(self, name: str) -> Costs:
        """What a model costs by counting."""

    def prepare(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in the type and on the device that `run` takes."""

    def run(self, name: str, images: Tensor) -> Tensor:
        """Output `(B, num_classes)` of a model; complete when it returns."""


class TorchBackend:
    """A family in torch, on whatever device it is; its models share their weights in memory.

    Args:
        net: The family, in evaluation mode.
        threads: Threads of the CPU per run; torch's present number by default.
    """

    runtime: Runtime = "torch"

    def __init__(self, net: DetachableNet, threads: int | None = None) -> None:
        self.net = net
        self.threads = threads or torch.get_num_threads()
        self.names, self.input_size, self.data = net.names, net.plan.input_size, net.data
        like = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
        self.device, self.dtype = like.device, like.dtype
        self._models = {name: net.detach(name, share=True) for name in net.names}

    def costs(self, name: str) -> Costs:
        """What a model costs by counting."""
        model = self.net.base if name == BASE else self._models[name]
        tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values()
        plan = self.net.plan[name]
        accuracy = self.net.accuracy.get(name)
        return Costs(name, plan.macs, plan.num_params, sum(t.nbytes for t in tensors), accuracy)

    def prepare(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in the family's type, on its device."""
        return images.to(self.device, self.dtype)

    def run(self, name: str, images: Tensor) -> Tensor:
        """Output `(B, num_classes)` of a model; a CUDA device has finished."""
        if torch.is_grad_enabled() or torch.get_num_threads() != self.threads:
            # Only then: setting what is set already takes as long as a small layer.
            with num_threads(self.threads), torch.no_grad():
                output = logits(self._models[name](images))
        else:
            output = logits(self._models[name](images))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return output


class OnnxBackend:
    """A family in an export folder, through ONNX Runtime on the CPU.

    Every file is checked against its checksum first.

    Args:
        folder: What `export` wrote.
        threads: Threads per run; torch's present number by default.
        models: Those to open; all by default.

    Raises:
        ExportError: The folder is no complete export to ONNX, or ONNX Runtime is not installed.
    """

    runtime: Runtime = "onnx"

    def __init__(
        self, folder: str | Path, threads: int | None = None, models: Sequence[str] | None = None
    ) -> None:
        self.folder, self.manifest = Path(folder), read_manifest(folder)
        if self.manifest.format != "onnx":
            raise ExportError(
                f"{folder} holds graphs of format {self.manifest.format!r}; here only 'onnx' is run",
                hint="detachnet export CHECKPOINT -o DIR --format onnx",
            )
        check_installed("onnx")
        self.threads = threads or torch.get_num_threads()
        self.device = torch.device("cpu")
        image = self.manifest.input
        self.names, self.input_size = self.manifest.names, image.shape
        self.data = self._data()
        self._sessions = {name: self._open(name) for name in models or self.names}

    def costs(self, name: str) -> Costs:
        """What the manifest says a model costs."""
        model = self.manifest[name]
        return Costs(name, model.macs, model.num_params, model.num_bytes, model.accuracy)

    def prepare(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)`, float32 on the CPU."""
        return images.detach().to("cpu", torch.float32)

    def run(self, name: str, images: Tensor) -> Tensor:
        """Output `(B, num_classes)` of a model."""
        output = self._sessions[name].run([self.manifest.output], {self.manifest.input.name: images.numpy()})[0]
        return torch.from_numpy(output)

    def _data(self) -> DataInfo | None:
        """What is known of the data: all but its name."""
        manifest, image = self.manifest, self.manifest.input
        if not image.mean:
            return None
        return DataInfo(
            name="",
            classes=manifest.labels,
            mean=image.mean,
            std=image.std,
            num_test=manifest.num_test,
            crop_pct=image.crop_pct,
        )

    def _open(self, name: str) -> Any:
        import onnxruntime  # an extra, and slow to import

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        path = self.folder / self.manifest[name].file
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def is_export(path: str | Path) -> bool:
    """Whether a path is that of an export folder."""
    return (Path(path) / MANIFEST).exists()


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """So many threads in torch's operators, in this thread of the program."""
    was = torch.get_num_threads()
    if threads == was:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(was)
