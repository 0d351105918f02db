"""plain module -> torch.export's program, and that in the operators which ONNX has a translation for."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from detachnet.deploy.formats import MAX_BATCH, Format, Piece
from detachnet.losses import logits

_aten = torch.ops.aten
_TRANSLATED = {
    *("conv1d.default", "conv2d.default", "linear.default", "layer_norm.default"),
    *("mean.dim", "max_pool2d.default", "avg_pool2d.default", "cat.default", "softmax.int", "prelu.default"),
    *("relu.default", "hardtanh.default", "hardswish.default", "hardsigmoid.default", "silu.default"),
    *("gelu.default", "sigmoid.default", "tanh.default", "elu.default", "leaky_relu.default"),
    *("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor"),
}
"""Operators that torch.onnx translates as they are, and that make new tensors."""
_VIEWS = {"flatten.using_ints", "permute.default", "dropout.default"}
"""Others that it translates; they may give what they take."""
_Replacement = tuple[Any, tuple[Any, ...]]
"""An operator and its arguments."""


def trace(piece: Piece, format: Format) -> ExportedProgram:
    """`torch.export` of a module, with the number of images left free."""
    batch = torch.export.Dim("batch", max=MAX_BATCH[format])
    return torch.export.export(piece.module, (piece.images.clone(),), dynamic_shapes=({0: batch},))


class _Decomposed(ExportedProgram):
    """A program that consists of what is translated already."""

    def run_decompositions(self, *_: Any, **__: Any) -> ExportedProgram:
        """Itself."""
        return self


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Put a program into operators that torch.onnx translates, where that takes no second trace.

    torch.onnx.export traces every program again to take operators apart, with tensors of symbolic shapes: more
    than half of its time. Most networks need that for batch norms, the pooling in front of the classifier and
    operators in place only. Those are replaced here, in the program's own graph; any other program comes back as
    it was, and torch.onnx.export takes it apart.

    Source: the replacements are those of torch's own decompositions.
    """
    graph = program.graph_module.graph
    others = [n for n in graph.nodes if n.op == "call_function" and _name(n) not in _TRANSLATED | _VIEWS]
    found = [(node, _replacement(node)) for node in others]
    if any(replacement is None for _, replacement in found):
        return program
    for node, replacement in found:
        _replace(node, *replacement)  # type: ignore[misc]
    graph.lint()
    program.graph_module.recompile()
    program.__class__ = _Decomposed
    return program


def _name(node: fx.Node) -> str:
    """An operator of torch's without its namespace: `conv2d.default`."""
    return str(node.target).removeprefix("aten.")


def _replacement(node: fx.Node) -> _Replacement | None:
    """What makes the same and is translated; None if that is not known."""
    args: tuple[Any, ...] = node.args
    if node.kwargs:
        return None
    if node.target is _aten.batch_norm.default and not args[5] and None not in args[:5]:
        return _aten._native_batch_norm_legit_no_training.default, (*args[:5], *args[6:8])
    if node.target is _aten.adaptive_avg_pool2d.default and list(args[1]) == [1, 1]:
        return _aten.mean.dim, (args[0], [-1, -2], True)
    name, _, overload = _name(node).partition(".")
    if name.endswith("_") and f"{name[:-1]}.{overload}" in _TRANSLATED and _is_unseen(node):
        return getattr(getattr(_aten, name[:-1]), overload), args
    return None


def _is_unseen(node: fx.Node) -> bool:
    """Whether nothing but its result shows that an operator in place has written: into a new tensor, used up."""
    written = node.args[0]
    if not isinstance(written, fx.Node) or written.op != "call_function":
        return False
    if _name(written) not in _TRANSLATED and _replacement(written) is None:
        return False
    return all(user is node or (user < node and _name(user) in _TRANSLATED) for user in written.users)


def _replace(node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    """Put another operator into a node's place; of several results its is the first."""
    if target is not _aten._native_batch_norm_legit_no_training.default:
        node.target, node.args = target, args
        return
    with node.graph.inserting_before(node):
        made = node.graph.call_function(target, args)
    value = node.meta["val"]
    made.meta = dict(node.meta) | {"val": (value, value.new_empty(0), value.new_empty(0))}
    node.target, node.args = operator.getitem, (made, 0)


class MainOutput(nn.Module):
    """A model without what it returns besides its main output."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        """The main output."""
        return logits(self.module(x))
