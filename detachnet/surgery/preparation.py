"""TracedGraph -> what a network does to the image in front of its first layer with weights.

A normalization or an augmentation there is no feature of the network: it prepares the image for all models.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import fx

from detachnet.surgery.graph import TracedGraph
from detachnet.surgery.tracer import Spec

_MOVING = {
    *(
        "Dropout",
        "Flatten",
        "Identity",
        "Unflatten",
        "chunk",
        "clone",
        "contiguous",
        "dropout",
        "expand",
        "flatten",
    ),
    *("float", "getitem", "movedim", "pad", "permute", "reshape", "split", "squeeze", "to", "transpose", "type"),
    *("type_as", "unflatten", "unfold", "unsqueeze", "view", "pixel_unshuffle", "PixelUnshuffle", "ZeroPad2d"),
}
"""Operations on an image that leave its values as they are."""


@dataclass(frozen=True)
class Preparation:
    """What is done to the image in front of the first layer with weights.

    Attributes:
        steps: The operations that change its values, by name, front to back.
        layer: That first layer.
        end: The cut behind which the image is prepared; empty where there is none that an image is the value of.
    """

    steps: tuple[str, ...] = ()
    layer: str = ""
    end: str = ""

    def hints(self, training: Preparation, *, raw: bool, prepared: bool) -> list[str]:
        """What is worth saying of it.

        Args:
            training: What is done in training mode.
            raw: Whether a sub-model takes in the image as it comes.
            prepared: Whether one takes it in behind the end.
        """
        hints, layer = [], self.layer
        if prepared:
            hints.append(f"{_listed(self.steps)} in front of {layer}: all models get the image so prepared")
        if raw and self.steps:
            hints.append(f"sub-models get the raw image, without {_listed(self.steps)} in front of {layer}")
        behind = [i for i, step in enumerate(training.steps) if step in self.steps]
        missed = training.steps[behind[-1] + 1 :] if behind and not raw else training.steps
        missed = tuple(step for step in missed if step not in self.steps)
        if missed and (raw or prepared):
            hints.append(f"in training mode sub-models do without {_listed(missed)} in front of {training.layer}")
        return hints


def _listed(steps: Sequence[str]) -> str:
    """Operations in words, at most four of them."""
    return ", ".join(steps[:4]) + (f" and {len(steps) - 4} more" if len(steps) > 4 else "")


def find_preparation(graph: TracedGraph, cuts: Collection[fx.Node]) -> Preparation:
    """What a graph does to the image; nothing where there is no layer with weights behind it.

    Args:
        graph: The graph.
        cuts: The nodes that it can be cut at.
    """
    raw, steps = list[fx.Node](), list[fx.Node]()
    for node in graph.live:
        inputs = [n for n in node.all_input_nodes if n in graph.data]
        if node.op == "output" or node not in graph.data or not set(raw).issuperset(inputs):
            continue
        if _reads_weights(graph, node):
            names = tuple(map(graph.describe, steps))
            behind = raw[raw.index(steps[-1]) :] if steps else []
            end = next((graph.name_of[n] for n in behind if n in cuts and _is_image(graph, n)), "")
            return Preparation(names, graph.describe(node), end)
        raw.append(node)
        steps += [] if _only_moves_pixels(graph, node, inputs) else [node]
    return Preparation()


def _is_image(graph: TracedGraph, node: fx.Node) -> bool:
    """Whether a value is laid out as the image is: of its channels or of its size, no patches or tokens."""
    image, value = graph.image.shape[1:], graph.values[node]
    shape = value.shape[1:] if isinstance(value, Spec) else ()
    return len(shape) == len(image) and (shape[0] == image[0] or shape[1:] == image[1:])


def _reads_weights(graph: TracedGraph, node: fx.Node) -> bool:
    return bool(graph.parameters_of(node)) or any(graph.parameters_of(n) for n in node.all_input_nodes)


def _only_moves_pixels(graph: TracedGraph, node: fx.Node, inputs: Sequence[fx.Node]) -> bool:
    """Whether an operation leaves the values of an image as they are, and numbers numbers."""
    specs = [value for n in (node, *inputs) if isinstance(value := graph.values[n], Spec)]
    if len({spec.dtype.is_floating_point for spec in specs}) > 1:
        return False
    target: object = node.target
    if node.op == "call_module":
        target = type(graph.module.get_submodule(str(target)))
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return node.op == "placeholder" or name in _MOVING
