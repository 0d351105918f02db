"""net or export folder -> models that run, behind the face that every runtime has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from detachnet.deploy.cache import OPTIMIZED_WEIGHTS, optimized_folder
from detachnet.deploy.formats import check_installed
from detachnet.deploy.manifest import read_manifest
from detachnet.deploy.measurement import Runtime
from detachnet.deploy.onnx_session import onnx_session, run_onnx
from detachnet.errors import ExportError
from detachnet.facts import DataInfo
from detachnet.losses import logits
from detachnet.machine import find_threads
from detachnet.storage import MANIFEST
from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.legs import Leg
from detachnet.surgery.plan import BASE


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
        legs: Model → what it runs between the places where models part, front to back.
    """

    runtime: Runtime
    device: torch.device
    threads: int
    names: tuple[str, ...]
    input_size: tuple[int, ...]
    data: DataInfo | None
    legs: dict[str, tuple[Leg, ...]]

    def costs(self, name: str) -> Costs:
        """What a model costs by counting."""

    def prepare(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in the type and on the device that `run` takes."""

    def run(self, name: str, images: Tensor) -> Tensor:
        """Output `(B, num_classes)` of a model; complete when it returns."""

    def run_leg(self, leg: Leg, value: Tensor) -> Tensor:
        """What a leg makes of images or a feature, `(B, …)`."""


class TorchBackend:
    """A family in torch, on whatever device it is; its models share their weights in memory.

    Args:
        net: The family, in evaluation mode.
        threads: Threads of the CPU per run; torch's present number by default.
    """

    runtime: Runtime = "torch"

    def __init__(self, net: DetachableNet, threads: int | None = None) -> None:
        self.net = net
        self.threads = find_threads(threads)
        self.names, self.input_size, self.data = net.names, net.plan.input_size, net.facts.data
        like = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
        self.device, self.dtype = like.device, like.dtype
        self._models = {name: net.detach(name, share=True) for name in net.names}
        self.legs = net.legs
        self._parts: dict[Leg, nn.Module] = {}
        self._changing = {leg for legs in self.legs.values() for leg in legs if net.changes_input(leg)}

    def costs(self, name: str) -> Costs:
        """What a model costs by counting."""
        model = self.net.base if name == BASE else self._models[name]
        if self.net.plan[name].kept:
            model = self.net.detach(name)  # in the family it reads parts of the base-model's tensors
        tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values()
        plan = self.net.plan[name]
        accuracy = self.net.facts.accuracy.get(name)
        return Costs(name, plan.macs, plan.num_params, sum(t.nbytes for t in tensors), accuracy)

    def prepare(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in the family's type, on its device."""
        return images.to(self.device, self.dtype)

    def run(self, name: str, images: Tensor) -> Tensor:
        """Output `(B, num_classes)` of a model; a CUDA device has finished."""
        return logits(self._run(self._models[name], self._safe(self.legs[name][0], images)))

    def run_leg(self, leg: Leg, value: Tensor) -> Tensor:
        """What a leg makes of images or a feature, `(B, …)`; a CUDA device has finished."""
        if leg not in self._parts:
            self._parts[leg] = self.net.detach_leg(leg, share=True)
        made = self._run(self._parts[leg], self._safe(leg, value))
        return made if leg.end else logits(made)

    def _safe(self, leg: Leg, value: Tensor) -> Tensor:
        """What a leg may change in place: others go on from the same value."""
        return value.clone() if leg in self._changing else value

    def _run(self, module: nn.Module, value: Tensor) -> Any:
        if torch.is_grad_enabled() or torch.get_num_threads() != self.threads:
            # Only then: setting what is set already takes as long as a small layer.
            with num_threads(self.threads), torch.no_grad():
                made = module(value)
        else:
            made = module(value)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return made


class OnnxBackend:
    """A family in an export folder, through ONNX Runtime on the CPU.

    Every file is checked against its checksum first.

    Args:
        folder: What `export` wrote.
        threads: Threads per run; torch's present number by default.
        models: Those to open; all by default.
        shared_memory: Open them as optimized for this processor once, from the user's cache folder, with their
            weights in memory once.

    Raises:
        ExportError: The folder is no complete export to ONNX, or ONNX Runtime is not installed.
    """

    runtime: Runtime = "onnx"

    def __init__(
        self,
        folder: str | Path,
        threads: int | None = None,
        models: Sequence[str] | None = None,
        shared_memory: bool = False,
    ) -> None:
        self.folder, self.manifest = Path(folder), read_manifest(folder)
        if self.manifest.format != "onnx":
            raise ExportError(
                f"{folder} holds graphs of format {self.manifest.format!r}; here only 'onnx' is run",
                hint="detachnet export CHECKPOINT -o DIR --format onnx",
            )
        check_installed("onnx")
        self.threads = find_threads(threads)
        self.device = torch.device("cpu")
        image = self.manifest.input
        self.names, self.input_size = self.manifest.names, image.shape
        self.data = self._data()
        own = (self.manifest.weights.file,) if self.manifest.weights else ()
        self._graphs, self._weights = self.folder, frozenset(own)
        if shared_memory:
            self._graphs = optimized_folder(self.folder, self.manifest)
            self._weights = frozenset([OPTIMIZED_WEIGHTS])
        self._sessions = {name: self._open_model(name) for name in models or self.names}
        self.legs = self.manifest.legs_of
        self._parts: dict[Leg, Any] = {}

    def costs(self, name: str) -> Costs:
        """What the manifest says a model costs."""
        model = self.manifest[name]
        return Costs(name, model.macs, model.num_params, model.num_bytes, model.accuracy)

    def prepare(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)`, float32 on the CPU."""
        return images.detach().to("cpu", torch.float32)

    def run(self, name: str, images: Tensor) -> Tensor:
        """Output `(B, num_classes)` of a model."""
        path, image = self._graphs / self.manifest[name].file, self.manifest.input
        return run_onnx(self._sessions[name], path, self.manifest.output, image.name, images)

    def run_leg(self, leg: Leg, value: Tensor) -> Tensor:
        """What a leg makes of images or a feature, `(B, …)`."""
        if not (leg.start or leg.end):
            return self.run(leg.models[0], value)
        path = self._graphs / self.manifest.leg(leg).file
        if leg not in self._parts:
            self._parts[leg] = onnx_session(path, self.threads, self._weights)
        session = self._parts[leg]
        return run_onnx(session, path, session.get_outputs()[0].name, session.get_inputs()[0].name, value)

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

    def _open_model(self, name: str) -> Any:
        """A model's graph, whose input and output are what the manifest says.

        Raises:
            ExportError: They are not, or ONNX Runtime cannot open it.
        """
        path, image = self._graphs / self.manifest[name].file, self.manifest.input
        session = onnx_session(path, self.threads, self._weights)
        inputs = [(value.name, tuple(value.shape[1:])) for value in session.get_inputs()]
        outputs = [value.name for value in session.get_outputs()]
        if inputs != [(image.name, image.shape)] or self.manifest.output not in outputs:
            raise ExportError(
                f"{path} is not what {MANIFEST} says of it",
                what=f"it takes {inputs} and gives {outputs}",
                hint="export again",
            )
        return session


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
