"""family -> the layers that its sub-models have of their own: copies of the base-model's, which follow it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from detachnet.surgery.contents import PLAIN
from detachnet.surgery.modules import Folder, copies_of_computed_tensors, put, with_leaves
from detachnet.surgery.ownership import HEADS, NORMS, ViewSource
from detachnet.surgery.plan import BASE
from detachnet.surgery.routes import folder
from detachnet.surgery.state import Reading, readings
from detachnet.surgery.statistics import Statistics, own_statistics
from detachnet.surgery.variables import CALLED, OF_MODULES

logger = logging.getLogger("detachnet")
Sources = Mapping[str, Mapping[bool, ViewSource]]
"""Model → what the views of each mode are made from."""


def put_own_layers(
    net: nn.Module, sources: Sources, statistics: Statistics, kinds: dict[str, str], *, anew: bool = False
) -> None:
    """Give each sub-model copies of the layers that are its own, those that it has not yet.

    Args:
        net: The family.
        sources: Of its models.
        statistics: Of the base-model's layers.
        kinds: Place of a copy → the classes of what it was copied from, which are noted there.
        anew: Whether the base-model may have other layers now than those that were copied.
    """
    wanted = {
        f"{place}.{folder(name)}.{path}": (name, path, place)
        for name in sources
        if name != BASE
        for path, place in sorted(sources[name][False].private[name].items())
    }
    there = dict(_own_layers(net))
    for target in [target for target in there if target not in wanted]:
        parent, _, last = target.rpartition(".")
        del net.get_submodule(parent)._modules[last]
        logger.warning("%s is gone: there is no such layer any more", target)
    for target, (name, path, place) in wanted.items():
        if target in there and not anew:
            continue
        layer = net.get_submodule(f"{BASE}.{path}")
        before, kinds[target] = kinds.get(target), _classes(layer)
        memo = _of_others(net.get_submodule(BASE), layer)
        own = (
            own_statistics(layer, statistics.get(path, ()), memo)
            if place == NORMS
            else with_leaves(copy.deepcopy(layer, memo))
        )
        mode = path not in sources[name][False].layers  # some are run in training only
        own = sources[name][mode].own_layer(path, own)
        if target not in there:
            put(net, target, own)
        elif (other := _shapes(own) != _shapes(there[target])) or before not in (None, kinds[target]):
            put(net, target, own)
            what = "had other shapes" if other else "was of another class"
            logger.warning("%s gets a copy of the new %r: its own %s", name, path, what)


def _of_others(base: nn.Module, layer: nn.Module) -> dict[int, Any]:
    """What stands in a copy of a layer for others that it refers to, and for tensors that hooks have computed."""
    others = set(base.modules()) - set(layer.modules())
    return copies_of_computed_tensors(layer) | {id(other): other for other in others}


def _own_layers(net: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Where each layer is that is a sub-model's own, bridges not counted."""
    for place in (NORMS, HEADS):
        for path, module in list(net.get_submodule(place).named_modules(prefix=place)):
            parent = net.get_submodule(path.rpartition(".")[0])
            if isinstance(parent, Folder) and not isinstance(module, Folder):
                yield path, module


def _classes(layer: nn.Module) -> str:
    """Of a layer and what is in it."""
    return " ".join(f"{type(part).__module__}.{type(part).__qualname__}" for part in layer.modules())


def _shapes(layer: nn.Module) -> dict[str, torch.Size]:
    """Of a layer's tensors."""
    return {name: t.shape for name, t in [*layer.named_parameters(), *layer.named_buffers()]}


def copied_parts(net: nn.Module, sources: Sources, statistics: Statistics) -> Iterator[Follower]:
    """What of the sub-models' own norms and heads is to follow the base-model's layers.

    Args:
        net: The family.
        sources: Of its models.
        statistics: Of the base-model's layers.
    """
    norms = dict[nn.Module, list[nn.Module]]()
    for name in sources:
        for path, place in sources[name][False].private.get(name, {}).items():
            keeps = statistics.get(path, ())
            theirs = dict(net.get_submodule(f"{BASE}.{path}").named_modules())
            for inner, part in net.get_submodule(f"{place}.{folder(name)}.{path}").named_modules():
                original = theirs.get(inner, part)
                if part is not original and isinstance(original, _BatchNorm):
                    norms.setdefault(original, []).append(part)
                if part is not original and not _is_plain_norm(original):
                    yield Copied(original, part, place == HEADS or inner in keeps)
    yield CopiedNorms(norms)


def _is_plain_norm(layer: nn.Module) -> bool:
    """Whether a layer is a batch norm that holds nothing but numbers, tensors and parts."""
    held = (value for name, value in vars(layer).items() if name not in OF_MODULES)
    return isinstance(layer, _BatchNorm) and all(isinstance(value, PLAIN + CALLED) for value in held)


class Follower(Protocol):
    """What has copies of the base-model's layers."""

    def passed(self) -> None:
        """A pass is done."""

    def follow(self) -> None:
        """Give the copies what the originals hold now."""


class CopiedNorms:
    """Batch norms that sub-models have copies of: their numbers, such as `momentum`, may be set at any time.

    Args:
        norms: The base-model's, and the copies of each.
    """

    def __init__(self, norms: Mapping[nn.Module, Sequence[nn.Module]]) -> None:
        self._norms = norms
        self._looks = [look for norm in norms for look in _looks_at(norm, norms[norm])]

    def passed(self) -> None:
        """A pass is done; what it counts, each has of its own."""

    def follow(self) -> None:
        """Give the copies what the base-model's norms have now, but for what was set otherwise in them."""
        if all(held.get(name) is value for held, name, value, _ in self._looks):
            return
        for held, name, value, copies in self._looks:
            for copied in copies if name in held else ():
                if copied.get(name) == value:
                    copied[name] = held[name]
        self._looks = [look for norm in self._norms for look in _looks_at(norm, self._norms[norm])]


def _looks_at(norm: nn.Module, copies: Sequence[nn.Module]) -> Iterator[_Look]:
    """What of a norm is looked at before each pass: numbers, functions, and the parts that its copies share."""
    for name, value in vars(norm).items():
        if name not in _OF_NORMS and isinstance(value, PLAIN + CALLED):
            yield vars(norm), name, value, [vars(copied) for copied in copies]
    for name, part in norm._modules.items():
        if part is not None and (shared := [c._modules for c in copies if c._modules.get(name) is part]):
            yield norm._modules, name, part, shared


_Look = tuple[dict[str, Any], str, Any, list[dict[str, Any]]]
"""Where something is, its name, what it was, and where copies have it."""
_OF_NORMS = {*OF_MODULES, "num_features", "affine", "track_running_stats"}
"""What every batch norm has, and never another one."""


class Copied:
    """A part of a layer that a sub-model has a copy of, for what is its own in it, and the base-model's part.

    Args:
        original: The base-model's.
        copied: The sub-model's.
        keeps: Whether its tensors are its own: a head's are, and those of what keeps statistics.
    """

    def __init__(self, original: nn.Module, copied: nn.Module, keeps: bool) -> None:
        self.original, self.copied = original, copied
        self._tensors = () if keeps else ("_parameters", "_buffers")
        self._shared = [n for n, part in copied._modules.items() if part is original._modules.get(n)]
        self._read = list(self._readings())
        self._seen = self._tensors_now()

    def _tensors_now(self) -> list[dict[str, Tensor | None]]:
        return [dict(getattr(self.original, kind)) for kind in self._tensors]

    def _readings(self) -> Iterator[Reading]:
        names = vars(self.original).keys() - vars(nn.Module()).keys()
        return (r for r in readings(self.original, names) if r.place is vars(self.original))

    def passed(self) -> None:
        """A pass is done: what that has changed in the original, such as a count, the copy has of its own."""
        if any(reading.has_changed for reading in self._read):
            self._read = list(self._readings())
        self._seen = self._tensors_now()

    def follow(self) -> None:
        """Give the copy what the original holds now, where that has changed since the last pass."""
        if changed := [reading for reading in self._read if reading.has_changed]:
            for name in [reading.name for reading in changed]:
                if name in vars(self.original):
                    setattr(self.copied, name, vars(self.original)[name])
                else:
                    vars(self.copied).pop(name, None)
            self._read = list(self._readings())
        for kind, seen in zip(self._tensors, self._seen, strict=True):
            theirs, mine = getattr(self.original, kind), getattr(self.copied, kind)
            mine.update({name: tensor for name, tensor in theirs.items() if seen.get(name) is not tensor})
        self._seen = self._tensors_now()
        parts = self.original._modules
        for name in self._shared:
            if name in parts and self.copied._modules.get(name) is not parts[name]:
                self.copied._modules[name] = parts[name]
