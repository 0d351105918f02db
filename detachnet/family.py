"""Recipe -> the family a training starts with."""

from __future__ import annotations

from pathlib import Path

import torch

from detachnet.checkpoint import read
from detachnet.detachable import DetachableNet, make_detachable
from detachnet.errors import CheckpointError, RecipeError
from detachnet.losses import logits
from detachnet.recipe import Recipe
from detachnet.runs import family_file
from detachnet.views import HEADS, NORMS
from detachnet.zoo import create_model


def build_family(recipe: Recipe, input_size: tuple[int, ...]) -> DetachableNet:
    """The family a recipe trains, newly initialized from its seed; cuts of untrained sub-models are left out."""
    names, cuts = recipe.family.names[1:], recipe.family.cuts
    places = list(cuts.values()) if isinstance(cuts, dict) else list(cuts)
    trained = {name: cut for name, cut in zip(names, places, strict=True) if name in recipe.models}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        model = create_model(recipe.model.name, **recipe.model.kwargs)
        table = recipe.family
        stepdown = table.stem if table.stepdown == "stem" else table.stepdown
        net = make_detachable(model, trained, input_size, norm=table.norm, head=table.head, stepdown=stepdown)
    net.trained = recipe.models
    return net


def check_classes(net: DetachableNet) -> None:
    """Refuse a family that does not have one output for each class of its data.

    Raises:
        RecipeError: It has more or fewer.
    """
    if net.data is None:
        return
    was = net.training
    with torch.no_grad():
        outputs = logits(net.eval()(torch.zeros(1, *net.plan.input_size))).shape[-1]
    net.train(was)
    if outputs != (count := len(net.data.classes)):
        raise RecipeError(
            f"the model has {outputs} outputs, but {net.data.name} has {count} classes",
            hint=f"--set model.kwargs.num_classes={count}",
        )


def start_from(net: DetachableNet, path: str | Path) -> None:
    """Give all models of a family the weights and statistics of a trained base-model; step-downs stay new.

    Args:
        net: The family; a sub-model's private norms and head become copies of the base-model's.
        path: The file of a family with the same base-model, or the folder of its run.

    Raises:
        CheckpointError: The file is missing, damaged, of another base-model, or of a run that did not train it.
    """
    path = family_file(path)
    header, tensors = read(path)
    if header.trained and "base" not in header.trained:
        raise CheckpointError(f"{path} cannot be started from: its base-model was not trained")
    tensors |= {name: tensors[kept] for name, kept in header.tied.items()}
    state = net.state_dict()
    for name in state:
        source = name
        if name.startswith((f"{NORMS}.", f"{HEADS}.")):
            source = "base." + name.split(".", 2)[2]
        if source.startswith("base."):
            if source not in tensors or tensors[source].shape != state[name].shape:
                raise CheckpointError(f"{path} cannot be started from: it has no {source!r} of that shape")
            state[name] = tensors[source]
    net.load_state_dict(state)
