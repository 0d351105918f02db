"""One file -> net.

Nothing in a file is executed: the zoo builds the model from a name and plain arguments, or the caller gives it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detachnet.checkpoint.answer import answer, is_alike, is_asked
from detachnet.checkpoint.content import LIVE, TRAINER, read, without_prefix
from detachnet.checkpoint.fingerprint import fingerprint, of_entries, unstored
from detachnet.checkpoint.header import Header
from detachnet.errors import CheckpointError, DetachNetError, ModelError, TraceError, one_line
from detachnet.memory import Bounded, Brief, TooMuchError
from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.making import make_detachable
from detachnet.surgery.modules import copy_model
from detachnet.surgery.plan import BASE, DetachPlan, ModelPlan
from detachnet.surgery.stepdown import StepDownBuilder
from detachnet.surgery.tracer import NO_LEAVES, Leaves
from detachnet.zoo import FETCHING, create_model

logger = logging.getLogger("detachnet")
SPARE_BYTES, SPARE_TENSORS = 1 << 28, 100_000
"""What building a family may take besides what its file is of: tables that are computed, say."""
SPARE_CALLS, SPARE_LAYERS = 20_000, 4_000
"""Operators and layers that making its base-model may take, likewise."""
LARGEST = 1_000_000
"""A number that a file may give as an argument of its base-model."""


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
        path: What `save` wrote; or `hf-hub:OWNER/NAME`, what `push_to_hub` put on the Hugging Face Hub.
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
    _check_given(path, model)
    header, tensors = read(path)
    leaves = Leaves.given(leaf_modules, leaf_functions)
    if header.detached is None:
        return build(header, tensors, path, model, stepdown, leaves)
    return _build_detached(header, header.detached, tensors, path, model, stepdown, leaves)


def _check_given(path: object, model: object) -> None:
    """Refuse what is no path, and no network that weights can be put into.

    Raises:
        CheckpointError: One of them is such.
    """
    if not isinstance(path, str | Path):
        raise CheckpointError(f"load takes the path of a file, not {path!r}")
    if not isinstance(model, nn.Module | None):
        raise CheckpointError(f"model is a network, not {model!r}", hint="model=Net(), made as it was then")
    if model is not None and any(tensor.is_meta for tensor in model.parameters()):
        raise CheckpointError(
            "model is on the meta device, where weights have no values", hint="make it on the CPU"
        )


def load_family(
    path: str | Path,
    model: nn.Module | None = None,
    stepdown: StepDownBuilder | None = None,
    leaves: Leaves = NO_LEAVES,
) -> DetachableNet:
    """`load`, where one model alone is not enough.

    Raises:
        CheckpointError: The file holds one model alone, or as `load`.
    """
    _check_given(path, model)
    return build(*read(path), path, model, stepdown, leaves)


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
            net = _family(header, path, base, stepdown, leaves)
            _check_plan(header, net.plan, own=model is not None)
    with _fits(base, path):
        load_weights(net, header, tensors)
    _warn_of_others(header, net.base, path)
    _warn_of_answers(header, net, net.base, path)
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
            net = _family(header, path, base, stepdown, leaves)
            _check_plan(header, net.plan, own=model is not None)
            module = net.detach(name)
    with _fits(base, path):
        tied = {name: tensors[kept] for name, kept in header.tied.items()}
        _cast_as(module, {**tensors, **tied})
        module.load_state_dict({**tensors, **tied, **header.extra_state})
    _warn_of_answers(header, net, module, path)
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
    base = copy_model(model) if model is not None else _create(header, path, tensors)
    if stepdown is None and header.plan.entry == "custom":
        raise CheckpointError(
            f"{path} was made with a user's own step-down",
            hint="detachnet.load(path, stepdown=it); commands cannot make it",
        )
    if header.fingerprint not in ("", fingerprint(base)):
        logger.warning(
            "%s was made from a %s whose layers had other classes, attributes, shapes or hooks",
            path,
            header.plan.model,
        )
    return base.to(getattr(torch, header.dtype)) if header.dtype in ("float16", "bfloat16", "float64") else base


def _warn_of_others(header: Header, base: nn.Module, path: str | Path) -> None:
    """Warn where a base-model has other tensors that no file holds than it had."""
    found = unstored(base)
    both = [(name, found[name], said) for name, said in header.unstored.items() if name in found]
    others = [
        name
        for name, now, said in both
        if max(abs(a - b) for a, b in zip(now, said, strict=True)) > 1e-3 * said[0]
    ]
    if others:
        logger.warning(
            "%s holds no %s, which was another one in what it was made from", path, ", ".join(map(repr, others))
        )


def _warn_of_answers(header: Header, net: DetachableNet, model: nn.Module, path: str | Path) -> None:
    """Warn where a model of a family answers otherwise than the one that was written; its layers are the same."""
    if header.answer is None or header.fingerprint != fingerprint(net.base) or not is_asked(net):
        return
    if not is_alike(header.answer, answer(model, header.plan.input_size)):
        logger.warning(
            "%s: %s answers otherwise than when it was written, with the same weights: its code, or what it holds "
            "besides tensors, is another",
            path,
            header.detached or header.plan.model,
        )


def _example(header: Header) -> Tensor | None:
    """Images like those that a family was made for, where these are no floating-point numbers."""
    if not header.input_dtype:
        return None
    return torch.zeros(2, *header.plan.input_size, dtype=getattr(torch, header.input_dtype))


def _family(
    header: Header, path: str | Path, base: nn.Module, stepdown: StepDownBuilder | None, leaves: Leaves
) -> DetachableNet:
    """The family a header describes, with weights to be replaced."""
    net = make_detachable(
        base,
        {m.name: m.asked for m in header.plan.models[1:]},
        None if header.input_dtype else header.plan.input_size,
        norm=header.plan.norm,
        head=header.plan.head,
        stepdown=header.plan.entry if stepdown is None else stepdown,
        leaf_modules=leaves.with_paths(header.plan.whole).modules,
        leaf_functions=leaves.functions,
        check="none",
        example_input=_example(header),
    )
    if header.entries not in ("", of_entries(net)):
        logger.warning("%s was made with another step-down: its layers had other classes or attributes", path)
    said = {name: getattr(header.plan, name) for name in ("checked", "hints", "whole")}
    net.plan = net.plan.model_copy(update=said)
    net.check = "full"
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


def load_weights(net: DetachableNet, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Put a file's weights into a family of the same plan."""
    weights = {name: tensor for name, tensor in tensors.items() if not name.startswith((TRAINER, LIVE))}
    weights |= {name: tensors[kept] for name, kept in header.tied.items()}
    _cast_as(net, weights)
    net.load_state_dict(weights | header.extra_state)


def _cast_as(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a model's tensors the precision of those that are to be loaded: norms may have another than layers."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        like = weights.get(name, tensor)
        if like.dtype != tensor.dtype and like.is_floating_point() and tensor.is_floating_point():
            tensor.data = tensor.data.to(like.dtype)


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
            with _brief(tensors):
                base = create_model(header.source.name, **header.source.kwargs)
            module = _family(header, path, base, None, NO_LEAVES).detach(name)
    except (DetachNetError, NotImplementedError, RuntimeError) as error:
        if isinstance(error.__cause__, TooMuchError):
            raise error.__cause__ from None
        return None
    _check_shapes(header, module, tensors, path, prefix="")
    return base


def _brief(tensors: Mapping[str, Tensor]) -> Brief:
    """Let making the zoo's model take as many operators and layers as the tensors of a file can be of."""
    return Brief(SPARE_CALLS + 100 * len(tensors), SPARE_LAYERS + 10 * len(tensors))


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
        with torch.random.fork_rng(devices=[]), _brief(tensors):
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
