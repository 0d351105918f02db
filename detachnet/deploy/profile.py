"""net -> latency, throughput, peak memory, MACs, parameters and bytes of each model, measured side by side."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from detachnet.checkpoint.saving import save
from detachnet.deploy.backends import Backend, Costs, OnnxBackend, TorchBackend
from detachnet.deploy.measurement import Measurement, Runtime
from detachnet.deploy.peak import resident_peaks
from detachnet.errors import CheckpointError, MeasurementError, nearest
from detachnet.fields import Fields, read_error
from detachnet.machine import OtherWork, find_device, find_threads, hardware, versions
from detachnet.progress import counted
from detachnet.storage import locate, read_file, replace_file
from detachnet.surgery.detachable import DetachableNet, family_in
from detachnet.surgery.modules import evaluating
from detachnet.text import Table, parse_json, si

logger = logging.getLogger("detachnet")
NOT_ASKED = "not asked for"


class Profile(Fields):
    """The measurements of a family's models; prints as a table.

    Attributes:
        format_version: Raised when the meaning of a file changes.
        rows: One per model, the base-model first.
        hardware: Device, number of CPU cores, architecture and operating system.
        versions: Of Python and the libraries that ran.
        memory: How peak memory was measured, or why not.
    """

    refused_as = {"": MeasurementError}

    format_version: Literal[1] = 1
    rows: Annotated[tuple[Measurement, ...], Field(min_length=1)]
    hardware: dict[str, str]
    versions: dict[str, str]
    memory: str

    @model_validator(mode="after")
    def _is_of_one_machine(self) -> Profile:
        if "device" not in self.hardware:
            raise ValueError("hardware names no device")
        return self

    def __getitem__(self, model: str) -> Measurement:
        rows = {row.model: row for row in self.rows}
        if model not in rows:
            raise MeasurementError(
                f"the profile has no model {model!r}",
                hint=f"the models are {', '.join(rows)}",
                nearest=nearest(str(model), rows),
            )
        return rows[model]

    @property
    def title(self) -> str:
        """The heading of the table."""
        row = self.rows[0]
        threads = f"{row.threads} thread" + ("s" if row.threads > 1 else "")
        runs = f"n = {row.n} after {row.warmup} to warm up"
        return f"{row.runtime} on {self.hardware['device']}, batch {row.batch}, {threads}, {runs}"

    @property
    def table(self) -> Table:
        """One row per model."""
        header = (
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
        rows = tuple(
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
        )
        return Table(header, rows, self.title, (f"peak MB: {self.memory}",))

    def __str__(self) -> str:
        return str(self.table)


def profile(
    family: DetachableNet | str | Path,
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
        family: A net, or a folder that `export` wrote in ONNX.
        device: `cpu` or `cuda`.
        batch: Images per run.
        threads: Threads of the CPU; torch's present number by default.
        n: Timed runs per model.
        warmup: Runs per model before these.
        peak_memory: Measure that too, which takes a few seconds per model.

    Raises:
        TraceError: This is no family.
        MeasurementError: The device is not there, or a number is out of range.
        ExportError: The folder is no complete export to ONNX, or ONNX Runtime is not installed.
    """
    settings = _Settings(device, batch, threads, n, warmup)
    if not isinstance(family, str | Path):
        return _profile_net(family_in(family), settings, peak_memory)
    return _profile_export(Path(family), settings, peak_memory)


MOST = 1_000_000
"""Images per run, and runs."""


class _Settings:
    """The arguments of `profile`, checked."""

    def __init__(self, device: str | torch.device, batch: int, threads: int | None, n: int, warmup: int) -> None:
        for name, value, least in (("batch", batch, 1), ("n", n, 1), ("warmup", warmup, 0)):
            if not hasattr(value, "__index__"):
                raise MeasurementError(f"{name}={value!r}: it is a whole number")
            if not least <= value <= MOST:
                bound = f"at least {least}" if value < least else f"at most {MOST}"
                raise MeasurementError(f"{name}={value}: it is {bound}")
        self.device = find_device(device)
        self.batch, self.n, self.warmup = batch, n, warmup
        self.threads = find_threads(threads)

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


def _profile_net(net: DetachableNet, settings: _Settings, peak_memory: bool) -> Profile:
    """Through torch, on a copy where the family lives on another device."""
    here = next(net.parameters(), torch.empty(0)).device
    device = settings.device
    if here.type != device.type or device.index not in (None, here.index):
        net = net.copied().to(device)
    backend = TorchBackend(net, settings.threads)
    with evaluating(net):
        seconds = _alternate_models(backend, settings)
        peaks, how = _net_peaks(backend, settings) if peak_memory else ({}, NOT_ASKED)
    return _profile(backend, settings, seconds, peaks, how)


def _profile_export(folder: Path, settings: _Settings, peak_memory: bool) -> Profile:
    """Through ONNX Runtime."""
    if settings.device.type != "cpu":
        raise MeasurementError(f"ONNX graphs are measured on the CPU, not on {settings.device}")
    backend = OnnxBackend(folder, settings.threads)
    seconds = _alternate_models(backend, settings)
    if not peak_memory:
        return _profile(backend, settings, seconds, {}, NOT_ASKED)
    peaks, how = resident_peaks("onnx", folder, backend.names, settings.batch, settings.threads)
    return _profile(backend, settings, seconds, peaks, how)


def _alternate_models(backend: Backend, settings: _Settings) -> dict[str, list[float]]:
    """Seconds of the runs of each model."""
    images = example(backend, settings.batch)
    runs = {name: partial(backend.run, name, images) for name in backend.names}
    other_work = OtherWork(settings.threads)
    with other_work:
        seconds = alternate(runs, settings.n, settings.warmup)
    other_work.tell()
    return seconds


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
    for _ in counted(range(n), n, "runs of each model"):
        for name, run in runs.items():
            began = clock()
            run()
            seconds[name].append(clock() - began)
    return seconds


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
        try:
            save(net, path)
        except CheckpointError as error:  # a model of the zoo's was changed, for one
            return {}, f"not measured: {error.summary}"
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


def write_profile(measured: Profile, path: str | Path) -> Path:
    """Write a profile beside the checkpoint, or into the export folder, that it is of.

    Raises:
        CheckpointError: It cannot be written.
    """
    where = locate(path).profile
    replace_file(where, (measured.model_dump_json(indent=1) + "\n").encode())
    return where


def read_profile(path: str | Path) -> Profile | None:
    """The profile of a checkpoint or an export folder; None if it was never measured.

    Raises:
        MeasurementError: The file is damaged or of another version.
    """
    where, fields = locate(path).profile, None
    try:
        content = read_file(where)
        fields = parse_json(content)
        return Profile.model_validate_json(content)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise MeasurementError(
            f"{where} is not a profile this version reads",
            what=read_error(error, fields),
            hint=f"detachnet profile {path}",
        ) from error


def profile_of(net: DetachableNet, path: str | Path) -> Profile | None:
    """`read_profile` of the file of a family; without one, and said so, if it was measured on another family.

    Raises:
        MeasurementError: The file is damaged or of another version.
    """
    measured = read_profile(path)
    if measured is not None:
        try:
            check_profile(measured, {model.name: model.macs for model in net.plan.models}, path)
        except MeasurementError as error:
            logger.warning("%s: its latencies are left out", error.summary)
            return None
    return measured


def check_profile(measured: Profile, macs: Mapping[str, int], path: str | Path) -> None:
    """Refuse a profile of another family: it has other models, or they have other costs.

    Args:
        measured: What was measured.
        macs: Model → multiply-accumulates of the family in question.
        path: Where that is.

    Raises:
        MeasurementError: It is one.
    """
    there = {row.model: row.macs for row in measured.rows}
    if macs != there:
        raise MeasurementError(
            f"{locate(path).profile} was measured on another family than {path}",
            what=f"models {', '.join(there)}; this family has {', '.join(macs)}",
            hint=f"detachnet profile {path}",
        )
