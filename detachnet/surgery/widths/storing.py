"""Kept <-> a few numbers in a plan; and a choice for one of a model's graphs made for the other."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property

import torch
from torch import Tensor, nn

from detachnet.errors import WidthError, nearest
from detachnet.surgery.graph import TracedGraph, TracedModel
from detachnet.surgery.routes import SubModel
from detachnet.surgery.widths.channels import CONSTANT, Channels
from detachnet.surgery.widths.check import Fault, check_width
from detachnet.surgery.widths.choice import Kept, KeptGroup, choose, unit_size
from detachnet.surgery.widths.groups import group_channels, group_names
from detachnet.surgery.widths.order import important
from detachnet.surgery.widths.propagation import find_channels, find_channels_of
from detachnet.surgery.widths.slicing import narrow_graph

REMEMBERED = 8
"""Narrower graphs that are kept: a family's plan and its views are made of the same ones."""
Stored = Mapping[str, int | str]
"""Name of a group → how many of its units are kept, from the first on; or which of them, as the bits of a
hexadecimal number, the first unit the lowest. Groups that are not named stay whole."""


def store(channels: Channels, kept: Kept) -> dict[str, int | str]:
    """What a choice keeps of the groups of a network, compactly.

    Args:
        channels: The network's, as `find_channels` found them.
        kept: What `choose` chose of them.
    """
    groups = group_channels(channels)
    found: dict[str, int | str] = {}
    for group, name in zip(groups, group_names(channels), strict=True):
        bits = kept.mask[list(group.roots)]
        count = int(bits.sum())
        if count < len(bits):
            is_front = bool(bits[:count].all())
            found[name] = count if is_front else f"{sum(1 << i for i in bits.nonzero().flatten().tolist()):x}"
    return found


def restore(channels: Channels, stored: Stored) -> Kept:
    """The choice that was stored.

    Raises:
        WidthError: It is none of this network.
    """
    groups, roots = group_channels(channels), channels.atoms.roots()
    names = group_names(channels)
    kept = torch.ones(len(roots), dtype=torch.bool)
    free = {name: group for group, name in zip(groups, names, strict=True) if not group.reason}
    for name, units in stored.items():
        if name not in free:
            why = next((group.reason for group, known in zip(groups, names, strict=True) if known == name), "")
            raise WidthError(
                f"a stored width is of filters {name!r}, of which none can be left out here{why and f': {why}'}",
                nearest=() if why else nearest(name, free),
            )
        kept[list(free[name].roots)] = _bits(name, units, len(free[name].roots))
    return _checked(channels, kept[roots], "a stored width does not fit the network")


def _bits(name: str, units: int | str, count: int) -> Tensor:
    """Unit → whether it is kept."""
    number = 0
    if isinstance(units, str):
        with suppress(ValueError):
            number = int(units, 16)
    elif 0 < units <= count:  # before there are so many bits
        number = (1 << units) - 1
    if not 0 < number < 1 << count:
        raise WidthError(f"a stored width keeps {units!r} of {name!r}, which has {count}")
    return torch.tensor([bool(number >> i & 1) for i in range(count)])


def _checked(channels: Channels, mask: Tensor, said: str) -> Kept:
    """A choice with the numbers that follow it.

    Raises:
        WidthError: With a summary that is given, where an operation would do something else.
    """
    found = check_width(channels, mask)
    if isinstance(found, Fault):
        where = channels.traced.describe(found.node)
        raise WidthError(f"{said}: {where}: {found.why}", node=channels.traced.name_of.get(found.node))
    groups, roots = group_channels(channels), channels.atoms.roots()
    report = []
    for group, name in zip(groups, group_names(channels), strict=True):
        size, left = unit_size(channels, group, roots), int(mask[list(group.roots)].sum())
        report.append(KeptGroup(name, left * size, len(group.roots) * size, group.reason))
    return Kept(channels, mask, tuple(report), found)


class Narrowing:
    """What sub-models keep of a model's filters.

    Args:
        traced: The model's graphs.
        model: The model with its weights, by which filters are important.
    """

    def __init__(self, traced: TracedModel, model: nn.Module | None = None) -> None:
        self.traced, self.model = traced, model
        self._narrowed: dict[frozenset[tuple[str, int | str]], tuple[Kept, TracedGraph]] = {}

    @cached_property
    def channels(self) -> Channels:
        """Those of the graph for evaluation."""
        return find_channels(self.traced)

    @cached_property
    def _order(self) -> dict[str, list[int]]:
        parameters = [] if self.model is None else list(self.model.parameters())
        if self.model is None or any(p.is_meta for p in parameters):
            raise WidthError("filters='important' needs the model's weights", hint="filters='first'")
        return important(self.model, self.channels)

    def stored(self, name: str, sub: SubModel) -> dict[str, int | str]:
        """What a sub-model keeps; chosen now, unless it has been.

        Raises:
            WidthError: A width is of unknown filters, or leaves none out.
        """
        if sub.kept:
            return dict(sub.kept)
        width = sub.width if isinstance(sub.width, float) else dict(sub.width)
        order = self._order if sub.filters == "important" else None
        kept = choose(self.channels, width, order)
        if found := store(self.channels, kept):
            return found
        why = {group.name: group.reason for group in kept.groups if group.reason}
        raise WidthError(
            f"{name} would have all filters of the base-model: with width={sub.width} none can be left out",
            what="; ".join(f"{group!r} stays whole: {reason}" for group, reason in list(why.items())[:3]),
            hint="detachnet.find_widths(model) lists the groups",
        )

    def restore(self, stored: Stored) -> tuple[Kept, TracedGraph]:
        """The choice that was stored, for the graph for evaluation, and that graph narrower."""
        key = frozenset(stored.items())
        if key not in self._narrowed:
            kept = restore(self.channels, stored)
            for oldest in list(self._narrowed)[: 1 - REMEMBERED]:
                del self._narrowed[oldest]
            self._narrowed[key] = kept, narrow_graph(kept)
        return self._narrowed[key]

    @cached_property
    def _channels_in_training(self) -> Channels:
        return find_channels_of(self.traced.train, self.traced.leaves)

    def in_training(self, kept: Kept) -> Kept:
        """A choice for the graph for evaluation, for that of the training mode.

        Raises:
            WidthError: Other channels go together there.
        """
        return _for_another_mode(self._channels_in_training, kept)


def _for_another_mode(channels: Channels, kept: Kept) -> Kept:
    """The same choice for the graph of the training mode, whose layers have the same names.

    Raises:
        WidthError: Other channels go together there.
    """
    said = "in training mode other filters go together than in evaluation mode"
    roots = channels.atoms.roots()
    mask = torch.ones(len(roots), dtype=torch.bool)
    pairs = [
        (atoms, known)
        for path, layer in channels.layers.items()
        if path in kept.channels.layers
        for (_, atoms), (_, known) in zip(layer.sides(), kept.channels.layers[path].sides(), strict=True)
    ]
    for target, atoms in channels.tensors.items():
        if target in kept.channels.tensors:
            pairs.append((atoms, kept.channels.tensors[target]))
    for atoms, known in pairs:
        mask[atoms.clamp_min(CONSTANT)] = kept.mask[known.clamp_min(CONSTANT)]
    mask[CONSTANT] = True
    if not torch.equal(mask, mask[roots]):
        raise WidthError(said)
    return _checked(channels, mask, said)
