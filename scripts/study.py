"""Train everything docs/study.md compares, one run after another, and print the table.

    python scripts/study.py [--data-root DIR] [--out runs/study] [--seeds 3] [--recipe FILE]
                            [--set TABLE.KEY=VALUE] [--json FILE] [NAME ...]

Runs that are finished are skipped and interrupted ones resumed, so it can be stopped at any time. About two hours
on two CPU cores with three seeds. The JSON file has each seed's accuracy on the test images and on the training
images that no run was trained on: settings are chosen on the latter. For families with shared batch norms it has
test accuracies with statistics of each model's own, too.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from datetime import date
from functools import cache
from pathlib import Path

import torch

import detachnet
from detachnet.data.batches import Batches
from detachnet.data.datasets import Split, load_data
from detachnet.evaluation import EVAL_BATCH, evaluate
from detachnet.memory import keep_freed
from detachnet.report import comparison
from detachnet.training.loop import Listener
from detachnet.training.recipe import Recipe, load_recipe
from detachnet.training.results import read_info
from detachnet.training.runs import RunFolder
from detachnet.training.start import build_family
from detachnet.training.trainer import train

RECIPE = Path(__file__).parents[1] / "recipes" / "study_cifar10.toml"
NO_WEIGHTS = "loss.weights={}"
NO_DISTILLATION = "loss.distillation=0"
ONE_HEAD = "family.head=shared"
CONV = "family.stepdown=conv"
SHARED = "family.norm=shared"
NO_CUTS = "family.cuts=[]"
LATE = 'family.models.late.drop=["features.16:features.22","features.26:features.32","features.36:features.42"]'
"""Without convolutions 6, 7, 9, 10, 12 and 13."""
INNER = (
    'family.models.inner.drop=["features.2:features.5","features.9:features.12","features.16:features.22",'
    '"features.26:features.29"]'
)
"""Without convolutions 2, 4, 6, 7 and 9."""
MIDDLE = 'family.models.middle.drop=["features.9:features.12","features.16:features.22","features.26:features.32"]'
"""Without convolutions 4, 6, 7, 9 and 10: as many MACs as without the inner ones, but more of them shared."""
EXIT = 'family.models.exit.drop=["features.16:features.43"]'
"""Out behind convolution 5, through one convolution to the head: an early exit of as many MACs."""
FRONT = 'family.models.front.drop=[":features.23"]'
"""In behind convolution 7, through a stem: the paper's way to save, for as many MACs."""
WIDE, NARROW = "family.models.wide.width=0.63", "family.models.narrow.width=0.5"
"""With 40 and 26 % of the MACs: the first filters of every layer, in multiples of 8."""
_LATE = LATE.replace("late.drop", "{}.drop")
THIN = (_LATE.format("thin"), 'family.models.thin.width={"features.0"=0.5}')
"""Without late convolutions and with half of the first filters: 40 % of the MACs."""
SLIM = (
    _LATE.format("slim"),
    'family.models.slim.width={"features.0"=0.5, "features.3"=0.5, "features.7"=0.75, "features.10"=0.75}',
)
"""Without late convolutions and with fewer filters in the layers that stay: 26 % of the MACs."""

RUNS: dict[str, tuple[str, ...]] = {
    "all": (),
    "base-alone": ('train.models=["base"]',),
    "sub0-alone": ('train.models=["sub0"]',),
    "sub1-alone": ('train.models=["sub1"]',),
    "paper": (SHARED, CONV, NO_WEIGHTS, NO_DISTILLATION, ONE_HEAD),
    "sub0-alone-conv": (CONV, 'train.models=["sub0"]'),
    "sub1-alone-conv": (CONV, 'train.models=["sub1"]'),
    "private": (CONV, NO_WEIGHTS, NO_DISTILLATION, ONE_HEAD),
    "private+stem": (NO_WEIGHTS, NO_DISTILLATION, ONE_HEAD),
    "private+distillation": (CONV, NO_WEIGHTS, ONE_HEAD),
    "private+weights": (CONV, NO_DISTILLATION, ONE_HEAD),
    "one-head": (ONE_HEAD,),
    "frozen-base": ("train.init={out}/base-alone-{seed}", "train.freeze_base=true"),
    "hint": ("loss.hint=1",),
    "larger": ("loss.teacher=larger",),
    "temperature": ("loss.temperature=2",),
    "late": (NO_CUTS, LATE, NO_WEIGHTS),
    "middle": (NO_CUTS, MIDDLE, NO_WEIGHTS),
    "inner": (NO_CUTS, INNER, NO_WEIGHTS),
    "exit": (NO_CUTS, EXIT, NO_WEIGHTS),
    "front": (NO_CUTS, FRONT, NO_WEIGHTS),
    "late+middle": (NO_CUTS, LATE, MIDDLE, NO_WEIGHTS),
    "late+middle-half": (NO_CUTS, LATE, MIDDLE, "loss.weights={late=0.5, middle=0.5}"),
    "middle-half": (NO_CUTS, MIDDLE, "loss.weights={middle=0.5}"),
    "middle-fifth": (NO_CUTS, MIDDLE, "loss.weights={middle=0.2}"),
    "middle-labels": (NO_CUTS, MIDDLE, NO_WEIGHTS, NO_DISTILLATION),
    "exit-labels": (NO_CUTS, EXIT, NO_WEIGHTS, NO_DISTILLATION),
    "late+middle-labels": (NO_CUTS, LATE, MIDDLE, NO_WEIGHTS, NO_DISTILLATION),
    "late+inner": (NO_CUTS, LATE, INNER, NO_WEIGHTS),
    "late-alone": (NO_CUTS, LATE, 'train.models=["late"]', NO_WEIGHTS),
    "middle-alone": (NO_CUTS, MIDDLE, 'train.models=["middle"]', NO_WEIGHTS),
    "inner-alone": (NO_CUTS, INNER, 'train.models=["inner"]', NO_WEIGHTS),
    "front-alone": (NO_CUTS, FRONT, 'train.models=["front"]', NO_WEIGHTS),
    "exit-alone": (NO_CUTS, EXIT, 'train.models=["exit"]', NO_WEIGHTS),
    "wide+narrow": (NO_CUTS, WIDE, NARROW, NO_WEIGHTS),
    "thin+slim": (NO_CUTS, *THIN, *SLIM, NO_WEIGHTS),
    "thin+slim-labels": (NO_CUTS, *THIN, *SLIM, NO_WEIGHTS, NO_DISTILLATION),
    "wide-alone": (NO_CUTS, WIDE, 'train.models=["wide"]', NO_WEIGHTS),
    "narrow-alone": (NO_CUTS, NARROW, 'train.models=["narrow"]', NO_WEIGHTS),
    "thin-alone": (NO_CUTS, *THIN, 'train.models=["thin"]', NO_WEIGHTS),
    "slim-alone": (NO_CUTS, *SLIM, 'train.models=["slim"]', NO_WEIGHTS),
}
"""Name -> what is overridden in the recipe, which has all levers that help together."""


def run(name: str, seed: int, out: Path, data_root: str | None, file: str, changes: list[str]) -> None:
    """Train one network or family, unless that is done."""
    overrides = [override.replace("{out}", str(out)).replace("{seed}", str(seed)) for override in RUNS[name]]
    recipe: Recipe = load_recipe(file, [*overrides, *changes, f"train.seed={seed}"])
    folder = RunFolder(out / f"{name}-{seed}")
    if folder.results.exists():
        if load_recipe(folder.recipe) != recipe:
            sys.exit(f"{folder.path} was trained with another recipe: remove it, or choose another --out")
        return
    print(f"{name}, seed {seed}", flush=True)
    done = train(recipe, folder.path, resume=folder.recipe.exists(), data_root=data_root, listener=Listener())
    if done.status != "finished":
        sys.exit(f"stopped ({done.status}); the same command goes on")


def scores(folder: RunFolder, data_root: str | None) -> dict[str, dict[str, float]]:
    """Each model's accuracies, in [0, 1], that its run did not measure.

    Of images that it was not trained on, where there are any; of test images with statistics of each model's own,
    where batch norms are shared.
    """
    recipe, known = load_recipe(folder.recipe), folder.path / "scores.json"
    if not known.exists():
        train_split, test_split = load_data(recipe.data.name, data_root)
        net, num_train, found = detachnet.load(folder.last), recipe.data.num_train, {}
        if num_train:
            rest = Split(train_split.images[num_train:], train_split.labels[num_train:], train_split.classes)
            found["held_out"] = accuracies(net, rest)
        if net.plan.norm == "shared":
            augmented = {"pad": recipe.data.pad, "flip": recipe.data.flip}
            batches = Batches(train_split.part(0, 5000), net.facts.known_data, EVAL_BATCH, **augmented)
            found["recalibrated"] = accuracies(detachnet.recalibrate(net, batches.epoch()), test_split)
        known.write_text(json.dumps(found))
    return dict(json.loads(known.read_text()))


def accuracies(net: detachnet.DetachableNet, images: Split) -> dict[str, float]:
    """Each model's share of images that it has right."""
    found = evaluate(net, images, "cuda" if torch.cuda.is_available() else "cpu")
    return {name: score["accuracy"] for name, score in found.items()}


def write_rows(entries: list[comparison.Entry], options: argparse.Namespace) -> None:
    """The entries as JSON, with what all runs share of their recipes and the machines that each ran on."""
    rows = []
    for entry in entries:
        folders = [RunFolder(options.out / f"{entry.run}-{seed}") for seed in range(options.seeds)]
        folders = [folder for folder in folders if folder.results.exists()]
        recipe = load_recipe(folders[0].recipe)
        found = [scores(folder, options.data_root) for folder in folders]
        more = {key: [seed[key][entry.model] for seed in found] for key in found[0]}
        infos = [read_info(folder.info) for folder in folders]
        on = sorted({f"{info['device']}, torch {info['torch']}" for info in infos})
        rows.append(asdict(entry) | more | {"effort": effort(recipe), "on": on})
    num_train = recipe.data.num_train or len(load_data(recipe.data.name, options.data_root)[0])
    shared = {"num_train": num_train, "epochs": recipe.train.epochs, "batch": recipe.train.batch_size}
    result = {
        "date": f"{date.today()}",
        "recipe": Path(options.recipe).stem,
        "changes": options.changes,
        "train": shared,
        "rows": rows,
    }
    options.json.write_text(json.dumps(result, indent=1) + "\n")


@cache
def effort(recipe: Recipe) -> float:
    """Multiply-accumulates for an image in training, over those of the base-model alone.

    What a sub-model shares with the base-model runs once, where both are trained.
    """
    base, *subs = build_family(recipe, (3, 32, 32)).plan.models
    trained = {model.name: model for model in (base, *subs) if model.name in recipe.models}
    once = sum(model.shared_macs for model in trained.values()) if base.name in trained else 0
    return (sum(model.macs for model in trained.values()) - once) / base.macs


def main() -> None:
    parser = argparse.ArgumentParser(description="Train everything the study compares.")
    parser.add_argument("names", nargs="*", choices=[[], *RUNS], help="only these; all if none is named")
    parser.add_argument("--data-root", help="where CIFAR-10 is")
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every seed's accuracies there")
    parser.add_argument("--recipe", default=str(RECIPE), help="a recipe file or one that is shipped")
    parser.add_argument("--set", action="append", default=[], dest="changes", help="override the recipe")
    options = parser.parse_args()
    keep_freed()
    names = options.names or list(RUNS)
    for seed in range(options.seeds):
        for name in names:
            run(name, seed, options.out, options.data_root, options.recipe, options.changes)
    finished = [options.out / f"{name}-{seed}" for name in RUNS for seed in range(options.seeds)]
    entries = comparison.compare([path for path in finished if RunFolder(path).results.exists()])
    table = comparison.table(entries).markdown()
    (options.out / "table.md").write_text(table)
    comparison.figure(entries, options.out / "accuracy.svg")
    if options.json:
        write_rows(entries, options)
    print(table)


if __name__ == "__main__":
    main()
