"""models of a family, each in a pass of its own -> what layers keep, as one joint pass leaves it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from detachnet.surgery.modules import attribute

if TYPE_CHECKING:
    from detachnet.surgery.detachable import DetachableNet

Kept = dict[str, Tensor | None]
"""Name → a tensor that a part of a layer keeps besides its parameters, or none yet."""
Holder = tuple[dict[str, Any], str]
"""Where such tensors are, and the name of the one that is meant; empty if all are."""


class Turns:
    """Some models of a family, which run one after another in passes of their own as a joint pass has them.

    What is one network with an earlier model runs once in a joint pass. So it begins here from where it was before
    the first of these passes, and its statistics move once.

    Args:
        net: The family, in the mode it runs in.
        models: Their names, in order.
        start: A copy of the family from before the first pass; the family as it is now if not given.

    Examples:
        >>> turns = Turns(net, net.names)
        >>> for name in net.names:
        ...     with turns.of(name):
        ...         outputs[name] = net(images, which=name)
    """

    def __init__(self, net: DetachableNet, models: Sequence[str], start: DetachableNet | None = None) -> None:
        self._shared = {name: _shared(net, name, models) for name in models}
        targets = {target for shared in self._shared.values() for target in shared}
        self._holders = {target: _holders(net, target) for target in targets}
        begun = {target: _holders(start, target) for target in targets} if start else self._holders
        same: dict[int, Tensor] = {}  # what has two names has one value
        self._start = {
            target: [_cloned(_kept(*holder), same) for holder in holders] for target, holders in begun.items()
        }

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """The turn of one model."""
        holders = [holder for target in self._shared[name] for holder in self._holders[target]]
        start = [kept for target in self._shared[name] for kept in self._start[target]]
        left = [_kept(*holder) for holder in holders]
        same: dict[int, Tensor] = {}
        for holder, kept in zip(holders, start, strict=True):
            _put(*holder, _cloned(kept, same))
        try:
            yield
        finally:
            for holder, kept in zip(holders, left, strict=True):
                _put(*holder, kept)


def _shared(net: DetachableNet, name: str, models: Sequence[str]) -> list[str]:
    """The layers and tensors that a model has in one network with earlier ones."""
    source = net._derived.sources[name][net.training]
    return sorted(source.shared(name, [other for other in models if other in source.routes]))


def _holders(net: DetachableNet, target: str) -> list[Holder]:
    """Where the parts of a layer keep tensors, torch's own in buffers only; or where a tensor is."""
    found = attribute(net, target)
    if not isinstance(found, nn.Module):
        folder, _, name = target.rpartition(".")
        return [(net.get_submodule(folder)._buffers, name)]
    holders: list[Holder] = []
    for module in found.modules():
        holders += [(module._buffers, "")] if module._buffers else []
        holders += [(vars(module), "")] if not type(module).__module__.startswith("torch.") else []
    return holders


def _kept(held: Mapping[str, Any], only: str) -> Kept:
    """What is there now."""
    return {name: value for name, value in held.items() if only in ("", name) and isinstance(value, Tensor | None)}


def _cloned(kept: Kept, same: dict[int, Tensor]) -> Kept:
    """Copies of that; `same` has the copy of each tensor so far."""
    return {name: None if t is None else same.setdefault(id(t), t.clone()) for name, t in kept.items()}


def _put(held: dict[str, Any], only: str, kept: Kept) -> None:
    """Have something else there; names stay in their order."""
    for name in _kept(held, only).keys() - kept.keys():
        del held[name]
    held.update(kept)
