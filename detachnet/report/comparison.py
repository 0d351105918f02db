"""runs -> one table: the paper's Table 1, with seeds, the baseline and each sub-model trained alone."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detachnet.errors import CheckpointError, RecipeError
from detachnet.report.chart import Axis, Chart, Point, Series, percent, write
from detachnet.surgery.plan import BASE
from detachnet.text import Table, si
from detachnet.training.recipe import Recipe, load_recipe
from detachnet.training.results import read_results
from detachnet.training.runs import RunFolder


@dataclass(frozen=True)
class Entry:
    """One model of one experiment, over its seeds.

    Attributes:
        run: The experiment's name: that of its folders, without the seed.
        model: The model's name.
        macs: Multiply-accumulates for one image.
        macs_of_base: The same as a share of the base-model's.
        num_params: Number of parameters.
        best: Each seed's best accuracy over its epochs, in [0, 1]: chosen on the images it is measured on.
        last: Each seed's accuracy after its last epoch, in [0, 1].
        to_baseline: Mean of `last` less that of the base-model trained alone; None if no such run was given.
        to_alone: The same, less that of the same model trained alone.
    """

    run: str
    model: str
    macs: int
    macs_of_base: float
    num_params: int
    best: tuple[float, ...]
    last: tuple[float, ...]
    to_baseline: float | None = None
    to_alone: float | None = None


@dataclass(frozen=True)
class _Experiment:
    """Runs of one recipe with different seeds."""

    name: str
    recipes: list[Recipe]
    results: dict[int, list[dict[str, Any]]]
    """Seed -> the final table."""

    @property
    def recipe(self) -> Recipe:
        """That of its first run."""
        return self.recipes[0]

    def last(self, model: str) -> tuple[float, ...]:
        """A model's accuracy after the last epoch, per seed."""
        return tuple(
            row["last_accuracy"] for rows in self.results.values() for row in rows if row["model"] == model
        )

    def is_alone(self, model: str, other: _Experiment) -> bool:
        """Whether this is `model` of another experiment alone: same network, step-down, data and training."""
        mine, theirs = self.recipe, other.recipe
        if mine.models != (model,) or mine.train.init or mine.train.freeze_base:
            return False
        same_entry = model == BASE or _entry(mine, model) == _entry(theirs, model)
        return same_entry and _budget(mine) == _budget(theirs)


def _entry(recipe: Recipe, model: str) -> tuple[Any, ...]:
    """What decides a sub-model's network."""
    family = recipe.family
    return family.routes.get(model), family.stepdown, family.stem if family.stepdown == "stem" else None


def _budget(recipe: Recipe) -> tuple[Any, ...]:
    """What must be equal for a difference to mean the family."""
    train = recipe.train
    same = (train.epochs, train.batch_size, train.precision)
    return recipe.model, recipe.data, recipe.optimizer, recipe.schedule, same


def compare(paths: Sequence[str | Path]) -> list[Entry]:
    """Put finished runs side by side.

    Runs whose recipes differ in nothing but the seed are one experiment; each may start from a run of its own, if
    those differ in nothing but the seed, too. A run that trained the base-model only,
    on the same data with the same optimizer, schedule, batch size and epochs, is the baseline; one that trained a
    sub-model only is what that sub-model reaches alone.

    Args:
        paths: Folders of runs, in the order of the table.

    Raises:
        CheckpointError: A folder holds no finished run, is given twice, or was measured on other images.
    """
    for i, path in enumerate(paths):
        if Path(path).resolve() in [Path(other).resolve() for other in paths[:i]]:
            raise CheckpointError(f"{path} is given twice", hint="name each run once")
    experiments = _experiments([RunFolder(path) for path in paths])
    return [
        _entry_of(experiment, i, experiments)
        for experiment in experiments
        for i in range(len(experiment.recipe.models))
    ]


def _experiments(folders: Sequence[RunFolder]) -> list[_Experiment]:
    """Runs grouped by their recipe without its seed."""
    found: list[_Experiment] = []
    for folder in folders:
        if not folder.results.exists():
            raise CheckpointError(
                f"{folder.path} holds no finished run",
                hint="finish it: detachnet train ... --resume"
                if folder.recipe.exists()
                else "give the run's folder",
            )
        recipe = load_recipe(folder.recipe)
        group = next((e for e in found if all(_are_seeds(recipe, other) for other in e.recipes)), None)
        if group is None:
            name = re.sub(r"[-_](seed[-_]?)?\d+$", "", folder.path.resolve().name) or folder.path.name
            if any(other.name == name for other in found):
                name = folder.path.resolve().name
            group = _Experiment(name, [], {})
            found.append(group)
        if recipe.train.seed in group.results:
            raise CheckpointError(f"{folder.path} is the second run of seed {recipe.train.seed} of {group.name}")
        group.recipes.append(recipe)
        group.results[recipe.train.seed] = read_results(folder.results, recipe.models)
    if len({bool(group.recipe.data.holdout) for group in found}) > 1:
        raise CheckpointError("some runs were measured on test images, others on held-out training images")
    return found


def _are_seeds(mine: Recipe, theirs: Recipe) -> bool:
    """Whether two recipes differ in nothing but the seed, and what they start from in nothing but its own."""
    if not _are_alike(mine, theirs):
        return False
    mine_from, theirs_from = _start_of(mine), _start_of(theirs)
    if mine_from is None or theirs_from is None or mine.train.init == theirs.train.init:
        return _name_their_seeds(mine, theirs)
    has_other_numbers = re.sub(r"\d+", "", mine.train.init) == re.sub(r"\d+", "", theirs.train.init)
    return has_other_numbers and _are_alike(mine_from, theirs_from) and _name_their_seeds(mine_from, theirs_from)


def _are_alike(mine: Recipe, theirs: Recipe) -> bool:
    """Whether two recipes differ in the seed and in what they start from at most."""
    same = {"seed": 0, "init": "", "log_with": ""}
    return mine.model_copy(update={"train": mine.train.model_copy(update=same)}) == theirs.model_copy(
        update={"train": theirs.train.model_copy(update=same)}
    )


def _name_their_seeds(mine: Recipe, theirs: Recipe) -> bool:
    """Whether the paths that two recipes start from are equal, or each has its recipe's seed where they differ."""
    paths = [re.split(r"(\d+)", recipe.train.init) for recipe in (mine, theirs)]
    seeds = (str(mine.train.seed), str(theirs.train.seed))
    return len(paths[0]) == len(paths[1]) and all(
        pair[0] == pair[1] or pair == seeds for pair in zip(*paths, strict=True)
    )


def _start_of(recipe: Recipe) -> Recipe | None:
    """The recipe of the run that a run starts from; None if it starts from none that can be read."""
    path = Path(recipe.train.init)
    try:
        folder = RunFolder(path if path.is_dir() else path.parent)
        is_of_run = path in (folder.path, folder.last, folder.best) and folder.recipe.exists()
        return load_recipe(folder.recipe) if is_of_run else None
    except (CheckpointError, RecipeError, OSError):
        return None


def _entry_of(experiment: _Experiment, i: int, experiments: Sequence[_Experiment]) -> Entry:
    """The row of an experiment's model number `i`."""
    rows = [rows[i] for rows in experiment.results.values()]
    model = str(rows[0]["model"])
    last = experiment.last(model)

    def difference(other: str) -> float | None:
        alone = next((e for e in experiments if e.is_alone(other, experiment)), None)
        if alone is None or experiment.is_alone(other, experiment):
            return None
        return statistics.fmean(last) - statistics.fmean(alone.last(other))

    return Entry(
        run=experiment.name,
        model=model,
        macs=rows[0]["macs"],
        macs_of_base=rows[0]["macs_of_base"],
        num_params=rows[0]["num_params"],
        best=tuple(row["best_accuracy"] for row in rows),
        last=last,
        to_baseline=difference(BASE),
        to_alone=difference(model),
    )


def table(entries: Sequence[Entry]) -> Table:
    """The entries as text: means, and sample standard deviations over seeds."""
    header = (
        *("run", "model", "MACs", "of base", "parameters", "seeds"),
        *("best accuracy", "last accuracy", "to baseline", "to alone"),
    )
    rows = tuple(
        (
            entry.run,
            entry.model,
            si(entry.macs),
            f"{100 * entry.macs_of_base:.0f} %",
            si(entry.num_params),
            str(len(entry.last)),
            _spread(entry.best),
            _spread(entry.last),
            _signed(entry.to_baseline),
            _signed(entry.to_alone),
        )
        for entry in entries
    )
    return Table(header, rows, "Accuracy, mean ± standard deviation over seeds", left=2)


def _spread(values: Sequence[float]) -> str:
    mean = f"{100 * statistics.fmean(values):.2f}"
    return f"{mean} ± {100 * statistics.stdev(values):.2f} %" if len(values) > 1 else f"{mean} %"


def _signed(difference: float | None) -> str:
    return "" if difference is None else f"{100 * difference:+.2f}"


def figure(entries: Sequence[Entry], path: str | Path) -> None:
    """Draw accuracy after the last epoch against MACs, one line per experiment, to a `.png`, `.svg` or `.pdf`.

    Error bars are sample standard deviations over seeds, where there is more than one.

    Raises:
        CheckpointError: The file cannot be written.
    """
    runs = list(dict.fromkeys(entry.run for entry in entries))
    series = tuple(_series(run, [e for e in entries if e.run == run], i) for i, run in enumerate(runs))
    words = "; ".join(f"{s.name}: {', '.join(p.title for p in s.points)}" for s in series) + "."
    x, y = (
        Axis("million MACs for one image", "{:g}".format, from_zero=True),
        Axis("last accuracy, mean of n seeds", percent),
    )
    try:
        write(Chart("Accuracy against MACs", words, x, y, series), path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot write the figure {path}", what=str(error)) from error


def _series(run: str, entries: Sequence[Entry], style: int) -> Series:
    """An experiment's models over their MACs."""
    points = tuple(
        Point(
            entry.macs / 1e6,
            statistics.fmean(entry.last),
            entry.model,
            f"{entry.model} {_spread(entry.last)}",
            statistics.stdev(entry.last) if len(entry.last) > 1 else 0.0,
        )
        for entry in sorted(entries, key=lambda entry: entry.macs)
    )
    return Series(f"{run}, n = {len(entries[0].last)}", points, style)
