"""net <-> one file: the weights as safetensors, the plan in its header, a checksum over both.

Nothing in a file is executed: the header is JSON checked against the classes below, the model is built by the
zoo from a name and plain arguments, or given by the caller.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from detachnet.data import DataInfo
from detachnet.detachable import DetachableNet, make_detachable
from detachnet.errors import CheckpointError, DetachNetError, ModelError, TraceError
from detachnet.plan import BASE, DetachPlan
from detachnet.stepdown import Stem, StepDownBuilder
from detachnet.tracer import NO_LEAVES, Leaves
from detachnet.zoo import create_model

KEY = "detachnet"
_FORMAT = {"format": "pt"}
TRAINER = "trainer."
"""Prefix of the optimizer's tensors, which only going on with the training needs."""
LIVE = "live."
"""Prefix of the weights that are trained, in a file whose family is their average; needed for the same."""

_Plain = str | int | float | bool | None
_FETCHING = {
    "cache_dir",
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "weights",
    "weights_backbone",
}
"""Arguments of models that would read or fetch a file."""


class Source(BaseModel):
    """How the base-model is built: `create_model(name, **kwargs)`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kwargs: dict[str, _Plain | tuple[_Plain, ...]]


class TrainingState(BaseModel):
    """Where a training is; with the recipe and the file's tensors enough to go on exactly.

    Attributes:
        recipe: The resolved recipe, as JSON.
        epoch: Epochs completed.
        step: Steps completed in the current epoch.
        sums: Model → sum of its training losses over these steps.
        rows: One row of metrics per completed epoch.
        train_s: Seconds spent training so far.
        wait_s: Seconds of these spent waiting for images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    recipe: str
    epoch: int
    step: int
    sums: dict[str, float]
    rows: tuple[dict[str, Any], ...]
    train_s: float
    wait_s: float = 0.0


class Header(BaseModel):
    """What a checkpoint says about itself.

    Attributes:
        format_version: Raised when the meaning of a file changes.
        source: None where the base-model is a user's own.
        plan: The family.
        dtype: Of the weights.
        tied: Names of tensors that are stored once under another name.
        data: What it was trained on, if that is known.
        trained: The models that were trained; empty if that is not known.
        accuracy: Model → its test accuracy, in [0, 1], when it was last measured.
        detached: The one model whose weights the file holds, under the names of the detached module; None for a
            whole family.
        training: Present in the files a training goes on from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    format_version: Literal[1] = 1
    source: Source | None
    plan: DetachPlan
    dtype: str
    tied: dict[str, str] = {}
    data: DataInfo | None = None
    trained: tuple[str, ...] = ()
    accuracy: dict[str, float] = {}
    detached: str | None = None
    training: TrainingState | None = None

    @model_validator(mode="after")
    def _detached_is_one_of_the_models(self) -> Header:
        if self.detached is not None and self.detached not in self.plan.names:
            raise ValueError(f"detached = {self.detached!r} is none of the models {self.plan.names}")
        return self


def save(net: DetachableNet, path: str | Path, which: str | None = None) -> None:
    """Write a family, or one of its models alone, to one safetensors file.

    The file appears complete or not at all: it is written beside its place and renamed.

    Args:
        net: The family.
        path: Where to.
        which: A model to write alone, with only the weights it needs: `load` gives what `net.detach(which)` does.

    Raises:
        CutError: No model is called `which`.
        CheckpointError: The file cannot be written, or the model's arguments cannot be stored.
    """
    if which is None:
        write(net, path)
    else:
        module = net.detach(which, share=True)
        _write(path, _alone(_header(net), which), module.state_dict(), {})


def write(
    net: DetachableNet,
    path: str | Path,
    training: TrainingState | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """`save`, with what a training needs to go on: its state and its tensors, under one of the two prefixes."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in (extra or {}).items()}
    _write(path, _header(net).model_copy(update={"training": training}), net.state_dict(), kept)


def _header(net: DetachableNet) -> Header:
    """What a family's file says, but for its tensors."""
    try:
        source = Source(name=net.source.name, kwargs=net.source.kwargs) if net.source else None
    except ValidationError as error:
        raise CheckpointError(
            "the arguments the model was made with cannot be stored in a file",
            what=f"{net.source}",
            hint="use numbers, strings and booleans only",
        ) from error
    dtype = next((t.dtype for t in net.state_dict().values() if t.is_floating_point()), torch.float32)
    return Header(
        source=source,
        plan=net.plan,
        dtype=str(dtype).removeprefix("torch."),
        data=net.data,
        trained=net.trained,
        accuracy=net.accuracy,
    )


def _alone(header: Header, name: str) -> Header:
    """The same of one model of the family."""
    models = tuple(model for model in header.plan.models if model.name in (BASE, name))
    change = {
        "plan": header.plan.model_copy(update={"models": models}),
        "trained": tuple(model for model in header.trained if model == name),
        "accuracy": {model: value for model, value in header.accuracy.items() if model == name},
        "detached": name,
    }
    return header.model_copy(update=change)


def _write(path: str | Path, header: Header, state: Mapping[str, Tensor], extra: Mapping[str, Tensor]) -> None:
    """A header and the tensors it is about, with a checksum over both."""
    tensors, tied = untied(state)
    tensors |= extra
    text = header.model_copy(update={"tied": tied}).model_dump_json()
    metadata = _FORMAT | {KEY: text, "sha256": _digest(text, tensors)}
    replace_file(Path(path), to_bytes(tensors, metadata))


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part.

    Raises:
        CheckpointError: It cannot be written; what was there is still there.
    """
    if not path.parent.is_dir():
        raise CheckpointError(f"cannot write {path}: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        kept = "; the previous file is unchanged" if path.exists() else ""
        raise CheckpointError(f"cannot write {path}{kept}", what=str(error)) from error


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    stepdown: StepDownBuilder | None = None,
    leaf_modules: Sequence[type[nn.Module]] = (),
    leaf_functions: Sequence[Callable[..., Any]] = (),
) -> DetachableNet | Any:
    """Read a family from a file, or the one model that was written alone; on the CPU, in evaluation mode.

    Args:
        path: What `save` wrote.
        model: A user's own architecture, where the base-model is not one of the zoo's.
        stepdown: The user's own step-down, where the family was made with one.
        leaf_modules: As given to `make_detachable`.
        leaf_functions: As given to `make_detachable`.

    Returns:
        The `DetachableNet`; from a file with one model the plain module, as `DetachableNet.detach` gives it.

    Raises:
        TraceError: `model` cannot be traced.
        CheckpointError: The file is missing, damaged, of an unknown kind, or does not fit `model`.
    """
    header, tensors = read(path)
    leaves = Leaves(tuple(leaf_modules), tuple(leaf_functions))
    if header.detached is None:
        return build(header, tensors, path, model, stepdown, leaves)
    return _build_detached(header, header.detached, tensors, path, model, stepdown, leaves)


def load_family(path: str | Path, model: nn.Module | None = None) -> DetachableNet:
    """`load`, where one model alone is not enough.

    Raises:
        CheckpointError: The file holds one model alone, or as `load`.
    """
    return build(*read(path), path, model)


def read(path: str | Path) -> tuple[Header, dict[str, Tensor]]:
    """A file's header and tensors, both checked."""
    if Path(path).is_dir():
        raise CheckpointError(
            f"{path} is a folder", hint="of a run, give its last.safetensors or best.safetensors"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file",
            what=str(error),
            hint="it may be no checkpoint, or truncated: then copy it again",
        ) from error
    if KEY not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file, but not one of detachnet's",
            hint="load plain weights into the model, then call make_detachable",
        )
    if metadata != _FORMAT | {KEY: metadata[KEY], "sha256": _digest(metadata[KEY], tensors)}:
        raise CheckpointError(
            f"{path} is damaged: its content does not match its checksum", hint="copy the file again"
        )
    try:
        raw = json.loads(metadata[KEY])
        if raw.get("format_version") != 1:
            raise CheckpointError(
                f"{path} has format version {raw.get('format_version')}; this version of detachnet reads 1",
                hint="pip install --upgrade detachnet",
            )
        return Header.model_validate_json(metadata[KEY]), tensors
    except (ValidationError, json.JSONDecodeError, AttributeError) as error:
        raise CheckpointError(f"the header of {path} says something unknown", what=_one_line(error)) from error


def build(
    header: Header,
    tensors: dict[str, Tensor],
    path: str | Path,
    model: nn.Module | None = None,
    stepdown: StepDownBuilder | None = None,
    leaves: Leaves = NO_LEAVES,
) -> DetachableNet:
    """The family a header and its tensors describe."""
    if header.detached is not None:
        raise CheckpointError(
            f"{path} holds {header.detached} alone, detached from its family",
            hint="give the file of the whole family; detachnet.load(path) reads this one as a plain module",
        )
    base = _base(header, path, model, stepdown)
    with _fits(base, path):
        net = _family(header, base, stepdown, leaves)
        load_weights(net, header, tensors)
    net.data, net.trained, net.accuracy = header.data, header.trained, dict(header.accuracy)
    return net.eval()


def _build_detached(
    header: Header,
    name: str,
    tensors: Mapping[str, Tensor],
    path: str | Path,
    model: nn.Module | None,
    stepdown: StepDownBuilder | None,
    leaves: Leaves,
) -> nn.Module:
    """The one model a header and its tensors describe."""
    base = _base(header, path, model, stepdown)
    with _fits(base, path):
        module = _family(header, base, stepdown, leaves).detach(name)
        module.load_state_dict(dict(tensors) | {name: tensors[kept] for name, kept in header.tied.items()})
    return module


def _base(
    header: Header, path: str | Path, model: nn.Module | None, stepdown: StepDownBuilder | None
) -> nn.Module:
    """The base-model, the user's own or the zoo's, with weights to be replaced."""
    base = copy.deepcopy(model) if model is not None else _create(header, path)
    if stepdown is None and _asked_for(header.plan) == "custom":
        raise CheckpointError(f"{path} was made with a user's own step-down", hint="load(path, stepdown=it)")
    return base.to(getattr(torch, header.dtype)) if header.dtype in ("float16", "bfloat16", "float64") else base


def _family(header: Header, base: nn.Module, stepdown: StepDownBuilder | None, leaves: Leaves) -> DetachableNet:
    """The family a header describes, with weights to be replaced."""
    return make_detachable(
        base,
        {m.name: m.cut or "" for m in header.plan.models[1:]},
        header.plan.input_size,
        norm=header.plan.norm,
        head=header.plan.head,
        stepdown=_asked_for(header.plan) if stepdown is None else stepdown,
        leaf_modules=leaves.modules,
        leaf_functions=leaves.functions,
    )


@contextmanager
def _fits(base: nn.Module, path: str | Path) -> Iterator[None]:
    """Say of whatever fails inside that the file is of another model."""
    try:
        yield
    except TraceError:
        raise
    except (DetachNetError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{path} does not fit {type(base).__name__}: it was made from another model",
            what=_one_line(error),
        ) from error


def _asked_for(plan: DetachPlan) -> str | Stem:
    """What `stepdown=` was when a family was made; flat features get a linear layer whatever that was."""
    entries = [model.stepdown for model in plan.models if model.stepdown and model.stepdown.kind != "linear"]
    return next((entry.stem or entry.kind for entry in entries), "conv")


def load_weights(net: DetachableNet, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Put a file's weights into a family of the same plan."""
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith((TRAINER, LIVE))}
    net.load_state_dict(weights | {name: tensors[kept] for name, kept in header.tied.items()})


def _create(header: Header, path: str | Path) -> nn.Module:
    """The zoo's model of a header, without letting it fetch or read anything."""
    if header.source is None:
        raise CheckpointError(
            f"{path} was made from a model of the user's own, {header.plan.model}",
            hint=f"detachnet.load(path, model={header.plan.model}(...))",
        )
    for name in header.source.kwargs:
        if name in _FETCHING:
            raise CheckpointError(f"{path} asks for the model argument {name!r}, which loading does not allow")
    try:
        with torch.random.fork_rng(devices=[]):
            return create_model(header.source.name, **header.source.kwargs)
    except ModelError as error:
        raise CheckpointError(f"the base-model of {path} cannot be built", what=error.summary) from error


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under names that begin with a prefix."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of the tensors whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def untied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and which names mean one that is stored under another name."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            tied[name] = seen[place]
        else:
            seen[place] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, tied


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _one_line(error: BaseException) -> str:
    """The first lines of an error, as one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines[:3])
