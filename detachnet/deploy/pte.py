"""plain modules <-> one ExecuTorch program with a method for each, for the XNNPACK backend."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from detachnet.deploy.formats import Piece, Precision, Runner, Written
from detachnet.deploy.program import trace
from detachnet.deploy.verify import compare
from detachnet.errors import ExportError
from detachnet.storage import open_file

FAMILY = "family.pte"
"""The one file of all models."""
_aten = torch.ops.aten


class PteWriter:
    """Writes one ExecuTorch program with a method for each model, for the XNNPACK backend (float32 on the CPU).

    Tensors that are equal are stored once. So that models share weights, batch norms become a scale and a shift
    behind the convolutions where there are several models; where there is one, they are folded in.

    Args:
        folder: Where it will be.
    """

    precision: Precision = "float32"
    weights: str | None = None
    file: str | None = FAMILY
    num_test: int | None = None

    def __init__(self, folder: Path) -> None:
        self._path = folder / FAMILY
        self._pieces: list[Piece] = []

    def write(self, piece: Piece, path: Path) -> Written:  # noqa: ARG002
        """Keep a module for the program."""
        self._pieces.append(piece)
        return Written(sum(tensor.nbytes for tensor in piece.module.state_dict().values()))

    def finish(self) -> None:
        """Write the program, and compare each of its methods."""
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        programs = {piece.name: trace(piece, "pte") for piece in self._pieces}
        if len(programs) > 1:
            for program in programs.values():
                separate_norms(program)
        lowered = to_edge_transform_and_lower(programs, partitioner=[XnnpackPartitioner()])
        self._path.write_bytes(lowered.to_executorch().buffer)
        for piece in self._pieces:
            compare(piece, open_pte(self._path, piece.name))


def separate_norms(program: ExportedProgram) -> None:
    """Make the batch norms of a program a scale and a shift, which nothing folds into weights that models share.

    They take the places of the running statistics.
    """
    graph, tensors = program.graph_module.graph, program.state_dict
    names = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    done = set[fx.Node]()
    for node in graph.find_nodes(op="call_function", target=_aten.batch_norm.default):
        x, weight, bias, mean, var, training, _, eps = node.args[:8]
        if training or None in (mean, var):
            continue
        if var not in done:
            done.add(var)
            scale = (tensors[names[var.name]] + eps).rsqrt()
            scale = scale if weight is None else scale * tensors[names[weight.name]].detach()
            shift = -tensors[names[mean.name]] * scale
            shift = shift if bias is None else shift + tensors[names[bias.name]].detach()
            shape = (-1,) + (1,) * (x.meta["val"].ndim - 2)
            for place, value in ((var, scale), (mean, shift)):
                tensors[names[place.name]] = value.reshape(shape)
                place.meta["val"] = place.meta["val"].reshape(shape)
        with graph.inserting_before(node):
            scaled = graph.call_function(_aten.mul.Tensor, (x, var))
        scaled.meta = dict(node.meta)
        node.target, node.args = _aten.add.Tensor, (scaled, mean)
    graph.lint()
    program.graph_module.recompile()


def open_pte(path: Path, model: str | None = None) -> Runner:
    """Through ExecuTorch's own runtime.

    Args:
        path: The program.
        model: Which of its methods; not needed where there is one.

    Raises:
        ExportError: It has no such method, or several.
    """
    from executorch.runtime import Runtime

    open_file(path).close()  # a pipe would never end
    program = Runtime.get().load_program(path)
    names = sorted(program.method_names)
    chosen = names[0] if model is None and len(names) == 1 else model
    if chosen not in names:
        raise ExportError(f"{path} holds {', '.join(names)}", hint=f"open_graph(path, {names[0]!r})")
    method = program.load_method(chosen)

    def run(images: Tensor) -> Tensor:
        outputs: Tensor = method.execute([images])[0]
        return outputs.clone()

    return run
