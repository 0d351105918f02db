"""base-model -> what it is made of, to see before a pass whether that is what was traced."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

logger = logging.getLogger("detachnet")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Structure:
    """The modules that a model's modules have, and which forward each has; little is done where nothing changes.

    Args:
        model: Its layers may be others afterwards.
        opened: Paths of the modules whose own forward was traced, and which hooks are not called for.
        sliced: Paths of the layers that narrower models read a part of: their classes and sizes count.
    """

    def __init__(self, model: nn.Module, opened: Collection[str], sliced: Collection[str]) -> None:
        parents = [(path, module) for path, module in model.named_modules() if module._modules]
        self._parts = [(path, module._modules, list(module._modules.items())) for path, module in parents]
        self._forwards = [(path, vars(module), vars(module).get("forward")) for path, module in parents]
        self._hooks = [(path, getattr(model.get_submodule(path), kind)) for path in opened for kind in _HOOKS]
        self._counts = [len(hooks) for _, hooks in self._hooks]
        layers = [(path, model.get_submodule(path)) for path in sliced]
        self._layers = [(path, layer, _kind_of(layer)) for path, layer in layers]
        self._held = [entry for _, layer in layers for entry in _held_by(layer)]

    def changed(self) -> str:
        """The first module that has other parts, tensors or another forward now; empty if none has."""
        for path, now, then in self._parts:
            if list(now.items()) != then:
                return path or "the model itself"
        for path, held, forward in self._forwards:
            if held.get("forward") is not forward:
                return path or "the model itself"
        as_before = all(held.get(name) is value for held, name, value in self._held)
        if as_before and all(layer.__class__ is kind[0] for _, layer, kind in self._layers):
            return ""
        return self._changed_layer()

    def _changed_layer(self) -> str:
        for path, layer, kind in self._layers:
            if _kind_of(layer) != kind:
                return path
        self._held = [entry for _, layer, _ in self._layers for entry in _held_by(layer)]
        return ""

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
