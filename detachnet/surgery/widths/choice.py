"""Channels + width -> Kept: which filters a narrower network has, chosen, checked and repaired without a run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx

from detachnet.errors import WidthError, nearest
from detachnet.surgery.tracer import PREFIX
from detachnet.surgery.widths.channels import CONSTANT, Channels, compress, distinct
from detachnet.surgery.widths.check import Fault, check_width
from detachnet.surgery.widths.functions import tensors_of
from detachnet.surgery.widths.groups import Group, costs, group_channels, group_names
from detachnet.surgery.widths.patch import Patch
from detachnet.text import Table, si

DIVISOR = 8
"""Channels are a multiple of this, where a group has twice as many."""
_Places = frozenset[tuple[str, str]]


@dataclass(frozen=True)
class KeptGroup:
    """What a width keeps of a group of filters.

    Attributes:
        name: As `find_widths` calls it.
        kept: How many channels stay.
        channels: Of how many.
        reason: Why all of them stay, where they do.
    """

    name: str
    kept: int
    channels: int
    reason: str = ""


@dataclass(frozen=True)
class Kept:
    """Which channels a narrower network has; prints as a table.

    Attributes:
        channels: The network's, with what the choice made one class.
        mask: Atom → whether it is kept.
        groups: What is kept of each group, front to back.
        patches: Nodes whose numbers follow.
    """

    channels: Channels
    mask: Tensor
    groups: tuple[KeptGroup, ...]
    patches: dict[fx.Node, Patch]

    @cached_property
    def costs(self) -> tuple[int, int]:
        """MACs for one image, and parameters."""
        return costs(self.channels, self.mask)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return self.costs[0]

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return self.costs[1]

    @property
    def macs_of_base(self) -> float:
        """`macs` divided by the base-model's."""
        return self.macs / max(1, sum(self.channels.traced.macs.values()))

    def indices(self, atoms: Tensor) -> Tensor:
        """Which of a layer's channels are kept."""
        return self.mask[atoms.clamp_min(CONSTANT)].nonzero().flatten()

    def __str__(self) -> str:
        rows = tuple((g.name, str(g.kept), str(g.channels), g.reason) for g in self.groups)
        title = f"{si(self.macs)} MACs, {100 * self.macs_of_base:.0f} % of the base-model's"
        return str(Table(("filters", "kept", "of", "all stay because"), rows, title))


def choose(
    channels: Channels,
    width: float | Mapping[str, float],
    order: Mapping[str, Sequence[int]] | None = None,
    divisor: int = DIVISOR,
) -> Kept:
    """Choose which filters a narrower network keeps.

    A group keeps the first of its units, or the first of an order. Then the graph's moves run again on what is
    kept. Where they would give something else, numbers written into the graph follow, channels that must be a
    product of two axes are coupled, those of a group are kept evenly instead of the first; if nothing helps, the
    group stays whole and says why.

    Args:
        channels: What `find_channels` found; it is not changed.
        width: The share of the channels to keep, in (0, 1]: one for all, or by paths, as `by_group` takes them
            (others stay whole).
        order: Name of a group → its units, those to keep first.
        divisor: Channels are kept in multiples of this, where a group has twice as many.

    Raises:
        WidthError: A width is out of range, or there is no such group.
    """
    return _Choice(channels.with_own_atoms(), width, order or {}, divisor).settle()


def by_group(channels: Channels, width: Mapping[str, float]) -> dict[str, float]:
    """The widths of groups that are asked for by paths: a group's name, or a layer or module that makes filters.

    Args:
        channels: The network's.
        width: Path → the share to keep of all groups that something below it makes.

    Returns:
        Name of each group that can be cut → its share.

    Raises:
        WidthError: There are no such filters that can be left out, or a group is asked for twice.
    """
    groups = group_channels(channels)
    named = dict(zip(group_names(channels), groups, strict=True))
    asked: dict[str, str] = {}
    for path in width:
        meant = [path] if path in named else [name for name, group in named.items() if _makes(group, path)]
        free = [name for name in meant if not named[name].reason]
        if not free:
            of = [name for name, group in named.items() if not group.reason]
            raise _no_filters(path, of, [f"{name!r} stays whole: {named[name].reason}" for name in meant])
        for name in free:
            if name in asked:
                raise WidthError(
                    f"two widths for the filters {name!r}: of {asked[name]!r} and of {path!r}",
                    what="filters that go together have one width; detachnet.find_widths(model) lists the groups",
                )
            asked[name] = path
    return {name: width[path] for name, path in asked.items()}


def _makes(group: Group, path: str) -> bool:
    """Whether a layer or one inside a module makes channels of a group."""
    makers = (place.removeprefix(PREFIX) for place, side in group.places if side == "out")
    return any(f"{maker}.".startswith(f"{path}.") for maker in makers)


def _no_filters(path: str, free: Iterable[str], reasons: Sequence[str] = ()) -> WidthError:
    """There are none that a width could leave out."""
    return WidthError(
        f"there are no filters {path!r} that can be left out",
        what="; ".join(reasons[:3]),
        hint="detachnet.find_widths(model) lists the groups",
        nearest=nearest(path, free),
    )


def unit_size(channels: Channels, group: Group, roots: Tensor) -> int:
    """How many channels of a group's first layer go together."""
    for path, layer in channels.layers.items():
        if layer.makes is not None and (path, "out") in group.places:
            return max(1, int((roots[layer.makes] == group.roots[0]).sum()))
    return 1


@dataclass
class _Choice:
    """A choice on its way: what had to be changed so far."""

    channels: Channels
    width: float | Mapping[str, float]
    order: Mapping[str, Sequence[int]]
    divisor: int
    origin: dict[int, str] = field(default_factory=dict)
    units: dict[str, tuple[int, ...]] = field(default_factory=dict)
    even: set[_Places] = field(default_factory=set)
    whole: dict[_Places, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        groups = group_channels(self.channels)
        for group, name in zip(groups, group_names(self.channels), strict=True):
            if not group.reason:
                self.origin |= dict.fromkeys(group.roots, name)
                self.units[name] = group.roots
        widths = self.width.values() if isinstance(self.width, Mapping) else [self.width]
        if any(not 0 < share <= 1 for share in widths):
            raise WidthError(f"width={self.width}: a width is a share of the channels, in (0, 1]")
        if isinstance(self.width, Mapping):
            self.width = by_group(self.channels, self.width)
        for name in self.order:
            if name not in self.units:
                raise _no_filters(name, self.units)

    def settle(self) -> Kept:
        """Choose, check and repair until nothing is wrong."""
        while True:
            groups = group_channels(self.channels)
            roots = self.channels.atoms.roots()
            kept = self._mask(groups, roots)
            found = check_width(self.channels, kept)
            if isinstance(found, Fault) and self._repair(found, groups, roots):
                continue
            patches = {} if isinstance(found, Fault) else found  # with everything kept there is nothing to follow
            return Kept(self.channels, kept, tuple(self._report(groups, roots, kept)), patches)

    def _mask(self, groups: Sequence[Group], roots: Tensor) -> Tensor:
        """Atom → whether it is kept."""
        kept = torch.ones(len(roots), dtype=torch.bool)
        for group in groups:
            if not group.reason and group.places not in self.whole:
                wanted = self._wanted(group, roots)
                kept[[root for root in group.roots if root not in wanted]] = False
        return kept[roots]

    def _wanted(self, group: Group, roots: Tensor) -> set[int]:
        """The classes of a group to keep."""
        units, name = group.roots, self.origin[group.roots[0]]
        width = self.width.get(name, 1.0) if isinstance(self.width, Mapping) else self.width
        count = self._count(len(units), width, unit_size(self.channels, group, roots))
        if group.places in self.even:
            return {
                unit for i, unit in enumerate(units) if (i + 1) * count // len(units) > i * count // len(units)
            }
        first = (int(roots[self.units[name][i]]) for i in self.order.get(name, ()))
        ranked = list(dict.fromkeys([*first, *units]))
        return set(ranked[:count])

    def _count(self, units: int, width: float, size: int) -> int:
        """How many of a group's units to keep, when each has so many channels."""
        step = self.divisor // math.gcd(self.divisor, size) if units * size >= 2 * self.divisor else 1
        return min(units, max(min(step, units), math.floor(units * width / step + 0.5) * step))

    def _repair(self, fault: Fault, groups: Sequence[Group], roots: Tensor) -> bool:
        """Couple, keep evenly, keep whole: the first that changes something, and whether one did."""
        if fault.couples and self._couple(fault.node):
            return True
        involved = self._involved(fault.node, groups, roots)
        why = f"{self.channels.traced.describe(fault.node)}: {fault.why}"
        if involved - self.even - self.whole.keys():
            self.even |= involved
        elif involved - self.whole.keys():
            self.whole |= dict.fromkeys(involved - self.whole.keys(), why)
        else:  # it follows from channels that do not meet it
            left = {group.places for group in groups if not group.reason} - self.whole.keys()
            self.whole |= dict.fromkeys(left, why)
            return bool(left)
        return True

    def _couple(self, node: fx.Node) -> bool:
        """Unite along the shorter of two axes with channels: what is kept is then a product of axes."""
        united = False
        for atoms in tensors_of(self.channels.values[node]):
            small = compress(atoms)
            axes = [axis for axis in range(small.ndim) if small.shape[axis] > 1]
            if len(axes) > 1:
                rows = small.movedim(min(axes, key=lambda axis: small.shape[axis]), 0).flatten(1)
                before = self.channels.atoms.roots()
                for row in rows[1:]:
                    self.channels.atoms.unite_pairs(rows[0], row)
                united |= not torch.equal(before, self.channels.atoms.roots())
        return united

    def _involved(self, node: fx.Node, groups: Sequence[Group], roots: Tensor) -> set[_Places]:
        """The groups whose channels a node's arguments and value have, or the numbers among them come from."""
        of = {root: group.places for group in groups if not group.reason for root in group.roots}
        found, pending, seen = set[_Places](), [node, *node.all_input_nodes], set[fx.Node]()
        while pending:
            current = pending.pop()
            if current in seen:
                continue
            seen.add(current)
            tensors = tensors_of(self.channels.values[current])
            for atoms in tensors:
                some = distinct(roots[compress(atoms).clamp_min(CONSTANT)]).tolist()
                found |= {of[root] for root in some if root in of}
            pending += [] if tensors else current.all_input_nodes
        return found

    def _report(self, groups: Sequence[Group], roots: Tensor, kept: Tensor) -> list[KeptGroup]:
        """What is kept of each group."""
        report = []
        for group, name in zip(groups, group_names(self.channels), strict=True):
            reason, size = group.reason or self.whole.get(group.places, ""), unit_size(self.channels, group, roots)
            left = int(kept[list(group.roots)].sum())
            report.append(KeptGroup(name, left * size, len(group.roots) * size, reason))
        return report
