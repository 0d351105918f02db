"""What detachnet makes of every model of torchvision and timm.

    python -m tests.zoo.check [--write] [--sample N [--seed S]] [NAME ...]

Compares with `table.csv`, or writes it and the page of the docs made from it. For each model: the number of valid
cuts, or the exact refusal. A model that works is made detachable on the meta device with cuts near two thirds and
one third of its MACs, and the shape of every model's output is checked. For one model of each of timm's modules
and each of torchvision's families, joint and separate passes are compared numerically.
"""

from __future__ import annotations

import argparse
import copy
import csv
import multiprocessing
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

import detachnet
from detachnet.losses import logits
from detachnet.surgery.cuts import CutAnalysis, choose_cuts, cut_points
from detachnet.surgery.plan import make_plan
from detachnet.surgery.trace import trace
from detachnet.surgery.tracer import leaves_of
from detachnet.zoo import default_input_size
from tests.helpers import without_dropout

TABLE = Path(__file__).with_name("table.csv")
TABLE_OF = "1.0.31"
"""The version of timm whose models the table has."""
PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
WORKERS = 2
FRESH = 50
"""Models after which a process gives its memory back by ending."""
LARGEST = 60e9
"""MACs of the largest model that is compared numerically at its own image size."""
LARGEST_OF_SAMPLE = 20e9
"""MACs of the largest model of a sample that is; larger ones take up to 17 GB and four minutes."""
SMALLER: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "timm deepseek_vit": ({"img_size": 112}, (3, 112, 112)),
    "timm gemma4_vit": ({"img_size": 192}, (3, 192, 192)),
    "timm qwen3_vit": ({"img_size": 128}, (3, 128, 128)),
    "torchvision video mvit": ({}, (3, 16, 224, 224)),
}
"""How the larger models, none with batch norms, are built to be compared on one image by two cores."""

torch.set_num_threads(1)


@dataclass(frozen=True)
class Row:
    """One model of the table."""

    name: str
    family: str
    cuts: str = ""
    macs: str = ""
    joint: str = ""
    refusal: str = ""


def every_name() -> list[str]:
    """All names of the table; torchvision's quantized, detection and optical-flow models among them."""
    return [f"torchvision:{n}" for n in torchvision.models.list_models()] + [
        f"timm:{n}" for n in timm.list_models()
    ]


def family_of(name: str) -> str:
    """torchvision's or timm's module."""
    library, _, short = name.partition(":")
    if library == "timm":
        return f"timm {timm.models._registry._model_to_module[short]}"
    module = torchvision.models.get_model_builder(short).__module__
    return module.replace("torchvision.models", "torchvision").replace(".", " ")


def build(name: str, **kwargs: Any) -> nn.Module:
    """A model on the meta device, or on the CPU where its initialization needs numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name.startswith("torchvision:"):
            kwargs |= {"weights": None} | ({"weights_backbone": None} if has_backbone(name) else {})
            kwargs |= {"init_weights": False} if name.endswith(("googlenet", "inception_v3")) else {}
        try:
            with torch.device("meta"):
                return detachnet.create_model(name, **kwargs)
        except (NotImplementedError, RuntimeError, detachnet.ModelError):
            return detachnet.create_model(name, **kwargs)


def has_backbone(name: str) -> bool:
    """Whether a torchvision model fetches weights for a backbone unless told not to."""
    return family_of(name).startswith(("torchvision segmentation", "torchvision detection"))


def left_out(name: str) -> str:
    """Why a model is not tried."""
    family = family_of(name)
    if family.startswith("torchvision quantization"):
        return "left out: quantized kernels have no gradient; make the float model detachable, then quantize"
    if family.startswith("torchvision optical_flow"):
        return "left out: takes two images"
    return ""


def check(name: str) -> Row:
    """One row."""
    if reason := left_out(name):
        return Row(name, family_of(name), refusal=reason)
    try:
        model = build(name).eval()
        traced = trace(model)
        macs = str(sum(traced.eval.macs.values()))
        if not CutAnalysis(traced.eval).valid:
            refusal = "no cut: every inner value is passed by another path"
            return Row(name, family_of(name), "0", macs, refusal=refusal)
        problem = check_family(model, traced)
        return Row(name, family_of(name), str(len(cut_points(traced))), macs, refusal=problem)
    except detachnet.DetachNetError as error:
        details = {line[2:10].strip(): line[11:] for line in str(error).splitlines()[1:]}
        parts = [error.summary, details.get("what", ""), details.get("try", "")]
        return Row(name, family_of(name), refusal="; ".join(filter(None, parts)))


def check_family(model: nn.Module, traced: Any) -> str:
    """Make a family on the meta device; what is wrong with its outputs, or nothing."""
    try:
        cuts = choose_cuts(traced, [2 / 3, 1 / 3])
    except detachnet.CutError:
        cuts = [point.name for point in cut_points(traced)][-1:]
    if not cuts:
        return "no step-down: no cut has a feature that one convolution of the image can produce"
    plan, stepdowns = make_plan(traced, cuts, "private")
    net = detachnet.DetachableNet(model.to("meta"), plan, stepdowns, traced)
    images = traced.eval.image.example(3)
    with torch.device("meta"), torch.no_grad():
        outputs = net.eval()(images, which="all")
        shapes = {
            n: [x.shape for x in leaves_of(out) if isinstance(x, torch.Tensor)] for n, out in outputs.items()
        }
        singles = [x.shape for x in leaves_of(net(images, which=net.names[-1])) if isinstance(x, torch.Tensor)]
    if any(shape != shapes["base"] for shape in [*shapes.values(), singles]):
        return f"outputs differ: {shapes}"
    return ""


def representatives(rows: list[Row]) -> list[str]:
    """The working model of each family with the fewest MACs."""
    smallest: dict[str, Row] = {}
    for row in rows:
        small = row.family in SMALLER or int(row.macs or 0) <= LARGEST
        if row.cuts not in ("", "0") and not row.refusal and small:
            other = smallest.setdefault(row.family, row)
            smallest[row.family] = min(row, other, key=lambda r: int(r.macs))
    return [row.name for row in smallest.values()]


def check_joint(name: str) -> tuple[str, str]:
    """Largest difference between joint and separate outputs in training mode, relative to the outputs."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kwargs = {"weights": None} if name.startswith("torchvision:") else {}
        kwargs |= {"weights_backbone": None} if name.startswith("torchvision:") and has_backbone(name) else {}
        smaller, size = SMALLER.get(family_of(name), ({}, None))
        model = without_dropout(detachnet.create_model(name, **kwargs | smaller)).double()
    size = size or default_input_size(model) or (3, 224, 224)
    traced = trace(model, size)
    try:
        cuts = choose_cuts(traced, [2 / 3, 1 / 3])
    except detachnet.CutError:
        cuts = [point.name for point in cut_points(traced)][-1:]
    together = detachnet.make_detachable(model, cuts, size, check="none").train()
    apart = copy.deepcopy(together)
    images = torch.randn(1 if family_of(name) in SMALLER else 2, *size, dtype=torch.double)
    with torch.no_grad():
        torch.manual_seed(1)
        outputs = together(images, which="all")
        worst = 0.0
        for other in apart.names:
            torch.manual_seed(1)
            expected, got = logits(apart(images, which=other)), logits(outputs[other])
            worst = max(worst, float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-9)))
        for one, two in zip(together.buffers(), apart.buffers(), strict=True):
            worst = max(worst, float((one.double() - two.double()).abs().max()) if one.numel() else 0.0)
    if any(type(module).__name__.endswith("Fp32") for module in model.modules()):
        return name, f"{worst:.0e}" if worst > 1e-5 else "equal in float32"
    return name, f"{worst:.0e}" if worst > 1e-10 else "equal"


def make_rows(names: list[str], joint: Callable[[list[Row]], list[str]]) -> list[Row]:
    """All rows, in the order of the names; `joint` says of which models the joint pass is compared."""
    rows = list(progress(in_processes(check, names, WORKERS), len(names), "models"))
    chosen = joint(rows)
    large = [row.name for row in rows if row.name in chosen and int(row.macs) > LARGEST_OF_SAMPLE]
    small = [name for name in chosen if name not in large]
    results = dict(progress(in_processes(check_joint, small, WORKERS), len(small), "joint passes"))
    results |= dict(progress(in_processes(check_joint, large, 1), len(large), "joint passes of large models"))
    return [Row(**(asdict(row) | {"joint": results.get(row.name, "")})) for row in rows]


def in_processes(function: Callable[[str], Any], names: list[str], workers: int) -> Iterator[Any]:
    """A function's results in the order of the names; a process that dies ends it with an error."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision", "timm", "detachnet.surgery.plan"])
    for first in range(0, len(names), FRESH * workers):  # `max_tasks_per_child` waits for ever in Python 3.11
        with ProcessPoolExecutor(workers, context) as pool:
            yield from pool.map(function, names[first : first + FRESH * workers])


def progress(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
    """Say now and then how far it is."""
    began = time.monotonic()
    for i, item in enumerate(items, start=1):
        yield item
        if i % 100 == 0 or i == total:
            print(f"{i} of {total} {what}, {time.monotonic() - began:.0f} s", flush=True)


def read_table() -> list[Row]:
    """The rows that are checked in."""
    with TABLE.open(newline="") as file:
        return [Row(**row) for row in csv.DictReader(file)]


def write_table(rows: list[Row]) -> None:
    """Write the table."""
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


INTRODUCTION = """\
# Coverage

Generated by `python -m tests.zoo.check --write`; `make zoo` compares. Each model is made detachable with two cuts,
near two thirds and one third of its MACs, and the outputs' shapes are checked; for the model of each
family with the fewest MACs, joint and separate passes are compared in float64 in training mode, on two images
(one for DeepSeek-ViT, Gemma4-ViT and Qwen3-ViT, at a smaller size, and for MViT). Norms that compute in float32
whatever they are given are equal to its precision."""


def page(rows: list[Row]) -> str:
    """The page of the docs."""
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
    good = sum(bool(row.cuts) and not row.refusal for row in rows)
    lines = [
        INTRODUCTION,
        "",
        f"{good} of {len(rows)} models work, with "
        + ", ".join(f"{name} {number.partition('+')[0]}" for name, number in versions.items())
        + ".",
        "",
        "| family | models | work | cuts | joint = separate |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    for family, members in families.items():
        good = [row for row in members if row.cuts and not row.refusal]
        cuts = sorted(int(row.cuts) for row in good)
        compared = next((f"{row.joint} ({row.name.partition(':')[2]})" for row in members if row.joint), "")
        span = f"{cuts[0]}–{cuts[-1]}" if cuts else ""
        lines.append(f"| {family} | {len(members)} | {len(good)} | {span} | {compared} |")
    lines += ["", "## Refusals", ""]
    refusals: dict[str, list[str]] = {}
    for row in rows:
        if row.refusal:
            refusals.setdefault(row.refusal, []).append(row.name)
    for refusal, names in refusals.items():
        lines += [f"- {refusal}", "", f"    {', '.join(f'`{name}`' for name in names)}", ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models; all of them by default")
    parser.add_argument("--write", action="store_true", help="write the table and the page")
    parser.add_argument("--sample", type=int, metavar="N", help="compare so many models, chosen at random")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10_000), help="of the sample")
    options = parser.parse_args()
    began = time.monotonic()
    if options.write:
        rows = make_rows(every_name(), representatives)
        write_table(rows)
        PAGE.write_text(page(rows))
        return
    known = {row.name: row for row in read_table()}
    names = options.names or every_name()
    if options.sample:
        names = sample(names, options.sample, options.seed)
        print(f"{len(names)} models of --seed {options.seed}", flush=True)
    largest = LARGEST_OF_SAMPLE if options.sample else float("inf")
    compared = {n for n, row in known.items() if n in names and row.joint and int(row.macs) <= largest}
    expected = {n: row if n in compared else replace(row, joint="") for n, row in known.items()}
    rows = make_rows(names, lambda rows: [row.name for row in rows if row.name in compared])
    different = [(row, expected.get(row.name)) for row in rows if row != expected.get(row.name)]
    gone = set() if options.names or options.sample else set(known) - set(names)
    for row, was in different:
        print(f"now {row}\nwas {was}")
    for name in sorted(gone):
        print(f"{name} is no longer there")
    print(f"{len(rows)} models, {len(different) + len(gone)} different, {time.monotonic() - began:.0f} s")
    sys.exit(bool(different or gone))


def sample(names: list[str], count: int, seed: int) -> list[str]:
    """Some names, the same for the same seed; of timm's only where the table is of the installed version."""
    if timm.__version__ != TABLE_OF:
        print(f"the table is of timm {TABLE_OF}, this is {timm.__version__}: its models are left out")
        names = [name for name in names if not name.startswith("timm:")]
    return sorted(random.Random(seed).sample(names, min(count, len(names))))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
