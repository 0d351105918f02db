"""What do sub-models with fewer filters cost: on disk, in time, and as slices of one file of weights?

    python benchmarks/widths.py [--quick] [--only storage|latency|loading] [--json FILE] [--threads N]

`storage`: bytes of a family of a base-model and sub-models 0.75, 0.5 and 0.25 as wide over those of the base-model
alone, as one file and as an ONNX folder, and the file of each detached sub-model. Norms differ in every model, as
after training.

`latency`: a narrower network detached, batch 1, over the base-model, in PyTorch and ONNX Runtime, with its
channels in multiples of 8 and of 16. `mac_ratio` is its share of the multiply-accumulates: what a machine would
take that only computes.

`loading`: ONNX graphs that slice the weights of the base-model beside graphs with small weights of their own:
milliseconds to open one, resident memory that it takes, and latency, each in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

import detachnet
from common import Row, Target, arguments, begin, report, time_in_turn
from detachnet.deploy.backends import OnnxBackend
from detachnet.surgery.trace import trace
from detachnet.surgery.widths.choice import choose
from detachnet.surgery.widths.propagation import find_channels
from detachnet.surgery.widths.slicing import slice_model

WIDTHS = (0.75, 0.5, 0.25)
PARTS = ("storage", "latency", "loading")
DIVISORS = (8, 16)
PROCESSES = 3


@dataclass(frozen=True)
class Case:
    """A base-model.

    Attributes:
        label: In the tables.
        name: In the zoo.
        image: Shape of one image.
        limit: What a family may take over its base-model.
        kwargs: Of the model.
    """

    label: str
    name: str
    image: tuple[int, int, int]
    limit: float
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def model(self) -> nn.Module:
        """The base-model, initialized from a seed."""
        torch.manual_seed(0)
        return detachnet.create_model(self.name, **self.kwargs).eval()

    def family(self, image: tuple[int, int, int] | None = None) -> detachnet.DetachableNet:
        """With norms that differ from model to model."""
        net = detachnet.make_detachable(self.model(), widths=WIDTHS, input_size=image or self.image, check="none")
        with torch.no_grad():
            for tensor in [*net.norms.parameters(), *net.norms.buffers()]:
                if tensor.is_floating_point():
                    tensor.mul_(1 + 0.1 * torch.rand_like(tensor))
        return net.eval()


CASES = (
    Case("VGG-16-BN/32", "detachnet:vgg16_cifar", (3, 32, 32), 1.02),
    Case("ResNet-50/224", "torchvision:resnet50", (3, 224, 224), 1.02),
    Case("MobileNetV3-Large/224", "torchvision:mobilenet_v3_large", (3, 224, 224), 1.05),
)
LITTLE = (Case("VGG-16-BN/32, a quarter", "detachnet:vgg16_cifar", (3, 32, 32), 1.02, {"width": 0.25}),)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", choices=PARTS, help="one of the three")
    parser.add_argument("--open", nargs=2, metavar=("FOLDER", "MODEL"), help=argparse.SUPPRESS)
    options = begin(parser)
    if options.open:
        print(json.dumps(open_here(Path(options.open[0]), options.open[1], options)))
        return
    cases = LITTLE if options.quick else CASES
    rows, targets = [], []
    for part in [options.only] if options.only else PARTS:
        for case in cases:
            new = list(MEASURES[part](case, options))
            rows += [{"part": part, **row} for row in new]
            targets += limits(case, new) if part == "storage" else []
    for part in PARTS:
        show = [row for row in rows if row["part"] == part]
        if show:
            report(argparse.Namespace(**vars(options) | {"json": None}), show)
    report(options, [], targets, parts=rows)


def storage(case: Case) -> Iterator[Row]:
    """Bytes of a family's file and ONNX folder; they do not depend on the images' size, which is small here."""
    net = case.family((3, 64, 64) if case.image[1] > 64 else case.image)
    with TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's libraries about each other
        folder = Path(name)
        detachnet.save(net, folder / "family")
        for model in net.names:
            detachnet.save(net, folder / f"{model}.alone", which=model)
        detachnet.export(net, folder / "onnx")
        detachnet.export(net, folder / "onnx-base", models=["base"])
        alone = {model: (folder / f"{model}.alone").stat().st_size for model in net.names}
        family, onnx, onnx_base = (num_bytes(folder / part) for part in ("family", "onnx", "onnx-base"))
    yield {
        "network": case.label,
        "base_mb": alone["base"] / 1e6,
        "family_mb": family / 1e6,
        "file_ratio": family / alone["base"],
        "onnx_base_mb": onnx_base / 1e6,
        "onnx_mb": onnx / 1e6,
        "onnx_ratio": onnx / onnx_base,
        **{f"detached_{width}_mb": alone[f"sub{i}"] / 1e6 for i, width in enumerate(WIDTHS)},
    }


def num_bytes(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    return sum(part.stat().st_size for part in path.iterdir()) if path.is_dir() else path.stat().st_size


def limits(case: Case, rows: list[Row]) -> list[Target]:
    """What a family may take on disk."""
    what = {"file_ratio": "family's file ÷ base-model's", "onnx_ratio": "family's ONNX folder ÷ base-model's"}
    return [Target(f"{case.label}: {text}", row[key], case.limit) for row in rows for key, text in what.items()]


def latency(case: Case, options: argparse.Namespace) -> Iterator[Row]:
    """Narrower networks over the base-model, in turn."""
    model, images = case.model(), torch.randn(1, *case.image)
    traced = trace(model, case.image)
    channels, total = find_channels(traced), sum(traced.eval.macs.values())
    networks, shares = {"base": model}, {"base": 1.0}
    for divisor in DIVISORS:
        for width in WIDTHS:
            kept = choose(channels, width, divisor=divisor)
            networks[f"{width}, multiples of {divisor}"] = slice_model(model, traced, kept)
            shares[f"{width}, multiples of {divisor}"] = kept.macs / total
    seconds = 2.0 if options.quick else 30.0
    with TemporaryDirectory() as name:
        places = {key: Path(name) / str(i) for i, key in enumerate(networks)}
        backends = {key: as_onnx(networks[key], case.image, place, options) for key, place in places.items()}
        runs = {
            "torch": {key: partial(network, images) for key, network in networks.items()},
            "onnx": {key: partial(backend.run, "base", images) for key, backend in backends.items()},
        }
        with torch.inference_mode():
            timings = {runtime: time_in_turn(of, options.device, seconds) for runtime, of in runs.items()}
    for key in networks:
        yield {
            "network": case.label,
            "width": key,
            "mac_ratio": shares[key],
            **{f"{runtime}_ms": timing.median_ms(key) for runtime, timing in timings.items()},
            **{f"{runtime}_to_base": timing.ratio(key, "base") for runtime, timing in timings.items()},
            "n": min(timing.n for timing in timings.values()),
        }


def as_onnx(
    network: nn.Module, image: tuple[int, int, int], folder: Path, options: argparse.Namespace
) -> OnnxBackend:
    """A network in ONNX Runtime."""
    net = detachnet.make_detachable(network, {}, image, check="none").eval()  # a family of one
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        detachnet.export(net, folder)
    return OnnxBackend(folder, options.threads)


def loading(case: Case, options: argparse.Namespace) -> Iterator[Row]:
    """Sliced graphs beside copies, each opened in processes of their own, in turn."""
    net = case.family()
    with TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        detachnet.export(net, folder / "slices")
        for model in net.names[1:]:
            detachnet.export(net, folder / model, models=[model])
        for i, width in enumerate(WIDTHS):
            places = {"slices": folder / "slices", "copies": folder / f"sub{i}"}
            seen: dict[str, list[dict[str, float]]] = {kind: [] for kind in places}
            for _ in range(1 if options.quick else PROCESSES):
                for kind, place in places.items():
                    seen[kind].append(open_apart(place, f"sub{i}", options))
            for kind, found in seen.items():
                values = {key: median(one[key] for one in found) for key in found[0]}
                yield {"network": case.label, "width": width, "graph": kind, **values, "processes": len(found)}


def open_apart(folder: Path, model: str, options: argparse.Namespace) -> dict[str, float]:
    """What `open_here` finds in a process of its own."""
    command = [sys.executable, __file__, "--open", str(folder), model, "--threads", str(options.threads)]
    command += ["--quick"] if options.quick else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def open_here(folder: Path, model: str, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds to open a model, its resident memory, and milliseconds of a run."""
    import onnxruntime  # noqa: F401  # loading it is not the model's

    before, began = resident_bytes(), time.perf_counter()
    backend = OnnxBackend(folder, options.threads, [model])
    loaded, memory = time.perf_counter(), resident_bytes()
    images = torch.randn(1, *backend.input_size)
    run = partial(backend.run, model, images)
    timing = time_in_turn({model: run}, options.device, 0.5 if options.quick else 2.0)
    return {
        "load_ms": 1e3 * (loaded - began),
        "resident_mb": (memory - before) / 1e6,
        "latency_ms": timing.median_ms(model),
    }


def resident_bytes() -> int:
    """Resident memory of this process; Linux tells it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


MEASURES = {"storage": lambda case, _: storage(case), "latency": latency, "loading": loading}


if __name__ == "__main__":
    main()
