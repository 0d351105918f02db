"""What detachnet makes of every model of torchvision and timm.

    python -m tests.zoo.check [--write] [--sample N [--seed S]] [NAME ...]

Compares with `table.csv`, or writes it and the page of the docs made from it. For each model: the number of valid
cuts, or the exact refusal; the spans that nothing needs to stand for, and the share of the MACs that goes with all
of them. A model that works is made detachable on the meta device with cuts near two thirds and one third of its
MACs, and the shape of every model's output is checked. For one model of each of timm's modules and each of
torchvision's families, joint and separate passes are compared numerically, a route without an inner span among
them, and so is a network of half the width with the one whose dropped filters are zero.
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
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

import detachnet
from detachnet.losses import logits
from detachnet.surgery.analysis import CutAnalysis
from detachnet.surgery.cuts import choose_cuts, cut_points
from detachnet.surgery.graph import TracedModel
from detachnet.surgery.planning import make_plan
from detachnet.surgery.routes import SubModel
from detachnet.surgery.spans import SpanPoint, span_places, span_points
from detachnet.surgery.trace import trace
from detachnet.surgery.tracer import leaves_of
from detachnet.surgery.turns import Turns
from detachnet.zoo import default_input_size
from tests.helpers import without_dropout
from tests.widths import narrowed

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
"""MACs of the largest model of a sample that is; larger ones take up to five minutes."""
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
    spans: str = ""
    left_out: str = ""
    joint: str = ""
    half: str = ""
    whole: str = ""
    narrow: str = ""
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
        spans = inner_spans(traced)
        share = sum(span.macs_of_base for span in apart(traced, spans))
        found = str(len(spans)), f"{share:.2f}" if spans else ""
        return Row(name, family_of(name), str(len(cut_points(traced))), macs, *found, refusal=problem)
    except detachnet.DetachNetError as error:
        details = {line[2:10].strip(): line[11:] for line in str(error).splitlines()[1:]}
        parts = [error.summary, details.get("what", ""), details.get("try", "")]
        return Row(name, family_of(name), refusal="; ".join(filter(None, parts)))


def inner_spans(traced: TracedModel) -> list[SpanPoint]:
    """What can be left out without anything in its place."""
    return [span for span in span_points(traced) if span.bridge is None]


def apart(traced: TracedModel, spans: list[SpanPoint]) -> Iterator[SpanPoint]:
    """Those of some spans that can all be left out at once, front to back."""
    places = [traced.eval.name_of[node] for node in span_places(CutAnalysis(traced.eval))]
    behind = 0
    for span in spans:
        start, end = map(places.index, span.name.split(":"))
        if start >= behind:
            behind = end
            yield span


def some_cuts(traced: TracedModel) -> list[str]:
    """Cuts near two thirds and one third of the MACs; where there are none, that of the smallest sub-model.

    What is left of it may be a classifier, for whose feature one layer makes an image of 331×331 with 15 times the
    base-model's parameters.
    """
    try:
        return choose_cuts(traced, [2 / 3, 1 / 3])
    except detachnet.CutError:
        points = sorted(cut_points(traced), key=lambda point: point.num_params)
        return [point.name for point in points[:1]]


def some_models(traced: TracedModel) -> dict[str, SubModel]:
    """Sub-models without the front, and one without an inner span."""
    models = {f"sub{i}": SubModel(drop=[f":{cut}"]) for i, cut in enumerate(some_cuts(traced))}
    if spans := inner_spans(traced):
        models["inner"] = SubModel(drop=[spans[len(spans) // 2].name])
    return models


def check_family(model: nn.Module, traced: TracedModel) -> str:
    """Make a family on the meta device; what is wrong with its outputs, or nothing."""
    cuts = some_cuts(traced)
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


def compare(name: str) -> tuple[str, dict[str, str]]:
    """What a model that is run gives: the columns of a family's representative."""
    torch.manual_seed(0)
    smaller, size = SMALLER.get(family_of(name), ({}, None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kwargs: dict[str, Any] = {"weights": None} if name.startswith("torchvision:") else {}
        kwargs |= {"weights_backbone": None} if name.startswith("torchvision:") and has_backbone(name) else {}
        model = without_dropout(detachnet.create_model(name, **kwargs | smaller)).double()
    size = size or default_input_size(model) or (3, 224, 224)
    images = torch.randn(1 if family_of(name) in SMALLER else 2, *size, dtype=torch.double)
    large = sum(trace(model, size).eval.macs.values()) > LARGEST_OF_SAMPLE
    narrow = {} if large else check_narrow(copy.deepcopy(model), size)
    return name, {"joint": check_joint(model, size, images), **narrow}


def check_joint(model: nn.Module, size: tuple[int, ...], images: torch.Tensor) -> str:
    """Largest difference between joint and separate passes in training mode, relative to the outputs."""
    models = some_models(trace(model, size))
    together = detachnet.make_detachable(model, models, size, check="none").train()
    single = copy.deepcopy(together)
    turns = Turns(single, single.names)
    with torch.no_grad():
        torch.manual_seed(1)
        outputs = together(images, which="all")
        worst = 0.0
        for other in single.names:
            torch.manual_seed(1)
            with turns.of(other):
                expected, got = logits(single(images, which=other)), logits(outputs[other])
            worst = max(worst, float((expected - got).abs().max() / expected.abs().max().clamp_min(1e-9)))
        for one, two in zip(together.buffers(), single.buffers(), strict=True):
            worst = max(worst, float((one.double() - two.double()).abs().max()) if one.numel() else 0.0)
    return verdict(worst, model)


def check_narrow(model: nn.Module, size: tuple[int, ...]) -> dict[str, str]:
    """A network of half the width: its share of the MACs, what stays whole, and how far off its outputs are."""
    half = narrowed(model, size)
    columns = {
        "half": f"{half.kept.macs_of_base:.2f}",
        "whole": "; ".join(sorted({reason.rpartition("': ")[2] for reason in half.whole.values()})),
    }
    return columns if half.kept.macs_of_base == 1 else columns | {"narrow": verdict(half.error, model)}


def verdict(error: float, model: nn.Module) -> str:
    """Whether a difference is one of rounding."""
    if any(type(module).__name__.endswith("Fp32") for module in model.modules()):
        return f"{error:.0e}" if error > 1e-5 else "equal in float32"
    return f"{error:.0e}" if error > 1e-10 else "equal"


def make_rows(names: list[str], run: Callable[[list[Row]], list[str]]) -> list[Row]:
    """All rows, in the order of the names; `run` says which models are run to be compared."""
    rows = list(progress(in_processes(check, names, WORKERS), len(names), "models"))
    chosen = run(rows)
    large = [row.name for row in rows if row.name in chosen and int(row.macs) > LARGEST_OF_SAMPLE]
    small = [name for name in chosen if name not in large]
    results = dict(progress(in_processes(compare, small, WORKERS), len(small), "comparisons"))
    results |= dict(progress(alone(compare, large), len(large), "comparisons of large models"))
    return [replace(row, **results.get(row.name, {})) for row in rows]


def in_processes(function: Callable[[str], Any], names: list[str], workers: int) -> Iterator[Any]:
    """A function's results in the order of the names; a process that dies ends it with an error."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torchvision", "timm", "detachnet.surgery.plan"])
    for first in range(0, len(names), FRESH * workers):  # `max_tasks_per_child` waits for ever in Python 3.11
        with ProcessPoolExecutor(workers, context) as pool:
            yield from pool.map(function, names[first : first + FRESH * workers])


def alone(function: Callable[[str], Any], names: list[str]) -> Iterator[Any]:
    """The same, each in a process of its own, which is no loss to the others where memory is short."""
    for name in names:
        try:
            yield from in_processes(function, [name], 1)
        except BrokenProcessPool:
            yield name, {"joint": "its process died: is there memory left?"}


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
near two thirds and one third of its MACs, and the outputs' shapes are checked. *Left out* is the share of the MACs
that goes with all spans that nothing needs to stand for (`find_spans`).

The model of each family with the fewest MACs is run, in float64, on two images (one for DeepSeek-ViT, Gemma4-ViT
and Qwen3-ViT, at a smaller size, and for MViT): joint and separate passes in training mode, with the two cuts and
a route without an inner span; and a network of half the width (`SubModel(width=0.5)`), which must give what the
model gives when the filters that were left out are zero. *Half width* is its share of the MACs: a quarter where
every filter can go; what stays whole is below. Norms that compute in float32 whatever they are given are equal to
its precision.

Networks of packages that detachnet knows nothing of are in `tests/zoo/packages.csv`:
`python -m tests.zoo.packages` compares them with their families, in an environment of its own. CI does not."""
COLUMNS = (
    "| family | models | work | cuts | left out | run | joint = separate | half width | narrow = zeroed |",
    "| --- | ---: | ---: | ---: | ---: | --- | --- | ---: | --- |",
)


def page(rows: list[Row]) -> str:
    """The page of the docs."""
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__}
    good = sum(works(row) for row in rows)
    lines = [
        INTRODUCTION,
        "",
        f"{good} of {len(rows)} models work, with "
        + ", ".join(f"{name} {number.partition('+')[0]}" for name, number in versions.items())
        + ".",
        "",
        *COLUMNS,
    ]
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    lines += [line_of(family, members) for family, members in families.items()]
    whole = grouped((reason, row.family) for row in rows if row.half for reason in row.whole.split("; ") if reason)
    lines += ["", "## Filters that stay", "", *listed(whole)]
    refusals = grouped((row.refusal, row.name) for row in rows if row.refusal)
    lines += ["## Refusals", "", *listed(refusals)]
    return "\n".join(lines).rstrip() + "\n"


def works(row: Row) -> bool:
    """Whether a model can be made detachable."""
    return bool(row.cuts) and not row.refusal


def line_of(family: str, members: list[Row]) -> str:
    """A family's line of the page."""
    good = [row for row in members if works(row)]
    cuts = sorted(int(row.cuts) for row in good)
    shares = sorted(float(row.left_out or 0) for row in good)
    ran = next((row for row in members if row.joint), Row("", ""))
    cells = (
        family,
        str(len(members)),
        str(len(good)),
        f"{cuts[0]}–{cuts[-1]}" if cuts else "",
        f"{100 * shares[0]:.0f}–{100 * shares[-1]:.0f} %" if shares else "",
        ran.name.partition(":")[2],
        ran.joint,
        f"{100 * float(ran.half):.0f} %" if ran.half else "",
        ran.narrow,
    )
    return f"| {' | '.join(cells)} |"


def grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """What each reason holds for."""
    found: dict[str, list[str]] = {}
    for reason, name in pairs:
        found.setdefault(reason, []).append(name)
    return found


def listed(groups: dict[str, list[str]]) -> Iterator[str]:
    """Reasons and names, as Markdown."""
    for reason, names in groups.items():
        yield from (f"- {reason}", "", f"    {', '.join(f'`{name}`' for name in names)}", "")


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
    unseen = dict.fromkeys(("joint", "half", "whole", "narrow"), "")
    expected = {n: row if n in compared else replace(row, **unseen) for n, row in known.items()}
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
