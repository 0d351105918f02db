"""Half the filters of a network: detachnet beside torch-pruning 1.6.1, on networks of the zoo and on small traps.

    make .venv/peers/ready
    .venv/peers/bin/python -m tests.zoo.pruning [--write] [NETWORK or TRAP ...]

Both are asked for half of the filters of every layer but the last. What comes out is right where it equals, in
float64, the network itself with nothing reading the filters that went. With `--write` the table `pruning.csv` is
written anew for what is named, all by default. Not for CI: it takes some minutes, and the peer an environment of
its own. Networks that normalize over channels are left out, since they have no such reference.
"""

from __future__ import annotations

import argparse
import copy
import csv
import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import detachnet
from tests.traps import TRAPS
from tests.widths import first, narrowed, randomize

TABLE = Path(__file__).with_name("pruning.csv")
EQUAL = 1e-9
MOST_SECONDS = 120
IMAGE, SMALL = (3, 64, 64), (3, 8, 8)
NETWORKS = (
    *("alexnet", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "mnasnet0_5", "mobilenet_v2"),
    *("mobilenet_v3_large", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d"),
    *("shufflenet_v2_x1_0", "squeezenet1_1", "vgg16_bn", "wide_resnet50_2"),
)
"""Of torchvision."""
TIMM = (
    *("cspresnet50", "dla34", "dpn68", "ese_vovnet19b_dw", "fbnetv3_b", "ghostnetv2_100", "hardcorenas_a"),
    *("hgnetv2_b0", "hrnet_w18_small", "mixnet_s", "mobileone_s0", "repvgg_a0", "res2net50_26w_4s", "rexnet_100"),
    *("selecsls42b", "skresnet18", "xception41"),
)
NAMES = (*(f"torchvision:{name}" for name in NETWORKS), *(f"timm:{name}" for name in TIMM))
TRAP_NAMES = (
    *("ChannelMean", "SoftmaxOverChannels", "L2Norm", "Attention", "SpatialGate", "ShiftedAdd", "Crossed"),
    *("FixedSplit", "FixedView", "GroupedShuffle", "Maxout", "SpaceToDepth", "PixelShuffle", "PlainParameters"),
)


@dataclass(frozen=True)
class Row:
    """A network, and what became of it: `equal`, `different`, or what was raised; with its share of the MACs."""

    network: str
    detachnet: str
    macs: str
    seconds: str
    torch_pruning: str
    torch_pruning_macs: str
    torch_pruning_seconds: str


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-accumulates; a multiply-accumulate is two of torch's FLOPs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return counter.get_total_flops() // 2


def ours(model: nn.Module, image: tuple[int, ...]) -> tuple[float, nn.Module]:
    """How far off our narrower network is, and it itself."""
    result = narrowed(model, image)
    return result.error, result.narrow


def theirs(model: nn.Module, image: tuple[int, ...]) -> tuple[float, nn.Module]:
    """The same of torch-pruning's."""
    import torch_pruning as tp

    model = randomize(model.double().eval())
    whole, images = copy.deepcopy(model), torch.randn(2, *image, dtype=torch.float64)
    names = {module: name for name, module in model.named_modules()}
    last = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]
    pruner = tp.pruner.BasePruner(
        model, images, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5, ignored_layers=[last]
    )
    reads: dict[str, list[int]] = {}
    for group in pruner.step(interactive=True):
        for dependency, indices in group:
            module = dependency.target.module
            if module in names and not pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                count = getattr(module, "in_channels", getattr(module, "in_features", 0))
                left, gone = reads.setdefault(names[module], [*range(count)]), set(indices)
                reads[names[module]] = [channel for at, channel in enumerate(left) if at not in gone]
        group.prune()
    with torch.no_grad():
        for name, kept in reads.items():
            weight: Tensor = whole.get_submodule(name).weight
            dropped = torch.ones(weight.shape[1], dtype=torch.bool)
            dropped[[channel for channel in kept if channel < len(dropped)]] = False  # the same in every group
            if len(dropped) > 1:  # a depthwise convolution has as many groups as channels
                weight[:, dropped] = 0.0
        out, expected = first(model(images)), first(whole(images))
    return float((out - expected).abs().max() / expected.abs().max()), model


def judge(
    how: Callable[[nn.Module, tuple[int, ...]], tuple[float, nn.Module]],
    make: Callable[[], nn.Module],
    image: tuple[int, ...],
) -> tuple[str, str, str]:
    """A verdict, the share of the MACs that is left, and seconds; after too many of them it is stopped."""
    torch.manual_seed(0)
    whole, began = make().eval(), time.perf_counter()
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(MOST_SECONDS)
    try:
        error, narrow = how(copy.deepcopy(whole), image)
    except Exception as problem:
        words = next(iter(str(problem).splitlines()), "")[:90]
        return f"{type(problem).__name__}: {words}", "", ""
    finally:
        signal.alarm(0)
    seconds = time.perf_counter() - began
    zeros = torch.zeros(1, *image)
    share = count_macs(narrow.float(), zeros) / count_macs(whole, zeros)
    return ("equal" if error < EQUAL else f"different ({error:.0e})"), f"{share:.2f}", f"{seconds:.1f}"


def _stop(_signal: int, _frame: object) -> None:
    raise TimeoutError(f"more than {MOST_SECONDS} s")


def read() -> Iterator[Row]:
    """The rows of the table."""
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            yield from (Row(**row) for row in csv.DictReader(file))


def write(rows: dict[str, Row]) -> None:
    """Write the table, in the order of the names above."""
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(rows[name]) for name in (*NAMES, *TRAP_NAMES) if name in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", nargs="*", metavar="NETWORK", help="all by default")
    parser.add_argument("--write", action="store_true", help="keep what became of them in the table")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    traps = {trap.__name__: trap for trap in TRAPS}
    for name in options.wanted or (*NAMES, *TRAP_NAMES):
        make = traps.get(name) or (lambda name=name: detachnet.create_model(name))
        image = SMALL if name in traps else IMAGE
        row = Row(name, *judge(ours, make, image), *judge(theirs, make, image))
        print(" | ".join(asdict(row).values()), flush=True)
        if options.write:
            write({row.network: row for row in read()} | {name: row})


if __name__ == "__main__":
    main()
