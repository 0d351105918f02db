"""What torch.nn.Module lacks: copies, twins without weights, parts by dotted path, modes that come back."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._device import _device_constructors

from detachnet.errors import DetachNetError, TraceError

# torch remembers its factories when `with torch.device(...)` is first used. That must not be while a trace has
# them replaced: `torch.rand` would not heed the device from then on.
_device_constructors()

TURN = threading.RLock()
"""Held while functions of torch are replaced or random states are set: one thread at a time does either."""


AnyModule = TypeVar("AnyModule", bound=nn.Module)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile(model)`, `DataParallel` or `DistributedDataParallel`.

    Raises:
        TraceError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"a model is a torch.nn.Module, not {type(model).__name__}")
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def inner_model(module: nn.Module) -> nn.Module | None:
    """The module that `torch.compile` or DataParallel is around, if this is one of these."""
    inner = unwrap(module)
    return None if inner is module else inner


def weight_of(model: nn.Module) -> Tensor:
    """What images are like on the way into a model: its first layer's weight, in whose type and where it is.

    The first floating-point weight of a convolution or linear layer; else the first floating-point parameter.
    """
    layers = (m._parameters.get("weight") for m in model.modules() if isinstance(m, _ConvNd | nn.Linear))
    floating = (p for p in [*layers, *model.parameters()] if p is not None and p.is_floating_point())
    return next(floating, next(model.parameters(), torch.empty(0)))


def in_type_of(weight: Tensor, images: Tensor) -> Tensor:
    """Images in the floating-point type of a weight; those of another kind as they are."""
    both = weight.is_floating_point() and images.is_floating_point()
    return images.to(weight.dtype) if both else images


def copy_for(weight: Tensor, images: Tensor) -> Tensor:
    """A copy of images, since some models change theirs: where a weight is, in its floating-point type."""
    made = in_type_of(weight, images).to(weight.device)
    return made.clone() if made is images else made


def place_of_weight(model: nn.Module) -> tuple[dict[str, Any], str]:
    """Where that weight is, to ask for its type in little time; an empty place where there is none."""
    like = weight_of(model)
    every = ((module._parameters, name) for module in model.modules() for name in module._parameters)
    return next(((held, name) for held, name in every if held[name] is like), ({}, ""))


def in_precision(model: AnyModule, dtype: torch.dtype) -> AnyModule:
    """A model with its floating-point tensors in some type, in place; complex ones as precise."""
    kinds = {torch.float64: torch.complex128, torch.float32: torch.complex64}

    def cast(tensor: Tensor) -> Tensor:
        if tensor.is_complex():
            return tensor.to(kinds.get(dtype, tensor.dtype))
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return model._apply(cast)  # type: ignore[no-untyped-call,no-any-return]


def attribute(root: nn.Module, target: str) -> Any:
    """The module, parameter or buffer a dotted target names."""
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value


class Folder(nn.Module):
    """Only holds submodules, so that a part sits under its original dotted path."""


def put(root: nn.Module, path: str, part: nn.Module | Tensor) -> None:
    """Set `root.<path>`, making the folders on the way."""
    *folders, last = path.split(".")
    for folder in folders:
        if folder not in root._modules:
            root.add_module(folder, Folder())
        root = root.get_submodule(folder)
    if isinstance(part, nn.Module):
        root.add_module(last, part)
    elif isinstance(part, nn.Parameter):
        root.register_parameter(last, part)
    else:
        root.register_buffer(last, part)


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode; each submodule's own mode comes back."""
    was = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in was:
            module.training = training


@contextmanager
def on_device(net: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """A module on a device, or where it is; it comes back to where it was."""
    was = next((tensor.device for tensor in [*net.parameters(), *net.buffers()]), torch.device("cpu"))
    there = was if device is None else torch.device(device)
    try:
        if there != was:
            net.to(there)
        yield there
    finally:
        if there != was:
            net.to(was)


@contextmanager
def random_states_kept(device: torch.device | None = None) -> Iterator[None]:
    """Leave the random states of Python, NumPy and torch as found, on a CUDA device too; other threads wait."""
    with TURN:
        python, numpy = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []):
                yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def random_states(device: torch.device) -> tuple[object, ...]:
    """The random states of Python, NumPy and torch, to be compared."""
    numpy = np.random.get_state(legacy=False)["state"]
    torchs = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return random.getstate(), numpy["key"].tobytes(), numpy["pos"], *(bytes(state.tolist()) for state in torchs)


def copy_model(model: nn.Module) -> nn.Module:
    """A copy with its own weights; tensors that `deepcopy` refuses (weights computed by hooks) are cloned.

    Raises:
        TraceError: It holds something else that cannot be copied.
    """
    return _copied(model, copies_of_computed_tensors(model))


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    before = dict(memo)
    try:
        return with_leaves(copy.deepcopy(model, memo))
    except DetachNetError:
        raise
    except Exception as error:  # whatever a class raises
        path, name, value = _uncopied(model, before) or ("", "", model)
        place = f"{path}.{name}".strip(".") or "the model itself"
        raise TraceError(
            f"cannot copy {type(model).__name__}: its {place!r} ({type(value).__name__}) allows no copy",
            what=f"{type(error).__name__}: {error}".splitlines()[0],
            hint="a family has a copy of the model: hold that in a global variable, or make it anew in forward",
            node=path or None,
        ) from error


def with_leaves(copied: nn.Module) -> nn.Module:
    """A copy whose script modules have parameters that can be trained: `deepcopy` has computed them."""
    for script in [m for m in copied.modules() if isinstance(m, torch.jit.ScriptModule)]:
        for parameter in [p for p in script.parameters() if not p.is_leaf]:
            parameter.detach_().requires_grad_()
    return copied


def _uncopied(model: nn.Module, memo: dict[int, Any]) -> tuple[str, str, Any] | None:
    """Path of a module, name and value of the first attribute that cannot be copied."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                if name != "_modules":
                    copy.deepcopy(value, dict(memo))
            except Exception:  # whatever a class raises
                return path, name, value
    return None


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """A module's own hooks on its passes."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def silence_hooks(model: nn.Module) -> nn.Module:
    """Take a copy's hooks away, which may reach the user's objects; torch's own, which compute weights, stay."""
    for module in model.modules():
        for hooks in hooks_of(module):
            for key, hook in list(hooks.items()):
                if not getattr(hook, "__module__", type(hook).__module__).startswith("torch."):
                    del hooks[key]
    return model


def copies_of_computed_tensors(model: nn.Module) -> dict[int, Any]:
    """A memo for `deepcopy` with the tensors it refuses."""
    return {id(t): t.detach().clone() for t in _computed_tensors(model)}


def _computed_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Plain tensors that autograd computed, in dicts and lists too, as `torch.nn.utils.weight_norm` has them."""
    for module in model.modules():
        kept = {name: value for name, value in vars(module).items() if name != "_modules"}
        for value in _leaves_of(kept):
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                yield value


def _leaves_of(value: Any) -> Iterator[Any]:
    """What is in nested dicts, lists and tuples."""
    if isinstance(value, dict | list | tuple):
        for item in list(value.values()) if isinstance(value, dict) else value:
            yield from _leaves_of(item)
    else:
        yield value


def parameters_in(value: Any) -> list[nn.Parameter]:
    """The parameters in what a graph's target names."""
    if isinstance(value, nn.Module):
        return list(value.parameters())
    return [value] if isinstance(value, nn.Parameter) else []


def meta_twin(model: nn.Module) -> nn.Module:
    """A copy of a model without its weights: parameters and buffers on the meta device, no hooks."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for tensor in [*model.buffers(), *_computed_tensors(model)]:
        memo[id(tensor)] = tensor.detach().to("meta")
    twin = _copied(model, memo)
    for module in twin.modules():
        for hooks in hooks_of(module):
            hooks.clear()
    return twin
