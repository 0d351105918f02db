"""The machine, in words."""

from __future__ import annotations

import logging
import os
import platform
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from detachnet.errors import MeasurementError

logger = logging.getLogger("detachnet")
MOST_THREADS = 4096
"""Of the CPU, per run: no machine has more cores."""
STAT = Path("/proc/stat")
"""Where Linux counts what all cores did."""
SHORT_S, SPARE = 0.2, 0.25
"""Seconds below which little can be told of other work, and cores that it may take."""


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
    except (RuntimeError, AssertionError, TypeError) as error:  # torch built without CUDA asserts
        given = repr(name) if isinstance(name, str | torch.device) else type(name).__name__
        raise MeasurementError(
            f"this machine has no device {given}", what=str(error).splitlines()[0], hint="device='cpu'"
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


class OtherWork:
    """Sees whether other processes needed cores that what is measured needs itself: `with` it around each part.

    Only where the system counts that, as Linux does.

    Args:
        threads: That is measured with.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._seconds = self._others = 0.0

    def __enter__(self) -> None:
        self._began, self._before = time.perf_counter(), _busy_seconds()

    def __exit__(self, *_: object) -> None:
        after = _busy_seconds()
        if self._before is not None and after is not None:
            self._seconds += time.perf_counter() - self._began
            self._others += after[0] - self._before[0] - (after[1] - self._before[1])

    def tell(self) -> None:
        """Warn if they did."""
        cores = os.cpu_count() or 1
        others = self._others / max(self._seconds, SHORT_S)
        if others > max(0, cores - self.threads) + SPARE:
            logger.warning("other work took %.1f of %d cores meanwhile: at rest this is faster", others, cores)


def _busy_seconds() -> tuple[float, float] | None:
    """Seconds that all cores worked since the machine started, and those of this process."""
    with suppress(OSError, ValueError, IndexError):
        user, nice, system, _, _, *interrupts = map(int, STAT.read_text().split("\n")[0].split()[1:9])
        return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK"), time.process_time()
    return None
