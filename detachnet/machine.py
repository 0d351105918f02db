"""The machine, in words."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from detachnet.errors import MeasurementError


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
