"""plain module <-> an ExecuTorch program, for the XNNPACK backend."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from detachnet.deploy.formats import Piece, Precision, Runner, Written
from detachnet.deploy.program import trace
from detachnet.deploy.verify import compare
from detachnet.storage import open_file


class PteWriter:
    """Writes ExecuTorch programs for the XNNPACK backend (float32 on the CPU)."""

    precision: Precision = "float32"
    weights: str | None = None
    num_test: int | None = None

    def write(self, piece: Piece, path: Path) -> Written:
        """Write a module's program, and compare it."""
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(trace(piece, "pte"), partitioner=[XnnpackPartitioner()])
        path.write_bytes(lowered.to_executorch().buffer)
        compare(piece, open_pte(path))
        return Written(path.stat().st_size)


def open_pte(path: Path) -> Runner:
    """Through ExecuTorch's own runtime."""
    from executorch.runtime import Runtime

    open_file(path).close()  # a pipe would never end
    method = Runtime.get().load_program(path).load_method("forward")

    def run(images: Tensor) -> Tensor:
        outputs: Tensor = method.execute([images])[0]
        return outputs.clone()

    return run
