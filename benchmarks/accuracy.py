"""The alternatives to a family, trained with the effort of the study: pruning, early exits, small networks.

    make .venv/peers/ready  # early exits and pruning, in an environment of their own
    .venv/peers/bin/python benchmarks/accuracy.py [NAME ...] [--data-root DIR] [--study runs/study]
        [--out runs/accuracy] [--seeds 3] [--set TABLE.KEY=VALUE] [--lr 0.1] [--device cuda]
        [--json FILE] [--quick]

Images, epochs, batches, augmentation, optimizer and schedule are those of `recipes/study_cifar10.toml`, whose
families and single networks `scripts/study.py` trains; what is changed of it by `--set` is to be changed alike in
both. `effort` is training images × the network's multiply-accumulates, over all of a row's trainings, over that of
the base-model alone.

`pruned-*`: the study's trained base-model (`base-alone`), pruned by torch-pruning to a share of its
multiply-accumulates (magnitudes, groups of layers, the same share everywhere), and trained on as long as it was
trained before, with the learning rate that held-out images are answered best with.
`exits`: earlyon's heads behind the second and the third pooling, trained jointly with the network. Its thresholds
are those that answer the held-out images best within a mean number of multiply-accumulates.
`resnet20`, `resnet20-half`, `shufflenet`, `mobilenet`: small networks by themselves.

Every run is a JSON file of its own, and is skipped if it is there; what is printed and written is of all that are.
Accuracies are of the last epoch, on the test images, and on the training images that no run is trained on, where
settings are chosen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import detachnet
from common import arguments, begin, table
from detachnet.data.batches import Batches
from detachnet.data.datasets import Split, describe_data, load_data
from detachnet.machine import hardware, versions
from detachnet.memory import keep_freed
from detachnet.training.optimizer import make_optimizer, make_schedule
from detachnet.training.recipe import Recipe, load_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "study_cifar10.toml"
FINE_TUNING_LR = 0.1
"""The rate the network was trained with: on the held-out images the best of 0.01, 0.03 and 0.1 (means of three
seeds: 73.8, 75.8 and 76.7 % with 40 % of the multiply-accumulates, 71.8, 73.9 and 75.0 % with 26 %;
`results/pruning-rates.json`, each `--lr`'s rows)."""
EXITS = ("features.13", "features.23")
BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.8)
"""Mean multiply-accumulates of early exits, as shares of the base-model's."""
QUICK = ("data.num_train=256", "train.epochs=1", "schedule.warmup_epochs=0")
CPU = torch.device("cpu")

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Row:
    """What one network, or one setting of it, reaches.

    Attributes:
        run: The approach.
        seed: Of weights, order and augmentation.
        macs: Multiply-accumulates for one image, on average.
        held_out: Accuracy on training images that it was not trained on, in [0, 1].
        test: Accuracy on the test images.
        effort: Trained images × multiply-accumulates over those of the base-model alone.
        on: What it was trained on.
        leaves: Share of the test images that each exit answers; none where there is one.
    """

    run: str
    seed: int
    macs: float
    held_out: float
    test: float
    effort: float
    on: str
    leaves: tuple[float, ...] = ()


class Study:
    """The images and the schedule all runs share.

    Args:
        recipe: The study's.
        data_root: Where CIFAR-10 is.
        runs: The folder of `scripts/study.py`.
        device: Where networks are trained.
        lr: The learning rate that pruned networks are trained on with.
    """

    def __init__(
        self,
        recipe: Recipe,
        data_root: str | None,
        runs: Path,
        device: torch.device = CPU,
        lr: float = FINE_TUNING_LR,
    ) -> None:
        self.recipe, self.runs, self.device, self.lr = recipe, runs, device, lr
        whole, self.test = load_data(recipe.data.name, data_root)
        count = recipe.data.num_train
        self.train, self.held_out = whole.part(0, count), whole.part(count, 5 * count // 2)  # its rest at most
        self.info = describe_data(recipe.data.name, (self.train, self.test))

    def base(self, seed: int) -> nn.Module:
        """The base-model that was trained alone."""
        net = detachnet.load(self.runs / f"base-alone-{seed}" / "last.safetensors")
        return net.detach("base").train()

    def fit(
        self, model: nn.Module, seed: int, loss: Callable[[Tensor], Tensor] | None = None, lr: float = 0.0
    ) -> None:
        """Train a network as the recipe has it, and leave it on the device.

        Args:
            model: Takes normalized images `(B, 3, 32, 32)`.
            seed: Of the order of the images and their augmentation.
            loss: Of images and labels; by default the cross entropy of what the network gives.
            lr: In the place of the recipe's learning rate.
        """
        recipe = self.recipe
        if lr:
            recipe = recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"lr": lr})})
        on_cuda = self.device.type == "cuda"
        model.to(self.device)
        if on_cuda:
            model.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(recipe, model, list(model.parameters()), fused=on_cuda)
        batches = self._batches(seed)
        schedule = make_schedule(recipe, optimizer, len(batches))
        compute = loss or (lambda images, labels: F.cross_entropy(model(images), labels))
        torch.manual_seed(seed)
        model.train()
        for epoch in range(recipe.train.epochs):
            for step, (images, labels) in enumerate(batches.epoch(epoch)):
                schedule.step_update(epoch * len(batches) + step)
                compute(images, labels).backward()
                optimizer.step()
                optimizer.zero_grad()
        model.eval()

    def _batches(self, seed: int) -> Batches:
        """Training images; channels-last, which none of these networks is broken by (`image_layout`)."""
        data, size, layout = self.recipe.data, self.recipe.train.batch_size, torch.channels_last
        augmented = {"pad": data.pad, "flip": data.flip}
        return Batches(
            self.train, self.info, size, self.device, **augmented, shuffle=True, seed=seed, layout=layout
        )

    @torch.no_grad()
    def answers(self, run: Callable[[Tensor], Outputs], split: Split) -> tuple[list[Tensor], Tensor]:
        """Logits of each output, `(N, 10)`, and labels `(N,)`, of all images of a split."""
        found = [(run(images), labels) for images, labels in Batches(split, self.info, 500, self.device).epoch()]
        outputs = [torch.cat(parts).cpu() for parts in zip(*(out for out, _ in found), strict=True)]
        return outputs, torch.cat([labels for _, labels in found]).cpu()

    def row(self, run: str, seed: int, model: nn.Module, effort: float) -> Row:
        """What a network with one output reaches."""
        scores = []
        for split in (self.held_out, self.test):
            (logits,), labels = self.answers(lambda images: (model(images),), split)
            scores.append(accuracy(logits, labels))
        return self.of(run, seed, count_macs(model, self.device), *scores, effort)

    def of(
        self,
        run: str,
        seed: int,
        macs: float,
        held_out: float,
        test: float,
        effort: float,
        leaves: tuple[float, ...] = (),
    ) -> Row:
        """A row of this device."""
        on = f"{hardware(self.device)['device']}, torch {versions('torch')['torch']}"
        return Row(run, seed, macs, held_out, test, effort, on, leaves)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    return (logits.argmax(1) == labels).double().mean().item()


def count_macs(model: Callable[[Tensor], Any], device: torch.device = CPU) -> int:
    """Multiply-accumulates for one image; a multiply-accumulate is two of torch's FLOPs."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 32, 32, device=device))
    return counter.get_total_flops() // 2


# Pruning.


def pruned(study: Study, seed: int, share: float) -> Iterator[Row]:
    """The trained base-model, pruned to a share of its multiply-accumulates and trained on."""
    model = study.base(seed).eval()
    whole = count_macs(model)
    prune(model, share)
    macs = count_macs(model)
    study.fit(model, seed, lr=study.lr)
    yield study.row(f"pruned-{share:.0%}", seed, model, 1 + macs / whole)


def prune(model: nn.Module, share: float) -> None:
    """Leave a network no more than a share of its multiply-accumulates: the filters of the largest weights."""
    import torch_pruning as tp

    whole = count_macs(model)
    heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
    pruner = tp.pruner.BasePruner(
        model,
        torch.randn(1, 3, 32, 32),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=1.0,
        iterative_steps=400,
        ignored_layers=heads,
    )
    while count_macs(model) > share * whole:
        pruner.step()


# Early exits.


def exits(study: Study, seed: int) -> Iterator[Row]:
    """A network that stops where it is sure enough, for several mean costs."""
    from earlyon.training.losses import weighted_multi_exit_loss

    torch.manual_seed(seed)
    model, whole = with_exits(study.recipe)

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        return weighted_multi_exit_loss(model(images, mode="training"), labels, model.config.loss_weights)

    study.fit(model, seed, loss)
    costs = [*exit_costs(model, len(EXITS), study.device), float(whole)]
    run = partial(model, mode="training")  # every exit's logits; the modules are in evaluation mode
    held_out, test = (study.answers(run, split) for split in (study.held_out, study.test))
    for budget in BUDGETS:
        thresholds = best_thresholds(*held_out, costs, budget * whole)
        known, new = (routed(*images, costs, thresholds) for images in (held_out, test))
        yield study.of(f"exits-{budget:.0%}", seed, new.cost, known.accuracy, new.accuracy, 1.0, new.leaves)


def with_exits(recipe: Recipe) -> tuple[Any, int]:
    """earlyon's network of the study's base-model, untrained, and the base-model's multiply-accumulates."""
    from earlyon.models import custom_ee

    backbone = detachnet.create_model(recipe.model.name, **recipe.model.kwargs)
    whole = count_macs(backbone.eval())
    return custom_ee(backbone, EXITS, num_classes=10, input_shape=(1, 3, 32, 32)), whole


def exit_costs(model: Any, count: int, device: torch.device = CPU) -> Iterator[float]:
    """Multiply-accumulates of an image that leaves at each exit, having asked those before it."""
    image = torch.zeros(1, 3, 32, 32, device=device)
    model(image, mode="inference")  # the first run also estimates costs, with runs of its own
    for index in range(count):
        yield float(count_macs(leaving(model, index, count), device))


def leaving(model: Any, index: int, count: int) -> Callable[[Tensor], Any]:
    """A network whose images all leave at one exit, having asked those before it; with `count` at none."""

    def run(image: Tensor) -> Any:
        model.config.confidence_thresholds = [0.0 if other == index else 1.0 for other in range(count)]
        return model(image, mode="inference")

    return run


class Routed(NamedTuple):
    """What images get that leave at the first exit that is sure enough: accuracy, mean cost, each exit's share."""

    accuracy: float
    cost: float
    leaves: tuple[float, ...]


def routed(
    outputs: Sequence[Tensor], labels: Tensor, costs: Sequence[float], thresholds: Sequence[float]
) -> Routed:
    """Each image leaves at the first exit that is sure enough."""
    sure = [out.softmax(1).amax(1) >= threshold for out, threshold in zip(outputs, thresholds, strict=False)]
    left = torch.stack([*sure, torch.ones_like(labels, dtype=torch.bool)]).int().argmax(0)
    answer = torch.stack([out.argmax(1) for out in outputs]).gather(0, left[None])[0]
    right, shares = (answer == labels).double().mean().item(), left.bincount(minlength=len(costs)) / len(left)
    return Routed(right, torch.tensor(costs)[left].mean().item(), tuple(shares.tolist()))


def best_thresholds(
    outputs: Sequence[Tensor], labels: Tensor, costs: Sequence[float], limit: float
) -> Sequence[float]:
    """The thresholds of the best accuracy within a mean cost, of all pairs of a grid; the cheapest if none is."""
    grid = [*(i / 20 for i in range(21)), 1.01]
    tried = {pair: routed(outputs, labels, costs, pair) for pair in product(grid, repeat=2)}
    within = [pair for pair, found in tried.items() if found.cost <= limit]
    if within:
        return max(within, key=lambda pair: tried[pair].accuracy)
    return min(tried, key=lambda pair: tried[pair].cost)


# Small networks.


def small(study: Study, seed: int, name: str, make: Callable[[], nn.Module]) -> Iterator[Row]:
    """A small network by itself."""
    torch.manual_seed(seed)
    model = make()
    base = detachnet.create_model(study.recipe.model.name, **study.recipe.model.kwargs)
    effort = count_macs(model) / count_macs(base.eval())
    study.fit(model, seed)
    yield study.row(name, seed, model, effort)


def shufflenet() -> nn.Module:
    """ShuffleNetV2 ×0.5 for 32×32 images: without the first two reductions."""
    model = torchvision.models.shufflenet_v2_x0_5(num_classes=10)
    model.conv1[0].stride, model.maxpool = (1, 1), nn.Identity()
    return model


def mobilenet() -> nn.Module:
    """MobileNetV2 ×0.5 for 32×32 images: without the first two reductions."""
    model = torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.5)
    model.features[0][0].stride = model.features[2].conv[1][0].stride = (1, 1)
    return model


SMALL: dict[str, Callable[[], nn.Module]] = {
    "resnet20-half": partial(detachnet.create_model, "detachnet:resnet_cifar", width=0.5),
    "shufflenet": shufflenet,
    "resnet20": partial(detachnet.create_model, "detachnet:resnet_cifar"),
    "mobilenet": mobilenet,
}
RUNS: dict[str, Callable[[Study, int], Iterator[Row]]] = {
    "pruned-40": partial(pruned, share=0.4),
    "pruned-26": partial(pruned, share=0.26),
    "exits": exits,
    **{name: partial(small, name=name, make=make) for name, make in SMALL.items()},
}


def finish(study: Study, name: str, seed: int, file: Path, settings: dict[str, Any]) -> None:
    """Make a run, unless that is done."""
    if file.exists():
        if json.loads(file.read_text())["settings"] != settings:
            sys.exit(f"{file} was made with other settings: remove it, or choose another --out")
        return
    print(f"{name}, seed {seed}", flush=True)
    rows = [asdict(row) for row in RUNS[name](study, seed)]
    file.write_text(json.dumps({"settings": settings, "rows": rows}))


def main(words: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("names", nargs="*", choices=[[], *RUNS], help="only these; all if none is named")
    parser.add_argument("--data-root", help="where CIFAR-10 is")
    parser.add_argument("--study", type=Path, default=Path("runs/study"), help="folder of the study's runs")
    parser.add_argument("--out", type=Path, default=Path("runs/accuracy"), help="folder of these runs")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--set", action="append", default=[], metavar="TABLE.KEY=VALUE", help="changes the recipe")
    parser.add_argument(
        "--lr", type=float, default=FINE_TUNING_LR, help="of pruned networks, in an --out of its own"
    )
    options = begin(parser, words)
    keep_freed()
    recipe = load_recipe(RECIPE, [*options.set, *(QUICK if options.quick else ())])
    study = Study(recipe, options.data_root, options.study, options.device, options.lr)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {"quick": options.quick, "changes": options.set, "lr": options.lr}
    files = {(name, s): options.out / f"{name}-{s}.json" for name in RUNS for s in range(options.seeds)}
    for (name, seed), file in sorted(files.items(), key=lambda run: run[0][1]):
        if name in (options.names or RUNS):
            finish(study, name, seed, file, settings)
    rows = [row for file in files.values() if file.exists() for row in json.loads(file.read_text())["rows"]]
    print("\n".join(table(rows)))
    if options.json:
        about = {"date": f"{date.today()}", "num_test": len(study.test), "num_held_out": len(study.held_out)}
        options.json.write_text(json.dumps(about | settings | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
