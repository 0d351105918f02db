"""net <-> one file: the weights as safetensors, the plan in its header, a checksum over both.

Nothing in a file is executed: the header is JSON checked against the classes below, the model is built by the
zoo from a name and plain arguments, or given by the caller.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from detachnet.data import DataInfo
from detachnet.detachable import DetachableNet, make_detachable
from detachnet.errors import CheckpointError, DetachNetError, ModelError, TraceError
from detachnet.plan import DetachPlan
from detachnet.stepdown import Stem, StepDownBuilder
from detachnet.tracer import NO_LEAVES, Leaves
from detachnet.zoo import create_model

KEY = "detachnet"
_FORMAT = {"format": "pt"}
TRAINER = "trainer."
"""Prefix of the tensors that only going on with the training needs."""

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
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    recipe: str
    epoch: int
    step: int
    sums: dict[str, float]
    rows: tuple[dict[str, Any], ...]
    train_s: float


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
    training: TrainingState | None = None


def save(net: DetachableNet, path: str | Path) -> None:
    """Write a family to one safetensors file.

    The file appears complete or not at all: it is written beside its place and renamed.

    Raises:
        CheckpointError: The file cannot be written, or the model's arguments cannot be stored.
    """
    write(net, path)


def write(
    net: DetachableNet,
    path: str | Path,
    training: TrainingState | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """`save`, with what a training needs to go on: its state and its tensors."""
    tensors, tied = _untied(net.state_dict())
    tensors |= {TRAINER + name: tensor.detach().cpu().contiguous() for name, tensor in (extra or {}).items()}
    try:
        source = Source(name=net.source.name, kwargs=net.source.kwargs) if net.source else None
    except ValidationError as error:
        raise CheckpointError(
            "the arguments the model was made with cannot be stored in a file",
            what=f"{net.source}",
            hint="use numbers, strings and booleans only",
        ) from error
    dtype = next((t.dtype for t in net.state_dict().values() if t.is_floating_point()), torch.float32)
    header = Header(
        source=source,
        plan=net.plan,
        dtype=str(dtype).removeprefix("torch."),
        tied=tied,
        data=net.data,
        trained=net.trained,
        accuracy=net.accuracy,
        training=training,
    ).model_dump_json()
    metadata = _FORMAT | {KEY: header, "sha256": _digest(header, tensors)}
    replace_file(Path(path), to_bytes(tensors, metadata))


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part.

    Raises:
        CheckpointError: It cannot be written; what was there is still there.
    """
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
) -> DetachableNet:
    """Read a family from a file, on the CPU and in evaluation mode.

    Args:
        path: What `save` wrote.
        model: A user's own architecture, where the base-model is not one of the zoo's.
        stepdown: The user's own step-down, where the family was made with one.
        leaf_modules: As given to `make_detachable`.
        leaf_functions: As given to `make_detachable`.

    Raises:
        TraceError: `model` cannot be traced.
        CheckpointError: The file is missing, damaged, of an unknown kind, or does not fit `model`.
    """
    header, tensors = read(path)
    leaves = Leaves(tuple(leaf_modules), tuple(leaf_functions))
    return build(header, tensors, path, model, stepdown, leaves)


def read(path: str | Path) -> tuple[Header, dict[str, Tensor]]:
    """A file's header and tensors, both checked."""
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
            hint="it may be truncated; copy it again",
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
    base = copy.deepcopy(model) if model is not None else _create(header, path)
    base = base.to(getattr(torch, header.dtype)) if header.dtype in ("float16", "bfloat16", "float64") else base
    plan = header.plan
    entry = _asked_for(plan) if stepdown is None else stepdown
    if entry == "custom":
        raise CheckpointError(f"{path} was made with a user's own step-down", hint="load(path, stepdown=it)")
    try:
        net = make_detachable(
            base,
            {m.name: m.cut or "" for m in plan.models[1:]},
            plan.input_size,
            norm=plan.norm,
            stepdown=entry,
            leaf_modules=leaves.modules,
            leaf_functions=leaves.functions,
        )
        load_weights(net, header, tensors)
    except TraceError:
        raise
    except (DetachNetError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{path} does not fit {type(base).__name__}: it was made from another model",
            what=_one_line(error),
        ) from error
    net.data, net.trained, net.accuracy = header.data, header.trained, dict(header.accuracy)
    return net.eval()


def _asked_for(plan: DetachPlan) -> str | Stem:
    """What `stepdown=` was when a family was made; flat features get a linear layer whatever that was."""
    entries = [model.stepdown for model in plan.models if model.stepdown and model.stepdown.kind != "linear"]
    return next((entry.stem or entry.kind for entry in entries), "conv")


def load_weights(net: DetachableNet, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Put a file's weights into a family of the same plan."""
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(TRAINER)}
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


def _untied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
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
