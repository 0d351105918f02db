"""model, alone in a process -> the most resident memory it takes.

Linux keeps the highest resident memory of a process (`VmHWM`) and resets it on demand. A process of its own loads
the family, gives back what loading left behind, notes its resident memory, makes the one model, resets the highest
value and runs the model; the difference is what holding and running that model takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from detachnet.memory import Run, measure_here
from detachnet.progress import counted

HOW = "highest resident memory of a process with this model alone, less that before the model was made"


def resident_peaks(
    runtime: str, path: Path, models: Sequence[str], batch: int, threads: int
) -> tuple[dict[str, int], str]:
    """Peak memory of each model in bytes, each in a process of its own, and how it was measured.

    Args:
        runtime: `torch` or `onnx`.
        path: A checkpoint (`torch`) or an export folder (`onnx`).
        models: Names of models.
        batch: Images per run.
        threads: Threads per run.

    Returns:
        Nothing and the reason where the system cannot tell or a process failed.
    """
    if not Path("/proc/self/clear_refs").exists():
        return {}, "not measured: only Linux tells the highest resident memory of a part of a process"
    peaks = {}
    for model in counted(models, len(models), "models in a process of their own"):
        task = [runtime, str(path), model, str(batch), str(threads)]
        command = [sys.executable, "-m", "detachnet.deploy.peak", *task]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            return {}, f"not measured: the process of {model} failed: {last[0]}"
        peaks[model] = int(json.loads(done.stdout.splitlines()[-1]))
    return peaks, HOW


def _torch(path: str, model: str, batch: int, threads: int) -> int:
    import torch

    from detachnet.checkpoint.loading import load

    torch.set_num_threads(threads)
    net = load(path)
    images = torch.randn(batch, *net.plan.input_size, dtype=next(net.parameters()).dtype)

    def prepare() -> Run:
        alone = net.detach(model)
        return lambda: alone(images)

    with torch.inference_mode():
        torch.nn.Conv2d(3, 8, 3)(torch.randn(1, 3, 32, 32))  # what the library sets up once is not the model's
        return measure_here(prepare)


def _onnx(folder: str, model: str, batch: int, threads: int) -> int:
    import onnxruntime  # noqa: F401  # what loading it takes is not the model's
    import torch

    from detachnet.deploy.backends import OnnxBackend
    from detachnet.deploy.manifest import read_manifest

    images = torch.randn(batch, *read_manifest(folder).input.shape)

    def prepare() -> Run:
        backend = OnnxBackend(folder, threads, [model])
        return lambda: backend.run(model, images)

    return measure_here(prepare)


def main(arguments: Sequence[str]) -> None:
    """Measure one model and write the number for the process that asked."""
    runtime, path, model, batch, threads = arguments
    measure = {"torch": _torch, "onnx": _onnx}[runtime]
    sys.stdout.write(f"{measure(path, model, int(batch), int(threads))}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
