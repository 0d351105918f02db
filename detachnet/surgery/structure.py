"""base-model -> what it is made of, to see before a pass whether that is what was traced."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from detachnet.surgery.contents import own_bases

logger = logging.getLogger("detachnet")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Structure:
    """The modules that a model's modules have, and which forward each has; little is done where nothing changes.

    Args:
        model: Its layers may be others afterwards.
        read: Path of a module whose own forward was traced, and which hooks are not called for → the names in it.
        sliced: Paths of the layers that narrower models read a part of: their classes and sizes count.
    """

    def __init__(self, model: nn.Module, read: Mapping[str, frozenset[str]], sliced: Collection[str]) -> None:
        every = {path: m for path, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)}
        self._model = model
        parents = [(p, m) for p, m in every.items() if m._modules or p in read or isinstance(m, _CONTAINERS)]
        self._parts = [(path, module._modules, dict(module._modules)) for path, module in parents]
        self._forwards = [(path, vars(module), vars(module).get("forward")) for path, module in parents]
        self._hooks = [(path, getattr(every[path], kind)) for path in read for kind in _HOOKS]
        self._counts = [len(hooks) for _, hooks in self._hooks]
        layers = (module for path, module in every.items() if path not in read)
        self._unhooked = [hooks for layer in layers for kind in _HOOKS if not (hooks := getattr(layer, kind))]
        self._layers = [(path, every[path], _kind_of(every[path])) for path in sliced]
        self._held = [entry for _, layer, _ in self._layers for entry in _held_by(layer)]
        self._opened = [_Opened(path, every[path], names) for path, names in read.items()]
        names = frozenset[str]().union({"forward"}, *read.values())
        tensors = [
            (path, held, _sizes(held))
            for path, module in every.items()
            for held in (module._parameters, module._buffers)
            if path in read or isinstance(module, _CONTAINERS) or not names.isdisjoint({*held, *_OF_ALL})
        ]
        self._empty = [(path, held) for path, held, sizes in tensors if not sizes]
        self._tensors = [entry for entry in tensors if entry[2]]
        kinds = dict.fromkeys(kind for opened in self._opened for kind in own_bases(opened.kind))
        self._methods = [
            (kind.__qualname__, vars(kind).get, name, code)
            for kind in kinds
            for name, code in vars(kind).items()
            if name in names and (callable(code) or hasattr(type(code), "__get__"))
        ]

    def changed(self, model: nn.Module) -> str:
        """The first module that has other parts, tensors or another forward now; empty if none has."""
        if model is not self._model:
            return "net.base"
        return next((place or "the model itself" for place in self._changes()), "")

    def _changes(self) -> Iterator[str]:
        yield from (path for path, now, then in self._parts if now != then)
        yield from (path for path, held, forward in self._forwards if held.get("forward") is not forward)
        yield from (path for path, tensors in self._empty if tensors)
        yield from (path for path, tensors, sizes in self._tensors if _sizes(tensors) != sizes)
        yield from (opened.path for opened in self._opened if opened.has_changed())
        yield from (f"the class {kind}" for kind, get, name, code in self._methods if get(name) is not code)
        as_before = all(held.get(name) is value for held, name, value in self._held)
        if not (as_before and all(layer.__class__ is kind[0] for _, layer, kind in self._layers)):
            yield from filter(None, [self._changed_layer()])

    def _changed_layer(self) -> str:
        for path, layer, kind in self._layers:
            if _kind_of(layer) != kind:
                return path
        self._held = [entry for _, layer, _ in self._layers for entry in _held_by(layer)]
        return ""

    def is_hooked_anew(self) -> bool:
        """Whether a layer that is called has hooks for the first time."""
        if not any(self._unhooked):
            return False
        self._unhooked = [hooks for hooks in self._unhooked if not hooks]
        return True

    def tell_of_hooks(self) -> None:
        """Warn of hooks that were added since to what a trace goes through, once each: they are not called."""
        counts = [len(hooks) for _, hooks in self._hooks]
        if counts == self._counts:
            return
        for (path, _), now, then in zip(self._hooks, counts, self._counts, strict=True):
            if now > then:
                logger.warning(
                    "hooks that were added to %s after the family was made are not called: "
                    "add them to the model before, or to its layers",
                    repr(path) if path else "the base-model",
                )
        self._counts = counts


_OF_ALL = ("parameters", "named_parameters", "_parameters", "buffers", "named_buffers", "_buffers", "state_dict")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def _sizes(tensors: dict[str, Any]) -> list[tuple[str, Any]]:
    """Which tensors there are, and their sizes."""
    return [(name, None if tensor is None else tensor.shape) for name, tensor in tensors.items()]


class _Opened:
    """What a module whose forward was traced has: its class, and attributes that it reads.

    Args:
        path: Where it is.
        module: It.
        names: What its forward may read; values of what there is are looked after as readings.
    """

    def __init__(self, path: str, module: nn.Module, names: frozenset[str]) -> None:
        self.path, self.kind = path, type(module)
        self._module, self._attributes, self._names = module, vars(module), names
        self._absent, self._count = names - vars(module).keys(), len(vars(module))

    def has_changed(self) -> bool:
        """Whether it is of another class, or has what it did not have."""
        if self._module.__class__ is not self.kind:
            return True
        if len(self._attributes) == self._count:
            return False
        if not self._absent.isdisjoint(self._attributes):
            return True
        self._count = len(self._attributes)
        return False


_NUMBERS = ("groups", "num_groups", "padding_mode")


def _held_by(layer: nn.Module) -> Iterator[tuple[dict[str, Any], str, object]]:
    """What tells, before each pass and so in little time, that a layer may be of another kind."""
    held, parameters = vars(layer), layer._parameters
    yield from ((held, name, held.get(name)) for name in ("forward", *_NUMBERS))
    yield from ((parameters, name, value) for name, value in parameters.items())


def _kind_of(layer: nn.Module) -> tuple[object, ...]:
    """What a narrower layer is made by: class, forward, sizes of tensors, numbers of groups, padding."""
    held = vars(layer)
    tensors = (*layer._parameters.items(), *layer._buffers.items())
    shapes = tuple((name, tensor.shape) for name, tensor in tensors if tensor is not None)
    return type(layer), held.get("forward"), shapes, *map(held.get, _NUMBERS)
