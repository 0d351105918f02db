"""net <-> one file: the weights as safetensors, the plan in its header, a checksum over both.

Nothing in a file is executed: the header is JSON checked against the classes below, the model is built by the
zoo from a name and plain arguments, or given by the caller.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes, save as to_bytes
from torch import Tensor, nn

from detachnet.errors import CheckpointError, DetachNetError, ModelError, TraceError, one_line
from detachnet.facts import DataInfo, Facts
from detachnet.fingerprint import difference_from_source, fingerprint
from detachnet.memory import Bounded, TooMuchError
from detachnet.storage import read_file, replace_file
from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.making import make_detachable
from detachnet.surgery.plan import BASE, DetachPlan, ModelPlan
from detachnet.surgery.stepdown import Stem, StepDownBuilder
from detachnet.surgery.tracer import NO_LEAVES, Leaves
from detachnet.text import by, parse_json
from detachnet.zoo import FETCHING, ModelSource, create_model, inferred_source

logger = logging.getLogger("detachnet")
KEY = "detachnet"
_AS_OWN = "save(net, path, own=True), then load(path, model=...) with the model as it is now"
_FORMAT = {"format": "pt"}
TRAINER = "trainer."
"""Prefix of the optimizer's tensors, which only going on with the training needs."""
LIVE = "live."
"""Prefix of the weights that are trained, in a file whose family is their average; needed for the same."""
SPARE_BYTES, SPARE_TENSORS = 1 << 28, 100_000
"""What building a family may take besides what its file is of: tables that are computed, say."""
LARGEST_IMAGE = 1 << 26
"""Values of one image of a family that is read: 3×4096×4096 are fewer."""
LARGEST = 1_000_000
"""A number that a file may give as an argument of its base-model."""
_Plain = str | int | float | bool | None


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
        counts: Model → how many of these steps trained it; all where there is none, as in older files.
        rows: One row of metrics per completed epoch.
        train_s: Seconds spent training so far.
        wait_s: Seconds of these spent waiting for images.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    recipe: str
    epoch: Annotated[int, Field(ge=0)]
    step: Annotated[int, Field(ge=0)]
    sums: dict[str, float]
    counts: dict[str, int] = {}
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
        fingerprint: Of the base-model's layers; empty in files from before it was kept.
        extra_state: What layers keep besides tensors (`get_extra_state`), by its name in the state dict.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    format_version: Literal[1] = 1
    source: Source | None
    plan: DetachPlan
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    tied: dict[str, str] = {}
    data: DataInfo | None = None
    trained: tuple[str, ...] = ()
    accuracy: dict[str, float] = {}
    detached: str | None = None
    training: TrainingState | None = None
    fingerprint: str = ""
    extra_state: dict[str, Any] = {}

    @property
    def facts(self) -> Facts:
        """What is known of the family's training."""
        return Facts(data=self.data, trained=self.trained, accuracy=self.accuracy)

    @model_validator(mode="after")
    def _is_of_one_family(self) -> Header:
        """Whatever it says of a model is of a model there is, and in its range."""
        named = {"detached": [self.detached] if self.detached is not None else [], "trained": self.trained}
        for key, names in (named | {"accuracy": self.accuracy}).items():
            for name in names:
                if name not in self.plan.names:
                    raise ValueError(f"{key} names {name!r}, which is none of the models {self.plan.names}")
        for name, value in self.accuracy.items():
            if not 0 <= value <= 1:
                raise ValueError(f"the accuracy of {name} is {value}, not in [0, 1]")
        for text in (self.plan.model, *self.plan.names):
            if not text.isprintable():
                raise ValueError(f"{text!r} is no name")
        if min(self.plan.input_size, default=0) < 1 or math.prod(self.plan.input_size) > LARGEST_IMAGE:
            raise ValueError(f"images of {by(self.plan.input_size)} values are none, or too large")
        for model in self.plan.models:
            counts = [model.macs, model.num_params, model.shared_macs, model.own_params]
            if min(counts + [value for span in model.spans for value in (span.begins, span.ends)]) < 0:
                raise ValueError(f"a count of {model.name} is negative")
        _check_data(self.data)
        return self


def _check_data(data: DataInfo | None) -> None:
    """Refuse a normalization that no images have.

    Raises:
        ValueError: It is such.
    """
    if data is None:
        return
    values = (*data.mean, *data.std, data.crop_pct or 1.0)
    wrong = not all(map(math.isfinite, values)) or min(data.std, default=1.0) <= 0 or data.num_test < 0
    if wrong or len(data.mean) != len(data.std) or not 0 < (data.crop_pct or 1.0) <= 1:
        raise ValueError("mean, std, crop_pct or num_test is none of any images")


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
        CutError: No model is called `which`.
        CheckpointError: The file cannot be written, or loading would not give this model.
    """
    check_storable(net, own)
    header = _header(net, own)
    if header.source is None:
        why = "" if own else _unlike_timms(net.base)
        logger.info("%s: loading it needs the model: load(path, model=%s(...))%s", path, net.plan.model, why)
    if which is None:
        _write(path, header, net.state_dict(), {})
    else:
        is_narrow = which in net.names and bool(net.plan[which].kept)
        module = net.detach(which, share=not is_narrow)
        _write(path, _alone(header, which), module.state_dict(), {})


def check_storable(net: DetachableNet, own: bool = False) -> None:
    """Refuse a family whose file would not load, or load as another network.

    Args:
        net: The family; a training run asks before it begins.
        own: As in `save`.

    Raises:
        CheckpointError: The model's arguments cannot be stored, it is no longer what they build, or a layer has a
            state that is no tensor and no JSON.
    """
    header = _header(net, own)
    _split(net.state_dict())
    if header.source is None or net.source is None:
        return
    if difference := difference_from_source(net.base, net.source):
        raise CheckpointError(
            f"the model is not what {net.source.name} with its arguments builds: it was changed afterwards",
            what=difference,
            hint=_AS_OWN,
        )


def write(
    net: DetachableNet,
    path: str | Path,
    training: TrainingState | None = None,
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """`save`, with what a training needs to go on: its state and its tensors, under one of the two prefixes."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in (extra or {}).items()}
    _write(path, _header(net).model_copy(update={"training": training}), net.state_dict(), kept)


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
    try:
        return Header(source=source, plan=net.plan, **said, **dict(net.facts))
    except ValidationError as error:
        raise CheckpointError(
            "what is known of the family cannot be stored in a file",
            what=one_line(error),
            hint="net.facts says it: data, trained and accuracy",
        ) from error


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


def _write(path: str | Path, header: Header, state: Mapping[str, Any], extra: Mapping[str, Tensor]) -> None:
    """A header and the tensors it is about, with a checksum over both."""
    state, plain = _split(state)
    tensors, tied = untied(state)
    tensors |= extra
    text = header.model_copy(update={"tied": tied, "extra_state": plain}).model_dump_json()
    metadata = _FORMAT | {KEY: text, "sha256": _digest(text, tensors)}
    replace_file(Path(path), _in_order(to_bytes(tensors, metadata)))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata in order: the library writes it in another one each time."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(content)[8 + length :]])


def _split(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state dict's tensors, and what layers keep besides, which must be JSON.

    Raises:
        CheckpointError: It is not, with the layer's name.
    """
    plain = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    for name, value in plain.items():
        try:
            kept = json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            kept = False
        if not kept:
            layer = name.removesuffix("._extra_state").removeprefix(f"{BASE}.")
            raise CheckpointError(
                f"the extra state of {layer!r} cannot be stored in a file",
                what=f"get_extra_state returns a {type(value).__name__} that JSON does not give back",
                hint="let get_extra_state return a tensor, or dicts, lists, strings and numbers",
            )
    return {name: value for name, value in state.items() if name not in plain}, plain


def load(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    stepdown: StepDownBuilder | None = None,
    leaf_modules: Sequence[type[nn.Module] | str] = (),
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
    if os.path.isdir(path):
        raise CheckpointError(
            f"{path} is a folder", hint="of a run, give its last.safetensors or best.safetensors"
        )
    metadata, tensors = _content(path)
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
        raw = parse_json(metadata[KEY])
        if raw.get("format_version") != 1:
            raise CheckpointError(
                f"{path} has format version {raw.get('format_version')}; this version of detachnet reads 1",
                hint="pip install --upgrade detachnet",
            )
        return Header.model_validate_json(metadata[KEY]), tensors
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"the header of {path} says something unknown", what=one_line(error)) from error


def _content(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A safetensors file's metadata and tensors, read through one descriptor."""
    try:
        content = read_file(path)
        length = int.from_bytes(content[:8], "little")
        tensors = from_bytes(content)  # which checks the header, too
        metadata = parse_json(content[8 : 8 + length]).get("__metadata__") or {}
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file",
            what=one_line(error),
            hint="it may be no checkpoint, or truncated: then copy it again",
        ) from error
    return metadata, tensors


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
    with _bounded_by(tensors, path, model):
        base = _base(header, path, model, stepdown, tensors)
        with _fits(base, path):
            net = _family(header, base, stepdown, leaves)
            _check_plan(header, net.plan, own=model is not None)
    with _fits(base, path):
        load_weights(net, header, tensors)
    net.facts = header.facts
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
    with _bounded_by(tensors, path):
        sketch = _sketch(header, name, tensors, path) if model is None and stepdown is None else None
    with _bounded_by(tensors, path, model or sketch):
        base = _base(header, path, model, stepdown, {})
        with _fits(base, path):
            net = _family(header, base, stepdown, leaves)
            _check_plan(header, net.plan, own=model is not None)
            module = net.detach(name)
    with _fits(base, path):
        tied = {name: tensors[kept] for name, kept in header.tied.items()}
        module.load_state_dict({**tensors, **tied, **header.extra_state})
    return module


@contextmanager
def _bounded_by(tensors: Mapping[str, Tensor], path: str | Path, model: nn.Module | None = None) -> Iterator[None]:
    """Let a family take as much memory, and as many layers, as its file and a user's model can be of.

    Raises:
        CheckpointError: It would take more.
    """
    given = [*tensors.values(), *(model.state_dict().values() if model is not None else ())]
    num_bytes = sum(tensor.nbytes for tensor in given if isinstance(tensor, Tensor))
    try:
        with Bounded(SPARE_BYTES + 16 * num_bytes, SPARE_TENSORS + 100 * len(tensors)):
            yield
    except TooMuchError as error:
        raise CheckpointError(
            f"{path} describes a network that is far larger than its weights", what=str(error)
        ) from error


def _check_plan(header: Header, plan: DetachPlan, *, own: bool) -> None:
    """Refuse a header whose plan is not that of its network; of a user's own model its counts may differ.

    Raises:
        CheckpointError: It is another one.
    """
    said, found = ({key: _counted(each, own) for key, each in _by_name(p).items()} for p in (header.plan, plan))
    if wrong := [name for name in {**said, **found} if said.get(name) != found.get(name)]:
        raise CheckpointError(f"the plan in the file is not that of {wrong[0]} as it is built")


def _by_name(plan: DetachPlan) -> dict[str, ModelPlan]:
    return {model.name: model for model in plan.models}


def _counted(model: ModelPlan, own: bool) -> tuple[Any, ...]:
    """What counts of a model's plan."""
    spans = tuple((str(span), span.bridge and span.bridge.kind) for span in model.spans)
    return spans if own else (spans, model.macs, model.num_params)


def _base(
    header: Header,
    path: str | Path,
    model: nn.Module | None,
    stepdown: StepDownBuilder | None,
    tensors: Mapping[str, Tensor],
) -> nn.Module:
    """The base-model, the user's own or the zoo's, with weights to be replaced.

    The zoo's is compared with the tensors, if there are any, before it takes memory.
    """
    base = copy.deepcopy(model) if model is not None else _create(header, path, tensors)
    if stepdown is None and _asked_for(header.plan) == "custom":
        raise CheckpointError(f"{path} was made with a user's own step-down", hint="load(path, stepdown=it)")
    if header.fingerprint not in ("", fingerprint(base)):
        logger.warning(
            "%s was made from a %s whose layers had other classes, attributes or shapes", path, header.plan.model
        )
    return base.to(getattr(torch, header.dtype)) if header.dtype in ("float16", "bfloat16", "float64") else base


def _family(header: Header, base: nn.Module, stepdown: StepDownBuilder | None, leaves: Leaves) -> DetachableNet:
    """The family a header describes, with weights to be replaced."""
    net = make_detachable(
        base,
        {m.name: m.asked for m in header.plan.models[1:]},
        header.plan.input_size,
        norm=header.plan.norm,
        head=header.plan.head,
        stepdown=_asked_for(header.plan) if stepdown is None else stepdown,
        leaf_modules=leaves.with_paths(header.plan.whole).modules,
        leaf_functions=leaves.functions,
        check="none",
    )
    said = {name: getattr(header.plan, name) for name in ("checked", "hints", "whole")}
    net.plan = net.plan.model_copy(update=said)
    return net


@contextmanager
def _fits(base: nn.Module, path: str | Path) -> Iterator[None]:
    """Say of whatever fails inside that the file is of another model."""
    try:
        yield
    except (TraceError, TooMuchError):
        raise
    except (DetachNetError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"{path} does not fit {type(base).__name__}: it was made from another model",
            what=one_line(error),
        ) from error


def _asked_for(plan: DetachPlan) -> str | Stem:
    """What `stepdown=` was when a family was made; flat features get a linear layer whatever that was."""
    entries = [model.stepdown for model in plan.models if model.stepdown and model.stepdown.kind != "linear"]
    return next((entry.stem or entry.kind for entry in entries), "conv")


def load_weights(net: DetachableNet, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Put a file's weights into a family of the same plan."""
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith((TRAINER, LIVE))}
    net.load_state_dict(weights | {name: tensors[kept] for name, kept in header.tied.items()} | header.extra_state)


def _check_shapes(
    header: Header, built: nn.Module, tensors: Mapping[str, Tensor], path: str | Path, prefix: str = f"{BASE}."
) -> None:
    """Refuse a model without weights whose names and shapes are not those of the file.

    Raises:
        CheckpointError: They are others.
    """
    stored = {name: tensors[kept] for name, kept in header.tied.items() if kept in tensors} | dict(tensors)
    there = {name: tuple(t.shape) for name, t in without_prefix(stored, prefix).items()}
    here = {name: tuple(t.shape) for name, t in built.state_dict().items() if isinstance(t, Tensor)}
    for name in {**here, **there}:
        if here.get(name) != there.get(name):
            raise CheckpointError(
                f"{path} does not fit {type(built).__name__}: it was made from another model",
                what=f"{name!r} is {there.get(name, 'not there')}, not {here.get(name, 'there')}",
            )


def _sketch(header: Header, name: str, tensors: Mapping[str, Tensor], path: str | Path) -> nn.Module | None:
    """The base-model of a file with one model, without memory, after that model's shapes were compared with the
    file's; None if it cannot be built without memory.

    Raises:
        CheckpointError: They are others.
    """
    if header.source is None:
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            base = create_model(header.source.name, **header.source.kwargs)
            module = _family(header, base, None, NO_LEAVES).detach(name)
    except (DetachNetError, NotImplementedError, RuntimeError):
        return None
    _check_shapes(header, module, tensors, path, prefix="")
    return base


def _create(header: Header, path: str | Path, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The zoo's model of a header, without letting it fetch or read anything."""
    if header.source is None:
        raise CheckpointError(
            f"{path} was made from a model of the user's own, {header.plan.model}",
            hint=f"detachnet.load(path, model={header.plan.model}(...)); commands: --model-file FILE.py:FUNCTION",
        )
    for name, value in header.source.kwargs.items():
        values = value if isinstance(value, tuple) else (value,)
        if name in FETCHING or any(isinstance(v, int | float) and not -LARGEST <= v <= LARGEST for v in values):
            raise CheckpointError(f"{path} asks for the model argument {name!r}, which loading does not allow")
    try:
        with torch.random.fork_rng(devices=[]):
            if tensors:
                with suppress(ModelError, NotImplementedError, RuntimeError):
                    with torch.device("meta"):
                        built = create_model(header.source.name, **header.source.kwargs)
                    _check_shapes(header, built, tensors, path)
            return create_model(header.source.name, **header.source.kwargs)
    except ModelError as error:
        if isinstance(error.__cause__, TooMuchError):
            raise error.__cause__ from None
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
