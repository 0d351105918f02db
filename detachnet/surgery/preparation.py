"""TracedGraph -> what a network does to the image in front of its first layer.

A normalization or an augmentation there is no feature of the network: it prepares the image for all models. It may
have weights: a norm over the channels of the image, a mean and a scale that are learned, a map of its colours.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import fx, nn

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
    """What is done to the image in front of the first layer.

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
    """What a graph does to the image; nothing where there is no layer behind it.

    Args:
        graph: The graph.
        cuts: The nodes that it can be cut at.
    """
    raw, steps = list[fx.Node](), list[fx.Node]()
    for node in graph.live:
        inputs = [n for n in node.all_input_nodes if n in graph.data]
        if node.op == "output" or node not in graph.data or not set(raw).issuperset(inputs):
            continue
        if (weights := _weights(graph, node)) and not _leaves_an_image(graph, node, weights):
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


def _weights(graph: TracedGraph, node: fx.Node) -> list[nn.Parameter]:
    """The parameters that an operation reads."""
    own = [node, *(n for n in node.all_input_nodes if n.op == "get_attr")]
    return [parameter for n in own for parameter in graph.parameters_of(n)]


def _leaves_an_image(graph: TracedGraph, node: fx.Node, weights: Sequence[nn.Parameter]) -> bool:
    """Whether an operation gives an image like that it gets, with weights of a map of colours or for pixels."""
    value, image = graph.values[node], graph.image.shape
    if not isinstance(value, Spec) or value.shape != image or len(image) < 2:
        return False
    if sum(p.numel() for p in weights) <= image[1] * (image[1] + 1):
        return True
    layer = graph.module.get_submodule(str(node.target)) if node.op == "call_module" else None
    mixes = type(layer).__module__.startswith("torch.") and not isinstance(layer, nn.LayerNorm)
    return not mixes and all(_is_for_pixels(p.shape, image[1:]) for p in weights)


def _is_for_pixels(weight: Sequence[int], image: Sequence[int]) -> bool:
    """Whether a weight is laid over an image `(C, H, W)`."""
    pairs = zip(reversed(weight), (*reversed(image), 1), strict=False)
    return len(weight) <= len(image) + 1 and all(size in (1, there) for size, there in pairs)


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
