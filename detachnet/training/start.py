"""recipe -> the family a run starts with."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detachnet.errors import CheckpointError, RecipeError, TraceError
from detachnet.losses import logits
from detachnet.models import FromImages
from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.making import make_detachable
from detachnet.surgery.modules import evaluating, in_type_of, weight_of
from detachnet.surgery.ownership import HEADS, NORMS
from detachnet.surgery.plan import BASE, DetachPlan, ModelPlan
from detachnet.surgery.routes import SubModel, folder
from detachnet.surgery.stepdown import Stem
from detachnet.surgery.synchronizing import synchronize_norms
from detachnet.text import number_of
from detachnet.training.data import Source
from detachnet.training.optimizer import make_loss
from detachnet.training.recipe import Recipe
from detachnet.training.step import without_gradient
from detachnet.training.tables import FilesTable
from detachnet.training.weights import OWN, Start, read_start
from detachnet.zoo import WEIGHTS, build_model, new_layers, takes_num_classes

logger = logging.getLogger("detachnet")


def decided(recipe: Recipe, source: Source) -> Recipe:
    """A recipe with all that its images decide: the number of classes, and routes that it leaves to be chosen.

    Raises:
        CutError: There are no such routes, with what to do.
    """
    model, info = recipe.model, source.info
    if info.test_share and info.num_test:
        logger.info(
            "%s has no splits: %d images are tested on and not trained on, %g %% of each class",
            *(info.name, info.num_test, 100 * info.test_share),
        )
    follows = isinstance(recipe.data, FilesTable) or not model.name.startswith("detachnet:")
    if "num_classes" not in model.kwargs and follows and takes_num_classes(model.name, recipe.folder):
        kwargs = model.kwargs | {"num_classes": len(info.classes)}
        recipe = recipe.model_copy(update={"model": model.model_copy(update={"kwargs": kwargs})})
    with _taking_in(source):
        return with_routes(recipe, source.input_size)


@contextmanager
def _taking_in(source: Source) -> Iterator[None]:
    """A model that takes in images of other channels is refused in the words of the recipe.

    Raises:
        RecipeError: In the place of what tracing it raises then.
    """
    try:
        yield
    except TraceError as error:
        found = re.search(r"to have (\d+) channels, but got (\d+) channels", str(error))
        if found is None or int(found[2]) != source.input_size[0]:
            raise
        raise RecipeError(
            f"the images of {source.info.name} have {number_of(int(found[2]), 'channel')}, "
            f"the model takes {found[1]}",
            what=error.summary,
            hint=f"other images in data.name, or a model for them: timm's have model.kwargs.in_chans={found[2]}",
        ) from error


def with_routes(recipe: Recipe, input_size: tuple[int, ...]) -> Recipe:
    """A recipe with the cuts or routes that it leaves to be chosen; the same one if it names them all.

    Raises:
        CutError: There are none such, with what to do.
    """
    family = recipe.family
    if not family.asked:
        return recipe
    kwargs = {key: value for key, value in recipe.model.kwargs.items() if key not in WEIGHTS}
    with torch.random.fork_rng(devices=[]):
        model = build_model(recipe.model.name, recipe.folder, **kwargs)
    cuts = family.cuts or None
    asked = None if cuts else family.sub_models
    plan = make_detachable(
        model, cuts, input_size, sub_models=asked, stepdown=_entry(recipe), head=family.head, check="none"
    ).plan
    for hint in plan.hints:
        logger.info("%s: %s", family.asked, hint)
    routes = {model.name: SubModel(drop=[str(span) for span in model.spans]) for model in plan.models[1:]}
    update: dict[str, object] = {"sub_models": (), "chosen": family.asked}
    if cuts:
        update["cuts"] = tuple(str(model.cut) for model in plan.models[1:])
    else:
        update["models"] = routes | family.models
    return recipe.model_copy(update={"family": family.model_copy(update=update)})


def _entry(recipe: Recipe) -> str | Stem:
    """What `make_detachable` takes as `stepdown`."""
    return recipe.family.stem if recipe.family.stepdown == "stem" else recipe.family.stepdown


def build_family(recipe: Recipe, input_size: tuple[int, ...], like: DetachPlan | None = None) -> DetachableNet:
    """The family a recipe trains, newly initialized from its seed; cuts of untrained sub-models are left out.

    Which filters are important is decided by the weights that training starts from, unless the plan of an earlier
    part of the run says what was decided, `like`, or that of the family it starts from.
    """
    recipe = with_routes(recipe, input_size)
    trained = {name: sub for name, sub in recipe.family.routes.items() if name in recipe.models}
    narrow = {name: sub for name, sub in trained.items() if isinstance(sub, SubModel) and sub.is_narrow}
    goes_on = like is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        model = build_model(recipe.model.name, recipe.folder, **recipe.model.kwargs)
        if narrow and recipe.train.init and not goes_on:
            like = _start_model(model, recipe.train.init)
        for name, sub in narrow.items():
            known = like[name] if like and name in like.names else None
            if known and (goes_on or known.asked.model_dump() == sub.model_dump()):
                trained[name] = sub.keeping(known.kept)
        table = recipe.family
        net = make_detachable(
            model, trained, input_size, norm=table.norm, head=table.head, stepdown=_entry(recipe)
        )
    net.facts = net.facts.updated(trained=recipe.models)
    return net


def starting_family(
    recipe: Recipe,
    source: Source,
    device: torch.device,
    *,
    several: bool,
    resuming: bool,
    like: DetachPlan | None = None,
) -> DetachableNet:
    """The family that a run trains, on its device; what is not trained asks for no gradient.

    Args:
        recipe: The experiment.
        source: Its images.
        device: Where it is trained.
        several: By more than one process: then batch norms are synchronized, where there are such (CUDA).
        resuming: Its weights come from a checkpoint of the run, not from `train.init`.
        like: The plan in that checkpoint.

    Raises:
        RecipeError: Its outputs are not those of the classes, or nothing is left to train.
        CheckpointError: It cannot start from `train.init`.
    """
    on_cuda = device.type == "cuda"
    with _taking_in(source):
        net = build_family(recipe, source.input_size, like)
    if several and on_cuda:
        synchronize_norms(net)
    net.facts = net.facts.updated(data=source.info)
    check_classes(net, takes_num_classes(recipe.model.name, recipe.folder))
    if recipe.train.freeze_base and not recipe.train.init and (layers := new_layers(net.base)):
        raise RecipeError(
            f"train.freeze_base would keep {layers[0]!r} untrained, which the published weights do not fit",
            hint="use as many classes as they have, or train.init with a base-model that is trained",
        )
    if recipe.train.init and not resuming:
        new = start_from(net, recipe.train.init)
        if new and recipe.train.freeze_base:
            raise RecipeError(
                f"train.freeze_base would keep {new[0]!r} untrained, which {recipe.train.init} has no weights for",
                hint="start from a base-model of the same classes, or without train.freeze_base",
            )
    elif not resuming and isinstance(net.base, FromImages):
        batches, _ = source.batches(recipe.train, device, (0, 1), torch.contiguous_format)
        net.base.initialize_from(next(iter(batches.epoch()))[0])  # the same in all processes
    net.to(device)
    if on_cuda:
        net.to(memory_format=torch.channels_last)
    trained = net.parameters_of(recipe.models)
    for name, parameter in net.named_parameters():
        frozen = recipe.train.freeze_base and name.startswith("base.")
        parameter.requires_grad_(parameter.requires_grad and name in trained and not frozen)
    if several:  # which would wait for gradients that do not come
        for name in without_gradient(net, recipe.models, make_loss(recipe)):
            net.get_parameter(name).requires_grad_(False)
    _check_trains(net, recipe)
    return net


def _check_trains(net: DetachableNet, recipe: Recipe) -> None:
    """Refuse a training that would change nothing.

    Raises:
        RecipeError: No parameter takes a gradient.
    """
    if any(parameter.requires_grad for parameter in net.parameters()):
        return
    if not recipe.train.freeze_base:
        raise RecipeError(
            f"there is nothing to train: no parameter of {', '.join(recipe.models)} takes a gradient",
            hint="parameter.requires_grad_(True) in the function that makes the model",
        )
    if recipe.models == (BASE,):
        raise RecipeError(
            "train.freeze_base leaves nothing to train: the base-model stays as it is, and no other is trained",
            hint="--set train.freeze_base=false, or sub-models in [family] and among train.models",
        )
    raise RecipeError(
        "train.freeze_base leaves nothing to train: all layers with weights are the base-model's",
        hint="--set train.freeze_base=false, or family.head = 'private': sub-models get a last layer of their own",
    )


def check_classes(net: DetachableNet, takes_number: bool = True) -> None:
    """Refuse a family that does not have one output for each class of its data.

    Args:
        net: The family; outputs other than `(B, N)` are not judged.
        takes_number: Whether its model has an argument `num_classes`.

    Raises:
        RecipeError: It has more or fewer.
    """
    if (data := net.facts.data) is None:
        return
    with evaluating(net), torch.no_grad():
        out = logits(net(in_type_of(weight_of(net), torch.zeros(1, *net.plan.input_size))))
    if out.dim() == 2 and (outputs := out.shape[1]) != (count := len(data.classes)):
        raise RecipeError(
            f"the model has {number_of(outputs, 'output')}, but {data.name} has {count} classes",
            hint=f"--set model.kwargs.num_classes={count}"
            if takes_number
            else f"a last layer of {count} outputs in the function that makes the model",
        )


def start_from(net: DetachableNet, path: str | Path) -> list[str]:
    """Give all models of a family the weights and statistics of a trained base-model; step-downs stay new.

    A sub-model that the file has, too, goes on from where it is there: with its own step-down, norms and head. A
    classifier for another number of classes stays new, which is said.

    Args:
        net: The family; another sub-model's private norms and head become copies of the base-model's.
        path: The file of a family with the same base-model, the folder of its run, or a state dict of the
            base-model alone.

    Returns:
        Names of the base-model's tensors that stay new.

    Raises:
        CheckpointError: The file is missing, damaged, of another base-model, or of a run that did not train it.
    """
    names = {
        name.removeprefix("base."): tensor for name, tensor in net.state_dict().items() if name[:5] == "base."
    }
    start = read_start(path, names)
    tensors = start.base
    new = [name for name in names if not _alike(tensors.get(name), names[name])]
    classifier = _classifier(net) if new else set()
    for name in new:
        layer = name.rpartition(".")[0]
        given = tensors.get(name)
        fits_but_for_classes = given is None or given.shape[1:] == names[name].shape[1:]
        if name.endswith("num_batches_tracked") or (layer in classifier and fits_but_for_classes):
            continue
        raise CheckpointError(f"{path} cannot be started from: it has no {'base.' + name!r} of that shape")
    state = net.state_dict()
    for name, value in state.items():
        source = name
        if is_own := name.startswith((f"{NORMS}.", f"{HEADS}.")):
            source = "base." + name.split(".", 2)[2]
        plain = source.removeprefix("base.")
        if source.startswith("base.") and plain not in new:
            given = tensors.get(plain, value)
            state[name] = net.own_tensor(name, given) if is_own and isinstance(given, Tensor) else given
    net.load_state_dict(state | _as_they_were(net, start, path))
    new = [name for name in new if not name.endswith("num_batches_tracked")]
    unused = [name for name in tensors if name not in names]
    if new:
        theirs = next((f"{tensors[name].shape[0]} outputs" for name in new if name in tensors), "none")
        ours = names[new[0]].shape[0]
        layers = ", ".join(dict.fromkeys(repr(name.rpartition(".")[0]) for name in new))
        logger.info("%s: %s stays new, with %s outputs; the file has %s", path, layers, ours, theirs)
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        logger.info("%s: not used: %s%s", path, ", ".join(unused[:3]), more)
    return new


def _alike(given: object, there: object) -> bool:
    """Whether what a file has can take the place of what is there: a tensor of that shape; plain values any."""
    if isinstance(there, Tensor):
        return isinstance(given, Tensor) and given.shape == there.shape
    return not isinstance(given, Tensor)


def _as_they_were(net: DetachableNet, start: Start, path: str | Path) -> dict[str, Any]:
    """What the sub-models that a file has, too, have for themselves there."""
    if start.plan is None:
        return {}
    there = {model.name: _leaves_out(net, model) for model in start.plan.models}
    same = [m.name for m in net.plan.models[1:] if there.get(m.name) == _leaves_out(net, m)]
    places = {folder(name) for name in same}
    state = net.state_dict()
    own = [name for name in state if name.startswith(OWN) and name.split(".")[1] in places]
    found = {n: start.own[n] for n in own if n in start.own and _alike(start.own[n], state[n])}
    if same:
        logger.info("%s: goes on with %s as they are there", path, ", ".join(same))
    if lost := [name for name in own if name not in found]:
        logger.info("%s: has no %s%s of its own", path, ", ".join(lost[:3]), " and more" * (len(lost) > 3))
    return found


def _leaves_out(net: DetachableNet, model: ModelPlan) -> tuple[object, ...]:
    """What makes a sub-model the same one in two families of a network."""
    return net.route_of(model), tuple(span.bridge for span in model.spans), model.kept


def _start_model(model: nn.Module, path: str | Path) -> DetachPlan | None:
    """Give a model alone the weights of a trained one, as far as they fit; the plan of its family, if all do."""
    own = model.state_dict()
    start = read_start(path, own)
    alike = {n: value for n, value in start.base.items() if n in own and _alike(value, own[n])}
    model.load_state_dict(own | alike)
    return start.plan if len(alike) == len(own) else None


def _classifier(net: DetachableNet) -> set[str]:
    """Paths of the layers that make one output for each class."""
    with evaluating(net), torch.no_grad():
        like = next(net.parameters())
        outputs = logits(net(torch.zeros(1, *net.plan.input_size, dtype=like.dtype))).shape[-1]
    layers = [(path, layer) for path, layer in net.base.named_modules() if list(layer.parameters(recurse=False))]
    found = {path for path, layer in layers if next(layer.parameters(recurse=False)).shape[:1] == (outputs,)}
    return found & {layers[-1][0]} | {path for path in found if _makes_logits(net.base.get_submodule(path))}


def _makes_logits(layer: torch.nn.Module) -> bool:
    """Whether a layer is linear: an auxiliary classifier is one, too."""
    return isinstance(layer, torch.nn.Linear)
