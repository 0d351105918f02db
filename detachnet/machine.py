"""The machine, in words."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from detachnet.errors import MeasurementError

MOST_THREADS = 4096
"""Of the CPU, per run: no machine has more cores."""


def find_threads(threads: int | None) -> int:
    """Threads of the CPU per run; torch's present number by default.

    Raises:
        MeasurementError: It is no such number.
    """
    if threads is None:
        return torch.get_num_threads()
    if not isinstance(threads, int) or not 1 <= threads <= MOST_THREADS:
        bound = f"at most {MOST_THREADS}" if isinstance(threads, int) and threads > 1 else "at least 1"
        raise MeasurementError(f"threads={threads!r}: it is {bound}")
    return threads


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


def hardware(device: torch.device) -> dict[str, str]:
    """The machine, in words."""
    cpu = f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
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
