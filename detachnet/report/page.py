"""runs -> one HTML page that needs nothing else: curves, trade-offs, table, family, predictions, recipe."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor, nn

from detachnet.data.batches import Batches
from detachnet.data.datasets import Split, load_data, select
from detachnet.deploy.profile import Profile
from detachnet.errors import DataError
from detachnet.evaluation import Prediction, predict
from detachnet.progress import counted
from detachnet.report.chart import Axis, Chart, Point, Series, key, on_page, percent
from detachnet.report.record import RunRecord, read_run
from detachnet.surgery.figures import bar, describe_route
from detachnet.text import si
from detachnet.training.data import FileSource, hold, open_test_files
from detachnet.training.tables import FilesTable

SHOWN, LARGE = 192, 48
"""Pixels of the sides of pictures that are shown, at most; those of pictures whose pixels are seen one by one."""
NUM_PICTURES = 12
"""Test images that are shown; evenly spaced through the test images, so not chosen by what came out."""


@dataclass(frozen=True)
class Page:
    """A page and what could not be shown on it.

    Attributes:
        html: The whole page.
        missing: What is missing and why, a sentence each; the page says it too.
    """

    html: str
    missing: tuple[str, ...]


def make_page(
    paths: Sequence[str | Path],
    data_root: str | Path | None = None,
    model: nn.Module | Sequence[nn.Module | None] | None = None,
) -> Page:
    """Put one or more runs on a page.

    Args:
        paths: Folders of runs; with several, a figure with all of them comes first.
        data_root: Where the images for predictions are looked for first; then where the run found them.
        model: A user's own architecture, where the base-models are not of the zoo; or of each run its own.

    Raises:
        DetachNetError: A folder holds no run, or a damaged one.
    """
    models = model if isinstance(model, Sequence) else [model] * len(paths)
    each = counted(zip(paths, _names(paths), models, strict=True), len(paths), "runs read")
    runs = [read_run(path, name, own) for path, name, own in each]
    missing: list[str] = []
    sections = [_section(run, data_root, missing) for run in counted(runs, len(runs), "runs drawn")]
    together = _together(runs) if len(runs) > 1 else None
    html = _template().render(
        title=_title(runs), sections=sections, together=together, key=key, legend=_legend(runs)
    )
    return Page(html, tuple(missing))


def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(
        resources.files("detachnet.report").joinpath("page.html").read_text(encoding="utf-8")
    )


def _names(paths: Sequence[str | Path]) -> list[str]:
    """The folders' names; their paths where these are not different."""
    names = [Path(path).resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _title(runs: Sequence[RunRecord]) -> str:
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs"


def _legend(runs: Sequence[RunRecord]) -> list[tuple[int, str]]:
    return [(i, run.name) for i, run in enumerate(runs)]


def _section(run: RunRecord, data_root: str | Path | None, missing: list[str]) -> dict[str, Any]:
    """What the template shows of one run."""
    plan, table = run.net.plan, run.table
    notes: list[str] = []
    pictures: list[dict[str, Any]] = []
    if not table:
        notes.append("No epoch is complete yet: there are no curves and no accuracies.")
    if not run.info:
        notes.append("There is no run.json: the hardware and the versions are not known.")
    if run.profile is None:
        notes.append("Latency was not measured: detachnet profile does that.")
    try:
        pictures = _pictures(run, _test_images(run, data_root))
    except DataError as error:
        notes.append(f"No predictions: {error.summary}.")
    missing += [f"{run.name}: {note}" for note in notes]
    return {
        "run": run,
        "plan": plan,
        "epochs": f"{len(run.metrics)} of {run.recipe.train.epochs} epochs",
        "tested": _tested(run),
        "rows": [_row(row) for row in table],
        "bars": [_bar(run, name) for name in plan.names],
        "legend": list(enumerate(run.recipe.models)),
        "figures": _figures(run, table),
        "pictures": pictures,
        "facts": _facts(run),
        "notes": notes,
    }


def _tested(run: RunRecord) -> str:
    """What accuracies are measured on."""
    count = run.net.facts.data.num_test if run.net.facts.data else 0
    kind = "held-out training" if run.recipe.data.holdout else "test"
    return (
        f"{count:,} {kind} images of {run.recipe.data.name}"
        if count
        else f"{kind} images of {run.recipe.data.name}"
    )


def _row(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of the final table, as text."""
    return {
        "model": row["model"],
        "macs": si(row["macs"]),
        "of_base": f"{100 * row['macs_of_base']:.0f} %",
        "num_params": si(row["num_params"]),
        "best": f"{100 * row['best_accuracy']:.2f} %",
        "epoch": str(row["best_epoch"]),
        "last": f"{100 * row['last_accuracy']:.2f} %",
    }


def _bar(run: RunRecord, name: str) -> dict[str, Any]:
    """A model's bar in the diagram of the family, and the words above it."""
    plan, model = run.net.plan, run.net.plan[name]
    words = describe_route(model)
    share = f"{100 * model.macs / max(1, plan.models[0].macs):.0f} %"
    return {"name": name, "macs": si(model.macs), "share": share, "words": words, "svg": bar(plan, model)}


def _figures(run: RunRecord, table: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Markup, bool]]:
    """Heading, sentence, drawing, and whether the legend of models belongs to it."""
    if not table:
        return []
    figures = [
        (
            "Accuracy against MACs",
            "After the last epoch; up and to the left is better.",
            _trade_off(_MACS, [_macs_points(table, i) for i in range(len(table))], [r["model"] for r in table]),
            False,
        )
    ]
    if run.profile is not None:
        drawn = _latency(run.profile, table)
        figures.append(("Accuracy against latency", f"Measured: {run.profile.title}.", drawn, False))
    epochs = [row["epoch"] for row in run.metrics]
    for heading, field, axis in (
        (
            "Held-out accuracy" if run.recipe.data.holdout else "Test accuracy",
            "test_accuracy",
            Axis("epoch", _whole),
        ),
        ("Training loss", "train_loss", Axis("epoch", _whole)),
    ):
        curves = _curves(run, field, epochs)
        y = Axis("", percent if field == "test_accuracy" else "{:g}".format)
        description = f"{heading} of {', '.join(run.recipe.models)} over {len(epochs)} epochs."
        chart = Chart(heading, description, axis, y, curves, markers=False)
        figures.append((heading, "One line per model.", on_page(chart), True))
    return figures


def _whole(value: float) -> str:
    """Ticks between two epochs have no number."""
    return f"{value:.0f}" if value == int(value) else ""


_MACS = Axis("million MACs for one image", "{:g}".format, from_zero=True)
_MS = Axis("median milliseconds", "{:g}".format, from_zero=True)


def _curves(run: RunRecord, field: str, epochs: Sequence[int]) -> tuple[Series, ...]:
    """A metric of each model over the epochs, those without one left out."""
    rows = [(x, row[field]) for x, row in zip(epochs, run.metrics, strict=True)]
    return tuple(
        Series(name, tuple(Point(x, values[name]) for x, values in rows if name in values), i)
        for i, name in enumerate(run.recipe.models)
    )


def _macs_points(table: Sequence[Mapping[str, Any]], i: int) -> tuple[Point, ...]:
    row = table[i]
    return (_point(row["model"], row["macs"] / 1e6, row["last_accuracy"], f"{si(row['macs'])} MACs"),)


def _point(model: str, x: float, accuracy: float, cost: str) -> Point:
    return Point(x, accuracy, model, f"{model}: {100 * accuracy:.2f} %, {cost}")


def _trade_off(axis: Axis, points: Sequence[tuple[Point, ...]], names: Sequence[str]) -> Markup:
    series = tuple(Series(name, group, i) for i, (name, group) in enumerate(zip(names, points, strict=True)))
    words = "; ".join(point.title for group in points for point in group) + "."
    return on_page(Chart(f"Accuracy against {axis.label}", words, axis, Axis("", percent), series))


def _latency(profile: Profile, table: Sequence[Mapping[str, Any]]) -> Markup:
    """Accuracy after the last epoch, which may be later than the profile, against the measured median."""
    ms = {row.model: 1e3 * row.p50_s for row in profile.rows}
    known = [(row["model"], row["last_accuracy"]) for row in table if row["model"] in ms]
    points = [(_point(name, ms[name], accuracy, f"{ms[name]:.3f} ms"),) for name, accuracy in known]
    return _trade_off(_MS, points, [name for name, _ in known])


def _together(runs: Sequence[RunRecord]) -> Markup:
    """Every run's models over their MACs; a line connects those of one run."""
    groups = []
    for run in runs:
        rows = sorted(run.table, key=lambda row: float(row["macs"]))
        points = (
            _point(row["model"], row["macs"] / 1e6, row["last_accuracy"], f"{si(row['macs'])} MACs")
            for row in rows
        )
        groups.append(tuple(points))
    return _trade_off(_MACS, groups, [run.name for run in runs])


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    """Hardware, versions and times, as `run.json` has them."""
    units = {
        "train_s": "training, s",
        "wait_share": "share of it waiting for images",
        "images_per_s": "images/s in training",
        "cpu_cores": "CPU cores",
    }
    facts = [(units.get(name, name), str(value)) for name, value in run.info.items() if value is not None]
    if run.profile is not None:
        measured = [*run.profile.hardware.values(), *(f"{k} {v}" for k, v in run.profile.versions.items())]
        facts.append(("latency measured on", ", ".join(measured)))
    return facts


def _test_images(run: RunRecord, data_root: str | Path | None) -> Split:
    """The images accuracies were measured on; of image files as many as are shown.

    Raises:
        DataError: They are not on this machine.
    """
    data = run.recipe.data
    told = run.info.get("data_root")
    root = data_root or (told if isinstance(told, str) and Path(told).is_dir() else None)
    if isinstance(data, FilesTable):
        info, (_, height, width) = run.net.facts.known_data, run.net.plan.input_size
        files = FileSource(data, root, run.recipe.model.name).test if data.holdout else open_test_files(info, root)
        return hold(files, info, (height, width), NUM_PICTURES)
    return select(load_data(data.name, root), data.num_train, data.holdout)[1]


def _pictures(run: RunRecord, split: Split) -> list[dict[str, Any]]:
    """Some test images with what each trained model says about them."""
    count = min(NUM_PICTURES, len(split))
    chosen = torch.arange(count) * len(split) // count
    part = Split(split.images[chosen], split.labels[chosen], split.classes)
    images, labels = next(Batches(part, run.net.facts.known_data, count).epoch())
    answers = {name: predict(run.net, images, name, top=1) for name in run.recipe.models}
    return [
        {
            "picture": _picture(part.images[i]),
            "large": max(part.images.shape[2:]) > LARGE,
            "truth": split.classes[label],
            "answers": [_answer(name, said[i], split.classes[label]) for name, said in answers.items()],
        }
        for i, label in enumerate(labels.tolist())
    ]


def _answer(model: str, answer: Prediction, truth: str) -> dict[str, Any]:
    text = f"{answer.labels[0]} {100 * answer.probabilities[0]:.0f}\N{NO-BREAK SPACE}%"
    return {"model": model, "right": answer.labels[0] == truth, "text": text}


def _picture(image: Tensor) -> str:
    """A picture `(C, H, W)`, uint8, as a data URL; a larger one than is shown is made smaller."""
    array = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    kind = "JPEG" if max(picture.size) > LARGE else "PNG"
    picture.thumbnail((SHOWN, SHOWN))
    file = io.BytesIO()
    picture.save(file, kind, quality=85)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
