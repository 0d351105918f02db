"""What do the networks that the study compares cost where they run, beside their multiply-accumulates?

    make .venv/peers/ready  # early exits and pruning, in an environment of their own
    .venv/peers/bin/python benchmarks/costs.py [--study runs/study] [--quick] [--json FILE]

Families are the first seed's of `scripts/study.py`, each model detached; pruned networks are made of its
`base-alone` once more, as `accuracy.py` does; early exits and small networks are those of that file, untrained.

`bytes`: of this network's weights and statistics; `files` has each family's one file.
`torch_ms`, `onnx_ms`: one image of 3×32×32 on one thread, all networks in turn; medians, and what each round's
ratio to the base-model alone is. An early exit's is that of an image that leaves there, having asked the exits
before it (`final` asks all). In PyTorch that is decided by earlyon, in Python; in ONNX Runtime it is one graph of
the network up to there with these exits' answers, so what deciding takes is left out.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import accuracy
import detachnet
from common import Row, arguments, begin, report, time_in_turn
from detachnet.training.recipe import load_recipe
from detachnet.training.runs import RunFolder
from widths import as_onnx

IMAGE = (3, 32, 32)
PRUNED = {"pruned-40%": 0.4, "pruned-26%": 0.26}
BASE = "base-alone: base"
Key = str
Run = Callable[[Tensor], Any]


def main(words: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__, fixed=True)
    parser.add_argument("--study", type=Path, default=Path("runs/study"), help="folder of the study's runs")
    options = begin(parser, words)
    runs = finished(options.study)
    if "base-alone" not in runs:
        sys.exit(f"{options.study} has no base-alone-0: python scripts/study.py base-alone --seeds 1")
    nets = {name: detachnet.load(run.last).eval() for name, run in runs.items()}
    networks = {key: network.eval() for key, network in [*detached(nets), *alternatives(nets["base-alone"])]}
    exits, count = early_exits(), len(accuracy.EXITS)
    leaves = {f"exits: {place}": accuracy.leaving(exits, i, count) for i, place in enumerate(exit_names())}
    networks_and_exits: dict[Key, Run] = {**networks, **leaves}
    runs_of = {"torch": networks_and_exits, "onnx": in_onnx(networks, exits, list(leaves), options)}
    image, seconds = torch.randn(1, *IMAGE), 2.0 if options.quick else 90.0
    with torch.inference_mode():
        timings = {
            runtime: time_in_turn({key: partial(run, image) for key, run in of.items()}, options.device, seconds)
            for runtime, of in runs_of.items()
        }
    rows = []
    for key, run in networks_and_exits.items():
        row: Row = {"network": key, "macs": accuracy.count_macs(run), "bytes": num_bytes(networks.get(key, exits))}
        for runtime, timing in timings.items():
            row |= {f"{runtime}_ms": timing.median_ms(key), f"{runtime}_to_base": timing.ratio(key, BASE)}
        rows.append(row)
    files = {name: file_bytes(net) for name, net in nets.items()}
    report(options, rows, files=files, n=[timing.n for timing in timings.values()])


def in_onnx(
    networks: dict[Key, nn.Module], exits: Any, places: Sequence[Key], options: argparse.Namespace
) -> dict[Key, Run]:
    """Networks, and what images need that leave at each exit, in ONNX Runtime."""
    runs: dict[Key, Run] = {}
    with TemporaryDirectory() as folder:
        for key, network in networks.items():
            backend = as_onnx(network, IMAGE, Path(folder) / str(len(runs)), options)
            runs[key] = partial(backend.run, "base")
        for index, place in enumerate(places):
            runs[place] = up_to(exits, index, Path(folder) / f"exit{index}.onnx", options.threads)
    return runs


def finished(folder: Path) -> dict[str, RunFolder]:
    """The first seed's finished runs by name."""
    runs = {path.name.removesuffix("-0"): RunFolder(path) for path in sorted(folder.glob("*-0"))}
    return {name: run for name, run in runs.items() if run.results.exists()}


def detached(nets: dict[str, detachnet.DetachableNet]) -> Iterator[tuple[Key, nn.Module]]:
    """Every model of every family."""
    for run, net in nets.items():
        for name in net.names:
            yield f"{run}: {name}", net.detach(name)


def alternatives(trained: detachnet.DetachableNet) -> Iterator[tuple[Key, nn.Module]]:
    """The trained base-model pruned, and small networks."""
    for name, share in PRUNED.items():
        network = trained.detach("base").eval()
        accuracy.prune(network, share)
        yield name, network
    for name, make in accuracy.SMALL.items():
        yield name, make()


def early_exits() -> Any:
    """The network with early exits, which has estimated its costs already."""
    model, _ = accuracy.with_exits(load_recipe(accuracy.RECIPE))
    model.eval()(torch.zeros(1, *IMAGE), mode="inference")
    return model


class UpTo(nn.Module):
    """The answers of the first exits of a network; earlyon's own module refuses to be exported."""

    def __init__(self, model: Any, count: int) -> None:
        super().__init__()
        exits, (_, (*_, output)) = accuracy.EXITS[:count], get_graph_node_names(model.backbone)
        self.trunk = create_feature_extractor(model.backbone, [*exits, *([output] if count > len(exits) else [])])
        self.heads = nn.ModuleList([*model.exit_heads.values(), nn.Identity()][:count])

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Logits `(B, num_classes)` of each exit."""
        return tuple(head(value) for head, value in zip(self.heads, self.trunk(image).values(), strict=True))


def up_to(model: Any, index: int, file: Path, threads: int) -> Run:
    """ONNX Runtime on what an image needs that leaves at one exit; the rest of the network is no part of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            UpTo(model, index + 1).eval(), (torch.zeros(1, *IMAGE),), file, dynamo=True, verbose=False
        )
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: session.run(None, {name: image.numpy()})


def exit_names() -> list[str]:
    """Where an image can leave."""
    return [*accuracy.EXITS, "final"]


def file_bytes(net: detachnet.DetachableNet) -> int:
    """Of a family's one file, with all its models."""
    with TemporaryDirectory() as folder:
        detachnet.save(net, Path(folder) / "family.safetensors")
        return (Path(folder) / "family.safetensors").stat().st_size


def num_bytes(network: nn.Module) -> int:
    """Of its parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


if __name__ == "__main__":
    main()
