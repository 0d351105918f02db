"""plain module -> seconds that it takes on this machine, through the runtime that it is to run in."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import get_args

import torch
from torch import Tensor, nn

from detachnet.deploy.backends import num_threads
from detachnet.deploy.formats import Piece, check_installed
from detachnet.deploy.measurement import Runtime
from detachnet.deploy.onnx_session import onnx_session, run_onnx
from detachnet.deploy.onnx_writer import onnx_model
from detachnet.deploy.program import MainOutput
from detachnet.errors import ExportError, MeasurementError, one_line
from detachnet.machine import OtherWork, find_threads, hardware
from detachnet.surgery.modules import copy_model

RUNS, WARMUP = 50, 5
"""Timed runs of a module, and runs before these."""


class Stopwatch:
    """Says how long modules take on this machine; two with the same words measure the same thing.

    Args:
        runtime: `torch`, or `onnx` for ONNX Runtime, which a module is exported for first.
        threads: Threads of the CPU; torch's present number by default.
        device: Where torch runs them; ONNX Runtime is measured on the CPU.

    Attributes:
        other_work: Says whether other processes worked meanwhile.

    Raises:
        MeasurementError: There is no such runtime, or a number is out of range.
        ExportError: ONNX Runtime is not installed.
    """

    def __init__(
        self, runtime: Runtime = "torch", threads: int | None = None, device: str | torch.device = "cpu"
    ) -> None:
        if runtime not in get_args(Runtime):
            raise MeasurementError(f"runtime={runtime!r}: it is {' or '.join(get_args(Runtime))}")
        if runtime == "onnx":
            check_installed("onnx")
        self.runtime = runtime
        self.threads = find_threads(threads)
        self.device = torch.device("cpu" if runtime == "onnx" else device)
        self.other_work = OtherWork(self.threads)

    def __str__(self) -> str:
        threads = f"{self.threads} thread" + "s" * (self.threads != 1)
        return f"{self.runtime}, {threads}, {hardware(self.device)['device']}"

    def __call__(self, module: nn.Module, images: Tensor) -> float:
        """Median seconds of a run.

        Args:
            module: In evaluation mode; it returns a tensor, or what begins with one.
            images: What it is run on, `(B, C, H, W)`, or a feature.

        Raises:
            MeasurementError: The module cannot be exported.
        """
        if self.runtime == "onnx":
            with TemporaryDirectory() as folder, torch.no_grad():
                return self._timed(_exported(module, images, self.threads, Path(folder) / "module.onnx"))
        module, images = module.to(self.device), images.to(self.device)
        with num_threads(self.threads), torch.inference_mode():
            return self._timed(lambda: module(images))

    def _timed(self, run: Callable[[], object]) -> float:
        seconds = []
        with self.other_work:
            for i in range(WARMUP + RUNS):
                began = now(self.device)
                run()
                if i >= WARMUP:
                    seconds.append(now(self.device) - began)
        return median(seconds)


def _exported(module: nn.Module, images: Tensor, threads: int, path: Path) -> Callable[[], object]:
    """A module as ONNX Runtime runs it, from a copy: it stays where it is."""
    names = ("images", "out")
    several = torch.cat([images.cpu().float()] * 3)  # of one image the exporter would keep the one
    try:
        piece = Piece("part", MainOutput(copy_model(module).cpu()).eval(), several, names)
        path.write_bytes(onnx_model(piece).SerializeToString())
        session = onnx_session(path, threads, set())
    except Exception as error:  # whatever an exporter raises
        if isinstance(error, ExportError | OSError):
            raise
        raise MeasurementError("a part of the network cannot be exported", what=one_line(error)) from error
    one = images.cpu().float().contiguous()
    return lambda: run_onnx(session, path, names[1], names[0], one)


def now(device: torch.device) -> float:
    """Seconds, when a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
