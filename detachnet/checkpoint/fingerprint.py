"""model -> what its layers are, without their tensors: two models of equal weights may still be two networks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from detachnet.errors import ModelError
from detachnet.surgery.contents import GENERATORS, MOST, SINGLE, content, parts_of
from detachnet.surgery.detachable import DetachableNet
from detachnet.surgery.routes import folder
from detachnet.surgery.whole import hooked
from detachnet.zoo import ModelSource, create_model

_DEEPEST = 8
"""Objects inside of one another that are looked into."""
_NOT_THE_NETWORK = {"training", "detachnet_source", "detachnet_new", "pretrained_cfg", "default_cfg"}
"""Attributes that say where a model comes from, or its mode."""


def fingerprint(model: nn.Module) -> str:
    """A hash over the class, the plain attributes, the shapes and, if there are such, the hooks of each layer."""
    layers = _layers(model)
    hooks = {path: {"hooks": True} for path in hooked(model)}
    return hashlib.sha256(
        json.dumps({path: layers[path] | hooks.get(path, {}) for path in layers}).encode()
    ).hexdigest()


def of_entries(net: DetachableNet, models: Sequence[str] | None = None) -> str:
    """The same hash over what sub-models, or some of them, take in images, and features, through."""
    wanted, places = {folder(name) for name in models or net.names}, []
    for part in (net.stepdowns, net.bridges):
        places.append(place := nn.Module())
        for name, entry in part.named_children():
            if name in wanted:
                place.add_module(name, entry)
    return fingerprint(nn.ModuleList(places))


def difference_from_source(model: nn.Module, source: ModelSource) -> str:
    """How a model differs from what its name and arguments build, in words; empty if it does not.

    Raises:
        ModelError: They build no model.
    """
    ours, theirs = _layers(model), _layers(_built(source))
    for path in [*theirs, *ours]:
        if ours.get(path) == theirs.get(path):
            continue
        name = repr(path) if path else "the model itself"
        if path not in ours:
            return f"there is no {name}"
        if path not in theirs:
            return f"there is {name}"
        keys = [k for k in {**theirs[path], **ours[path]} if ours[path].get(k) != theirs[path].get(k)]
        key = keys[0]  # the class comes first
        ours_said, theirs_said = ours[path].get(key, "nothing"), theirs[path].get(key, "nothing")
        return f"{key} of {name} is {ours_said}, not {theirs_said}"
    return ""


def _built(source: ModelSource) -> nn.Module:
    """The zoo's model without weights, or with new ones where making them needs numbers."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return create_model(source.name, **source.kwargs)
        except (ModelError, NotImplementedError, RuntimeError):
            return create_model(source.name, **source.kwargs)


def _layers(model: nn.Module) -> dict[str, dict[str, str]]:
    """Path -> what a layer is; where two have one tensor, the second one's is said to be the first one's."""
    seen, layers = dict[int, str](), {}
    for path, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        own = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        tied = {name: f"that of {seen[id(tensor)]!r}" for name, tensor in own.items() if id(tensor) in seen}
        layers[path] = _layer(module) | tied
        seen = {id(tensor): f"{path}.{name}".lstrip(".") for name, tensor in own.items()} | seen
    return layers


def _layer(module: nn.Module) -> dict[str, str]:
    """A layer's class, plain attributes and shapes."""
    attributes = {
        name: said
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and name not in _NOT_THE_NETWORK and (said := _said(value))
    }
    tensors = {**module._parameters, **module._buffers}
    shapes = {name: str(tuple(tensor.shape)) for name, tensor in sorted(tensors.items()) if tensor is not None}
    return {"class": type(module).__qualname__, **attributes, **shapes}


def _said(value: Any, around: tuple[int, ...] = ()) -> str:
    """A plain value as text, an object by what it holds, a function by its name; nothing of tensors."""
    if isinstance(value, Tensor):
        return ""
    if value is None or isinstance(value, bool | int | float | str | torch.Size | torch.dtype):
        return repr(value)
    if isinstance(value, Enum):
        return str(value)
    kind = type(value).__qualname__
    is_deep = id(value) in around or len(around) > _DEEPEST
    if is_deep or isinstance(value, (*SINGLE, *GENERATORS, Iterator)):
        return str(getattr(value, "__qualname__", kind))
    return _said_of_parts(value, kind, (*around, id(value)))


def _said_of_parts(value: Any, kind: str, around: tuple[int, ...]) -> str:
    """A container, or an object by the name of its class and what it holds."""
    if isinstance(value, tuple | list | set | frozenset):
        items = [_said(item, around) for item in value]
        return f"({', '.join(sorted(items) if isinstance(value, set | frozenset) else items)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_said(item, around)}' for key, item in value.items())}}}"
    if (parts := parts_of(value)) is None:
        return str(content(value) or kind)
    return f"{kind}({', '.join(f'{name}={_said(part, around)}' for name, part in parts[:MOST])})"


def unstored(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Tensors that no state dict has: buffers that are not persistent, and plain attributes.

    Returns:
        Their name → their mean size, and a mean that tells most tensors of that size from each other.
    """
    found = {}
    for path, module in model.named_modules():
        buffers = {name: module._buffers[name] for name in module._non_persistent_buffers_set}
        plain = {} if module._forward_pre_hooks else vars(module)  # which compute weights from what is stored
        for name, value in {**buffers, **plain}.items():
            if isinstance(value, Tensor) and value.numel() and not (value.is_meta or value.is_complex()):
                numbers = value.detach().double().cpu().flatten()
                weighed = numbers * torch.linspace(1, 2, len(numbers), dtype=torch.double)
                both = float(numbers.abs().mean()), float(weighed.mean())
                if all(map(math.isfinite, both)):
                    found[f"{path}.{name}".lstrip(".")] = both
    return found
