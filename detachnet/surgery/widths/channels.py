"""Channels: which channels of a traced network belong together, as numbers in tensors of the network's shapes.

Each channel of each layer's output is a number, an *atom*. A tensor of atoms has the shape that the network's has
for one image and says for each element whose channel it is. Atoms that must stay or go together are one *class*.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, fx

from detachnet.surgery.graph import TracedGraph
from detachnet.surgery.tracer import leaves_of
from detachnet.text import Shape

CONSTANT = 0
"""The atom of what no layer makes: padding, and tensors that the forward pass makes itself."""
SHARED = -1
"""The atom of a parameter with a single element: it goes with any channel."""

Kind = Literal[
    "conv", "transposed", "linear", "norm", "group norm", "layer norm", "response norm", "scale", "blur"
]
Side = Literal["out", "in"]


class WholeError(Exception):
    """Why what goes into an operation stays as wide as it is; never leaves the run on atoms."""


class Atoms:
    """The classes of atoms (union-find), and why some of them stay whole.

    Attributes:
        parent: Atom → another one of its class; the class's first is its own.
        constant: Atoms that are always there and join no class → what they are.
        whole: First atom of a class that cannot be cut → why.
        joined: First atom of a class that an operation made of a layer's several channels → which operation.
        known: What was worked out of all this, by name; a change forgets it.
    """

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}
        self.parent = [CONSTANT]
        self.constant = {CONSTANT: "a constant of the forward pass"}
        self.whole: dict[int, str] = {}
        self.joined: dict[int, str] = {}

    def fresh(self, count: int) -> Tensor:
        """New atoms, each a class of its own."""
        self.known.clear()
        start = len(self.parent)
        self.parent.extend(range(start, start + count))
        return torch.arange(start, start + count)

    def fixed(self, count: int, why: str) -> Tensor:
        """New atoms that are always there."""
        atoms = self.fresh(count)
        self.constant |= dict.fromkeys(atoms.tolist(), why)
        return atoms

    def find(self, atom: int) -> int:
        """The first atom of a class."""
        root = atom
        while self.parent[root] != root:
            root = self.parent[root]
        while self.parent[atom] != root:
            self.parent[atom], atom = root, self.parent[atom]
        return root

    def unite(self, one: int, other: int) -> None:
        """Make two classes one; what meets a constant stays whole, what goes with any channel unites nothing."""
        if SHARED in (one, other):
            return
        first, second = sorted((self.find(one), self.find(other)))
        if first == second:
            return
        self.known.clear()
        if first in self.constant or second in self.constant:
            kept, why = (second, first) if first in self.constant else (first, second)
            self._keep(kept, self.constant[why])
            return
        self.parent[second] = first
        for notes in (self.whole, self.joined):
            if second in notes:
                notes.setdefault(first, notes.pop(second))

    def unite_pairs(self, one: Tensor, other: Tensor) -> None:
        """Unite atoms element by element."""
        differ = one != other
        if differ.any():
            for pair in distinct(torch.stack([one[differ], other[differ]], 1), 0).tolist():
                self.unite(*pair)

    def join(self, atoms: Tensor, why: str) -> None:
        """Make one class of several atoms."""
        first, *others = distinct(atoms.clamp_min(CONSTANT)).tolist()
        for other in others:
            self.unite(first, other)
        if others and (root := self.find(first)) not in self.constant:
            self.known.clear()
            self.joined.setdefault(root, why)

    def freeze(self, value: Any, why: str) -> None:
        """Keep the classes of all atoms in a value."""
        for leaf in leaves_of(value):
            if isinstance(leaf, Tensor):
                for atom in distinct(compress(leaf)).tolist():
                    if atom > CONSTANT:
                        self._keep(self.find(atom), why)

    def _keep(self, root: int, why: str) -> None:
        if root not in self.constant:
            self.known.clear()
            self.whole.setdefault(root, why)

    def roots(self) -> Tensor:
        """Atom → the first atom of its class."""
        if "roots" not in self.known:
            self.known["roots"] = torch.tensor([self.find(atom) for atom in range(len(self.parent))])
        return self.known["roots"]  # type: ignore[no-any-return]

    def copy(self) -> Atoms:
        """The same classes, to unite further."""
        other = Atoms()
        other.parent, other.constant = [*self.parent], {**self.constant}
        other.whole, other.joined, other.known = {**self.whole}, {**self.joined}, {**self.known}
        return other


@dataclass
class Layer:
    """The channels of one layer with weights, as atoms.

    Attributes:
        kind: What its weights are, and so how it is cut.
        makes: One atom for each channel it makes; None where it makes those that it reads.
        reads: One atom for each channel it reads.
        axis: Where its input has the channels.
    """

    kind: Kind
    makes: Tensor | None
    reads: Tensor
    axis: int = 1

    def sides(self) -> Iterator[tuple[Side, Tensor]]:
        """What it makes and reads."""
        if self.makes is not None:
            yield "out", self.makes
        yield "in", self.reads


@dataclass
class Channels:
    """What the run on atoms found.

    Attributes:
        traced: The graph.
        atoms: The classes.
        layers: Path of a layer as the graph calls it → its channels.
        tensors: Target of a parameter, buffer or constant that the graph reads itself → atoms of its shape.
        norms: Node of a norm called as a function → its channels.
        values: Node → tensors of atoms, in the nesting of its value; numbers are those for one image.
        moves: The nodes that only move elements: they were run on the atoms.
    """

    traced: TracedGraph
    atoms: Atoms = field(default_factory=Atoms)
    layers: dict[str, Layer] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[fx.Node, Layer] = field(default_factory=dict)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    moves: set[fx.Node] = field(default_factory=set)

    @cached_property
    def layer_macs(self) -> dict[str, int]:
        """Path of a layer → its multiply-accumulates for one image, all calls together."""
        macs = dict.fromkeys(self.layers, 0)
        for node in self.traced.live:
            if node.op == "call_module" and node.target in macs:
                macs[str(node.target)] += self.traced.macs[node]
        return macs

    def places(self) -> Iterator[tuple[str, Side]]:
        """Each side of each layer, front to back."""
        return ((path, side) for path, layer in self.layers.items() for side, _ in layer.sides())

    def made(self, path: str, count: int) -> Tensor:
        """The atoms a layer makes: new ones at its first call."""
        known = self.layers.get(path)
        return self.atoms.fresh(count) if known is None or known.makes is None else known.makes

    def note(self, path: str, layer: Layer) -> None:
        """Keep a layer's channels; those of a second call are those of the first."""
        known = self.layers.setdefault(path, layer)
        if known is not layer:
            for (_, one), (_, other) in zip(known.sides(), layer.sides(), strict=True):
                self.atoms.unite_pairs(one, other)

    def with_own_atoms(self) -> Channels:
        """A copy whose classes can be united further."""
        return replace(self, atoms=self.atoms.copy())


def distinct(atoms: Tensor, axis: int | None = None) -> Tensor:
    """Each atom once, or each slice along an axis."""
    return atoms.unique(dim=axis)  # type: ignore[no-any-return, no-untyped-call]


def compress(atoms: Tensor) -> Tensor:
    """Size 1 along each axis where nothing varies."""
    for axis, size in enumerate(atoms.shape):
        if size > 1:
            first = atoms.narrow(axis, 0, 1)
            if atoms.stride(axis) == 0 or bool((first == atoms).all()):
                atoms = first
    return atoms


def lean(atoms: Tensor) -> Tensor:
    """The same, without memory of its own along axes where nothing varies."""
    return compress(atoms).expand(atoms.shape)


def along(atoms: Tensor, axis: int) -> Tensor:
    """The atoms along an axis.

    Raises:
        WholeError: They vary along another one, too.
    """
    axis %= atoms.ndim
    small = compress(atoms)
    if any(size > 1 for other, size in enumerate(small.shape) if other != axis):
        raise WholeError("its channels are not along one axis")
    return small.flatten().expand(atoms.shape[axis])


def spread(atoms: Tensor, shape: Shape, axis: int) -> Tensor:
    """A tensor of a shape with atoms along one axis."""
    view = [1] * len(shape)
    view[axis] = len(atoms)
    return atoms.view(view).expand(shape)
