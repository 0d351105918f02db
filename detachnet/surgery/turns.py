"""models of a family, each in a pass of its own -> what layers keep, as one joint pass leaves it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from detachnet.surgery.modules import attribute

if TYPE_CHECKING:
    from detachnet.surgery.detachable import DetachableNet

Place = tuple[dict[str, Tensor | None], str]
"""The buffers of a module, and the name of one."""


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
        self._places = {target: _places(net, target) for target in {t for s in self._shared.values() for t in s}}
        as_it_was = self._places if start is None else {target: _places(start, target) for target in self._places}
        self._start = {target: [_value(place).clone() for place in places] for target, places in as_it_was.items()}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """The turn of one model."""
        places = [place for target in self._shared[name] for place in self._places[target]]
        start = [before for target in self._shared[name] for before in self._start[target]]
        left = [_value(place) for place in places]
        begun: dict[int, Tensor] = {}
        for (buffers, key), now, before in zip(places, left, start, strict=True):
            buffers[key] = begun.setdefault(id(now), before.clone())  # what has two names has one value
        try:
            yield
        finally:
            for (buffers, key), now in zip(places, left, strict=True):
                buffers[key] = now


def _value(place: Place) -> Tensor:
    """The buffer in a place."""
    buffers, key = place
    tensor = buffers[key]
    assert tensor is not None
    return tensor


def _shared(net: DetachableNet, name: str, models: Sequence[str]) -> list[str]:
    """The layers and tensors that a model has in one network with earlier ones."""
    source = net._derived.sources[name][net.training]
    return sorted(source.shared(name, [other for other in models if other in source.routes]))


def _places(net: DetachableNet, target: str) -> list[Place]:
    """Where the buffers of a layer are, or a buffer."""
    found = attribute(net, target)
    if isinstance(found, nn.Module):
        return [
            (m._buffers, key) for m in found.modules() for key, buffer in m._buffers.items() if buffer is not None
        ]
    folder, _, key = target.rpartition(".")
    buffers = net.get_submodule(folder)._buffers
    return [(buffers, key)] if key in buffers else []
