"""family, and the run it comes from -> the card of its repository: what it is, what it costs, how it is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence

from detachnet.report.chart import Axis, Chart, Point, Series, percent
from detachnet.surgery.detachable import DetachableNet
from detachnet.text import Table, by, si

FIGURE = "accuracy.png"
"""The figure beside a card."""


def make_card(
    net: DetachableNet,
    repo: str,
    license: str,
    *,
    recipe: str = "",
    base_model: str = "",
    loads_alone: bool = True,
) -> str:
    """A model card in Markdown, with the metadata that the Hub reads in front.

    Args:
        net: The family.
        repo: `OWNER/NAME`.
        license: The licence of the weights, by the Hub's name for it, such as `apache-2.0`.
        recipe: What trained it, TOML.
        base_model: The repository on the Hub that the base-model's weights come from.
        loads_alone: Whether loading needs nothing but the file.
    """
    plan, data = net.plan, net.facts.data
    meta = {
        "license": license,
        "library_name": "detachnet",
        "pipeline_tag": "image-classification",
        "tags": ["detachnet", "model-compression"],
        **({"base_model": base_model} if base_model else {}),
    }
    model = "" if loads_alone else f", model={plan.model}(...)"
    smallest = min(plan.models, key=lambda model: model.macs).name
    parts = [
        "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in meta.items()) + "---\n",
        f"# {repo}\n",
        f"{plan.model} for {by(plan.input_size)} images and {len(plan.models) - 1} sub-models that share its "
        "weights, in one file: a family of detachnet.\n",
        _table(net).markdown(),
        _tested(net),
        f"![Accuracy against MACs]({FIGURE})\n" if figure(net) else "",
        "## Load\n",
        f'```python\nimport detachnet\n\nnet = detachnet.load("hf-hub:{repo}"{model})\n'
        f'small = net.detach("{smallest}")  # a plain module\n```\n',
        "Loading executes nothing of the file." + ("" if loads_alone else _own_model(plan.model)) + "\n",
        _described(data.name, data.classes, data.mean, data.std) if data else "",
        f"## Training\n\n```toml\n{recipe.strip()}\n```\n" if recipe else "",
        f"## Licence\n\nThe weights: {license}.{f' They started from `{base_model}`.' if base_model else ''}\n",
    ]
    return "\n".join(part for part in parts if part)


def figure(net: DetachableNet) -> Chart | None:
    """Accuracy against MACs; None where no accuracy is known."""
    known = [
        (model, net.facts.accuracy[model.name]) for model in net.plan.models if model.name in net.facts.accuracy
    ]
    series = tuple(
        Series(model.name, (Point(model.macs / 1e6, accuracy, model.name),), i)
        for i, (model, accuracy) in enumerate(known)
    )
    axis = Axis("million MACs for one image", "{:g}".format, from_zero=True)
    words = "; ".join(f"{model.name}: {100 * accuracy:.2f} %" for model, accuracy in known)
    return Chart("Accuracy against MACs", words, axis, Axis("", percent), series) if known else None


def _table(net: DetachableNet) -> Table:
    """What each model costs, and how accurate it is."""
    plan, accuracy = net.plan, net.facts.accuracy
    header = ("model", "MACs", "of base", "parameters", *(["test accuracy"] if accuracy else []))
    rows = tuple(
        (
            f"`{model.name}`",
            si(model.macs),
            f"{100 * model.macs / max(1, plan.models[0].macs):.0f} %",
            si(model.num_params),
            *([f"{100 * accuracy[model.name]:.2f} %" if model.name in accuracy else "–"] if accuracy else []),
        )
        for model in plan.models
    )
    return Table(header, rows)


def _tested(net: DetachableNet) -> str:
    """What accuracies are of."""
    data = net.facts.data
    if not data or not net.facts.accuracy:
        return ""
    counted = f"n = {data.num_test} " if data.num_test else ""
    return f"Accuracy on {counted}test images of {data.name}.\n"


def _own_model(name: str) -> str:
    return f" The base-model is an architecture of its author's: make a `{name}` and pass it as `model`."


def _described(name: str, classes: Sequence[str], mean: Sequence[float], std: Sequence[float]) -> str:
    """What the models take in and give."""
    shown = ", ".join(classes[:20]) + (f" and {len(classes) - 20} more" if len(classes) > 20 else "")
    values = " and ".join(str([round(value, 4) for value in values]) for values in (mean, std))
    return f"## Data\n\n{name}, {len(classes)} classes: {shown}. Channels have mean and deviation {values}.\n"
