"""net -> latency, throughput, peak memory, MACs, parameters and bytes of each model, measured side by side."""

from __future__ import annotations

import copy
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from detachnet.backends import Backend, Costs, Runtime, TorchBackend
from detachnet.checkpoint import replace_file, save
from detachnet.detachable import DetachableNet
from detachnet.errors import MeasurementError
from detachnet.peak import resident_peaks
from detachnet.plan import align, si

NOT_ASKED = "not asked for"


class Measurement(BaseModel):
    """What one model of a family costs, as measured on one machine.

    Attributes:
        model: Its name.
        runtime: `torch`, or `onnx` for ONNX Runtime.
        device: Where it ran.
        batch: Images per run.
        threads: Threads of the CPU per run.
        n: Timed runs, alternating with those of the family's other models.
        warmup: Runs before these.
        p50_s: Median seconds of a run of `batch` images.
        p90_s: Nine of ten runs take no longer.
        p99_s: 99 of 100 runs take no longer.
        images_per_s: Images over the seconds of all timed runs.
        peak_memory_bytes: Memory that holding and running this model alone takes; None if it was not measured.
        macs: Multiply-accumulates for one image.
        num_params: Number of parameters when detached.
        num_bytes: Bytes of its parameters and buffers when detached.
        accuracy: Test accuracy, in [0, 1]; None if it is not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    runtime: Runtime
    device: str
    batch: int
    threads: int
    n: int
    warmup: int
    p50_s: float
    p90_s: float
    p99_s: float
    images_per_s: float
    peak_memory_bytes: int | None
    macs: int
    num_params: int
    num_bytes: int
    accuracy: float | None


class Profile(BaseModel):
    """The measurements of a family's models; prints as a table.

    Attributes:
        format_version: Raised when the meaning of a file changes.
        rows: One per model, the base-model first.
        hardware: Device, number of CPU cores, architecture and operating system.
        versions: Of Python and the libraries that ran.
        memory: How peak memory was measured, or why not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    rows: tuple[Measurement, ...]
    hardware: dict[str, str]
    versions: dict[str, str]
    memory: str

    def __getitem__(self, model: str) -> Measurement:
        return next(row for row in self.rows if row.model == model)

    @property
    def title(self) -> str:
        """The heading of the table."""
        row = self.rows[0]
        threads = f"{row.threads} thread" + ("s" if row.threads > 1 else "")
        runs = f"n = {row.n} after {row.warmup} to warm up"
        return f"{row.runtime} on {self.hardware['device']}, batch {row.batch}, {threads}, {runs}"

    @property
    def header(self) -> tuple[str, ...]:
        """The columns of `cells`."""
        return (
            "model",
            "MACs",
            "parameters",
            "MB",
            "p50 ms",
            "p90 ms",
            "p99 ms",
            "images/s",
            "peak MB",
            "accuracy",
        )

    def cells(self) -> list[tuple[str, ...]]:
        """One row of text per model."""
        return [
            (
                row.model,
                si(row.macs),
                si(row.num_params),
                f"{row.num_bytes / 1e6:.2f}",
                *(f"{1e3 * seconds:.3f}" for seconds in (row.p50_s, row.p90_s, row.p99_s)),
                f"{row.images_per_s:,.0f}",
                "–" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 1e6:.1f}",
                "–" if row.accuracy is None else f"{100 * row.accuracy:.2f} %",
            )
            for row in self.rows
        ]

    def __str__(self) -> str:
        return "\n".join([self.title, *align([self.header, *self.cells()]), f"peak MB: {self.memory}"])


def profile(
    family: DetachableNet,
    device: str | torch.device = "cpu",
    batch: int = 1,
    threads: int | None = None,
    n: int = 100,
    warmup: int = 10,
    peak_memory: bool = True,
) -> Profile:
    """Measure every model of a family on this machine.

    The models are run in turn, `base sub0 sub1 base sub0 …`, in one process, so that whatever else the machine
    does meets all of them alike. A CUDA device is waited for in every run. The family, its modes and the number of
    threads come back as they were.

    Peak memory is what holding and running one model alone adds. On CUDA: the highest value of torch's allocator,
    less the value before the model was copied to the device. On Linux: for each model a process of its own, whose
    highest resident memory while running (`VmHWM`) less that before the model is made is taken; a few hundred
    kilobytes of it vary. Elsewhere, and for models that a file alone cannot bring back: None, and
    `Profile.memory` says why.

    Args:
        family: A net.
        device: `cpu` or `cuda`.
        batch: Images per run.
        threads: Threads of the CPU; torch's present number by default.
        n: Timed runs per model.
        warmup: Runs per model before these.
        peak_memory: Measure that too, which takes a few seconds per model.

    Raises:
        MeasurementError: The device is not there, or a number is out of range.
    """
    return _profile_net(family, _Settings(device, batch, threads, n, warmup), peak_memory)


class _Settings:
    """The arguments of `profile`, checked."""

    def __init__(self, device: str | torch.device, batch: int, threads: int | None, n: int, warmup: int) -> None:
        for name, value, least in (
            ("batch", batch, 1),
            ("threads", threads, 1),
            ("n", n, 1),
            ("warmup", warmup, 0),
        ):
            if value is not None and value < least:
                raise MeasurementError(f"{name}={value}: it is at least {least}")
        self.device = find_device(device)
        self.batch, self.n, self.warmup = batch, n, warmup
        self.threads = threads or torch.get_num_threads()

    def measurement(
        self, runtime: Runtime, costs: Costs, seconds: Sequence[float], peak: int | None
    ) -> Measurement:
        """The row of one model."""
        p50, p90, p99 = np.percentile(seconds, [50, 90, 99]).tolist()
        return Measurement(
            **costs._asdict(),
            runtime=runtime,
            device=str(self.device),
            batch=self.batch,
            threads=self.threads,
            n=self.n,
            warmup=self.warmup,
            p50_s=p50,
            p90_s=p90,
            p99_s=p99,
            images_per_s=self.batch * self.n / sum(seconds),
            peak_memory_bytes=peak,
        )


def find_device(name: str | torch.device) -> torch.device:
    """A device that works.

    Raises:
        MeasurementError: It does not.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise MeasurementError(
            f"this machine has no device {str(name)!r}", what=str(error).splitlines()[0], hint="device='cpu'"
        ) from error
    return device


def _profile_net(net: DetachableNet, settings: _Settings, peak_memory: bool) -> Profile:
    """Through torch, on a copy where the family lives on another device."""
    here = next(net.parameters(), torch.empty(0)).device
    device = settings.device
    if here.type != device.type or device.index not in (None, here.index):
        net = copy.deepcopy(net).to(device)
    backend = TorchBackend(net, settings.threads)
    with evaluating(net):
        seconds = _alternate_models(backend, settings)
        peaks, how = _net_peaks(backend, settings) if peak_memory else ({}, NOT_ASKED)
    return _profile(backend, settings, seconds, peaks, how)


def _alternate_models(backend: Backend, settings: _Settings) -> dict[str, list[float]]:
    """Seconds of the runs of each model."""
    images = example(backend, settings.batch)
    runs = {name: partial(backend.run, name, images) for name in backend.names}
    return alternate(runs, settings.n, settings.warmup)


def _profile(
    backend: Backend,
    settings: _Settings,
    seconds: Mapping[str, Sequence[float]],
    peaks: Mapping[str, int],
    how: str,
) -> Profile:
    """All that was measured, and on what."""
    rows = tuple(
        settings.measurement(backend.runtime, backend.costs(name), seconds[name], peaks.get(name))
        for name in backend.names
    )
    library = {"torch": "torch", "onnx": "onnxruntime"}[backend.runtime]
    return Profile(rows=rows, hardware=hardware(settings.device), versions=versions(library), memory=how)


def example(backend: Backend, batch: int) -> Tensor:
    """Random images `(B, C, H, W)` as a family takes them; the same each time."""
    generator = torch.Generator().manual_seed(0)
    return backend.prepare(torch.randn(batch, *backend.input_size, generator=generator))


def alternate(
    runs: Mapping[str, Callable[[], object]],
    n: int,
    warmup: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of `n` runs of each, in turn (A B A B …), after `warmup` untimed rounds."""
    for _ in range(warmup):
        for run in runs.values():
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(n):
        for name, run in runs.items():
            began = clock()
            run()
            seconds[name].append(clock() - began)
    return seconds


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode; each submodule's own mode comes back."""
    was = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in was:
            module.training = training


def hardware(device: torch.device) -> dict[str, str]:
    """The machine, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    system = f"{platform.machine()}, {platform.system()}"
    return {"device": f"{device.type} ({name})", "cpu_cores": str(os.cpu_count()), "system": system}


def _processor() -> str:
    """The processor's name where the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(*packages: str) -> dict[str, str]:
    """Of Python, detachnet and some packages."""
    found = {package: version(package) for package in ("detachnet", *packages)}
    return {"python": platform.python_version(), **found}


def _net_peaks(backend: TorchBackend, settings: _Settings) -> tuple[dict[str, int], str]:
    """Peak memory of each model in bytes, and how it was measured."""
    net, device = backend.net, settings.device
    if device.type == "cuda":
        images = example(backend, settings.batch)
        return {name: _cuda_peak(net, name, images) for name in net.names}, "torch's CUDA allocator, model alone"
    if device.type != "cpu":
        return {}, f"not measured: no counter is known on {device.type}"
    if net.source is None or any(m.stepdown and m.stepdown.kind == "custom" for m in net.plan.models):
        return {}, "not measured: a process of its own cannot build a model or step-down of the user's own"
    with TemporaryDirectory() as folder:
        path = Path(folder) / "family.safetensors"
        save(net, path)
        return resident_peaks("torch", path, net.names, settings.batch, settings.threads)


def _cuda_peak(net: DetachableNet, name: str, images: Tensor) -> int:
    """What a model of its own adds to torch's allocator, weights included."""
    before = torch.cuda.memory_allocated(images.device)
    model = net.detach(name)
    torch.cuda.reset_peak_memory_stats(images.device)
    with torch.no_grad():
        model(images)
    torch.cuda.synchronize(images.device)
    return torch.cuda.max_memory_allocated(images.device) - before


def profile_path(path: str | Path) -> Path:
    """Where a profile lives: `last.profile.json` beside `last.safetensors`, `profile.json` in an export folder.

    The folder of a run stands for its `last.safetensors`.
    """
    path = Path(path)
    if path.is_dir() and not (path / "last.safetensors").exists():
        return path / "profile.json"
    return (path / "last.safetensors" if path.is_dir() else path).with_suffix(".profile.json")


def write_profile(measured: Profile, path: str | Path) -> Path:
    """Write a profile beside the checkpoint, or into the export folder, that it is of.

    Raises:
        CheckpointError: It cannot be written.
    """
    where = profile_path(path)
    replace_file(where, (measured.model_dump_json(indent=1) + "\n").encode())
    return where


def read_profile(path: str | Path) -> Profile | None:
    """The profile of a checkpoint or an export folder; None if it was never measured.

    Raises:
        MeasurementError: The file is damaged or of another version.
    """
    where = profile_path(path)
    try:
        return Profile.model_validate_json(where.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise MeasurementError(
            f"{where} is not a profile this version reads",
            what="; ".join(line.strip() for line in str(error).splitlines()[:3]),
            hint=f"detachnet profile {path}",
        ) from error
