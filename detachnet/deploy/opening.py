"""graph's file -> a function of images, through the runtime its format is for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from detachnet.deploy.formats import Format, Runner, check_installed
from detachnet.deploy.onnx_session import open_onnx
from detachnet.deploy.pt2 import open_pt2
from detachnet.deploy.pte import open_pte
from detachnet.errors import ExportError

_OPENERS: dict[str, tuple[Format, Callable[[Path], Runner]]] = {
    ".onnx": ("onnx", open_onnx),
    ".pt2": ("pt2", open_pt2),
}
_PTE = ".pte"


def open_graph(path: str | Path, model: str | None = None) -> Runner:
    """A graph's file as a function of images, through the runtime its format is for.

    Nothing of the file's is run but its graph: a pt2 file is read, checked and written again with tensors and
    known operators only before torch sees it, and an ONNX graph may read no file but the weights beside it.

    Args:
        path: The file.
        model: Which one, of a pte file with several.

    Raises:
        ExportError: The file is of no known format, holds what detachnet never writes or not that model, or the
            format's packages are not installed.
    """
    path = Path(path)
    if path.suffix == _PTE:
        check_installed("pte")
        return _of_tensors(open_pte(path, model))
    if path.suffix not in _OPENERS:
        raise ExportError(f"{path} is no graph of a known format", hint=".onnx, .pt2 or .pte")
    if model is not None:
        raise ExportError(f"{path} holds one model", hint="open_graph(path)")
    format, opener = _OPENERS[path.suffix]
    check_installed(format)
    return _of_tensors(opener(path))


def _of_tensors(run: Runner) -> Runner:
    """A runner that says what it takes where it is given anything else."""

    def checked(images: Tensor) -> Tensor:
        if not isinstance(images, Tensor):
            raise ExportError(
                f"a graph takes a tensor of images, not {type(images).__name__}", hint="torch.from_numpy(array)"
            )
        return run(images)

    return checked
