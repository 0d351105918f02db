"""export folder -> the same graphs, optimized for this processor, with one file of weights for all of them.

ONNX Runtime optimizes a graph each time it loads it, and copies the weights that it folds or orders anew: every
model of a family then holds its own. Here that is done once and written down, without folding batch norms, which
would make the weights different in each model. What is loaded from there maps the one file into memory.

Such graphs are for one kind of processor. They are kept in the user's cache folder, below a name that changes with
the export, the processor and the version of ONNX Runtime, and never belong to what is shipped. When new ones are
made, those of exports that are no longer where they were, or were made anew, are removed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from detachnet.deploy.formats import Runner
from detachnet.deploy.manifest import ExportedFile, Manifest, exported_file
from detachnet.deploy.onnx_session import onnx_session, run_onnx
from detachnet.deploy.verify import CHECKED_BATCHES, check_equal
from detachnet.deploy.weights import SharedWeights
from detachnet.errors import ExportError
from detachnet.fields import Fields
from detachnet.machine import hardware, versions
from detachnet.progress import counted
from detachnet.storage import MANIFEST, new_folder, read_file, write_new

OPTIMIZED_WEIGHTS = "optimized.bin"
"""The one file of weights of all optimized graphs."""
_INDEX = "index.json"
_FORMAT = 2
"""Raised when graphs are optimized or written in another way."""
_PAGE_BYTES = 4096
_INLINE_BYTES = 1024
"""Smaller tensors stay in the graph."""
_UNSHARED = ("ConvBNFusion",)
"""Optimizations that make weights that are equal in several models different."""


class _Index(Fields):
    """The files of a cache folder, and of which export: where it was, and the checksum of its manifest."""

    files: tuple[ExportedFile, ...]
    source: str
    sha256: str


def optimized_folder(folder: Path, manifest: Manifest) -> Path:
    """Where the optimized graphs of an export are: those that are there and whole, or new ones.

    They have the names of the export's graphs. Each one is compared with the graph it was made from.

    Args:
        folder: What `export` wrote, checked already.
        manifest: What is in it.

    Raises:
        ExportError: They cannot be written, ONNX Runtime cannot make them, or they compute something else.
    """
    place = cache_folder() / "onnx" / _key(folder)
    if _is_whole(place):
        return place
    if place.exists():
        shutil.rmtree(place, ignore_errors=True)
    try:
        with new_folder(place) as inside:
            _fill(inside, folder, manifest)
    except ExportError:
        if not _is_whole(place):  # another process can have been faster
            raise
    _remove_old(place.parent)
    return place


def cache_folder() -> Path:
    """The user's folder for what can be made again: `$XDG_CACHE_HOME/detachnet`, or `~/.cache/detachnet`.

    Raises:
        ExportError: There is neither.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "detachnet"
    except RuntimeError as error:
        raise ExportError(
            "there is no home folder for the cache", hint="set XDG_CACHE_HOME to a folder"
        ) from error


def _key(folder: Path) -> str:
    """A name that changes with all that optimized graphs depend on."""
    processor = (hardware(torch.device("cpu"))["device"], platform.machine())
    libraries = sorted(versions("onnxruntime").items())
    said = [_FORMAT, _checksum(folder), processor, libraries]
    return hashlib.sha256(repr(said).encode()).hexdigest()[:32]


def _checksum(folder: Path) -> str:
    """Of an export's manifest, which has those of all files."""
    return hashlib.sha256(read_file(folder / MANIFEST)).hexdigest()


def _is_whole(place: Path) -> bool:
    """Whether a cache folder has all its files as they were written."""
    try:
        return all(exported_file(place / file.file) == file for file in _index(place).files)
    except (OSError, ValidationError):
        return False


def _index(place: Path) -> _Index:
    """What a cache folder says of itself."""
    return _Index.model_validate_json(read_file(place / _INDEX))


def _remove_old(places: Path) -> None:
    """Remove the cache folders of exports that are not there any more, or are others now."""
    for place in places.iterdir():
        try:
            index = _index(place)
        except (OSError, ValidationError):  # being made, or none of ours
            continue
        try:
            is_old = _checksum(Path(index.source)) != index.sha256
        except OSError:
            is_old = True
        if is_old:
            shutil.rmtree(place, ignore_errors=True)


def _fill(inside: Path, folder: Path, manifest: Manifest) -> None:
    """Optimize all graphs of an export into a new folder."""
    weights = SharedWeights(inside / OPTIMIZED_WEIGHTS, _PAGE_BYTES)
    own = frozenset([manifest.weights.file]) if manifest.weights else frozenset[str]()
    files = [model.file for model in manifest.models] + [leg.file for leg in manifest.legs]
    for file in counted(files, len(files), "graphs optimized for this processor"):
        _optimize(folder / file, inside / file, weights, own)
        found = onnx_session(inside / file, torch.get_num_threads(), {OPTIMIZED_WEIGHTS})
        wanted = onnx_session(folder / file, torch.get_num_threads(), own)
        shape = tuple(wanted.get_inputs()[0].shape[1:])
        images = torch.randn(max(CHECKED_BATCHES), *shape, generator=torch.Generator().manual_seed(0))
        check_equal(
            f"the optimized {file}",
            "the exported one",
            _runner(wanted, folder / file),
            _runner(found, inside / file),
            images,
        )
    made = tuple(exported_file(inside / file) for file in (*files, OPTIMIZED_WEIGHTS))
    index = _Index(files=made, source=str(folder.resolve()), sha256=_checksum(folder))
    write_new(inside / _INDEX, index.model_dump_json().encode())


def _runner(session: Any, path: Path) -> Runner:
    """A session as a function."""
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    return lambda images: run_onnx(session, path, made.name, given.name, images)


def _optimize(source: Path, target: Path, weights: SharedWeights, own: frozenset[str]) -> None:
    """Write one graph as ONNX Runtime would run it."""
    import onnx
    from onnx import numpy_helper
    from onnx.external_data_helper import set_external_data

    onnx_session(source, 1, own, optimized=target, without=_UNSHARED)
    model = onnx.load(target, load_external_data=False)
    for tensor in _tensors(model):
        # Also those that still refer to the export's file of weights: there is none beside this graph.
        content = numpy_helper.to_array(tensor, base_dir=str(source.parent)).tobytes()
        tensor.CopyFrom(onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims))
        tensor.raw_data = content
        if len(content) >= _INLINE_BYTES:
            set_external_data(tensor, weights.path.name, offset=weights.place(content), length=len(content))
            tensor.ClearField("raw_data")
    target.write_bytes(model.SerializeToString())


def _tensors(model: Any) -> Iterator[Any]:
    """The tensors of a graph whose bytes may lie elsewhere; texts have none."""
    from onnx import TensorProto

    return (tensor for tensor in model.graph.initializer if tensor.data_type != TensorProto.STRING)
