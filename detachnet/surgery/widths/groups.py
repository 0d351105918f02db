"""Channels -> WidthGroups: which filters of a model go together, what they cost, and which can be left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detachnet.surgery.modules import unwrap
from detachnet.surgery.trace import trace
from detachnet.surgery.tracer import PREFIX, Leaves
from detachnet.surgery.widths.channels import CONSTANT, Channels, Side, distinct
from detachnet.surgery.widths.propagation import find_channels
from detachnet.text import Table, si


@dataclass(frozen=True)
class Place:
    """The channels of one layer that belong to a group.

    Attributes:
        layer: The layer's path.
        ranges: Its channels, each range from the first up to but without the last.
        of: How many channels the layer has on that side.
    """

    layer: str
    ranges: tuple[tuple[int, int], ...]
    of: int

    def __str__(self) -> str:
        if self.ranges == ((0, self.of),):
            return self.layer
        more = "" if len(self.ranges) == 1 else f"+{len(self.ranges) - 1}"
        return f"{self.layer}[{self.ranges[0][0]}:{self.ranges[0][1]}{more}]"


@dataclass(frozen=True)
class WidthGroup:
    """Filters of several layers that are left out together: a width keeps so many of them.

    Attributes:
        name: The first layer that makes them, with the range of its channels where it has others, too.
        channels: Their number in that layer.
        units: How many parts of them can be left out one by one; a channel each, or a group of a grouped layer.
        makers: The layers that make them.
        readers: The layers that read them; norms and other layers they pass through are among them.
        macs: Multiply-accumulates for one image of what makes and reads them.
        macs_of_base: `macs` divided by the base-model's.
        num_params: The parameters that belong to them.
        reason: Why they stay as many as they are; empty where a width can leave some out.
    """

    name: str
    channels: int
    units: int
    makers: tuple[Place, ...]
    readers: tuple[Place, ...]
    macs: int
    macs_of_base: float
    num_params: int
    reason: str = ""


class Widths(tuple[WidthGroup, ...]):
    """The groups of a model, front to back; prints as a table."""

    __slots__ = ()

    def table(self, title: str = "") -> Table:
        """A row for each group."""
        header = ("filters", "channels", "made by", "read by", "MACs", "of base", "parameters", "stay because")
        return Table(header, tuple(map(_row, self)), title, left=1)

    def __str__(self) -> str:
        return str(self.table())


def _row(group: WidthGroup) -> tuple[str, ...]:
    return (
        group.name,
        str(group.channels),
        str(len(group.makers)),
        str(len(group.readers)),
        si(group.macs),
        f"{100 * group.macs_of_base:.0f} %",
        si(group.num_params),
        group.reason,
    )


@dataclass(frozen=True)
class Group:
    """Classes of atoms with the same places.

    Attributes:
        roots: First atom of each class.
        places: The layers that make and read them.
        reason: Why they all stay; empty where some can go.
    """

    roots: tuple[int, ...]
    places: frozenset[tuple[str, Side]]
    reason: str = ""


def group_channels(channels: Channels) -> list[Group]:
    """The groups of a network, in the order of their first channels."""
    known = channels.atoms.known
    if "groups" not in known:
        known["groups"] = _grouped(channels)
    return known["groups"]  # type: ignore[no-any-return]


def _grouped(channels: Channels) -> list[Group]:
    """`group_channels`, worked out."""
    roots, atoms = channels.atoms.roots(), channels.atoms
    constant = torch.zeros(len(roots), dtype=torch.bool)
    constant[list(atoms.constant)] = True
    # A class's places are a number that says which were the ones before, and the last.
    signature = torch.zeros(len(roots), dtype=torch.int64)
    chain: list[tuple[int, tuple[str, Side]]] = [(0, ("", "out"))]
    for path, layer in channels.layers.items():
        for side, made in layer.sides():
            here = distinct(roots[made.clamp_min(CONSTANT)])
            here = here[~constant[here]]
            before, which = torch.unique(signature[here], return_inverse=True)
            signature[here] = len(chain) + which
            chain += [(number, (path, side)) for number in before.tolist()]
    found: dict[tuple[int, bool], list[int]] = {}
    for root in signature.nonzero().flatten().tolist():
        found.setdefault((int(signature[root]), root in atoms.whole), []).append(root)
    return [
        Group(tuple(classes), _followed(chain, number), _reason(channels, classes, is_whole))
        for (number, is_whole), classes in found.items()
    ]


def _followed(chain: Sequence[tuple[int, tuple[str, Side]]], number: int) -> frozenset[tuple[str, Side]]:
    """The places a number stands for."""
    places = set()
    while number:
        number, place = chain[number]
        places.add(place)
    return frozenset(places)


def _reason(channels: Channels, classes: Sequence[int], is_whole: bool) -> str:
    """Why the classes of a group stay."""
    if is_whole:
        return channels.atoms.whole[classes[0]]
    if len(classes) == 1:
        return channels.atoms.joined.get(classes[0], "they only go together")
    return ""


def costs(channels: Channels, kept: Tensor, paths: Iterable[str] | None = None) -> tuple[int, int]:
    """MACs for one image and parameters of layers with the kept channels, from the atoms alone.

    Args:
        channels: The network's.
        kept: Atom → whether it is kept.
        paths: The layers; by default everything in the network.
    """
    macs = num_params = 0
    for path in channels.layers if paths is None else paths:
        (kept_parts, parts), _ = _shares(channels, path, kept)
        macs += channels.layer_macs[path] * kept_parts // parts
        num_params += sum(_kept_params(channels, path, kept))
    if paths is None:
        macs += sum(channels.traced.macs.values()) - sum(channels.layer_macs.values())
        num_params += _other_params(channels, kept)
    return macs, num_params


def _shares(channels: Channels, path: str, kept: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of a layer's weight, and of its other parameters: so many parts are kept of how many."""
    layer = channels.layers[path]
    reads = int(count(kept, layer.reads)), len(layer.reads)
    if layer.makes is None:
        return reads, reads
    makes = int(count(kept, layer.makes)), len(layer.makes)
    if getattr(channels.traced.module.get_submodule(path), "groups", 1) > 1:
        return makes, makes
    return (makes[0] * reads[0], makes[1] * reads[1]), makes


def _kept_params(channels: Channels, path: str, kept: Tensor) -> Iterator[int]:
    """The sizes of a layer's parameters."""
    weight, other = _shares(channels, path, kept)
    for name, parameter in channels.traced.module.get_submodule(path).named_parameters():
        kept_parts, parts = weight if name == "weight" else other if parameter.numel() > 1 else (1, 1)
        yield parameter.numel() * kept_parts // parts


def _other_params(channels: Channels, kept: Tensor) -> int:
    """The number of parameters that the graph reads itself, and of layers that are not known."""
    traced, num_params = channels.traced, 0
    unknown = {str(n.target) for n in traced.live if n.op == "call_module"} - channels.layers.keys()
    for path in unknown:
        num_params += sum(p.numel() for p in traced.module.get_submodule(path).parameters())
    targets = {str(n.target): traced.parameters_of(n) for n in traced.live if n.op == "get_attr"}
    for target, parameters in targets.items():
        num_params += int(count(kept, channels.tensors[target])) if parameters else 0
    return num_params


def count(kept: Tensor, atoms: Tensor) -> int:
    """How many of a tensor's elements are kept."""
    return int(kept[atoms.clamp_min(CONSTANT)].sum())


def width_groups(channels: Channels) -> Widths:
    """The groups of a network with their layers and costs."""
    groups = group_channels(channels)
    owner = owners(channels, groups)
    total = max(1, sum(channels.traced.macs.values()))
    everything = torch.ones(len(owner), dtype=torch.bool)
    found: list[WidthGroup] = []
    for i, (group, name) in enumerate(zip(groups, group_names(channels), strict=True)):
        inside, paths = owner == i, {path for path, _ in group.places}
        (macs, num_params), rest = costs(channels, everything, paths), costs(channels, ~inside, paths)
        macs, num_params = macs - rest[0], num_params - rest[1]
        places = [place for place in channels.places() if place in group.places]
        makers, readers = (
            tuple(_place(channels, path, side, inside) for path, side in places if side == which)
            for which in ("out", "in")
        )
        num_chs = sum(b - a for a, b in (makers or readers)[0].ranges)
        costs_of = (macs, macs / total, num_params)
        found.append(WidthGroup(name, num_chs, len(group.roots), makers, readers, *costs_of, group.reason))
    return Widths(found)


def owners(channels: Channels, groups: Sequence[Group]) -> Tensor:
    """Atom → the number of its group; -1 for those of none."""
    roots = channels.atoms.roots()
    owner = torch.full((len(roots),), -1)
    for i, group in enumerate(groups):
        owner[list(group.roots)] = i
    return owner[roots]


def group_names(channels: Channels) -> list[str]:
    """A name for each group: the first layer that makes its channels, with their range in it."""
    known = channels.atoms.known
    if "names" not in known:
        known["names"] = _named(channels, group_channels(channels))
    return known["names"]  # type: ignore[no-any-return]


def _named(channels: Channels, groups: Sequence[Group]) -> list[str]:
    """`group_names`, worked out."""
    owner, names, taken = owners(channels, groups), list[str](), set[str]()
    position = {place: i for i, place in enumerate(channels.places())}
    for i, group in enumerate(groups):
        path, side = min(group.places, key=lambda place: (place[1] == "in", position[place]))
        name = free = str(_place(channels, path, side, owner == i))
        number = 1
        while free in taken:
            number += 1
            free = f"{name}#{number}"
        taken.add(free)
        names.append(free)
    return names


def _place(channels: Channels, path: str, side: Side, inside: Tensor) -> Place:
    """The channels of a layer that are inside."""
    atoms = dict(channels.layers[path].sides())[side]
    picked = inside[atoms.clamp_min(CONSTANT)].nonzero().flatten().tolist()
    return Place(path.removeprefix(PREFIX), _ranges(picked), len(atoms))


def _ranges(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Rising numbers as ranges."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return tuple(found)


def find_widths(
    model: nn.Module,
    input_size: tuple[int, ...] | None = None,
    *,
    example_input: Tensor | None = None,
    leaf_modules: Sequence[type[nn.Module] | str] = (),
    leaf_functions: Sequence[Callable[..., object]] = (),
) -> Widths:
    """List which filters of a model go together, front to back: what a narrower network can leave out.

    Args:
        model: Any CNN; it is not run, moved or changed.
        input_size: Shape of one image, `(C, H, W)`; by default what the model declares.
        example_input: A batch `(B, ...)` instead.
        leaf_modules: Classes of modules to keep whole, or names of single modules; what goes into them stays
            whole, too.
        leaf_functions: Functions to keep whole.

    Returns:
        The groups. Those that cannot be cut say why; layers of which nothing is known are in none.

    Raises:
        TraceError: The model cannot be traced at that size.

    Examples:
        >>> [(group.name, group.channels) for group in detachnet.find_widths(torchvision.models.resnet18())][:3]
        [('conv1', 64), ('layer1.0.conv1', 64), ('layer1.1.conv1', 64)]
    """
    leaves = Leaves.given(leaf_modules, leaf_functions)
    return width_groups(find_channels(trace(unwrap(model), input_size, example_input, leaves)))
