"""ONNX graph of a narrower model -> one that reads parts of tensors which another model has in the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from detachnet.deploy.weights import INLINE_BYTES, SharedWeights
from detachnet.surgery.widths.reading import Pick


def read_parts(model: Any, parts: Mapping[str, tuple[Tensor, Pick]], weights: SharedWeights) -> int:
    """Let a graph read parts of tensors that the file of weights has already, in place of copies of its own.

    Runtimes take the parts when they load the graph; it runs as fast.

    Args:
        model: An `onnx.ModelProto` with its weights inside.
        parts: Name of a weight → the tensor it is a part of, and which part; weights are found by what they hold.
        weights: Where the weights go.

    Returns:
        Bytes of those tensors that the graph does not read; of what several layers read, all but the largest part.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes, read = list[Any](), dict[bytes, tuple[int, int]]()
    known: dict[tuple[tuple[int, ...], bytes], tuple[Tensor, Pick]] = {}
    for whole, pick in parts.values():
        turned = [(whole.t(), pick.t())] if whole.ndim == 2 else []  # as layers with channels last have them
        for one, its in [(whole, pick), *turned]:
            known.setdefault((tuple(its(one).shape), _bytes_of(its(one))), (one, its))
    for tensor in list(model.graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or len(tensor.raw_data) < INLINE_BYTES:
            continue
        part = known.get((tuple(tensor.dims), bytes(tensor.raw_data)))
        if part is None or not (part[1].front or part[1].indices):
            continue
        whole, pick = part
        content = _bytes_of(whole)
        if (stored := weights.encode(content)) not in weights:
            continue
        name, taken = tensor.name, f"{tensor.name}.whole"
        taken_bytes = len(stored) * len(tensor.raw_data) // len(content)
        read[stored] = len(stored), max(taken_bytes, read.get(stored, (0, 0))[1])
        model.graph.initializer.remove(tensor)
        constants = [helper.make_tensor(taken, TensorProto.FLOAT, whole.shape, content, raw=True)]
        steps: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        if pick.front:
            axes, ends = list(pick.front), list(pick.front.values())
            steps.append(("Slice", {"starts": [0] * len(axes), "ends": ends, "axes": axes}, {}))
        for axis, index in pick.indices.items():
            steps.append(("Gather", {f"kept.{axis}": index.tolist()}, {"axis": axis}))
        for i, (kind, inputs, attributes) in enumerate(steps):
            made = name if i == len(steps) - 1 else f"{name}.{i}"
            numbers = {f"{name}.{key}": np.array(value, np.int64) for key, value in inputs.items()}
            constants += [numpy_helper.from_array(value, key) for key, value in numbers.items()]
            nodes.append(helper.make_node(kind, [taken, *numbers], [made], **attributes))
            taken = made
        model.graph.initializer.extend(constants)
    put_first(model.graph, nodes)
    return sum(all_bytes - taken_bytes for all_bytes, taken_bytes in read.values())


def put_first(graph: Any, nodes: Sequence[Any]) -> None:
    """Nodes in front of those that an ONNX graph has."""
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().numpy().tobytes()
