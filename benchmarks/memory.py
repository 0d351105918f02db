"""What does a family in ONNX Runtime take in memory, with its weights once and with a copy for each model?

    python benchmarks/memory.py [--quick] [--json FILE] [--threads N]

All models of an export are opened in a process of its own and run once, as `Family.load` opens them by default and
with `shared_memory=True`, whose graphs are made before. Given is what that adds to the process, as Linux counts
it: anonymous memory, which is this process's alone, and the proportional set size (PSS), which also counts what it
maps. Resident memory would count the mapped weights once for each model. The latency is that of the base-model's
shared graph over that of its default one, in turn, in one process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import detachnet
from common import Row, Target, arguments, begin, report, time_in_turn
from detachnet.deploy.backends import OnnxBackend
from detachnet.deploy.cache import optimized_folder
from detachnet.deploy.manifest import read_manifest
from detachnet.memory import give_back

CASES: tuple[tuple[str, str, tuple[str, ...], int, dict[str, Any]], ...] = (
    ("VGG-16-BN/32", "detachnet:vgg16_cifar", ("features.6", "features.23"), 32, {}),
    ("ResNet-18/224", "torchvision:resnet18", ("layer1", "layer2"), 224, {}),
    ("MobileNetV3-L/224", "torchvision:mobilenet_v3_large", ("features.6", "features.12"), 224, {}),
)
WAYS = {"default": False, "shared": True}
FIELDS = {"anonymous": "Anonymous", "pss": "Pss"}
PSS_LIMIT, LATENCY_LIMIT = 0.7, 1.05


def main() -> None:
    options = begin(arguments(__doc__, fixed=True))
    rows, targets = list[Row](), list[Target]()
    for label, model, cuts, size, kwargs in CASES[:1] if options.quick else CASES:
        with TemporaryDirectory() as folder:
            os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
            export(Path(folder) / "family", model, cuts, size, **kwargs)
            row = measure(label, Path(folder) / "family", options)
        rows.append(row)
        pss_ratio = row["shared_pss_mb"] / row["default_pss_mb"]
        targets.append(Target(f"{label}: PSS shared ÷ default", pss_ratio, PSS_LIMIT))
        targets.append(Target(f"{label}: latency shared ÷ default", row["latency_ratio"], LATENCY_LIMIT))
    report(options, rows, targets)


def export(folder: Path, model: str, cuts: tuple[str, ...], size: int, **kwargs: object) -> None:
    """A family whose norms differ in every model, as after training."""
    net = detachnet.make_detachable(detachnet.create_model(model, **kwargs), cuts, (3, size, size)).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
    detachnet.export(net, folder)


def measure(label: str, folder: Path, options: argparse.Namespace) -> Row:
    """A row of a family: memory and loading in processes of their own, then the latency of the base-model."""
    optimized_folder(folder, read_manifest(folder))
    row: Row = {"model": label}
    for way in WAYS:  # before anything is open here: pages that two processes map count half in each
        command = [sys.executable, __file__, "--alone", way, str(folder)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        row |= {f"{way}_{key}": value for key, value in found.items()}
    backends = {way: OnnxBackend(folder, options.threads, shared_memory=WAYS[way]) for way in WAYS}
    name, images = backends["default"].names[0], torch.randn(1, *backends["default"].input_size)
    runs = {way: partial(backend.run, name, images) for way, backend in backends.items()}
    timing = time_in_turn(runs, options.device, seconds=3 if options.quick else 20)
    return row | {"latency_ratio": timing.ratio("shared", "default"), "n": timing.n}


def alone(way: str, folder: str) -> None:
    """What opening all models and running each adds to this process, and the seconds of opening them."""
    import onnx  # noqa: F401  # what loading the libraries takes is not the family's
    import onnxruntime  # noqa: F401

    before, began = counted(), time.perf_counter()
    backend = OnnxBackend(folder, 1, shared_memory=WAYS[way])
    load_s = time.perf_counter() - began
    for name in backend.names:
        backend.run(name, torch.randn(1, *backend.input_size))
    gc.collect()
    give_back()  # what only loading needed
    after = counted()
    said = {f"{key}_mb": (after[field] - before[field]) / 1e6 for key, field in FIELDS.items()}
    print(json.dumps(said | {"load_s": load_s}))


def counted() -> dict[str, int]:
    """Bytes of this process, by the kinds of `/proc/self/smaps_rollup`."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    return {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}


if __name__ == "__main__":
    alone(*sys.argv[2:]) if sys.argv[1:2] == ["--alone"] else main()
