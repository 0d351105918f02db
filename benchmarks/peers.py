"""What do three smaller budgets cost with detachnet, with early exits, and with pruning?

    make .venv/peers/ready  # early exits and pruning, in an environment of their own
    .venv/peers/bin/python benchmarks/peers.py [--quick] [--json FILE] [--threads N]

torchvision's ResNet-18, 1000 classes, 224×224 images, untrained weights: this compares procedures and costs, and
says nothing about accuracy. Each approach makes a set of three models, from the full network down. Two functions
per approach are the code a user writes: `make_*` from a model to files, `deploy_*` from files to one network that
answers. Their bodies are counted, one line per statement however it is broken, imports left out. `train` stands
for a training of the user's own and is only counted; early exits that decide per image also need thresholds,
calibrated on held-out images. `hardest` is an image that asks every exit and leaves at none.

MACs of all are counted the same way: torch's FlopCounterMode, halved, on the deployed network with one image.
Pruning stops at the first step with no more MACs than detachnet's sub-models have, with channels rounded to four,
and once more rounded to sixteen: coarser, but wide vector units like it. Latency: one image, all networks in turn
(A B C A B C …) in one process, 200 runs each after 10 (--quick: 5 after 1). A peer that is missing is named with
the line that installs it, and left out; with none there the exit code is 2.
"""

from __future__ import annotations

import ast
import inspect
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import detachnet
from common import arguments, begin, write
from detachnet.deploy.profile import alternate
from detachnet.machine import versions
from detachnet.text import Table

IMAGE = (1, 3, 224, 224)
CUTS = ["layer1", "layer2"]

Run = Callable[[Tensor], Any]
Train = Callable[[nn.Module], None]


# The code a user writes. Imports of peers are inside: each may be missing.


def make_family(folder: Path, train: Train) -> None:
    model = detachnet.create_model("torchvision:resnet18")
    net = detachnet.make_detachable(model, cuts=CUTS, stepdown="stem")
    train(net)
    detachnet.save(net, folder / "family.safetensors")


def deploy_family(folder: Path, name: str) -> Run:
    return detachnet.load(folder / "family.safetensors").detach(name)


def make_exits(folder: Path, train: Train) -> None:
    from earlyon.models import resnet18_ee
    from earlyon.utils import save_wrapper

    model = resnet18_ee(num_classes=1000, pretrained=False)
    train(model.backbone)
    train(model.exit_heads)
    save_wrapper(model, folder / "exits.pth")


def deploy_exits(folder: Path, name: str) -> Run:
    from earlyon.utils import load_wrapper

    model = load_wrapper(folder / "exits.pth").eval()
    model.config.enabled_exits = [name in (exit.name, "hardest") for exit in model.config.exit_points]
    model.config.confidence_thresholds = [1.0 if name == "hardest" else 0.0 for _ in model.config.exit_points]
    return lambda image: model(image, mode="inference").prediction


def make_stages(folder: Path, train: Train) -> None:
    from earlyon.models import custom_ee
    from earlyon.staged import staged_model

    *front, (_, fc) = torchvision.models.resnet18().named_children()
    backbone = nn.Sequential(OrderedDict([*front, ("flatten", nn.Flatten()), ("fc", fc)]))
    model = custom_ee(backbone, exit_layers=["layer2", "layer3"], num_classes=1000)
    train(model.backbone)
    train(model.exit_heads)
    features = torch.randn(IMAGE)
    for index, stage in enumerate(staged_model(model).eval().stages):
        torch.export.save(torch.export.export(stage, (features,)), folder / f"stage{index}.pt2")
        features, _ = stage(features)


def deploy_stages(folder: Path, name: str) -> Run:
    num_stages = {"e0": 1, "e1": 2, "final": 3}[name]
    stages = [torch.export.load(folder / f"stage{index}.pt2").module() for index in range(num_stages)]

    def run(image: Tensor) -> Tensor:
        features = image
        for stage in stages:
            features, logits = stage(features)
        return logits

    return run


def make_pruned(folder: Path, train: Train, round_to: int) -> None:
    import torch_pruning as tp

    model = torchvision.models.resnet18()
    train(model)
    torch.save(model, folder / "full.pth")
    for name, target in zip(("middle", "small"), targets(), strict=True):
        pruned = deepcopy(model)
        pruner = tp.pruner.BasePruner(
            pruned,
            torch.randn(IMAGE),
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=1.0,
            iterative_steps=200,
            ignored_layers=[pruned.fc],
            round_to=round_to,
        )
        while count_macs(pruned) > target:
            pruner.step()
        train(pruned)
        torch.save(pruned, folder / f"{name}.pth")


def deploy_pruned(folder: Path, name: str) -> Run:
    return torch.load(folder / f"{name}.pth", weights_only=False).eval()


# What is measured.


class Approach(NamedTuple):
    """One way to three budgets.

    Attributes:
        title: Its name in the tables.
        peer: The package it needs.
        make: From a model to files.
        deploy: From files to one network.
        names: The networks, from the full one down.
        alone: The file the smallest one needs; None where that is one more line, see `alone_bytes`.
        extra: A name that is run and measured, but is no budget.
    """

    title: str
    peer: str
    make: Callable[..., None]
    deploy: Callable[[Path, str], Run]
    names: tuple[str, str, str]
    alone: str | None
    extra: tuple[str, ...] = ()


EXITS = ("final", "e1", "e0")
PRUNED = ("full", "middle", "small")
APPROACHES = (
    Approach("detachnet", "detachnet", make_family, deploy_family, ("base", "sub0", "sub1"), None),
    Approach("earlyon", "earlyon", make_exits, deploy_exits, EXITS, "exits.pth", ("hardest",)),
    Approach("earlyon, stages", "earlyon", make_stages, deploy_stages, EXITS, "stage0.pt2"),
    *(
        Approach(
            f"torch-pruning, {round_to}",
            "torch-pruning",
            partial(make_pruned, round_to=round_to),
            deploy_pruned,
            PRUNED,
            "small.pth",
        )
        for round_to in (4, 16)
    ),
)


@cache
def targets() -> tuple[int, ...]:
    """MACs of detachnet's sub-models, which pruning aims at."""
    model = detachnet.create_model("torchvision:resnet18")
    net = detachnet.make_detachable(model, cuts=CUTS, stepdown="stem").eval()
    return tuple(count_macs(net.detach(name)) for name in net.names[1:])


def count_macs(run: Run) -> int:
    """Multiply-accumulates for one image; a multiply-accumulate is two of torch's FLOPs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(torch.zeros(IMAGE))
    return counter.get_total_flops() // 2


def num_lines(function: Callable[..., object]) -> int:
    """Lines of a function's body, one per statement, without imports."""
    function = function.func if isinstance(function, partial) else function
    definition = ast.parse(inspect.getsource(function)).body[0]
    assert isinstance(definition, ast.FunctionDef)
    code = [statement for statement in definition.body if not isinstance(statement, ast.ImportFrom | ast.Import)]
    return sum(len(ast.unparse(statement).splitlines()) for statement in code)


def alone_bytes(approach: Approach, folder: Path) -> int:
    """Bytes a device needs that only ever runs the smallest network."""
    if approach.alone:
        return (folder / approach.alone).stat().st_size
    alone = folder / "alone.safetensors"
    detachnet.save(detachnet.load(folder / "family.safetensors"), alone, which=approach.names[-1])
    return alone.stat().st_size


def build(approach: Approach, folder: Path) -> tuple[dict[str, Any], dict[tuple[str, str], Run]]:
    """Make the files of an approach: what they cost, and its networks, deployed from them."""
    folder.mkdir()
    trained: list[nn.Module] = []
    approach.make(folder, trained.append)
    sizes = [file.stat().st_size for file in folder.iterdir()]
    costs = {
        "approach": approach.title,
        "make_lines": num_lines(approach.make),
        "deploy_lines": num_lines(approach.deploy),
        "trainings": len(trained),
        "files": len(sizes),
        "set_bytes": sum(sizes),
        "smallest_alone_bytes": alone_bytes(approach, folder),
    }
    names = (*approach.names, *approach.extra)
    return costs, {(approach.title, name): approach.deploy(folder, name) for name in names}


def measure(runs: dict[tuple[str, str], Run], n: int, warmup: int) -> list[dict[str, Any]]:
    """MACs and latency of each network; the image is the same for all."""
    image = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for key, run in runs.items():
            if run(image).shape != (1, 1000):
                raise RuntimeError(f"{key} gives {tuple(run(image).shape)}, not (1, 1000)")
        keyed = {str(index): partial(run, image) for index, run in enumerate(runs.values())}
        seconds = alternate(keyed, n, warmup)
    rows = []
    for (approach, name), run, times in zip(runs, runs.values(), seconds.values(), strict=True):
        p50, p90 = np.percentile(times, [50, 90]).tolist()
        rows.append({"approach": approach, "model": name, "macs": count_macs(run), "p50_s": p50, "p90_s": p90})
    return rows


# The command.


def missing(peer: str) -> str | None:
    """Why a peer cannot be used, with the line that installs it; None if it can."""
    try:
        import_module(peer.replace("-", "_"))
    except ImportError as error:
        return f"{peer} is left out ({error}): pip install {peer}"
    return None


def costs_table(costs: Sequence[dict[str, Any]]) -> list[str]:
    header = ("approach", "lines to make", "to deploy", "trainings", "files", "set MB", "smallest alone MB")
    rows = [
        (
            *(str(cost[key]) for key in ("approach", "make_lines", "deploy_lines", "trainings", "files")),
            *(f"{cost[key] / 1e6:.2f}" for key in ("set_bytes", "smallest_alone_bytes")),
        )
        for cost in costs
    ]
    return Table(tuple(header), tuple(map(tuple, rows))).lines()


def latency_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    header = ("approach", "model", "M MACs", "p50 ms", "p90 ms")
    cells = [
        (
            row["approach"],
            row["model"],
            f"{row['macs'] / 1e6:,.1f}",
            *(f"{1e3 * row[key]:.2f}" for key in ("p50_s", "p90_s")),
        )
        for row in rows
    ]
    return Table(tuple(header), tuple(map(tuple, cells))).lines()


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__, fixed=True)
    parser.add_argument("--threads", type=int, metavar="N", help="threads of the CPU per run, 1 by default")
    options = begin(parser, words)
    left_out = {peer: why for peer in ("earlyon", "torch-pruning") if (why := missing(peer))}
    for why in left_out.values():
        print(why, file=sys.stderr)
    if len(left_out) == 2:
        return 2
    torch.manual_seed(0)
    n, warmup = (5, 1) if options.quick else (200, 10)
    with tempfile.TemporaryDirectory() as folder:
        approaches = [approach for approach in APPROACHES if approach.peer not in left_out]
        built = [build(approach, Path(folder) / str(index)) for index, approach in enumerate(approaches)]
    costs = [cost for cost, _ in built]
    rows = measure({key: run for _, runs in built for key, run in runs.items()}, n, warmup)
    peers = versions(*sorted({a.peer for a in approaches} - {"detachnet"}))
    print(*costs_table(costs), "", *latency_table(rows), "", sep="\n")
    print(f"n = {n} after {warmup}, batch 1; " + "; ".join(f"{name} {version}" for name, version in peers.items()))
    write(options, rows, costs=costs, peers=peers, n=n, warmup=warmup, input_size=IMAGE[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
