"""net -> models that run, behind the face that every runtime has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from detachnet.data import DataInfo
from detachnet.detachable import DetachableNet
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
        net: The family. It is in evaluation mode while it runs.
        threads: Threads of the CPU per run; torch's present number by default.
    """

    runtime: Runtime = "torch"

    def __init__(self, net: DetachableNet, threads: int | None = None) -> None:
        self.net = net
        self.threads = threads or torch.get_num_threads()
        self.names, self.input_size, self.data = net.names, net.plan.input_size, net.data
        like = next((p for p in net.parameters() if p.is_floating_point()), torch.empty(0))
        self.device, self.dtype = like.device, like.dtype

    def costs(self, name: str) -> Costs:
        """What a model costs by counting."""
        model = self.net.base if name == BASE else self.net.detach(name, share=True)
        tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}.values()
        plan = self.net.plan[name]
        accuracy = self.net.accuracy.get(name)
        return Costs(name, plan.macs, plan.num_params, sum(t.nbytes for t in tensors), accuracy)

    def prepare(self, images: Tensor) -> Tensor:
        """Images `(B, C, H, W)` in the family's type, on its device."""
        return images.to(self.device, self.dtype)

    def run(self, name: str, images: Tensor) -> Tensor:
        """Output `(B, num_classes)` of a model; a CUDA device has finished."""
        with num_threads(self.threads), torch.no_grad():
            output = logits(self.net(images, which=name))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return output


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
