"""net -> one file, which says what it takes to build the family again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detachnet.checkpoint.answer import answer, is_asked
from detachnet.checkpoint.content import split_state, write_file
from detachnet.checkpoint.fingerprint import difference_from_source, fingerprint, of_entries, unstored
from detachnet.checkpoint.header import Header, Source, TrainingState
from detachnet.errors import CheckpointError, ModelError, one_line
from detachnet.surgery.contents import PLAIN
from detachnet.surgery.detachable import DetachableNet, family_in
from detachnet.surgery.plan import BASE
from detachnet.surgery.whole import hooked
from detachnet.zoo import ModelSource, inferred_source

logger = logging.getLogger("detachnet")
_AS_OWN = "save(net, path, own=True), then load(path, model=...) with the model as it is now"


def save(net: DetachableNet, path: str | Path, which: str | None = None, *, own: bool = False) -> None:
    """Write a family, or one of its models alone, to one safetensors file.

    The file appears complete or not at all: it is written beside its place and renamed.

    Args:
        net: The family.
        path: Where to.
        which: A model to write alone, with only the weights it needs: `load` gives what `net.detach(which)` does.
        own: Write it as a model of your own even if it came from the zoo, as one that was changed must be: loading
            then needs `load(path, model=...)`.

    Raises:
        TraceError: This is no family.
        CutError: No model is called `which`.
        CheckpointError: The file cannot be written, or loading would not give this model.
    """
    net = family_in(net)
    check_storable(net, own)
    header = _header(net, own)
    if header.source is None:
        why = "" if own else _unlike_timms(net.base)
        logger.info("%s: loading it needs the model: load(path, model=%s(...))%s", path, net.plan.model, why)
    if which in net.names and which not in net.facts.models(net.names):
        logger.warning("%s is written as it was made: it was not trained", which)
    if which is None:
        write_file(path, _with_answer(header, net, net.base), net.state_dict(), {})
    else:
        is_narrow = which in net.names and bool(net.plan[which].kept)
        module = net.detach(which, share=not is_narrow)
        header = _with_answer(_alone(header, net, which), net, net.detach(which))
        write_file(path, header, module.state_dict(), {})


def loads_alone(net: DetachableNet) -> bool:
    """Whether loading what `save` writes needs no model: a user's own does."""
    return _header(net).source is not None


def check_storable(net: DetachableNet, own: bool = False) -> None:
    """Refuse a family whose file would not load, or load as another network.

    Args:
        net: The family; a training run asks before it begins.
        own: As in `save`.

    Raises:
        CheckpointError: The model's arguments cannot be stored, it is no longer what they build, or a layer has a
            state that is no tensor and no JSON.
    """
    net.prepare((BASE,))  # which follows what was changed since the last pass
    header = _header(net, own)
    split_state(net.state_dict())
    _check_norms(net)
    if header.source is None or net.source is None:
        return
    if difference := difference_from_source(net.base, net.source):
        raise CheckpointError(
            f"the model is not what {net.source.name} with its arguments builds: it was changed afterwards",
            what=difference,
            hint=_AS_OWN,
        )
    if hooks := hooked(net.base):
        names = ", ".join(repr(path) if path else "the model itself" for path in hooks)
        logger.warning("a file has no hooks: what loading gives is without those of %s; %s", names, _AS_OWN)


_OF_NORMS = ["eps", "momentum", "affine", "track_running_stats"]
"""What is compared of norms of different sizes."""


def _check_norms(net: DetachableNet) -> None:
    """Refuse sub-models' norms that are set otherwise than the base-model's: loading makes them of those.

    Raises:
        CheckpointError: There is one.
    """
    for path, norm in net.norms.named_modules():
        if isinstance(norm, _BatchNorm):
            like = net.base.get_submodule(path.partition(".")[2])
            alike = norm.num_features == like.num_features  # else the others may follow from that
            plain = (
                [name for name, value in vars(norm).items() if isinstance(value, PLAIN)] if alike else _OF_NORMS
            )
            for name in [name for name in plain if name[:1] != "_" and name != "training"]:
                if getattr(norm, name) != getattr(like, name, None):
                    raise CheckpointError(
                        f"{name} of net.norms.{path} is {getattr(norm, name)}, that of the base-model's norm "
                        f"{getattr(like, name, None)}: a file has one for both",
                        hint="set it for all norms alike: net.modules() has them",
                    )


def write(
    net: DetachableNet,
    path: str | Path,
    training: TrainingState | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """`save`, with what a training needs to go on: its state and its tensors, under one of the two prefixes."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in (extra or {}).items()}
    header = _with_answer(_header(net), net, net.base)
    write_file(path, header.model_copy(update={"training": training}), net.state_dict(), kept)


def _header(net: DetachableNet, own: bool = False) -> Header:
    """What a family's file says, but for its tensors."""
    known = None if own else net.source or _timms_own(net.base)
    try:
        source = Source(name=known.name, kwargs=known.kwargs) if known else None
    except ValidationError as error:
        raise CheckpointError(
            "the arguments the model was made with cannot be stored in a file",
            what=f"{net.source}",
            hint=f"use numbers, strings and booleans only; or {_AS_OWN}",
        ) from error
    tensors = [*net.parameters(), *net.buffers()]
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    said: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "fingerprint": fingerprint(net.base)}
    said["unstored"] = unstored(net.base)
    if net.plan.entry == "custom":
        said["entries"] = of_entries(net)
    if not net.input_dtype.is_floating_point:
        said["input_dtype"] = str(net.input_dtype).removeprefix("torch.")
    try:
        return Header(source=source, plan=net.plan, **said, **dict(net.facts))
    except ValidationError as error:
        raise CheckpointError(
            "what is known of the family cannot be stored in a file",
            what=one_line(error),
            hint="net.facts says it: data, trained and accuracy",
        ) from error


def _with_answer(header: Header, net: DetachableNet, model: nn.Module) -> Header:
    """The same with what the one model of the file, or the base-model, answers."""
    said = answer(model, net.plan.input_size) if is_asked(net) else None
    return header.model_copy(update={"answer": said})


def _timms_own(model: nn.Module) -> ModelSource | None:
    """The name and arguments of a model that `timm.create_model` made, if they build the same one again."""
    source = inferred_source(model)
    try:
        return source if source and not difference_from_source(model, source) else None
    except ModelError:
        return None


def _unlike_timms(model: nn.Module) -> str:
    """What keeps a model of timm's from being made again by its name; nothing of another."""
    source = inferred_source(model)
    try:
        return f"; unlike {source.name}, {difference_from_source(model, source)}" if source else ""
    except ModelError:
        return ""


def _alone(header: Header, net: DetachableNet, name: str) -> Header:
    """The same of one model of the family."""
    models = tuple(model for model in header.plan.models if model.name in (BASE, name))
    change = {
        "plan": header.plan.model_copy(update={"models": models}),
        "trained": tuple(model for model in header.trained if model == name),
        "accuracy": {model: value for model, value in header.accuracy.items() if model == name},
        "entries": of_entries(net, (name,)) if header.entries else "",
        "detached": name,
    }
    return header.model_copy(update=change)
