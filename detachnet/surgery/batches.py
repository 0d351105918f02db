"""node -> what it gives at other batch sizes, as far as shapes tell: whether a number follows the batch.

Shapes are known at two batch sizes and follow a line through these; what is asked of them is worked out anew.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

BATCHES = (*range(1, 1025), *(2**i for i in range(11, 14)))
"""Batch sizes that a number is worked out at."""
FEW = (*range(2, 9), *(2**i for i in range(4, 11)))
"""Batch sizes that lengths are, of which there are many."""
_CALLS = ("call_function", "call_method")
_ASK = (getattr, operator.getitem)
"""What asks for an axis: it has one size or follows the batch, which two sizes tell."""


class OtherBatches:
    """Works out numbers at other batch sizes.

    Args:
        values: Of a node, at two batch sizes: tensors, or what says their shape and dtype; or anything else.
        sizes: These two.
    """

    def __init__(self, values: Callable[[fx.Node], tuple[Any, Any]], sizes: tuple[int, int]) -> None:
        self._values, self._sizes = values, sizes

    def is_same(self, node: fx.Node) -> bool:
        """Whether a number is the same at all batch sizes at which it can be worked out."""
        first = self._values(node)[0]
        return all(value == first for _, value in self._found(node, BATCHES))

    def is_as_long(self, node: fx.Node) -> bool:
        """Whether a sequence is as long at all of some batch sizes."""
        first = len(self._values(node)[0])
        return all(len(value) == first for _, value in self._found(node, FEW))

    def is_multiple(self, node: fx.Node) -> bool:
        """Whether a number is the same at all batch sizes, or the same multiple of each."""
        found = list(self._found(node, BATCHES))
        first, size = self._values(node)[0], self._sizes[0]
        return all(v == first for _, v in found) or all(v * size == first * batch for batch, v in found)

    def _found(self, node: fx.Node, batches: Iterable[int]) -> Iterator[tuple[int, Any]]:
        """Batch sizes and values, wherever a number may follow the batch in a way that two sizes do not tell."""
        if node.op not in _CALLS or node.target in _ASK or not self._follows(node):
            return
        for batch in batches:
            try:
                yield batch, self._run(node, batch)
            except Exception:  # whatever an operation raises at sizes that it is not made for
                continue

    def _follows(self, node: fx.Node) -> bool:
        """Whether anything that goes into a number follows the batch."""
        return any(
            _differ(*self._values(n)) or (self._is_worked_out(n) and self._follows(n))
            for n in node.all_input_nodes
        )

    def _is_worked_out(self, node: fx.Node) -> bool:
        return node.op in _CALLS and not hasattr(self._values(node)[0], "shape")

    def _run(self, node: fx.Node, batch: int) -> Any:
        def given(leaf: fx.Node) -> Any:
            return self._at(leaf, batch)

        args: Any = fx.node.map_arg(node.args, given)
        kwargs: Any = fx.node.map_arg(node.kwargs, given)
        with torch.device("meta"):
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            target: Any = node.target
            return target(*args, **kwargs)

    def _at(self, node: fx.Node, batch: int) -> Any:
        """What a node that another one reads gives."""
        one, two = self._values(node)
        if hasattr(one, "shape"):
            first, second = self._sizes
            pairs = zip(one.shape, two.shape, strict=True)
            shape = [a + (b - a) * (batch - first) // (second - first) for a, b in pairs]
            return torch.empty(shape, dtype=one.dtype, device="meta")
        return self._run(node, batch) if node.op in _CALLS else one


def _differ(one: Any, two: Any) -> bool:
    """Whether shapes or numbers at two batch sizes are not the same."""
    if hasattr(one, "shape") and hasattr(two, "shape"):
        return bool(tuple(one.shape) != tuple(two.shape))
    if isinstance(one, tuple | list) and isinstance(two, tuple | list):
        return len(one) != len(two) or any(map(_differ, one, two))
    return bool(one != two)
