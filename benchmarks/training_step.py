"""What does training a whole family cost, in one joint pass, in separate passes, and beside the base-model alone?

    python benchmarks/training_step.py [--quick] [--json FILE] [--device cuda] [--threads N]
        [--compile] [--layouts] [--only TEXT]

One step is the trainer's (`TrainingStep`): forward, the sum of the models' losses, backward and update (SGD with
momentum), on random images.
`separate` runs each model by itself and adds the losses up before one backward pass, which is how the paper
reads; `freed` is the same with a backward pass after each model, which frees its activations before the next
(`train.strategy = "separate"`); `joint` is `net(images, which="all")`. All run in turn on one family. `sum_ratio`
is the sum of all models' multiply-accumulates over the base-model's, `mac_ratio` the same with what sub-models
share with the base-model counted once: what joint ÷ base is where arithmetic is all that counts. Freed memory is
kept, as `detachnet train` has it.

With `--compile` forward passes and losses run through torch.compile, as with `train.compile`, and `joint_to_plain`
is the joint step over the same one without it. With `--layouts` nothing but the joint step is timed, on
channels-last images, as training has them, and on channels-first ones; `last_to_first` is their ratio.

Memory is what two steps add at their highest to a family that is made already: activations, gradients, momentum;
always without torch.compile. On CUDA torch's allocator tells it, on Linux the highest resident memory of a process
per alternative.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

import detachnet
from common import Row, Target, arguments, begin, report, time_in_turn, write
from detachnet.memory import give_back, keep_freed, measure_here
from detachnet.surgery.plan import Norm
from detachnet.training.step import TrainingStep

WAYS = ("base", "separate", "freed", "joint")
BATCHES = (32, 128)
LIMITS = {"cpu": 0.80, "cuda": 0.60}
"""Of joint ÷ separate, at batch 32."""
SPANS = {"cpu": (24, 5), "cuda": (3, 20)}
"""Seconds of a case, and rounds at least."""
CUDA_BASE_LIMIT = 1.6
"""Of joint ÷ base on CUDA at batch 32; on the CPU that is the ratio of MACs."""


@dataclass(frozen=True)
class Case:
    """A family, a batch size and whose batch norms the sub-models use; `drop` says what each leaves out."""

    label: str
    model: str
    drop: tuple[tuple[str, ...], ...]
    size: int
    norm: Norm = "private"
    batch: int = 32
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.label}, {self.norm} norms, batch {self.batch}"


VGG = partial(Case, model="detachnet:vgg16_cifar", drop=((":features.6",), (":features.23",)), size=32)
RESNET18 = partial(
    Case,
    model="torchvision:resnet18",
    drop=((":layer1",), (":layer2",)),
    size=32,
    kwargs={"num_classes": 10},
)
SMALL = (partial(VGG, "VGG-16-BN/32"), partial(RESNET18, "ResNet-18/32"))
ROUTES = (
    VGG(
        "VGG-16-BN/32, late route",
        drop=(("features.16:features.22", "features.26:features.32", "features.36:features.42"),),
        batch=128,
    ),
    RESNET18("ResNet-18/32, late route", drop=(("layer3.0:layer3.1", "layer4.0:layer4.1"),), batch=128),
)
"""Most of what their sub-model runs is shared with the base-model."""
LARGE = (
    partial(Case, "ResNet-50/224", "torchvision:resnet50", ((":layer1",), (":layer2",)), 224),
    partial(Case, "MobileNetV3/224", "torchvision:mobilenet_v3_large", ((":features.3",), (":features.6",)), 224),
)
LAYOUTS = (SMALL[0](batch=128), LARGE[0](batch=16))
"""Networks whose images' layout counts: wide, and of large images."""
QUICK = (VGG("VGG-16-BN/32, half width", kwargs={"width": 0.5}), SMALL[1]())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--compile", action="store_true", help="forward passes and losses through torch.compile")
    parser.add_argument(
        "--layouts", action="store_true", help="only the joint step, with both layouts of images in memory"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases with this in their name")
    options = begin(parser)
    keep_freed()
    if options.layouts:
        report(options, [measure_layouts(case, options) for case in (QUICK if options.quick else LAYOUTS)])
        return
    rows, targets = [], []
    for case in QUICK if options.quick else cases():
        if options.only not in case.name:
            continue
        if reason := left_out(case, rows, options.device):
            print(f"left out: {case.name}: {reason}")
            continue
        row = measure(case, options, *((6, 3) if options.quick else SPANS[options.device.type]))
        rows.append(row)
        targets += judge(case, row, options.device)
        write(options, rows, targets, compiled=options.compile)  # a full run takes long
    report(options, rows, targets, compiled=options.compile)


def cases() -> Iterator[Case]:
    """All that is measured: at 32×32 both kinds of norms, at 224×224 private ones."""
    for family in SMALL:
        yield from (family(norm=norm, batch=batch) for norm in get_args(Norm) for batch in BATCHES)
    yield from ROUTES
    for family in LARGE:
        yield from (family(batch=batch) for batch in BATCHES)


def left_out(case: Case, rows: Sequence[Row], device: torch.device) -> str:
    """Why a case is not measured, from what the same family took with the smaller batch; nothing if it is."""
    same = [row for row in rows if (row["model"], row["norm"]) == (case.label, case.norm)]
    images = [(row[f"{way}_mb"] or 0) / row["batch"] for row in same for way in WAYS]
    most = max(images, default=0) * 1e6 * case.batch
    if most and most > 0.9 * (there := total_memory(device)):
        return f"it would take {most / 1e9:.0f} GB of the {there / 1e9:.0f} GB there are"
    return ""


def total_memory(device: torch.device) -> int:
    """Bytes, of the device or the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class Step:
    """The trainer's step of a family, in each of the ways; its layers that do not take part cost nothing."""

    def __init__(
        self,
        case: Case,
        device: torch.device,
        compiled: bool = False,
        layout: torch.memory_format = torch.channels_last,  # as the trainer has it
    ) -> None:
        torch.manual_seed(0)
        model = detachnet.create_model(case.model, **case.kwargs)
        size = (3, case.size, case.size)
        models = {f"sub{i}": detachnet.SubModel(drop=spans) for i, spans in enumerate(case.drop)}
        net = detachnet.make_detachable(model, models, size, norm=case.norm, check="none")  # the tests compare it
        self.net = net.to(device).train()
        self.net.to(memory_format=layout if device.type == "cuda" else torch.preserve_format)
        self.images = torch.randn(case.batch, *size, device=device).contiguous(memory_format=layout)
        self.target = torch.randint(10, (case.batch,), device=device)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4, fused=device.type == "cuda"
        )
        if compiled:
            torch._dynamo.reset()  # what earlier families left
            for name in self.net.names:
                self.net.prepare((name,))
        self.ways = {way: self.make(way, compiled) for way in WAYS}

    def make(self, way: str, compiled: bool) -> TrainingStep:
        """The step in one of the ways."""
        return TrainingStep(
            self.net,
            self.net.names[:1] if way == "base" else self.net.names,
            detachnet.MultiModelLoss(),
            self.optimizer,
            strategy="separate" if way == "freed" else "joint",
            forward=self.one_by_one if way == "separate" else None,
            compiled=compiled,
        )

    def one_by_one(self, images: Tensor, which: Sequence[str], features: bool) -> dict[str, Tensor]:
        """The outputs of some models, each from a pass of its own."""
        assert not features
        outputs: dict[str, Tensor] = {}
        for name in which:
            outputs |= self.net(images, which=(name,))
        return outputs

    def run(self, way: str) -> None:
        """Make a step."""
        self.ways[way](self.images, self.target)


def measure(case: Case, options: argparse.Namespace, seconds: float, least: int) -> Row:
    """Times, ratios and memory of one case."""
    step = Step(case, options.device, options.compile)
    base, *subs = step.net.plan.models
    macs, run_once = base.macs + sum(sub.macs for sub in subs), sum(sub.shared_macs for sub in subs)
    runs = {way: partial(step.run, way) for way in WAYS}
    if options.compile:
        runs["plain"] = partial(Step(case, options.device).run, "joint")
    for name in ("joint", *runs):
        runs[name]()  # one that trains all first: torch's fused update wants a momentum of every parameter
    timing = time_in_turn(runs, options.device, seconds, least)
    del step, runs
    gc.collect()
    give_back()  # what runs next is measured in processes of their own
    memory = {way: added_memory(case, way, options) for way in WAYS}
    return {
        "model": case.label,
        "norm": case.norm,
        "batch": case.batch,
        **{f"{way}_ms": timing.median_ms(way) for way in WAYS},
        "joint_to_separate": timing.ratio("joint", "separate"),
        "joint_to_base": timing.ratio("joint", "base"),
        "mac_ratio": (macs - run_once) / base.macs,
        "sum_ratio": macs / base.macs,
        **({"joint_to_plain": timing.ratio("joint", "plain")} if options.compile else {}),
        **{f"{way}_mb": memory[way] and memory[way] / 1e6 for way in WAYS},
        "n": timing.n,
    }


def measure_layouts(case: Case, options: argparse.Namespace) -> Row:
    """Times of the joint step with both layouts of images in memory."""
    layouts = {"last": torch.channels_last, "first": torch.contiguous_format}
    runs = {name: partial(Step(case, options.device, layout=of).run, "joint") for name, of in layouts.items()}
    timing = time_in_turn(runs, options.device, *((6, 2) if options.quick else (60, 3)))
    return {
        "model": case.label,
        "norm": case.norm,
        "batch": case.batch,
        **{f"{name}_ms": timing.median_ms(name) for name in layouts},
        "last_to_first": timing.ratio("last", "first"),
        "n": timing.n,
    }


def judge(case: Case, row: Row, device: torch.device) -> list[Target]:
    """The targets: where models share MACs that joint ÷ base follows them, of the others those of batch 32."""
    if row["mac_ratio"] < row["sum_ratio"]:
        return [Target(f"{case.name}: joint ÷ base", row["joint_to_base"], 1.03 * row["mac_ratio"])]
    if case.batch != 32:
        return []
    base_limit = row["mac_ratio"] if device.type == "cpu" else CUDA_BASE_LIMIT
    return [
        Target(f"{case.name}: joint ÷ separate", row["joint_to_separate"], LIMITS[device.type]),
        Target(f"{case.name}: joint ÷ base", row["joint_to_base"], base_limit),
    ]


def added_memory(case: Case, way: str, options: argparse.Namespace) -> int | None:
    """Bytes that training adds to a family; None where the system cannot tell."""
    if options.device.type == "cuda":
        return cuda_memory(case, way, options.device)
    if not Path("/proc/self/clear_refs").exists():
        return None
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:
        return alone.submit(resident_memory, case, way, options.threads).result()


def resident_memory(case: Case, way: str, threads: int) -> int:
    """Of this process."""
    torch.set_num_threads(threads)
    keep_freed()
    step = Step(case, torch.device("cpu"))
    torch.nn.Conv2d(3, 8, 3)(torch.randn(1, 3, 32, 32))  # what the library sets up once is not the model's
    return measure_here(lambda: partial(step.run, way), runs=2)


def cuda_memory(case: Case, way: str, device: torch.device) -> int:
    """Of torch's allocator."""
    step = Step(case, device)
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        step.run(way)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


if __name__ == "__main__":
    main()
