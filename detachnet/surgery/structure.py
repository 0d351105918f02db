"""base-model -> what it is made of, to see before a pass whether that is what was traced."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from detachnet.surgery.state import Reading, readings

logger = logging.getLogger("detachnet")
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Structure:
    """The modules that a model's modules have, and which forward each has; little is done where nothing changes.

    Args:
        model: Its layers may be others afterwards.
        opened: Paths of the modules whose own forward was traced, and which hooks are not called for.
        sliced: Paths of the layers that narrower models read a part of: of which class, tensors and sizes counts.
    """

    def __init__(self, model: nn.Module, opened: Collection[str], sliced: Collection[str]) -> None:
        parents = [(path, module) for path, module in model.named_modules() if module._modules]
        self._parts = [(path, module._modules, list(module._modules.items())) for path, module in parents]
        self._forwards = [(path, vars(module), vars(module).get("forward")) for path, module in parents]
        self._hooks = [(path, getattr(model.get_submodule(path), kind)) for path in opened for kind in _HOOKS]
        self._counts = [len(hooks) for _, hooks in self._hooks]
        layers = [(path, model.get_submodule(path)) for path in sliced]
        self._layers = [(path, layer, _kind_of(layer)) for path, layer in layers]

    def changed(self) -> str:
        """The first module that is of other parts, tensors or another forward now; empty if none is."""
        for path, now, then in self._parts:
            if list(now.items()) != then:
                return path or "the model itself"
        for path, held, forward in self._forwards:
            if held.get("forward") is not forward:
                return path or "the model itself"
        for path, layer, kind in self._layers:
            if _kind_of(layer) != kind:
                return path
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


def _kind_of(layer: nn.Module) -> tuple[object, ...]:
    """What a narrower layer is made by: class and forward, sizes of its tensors, numbers of groups, padding."""
    held = vars(layer)
    tensors = (*layer._parameters.items(), *layer._buffers.items())
    shapes = tuple((name, tensor.shape) for name, tensor in tensors if tensor is not None)
    return type(layer), held.get("forward"), shapes, *map(held.get, ("groups", "num_groups", "padding_mode"))


class Copied:
    """A part of a layer that a sub-model has a copy of, for the statistics in it, and the base-model's part.

    Args:
        original: The base-model's.
        copied: The sub-model's.
        keeps: Whether it keeps statistics itself, so that its tensors are its own.
    """

    def __init__(self, original: nn.Module, copied: nn.Module, keeps: bool) -> None:
        self.original, self.copied = original, copied
        self._tensors = () if keeps else ("_parameters", "_buffers")
        self._shared = [n for n, part in copied._modules.items() if part is original._modules.get(n)]
        self._read = list(self._readings())

    def _readings(self) -> Iterator[Reading]:
        names = vars(self.original).keys() - vars(nn.Module()).keys()
        return (r for r in readings(self.original, names) if r.place is vars(self.original))

    def follow(self) -> None:
        """Give the copy what the original holds now, where that has changed."""
        if changed := [reading for reading in self._read if reading.has_changed]:
            for reading in changed:
                setattr(self.copied, reading.name, reading.now)
            self._read = list(self._readings())
        for kind in self._tensors:
            theirs, mine = getattr(self.original, kind), getattr(self.copied, kind)
            mine.update({name: tensor for name, tensor in theirs.items() if mine.get(name) is not tensor})
        parts = self.original._modules
        for name in self._shared:
            if name in parts and self.copied._modules.get(name) is not parts[name]:
                self.copied._modules[name] = parts[name]


def copied_parts(layer: nn.Module, own: nn.Module, statistics: Collection[str]) -> Iterator[Copied]:
    """What of a sub-model's own layer is to follow the base-model's.

    Args:
        layer: The base-model's.
        own: The sub-model's.
        statistics: Paths in it of the parts that keep statistics, batch norms not counted.
    """
    theirs = dict(layer.named_modules())
    for path, part in own.named_modules():
        if part is not theirs.get(path, part) and not isinstance(part, _BatchNorm):
            yield Copied(theirs[path], part, path in statistics)
