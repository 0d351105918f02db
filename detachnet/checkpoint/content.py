"""header and tensors <-> one file: safetensors with the header in its metadata, a checksum over both."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes, save as to_bytes
from torch import Tensor

from detachnet.checkpoint.header import Header
from detachnet.errors import CheckpointError, one_line
from detachnet.fields import read_error
from detachnet.hub import fetched
from detachnet.storage import MANIFEST, read_file, replace_file
from detachnet.surgery.plan import BASE
from detachnet.text import parse_json

KEY = "detachnet"
TRAINER = "trainer."
"""Prefix of the optimizer's tensors, which only resuming the training needs."""
LIVE = "live."
"""Prefix of the weights that are trained, in a file whose family is their average; needed for the same."""
LARGEST_HEADER, MOST_TENSORS = 100_000_000, 100_000
"""Bytes, which are safetensors' own limit, and tensors of a file that is read; large networks have thousands."""
_FORMAT = {"format": "pt"}
T = TypeVar("T")


def write_file(path: str | Path, header: Header, state: Mapping[str, Any], extra: Mapping[str, Tensor]) -> None:
    """A header and the tensors it is about, with a checksum over both."""
    state, plain = split_state(state)
    tensors, tied = untied(state)
    tensors |= extra
    text = header.model_copy(update={"tied": tied, "extra_state": plain}).model_dump_json()
    metadata = _FORMAT | {KEY: text, "sha256": _digest(text, tensors)}
    replace_file(Path(path), _in_order(to_bytes(tensors, metadata)))


def read(path: str | Path) -> tuple[Header, dict[str, Tensor]]:
    """A file's header and tensors, both checked; it may be on the Hub."""
    path = fetched(path)
    if os.path.isdir(path):
        is_export = os.path.exists(os.path.join(path, MANIFEST))
        raise CheckpointError(
            f"{path} is a folder that detachnet export wrote" if is_export else f"{path} is a folder",
            hint="detachnet.Family.load(path) runs it"
            if is_export
            else "of a run, give its last.safetensors or best.safetensors",
        )
    metadata, tensors = _content(path)
    if KEY not in metadata:
        raise CheckpointError(
            f"{path} is a safetensors file, but not one of detachnet's",
            hint="load plain weights into the model, then call make_detachable",
        )
    if metadata != _FORMAT | {KEY: metadata[KEY], "sha256": _digest(metadata[KEY], tensors)}:
        raise CheckpointError(
            f"{path} is damaged: its content does not match its checksum", hint="copy the file again"
        )
    raw: Any = None
    try:
        raw = parse_json(metadata[KEY])
        if raw.get("format_version") != 1:
            raise CheckpointError(
                f"{path} has format version {raw.get('format_version')}; this version of detachnet reads 1",
                hint="pip install --upgrade detachnet",
            )
        return Header.model_validate_json(metadata[KEY]), tensors
    except (ValueError, AttributeError) as error:
        raise CheckpointError(
            f"the header of {path} says something unknown", what=read_error(error, raw)
        ) from error


def _content(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A safetensors file's metadata and tensors, read through one descriptor."""
    try:
        content = read_file(path)
        header = _header(content)
        tensors = from_bytes(content)  # which checks the header, too
        metadata = header.get("__metadata__") or {}
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no file {path}") from error
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a complete safetensors file",
            what=one_line(error),
            hint="it may be no checkpoint, or truncated: then copy it again",
        ) from error
    return metadata, tensors


def _header(content: bytes) -> dict[str, Any]:
    """What a safetensors file says of its tensors, bounded before any of them is made.

    Raises:
        ValueError: It says nothing, or too much.
    """
    length = int.from_bytes(content[:8], "little")
    if content[:2] == b"PK":
        raise ValueError("it is an archive, as torch.save and torch.export write them")
    if length > LARGEST_HEADER:
        raise ValueError(f"its header is said to have {length} bytes")
    header = parse_json(content[8 : 8 + length])
    if not isinstance(header, dict) or len(header) > MOST_TENSORS:
        raise ValueError(
            f"its header names {len(header)} tensors" if isinstance(header, dict) else "it has no header"
        )
    return header


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata in order: the library writes it in another one each time."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(content)[8 + length :]])


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state dict's tensors, and what layers keep besides, which must be JSON.

    Raises:
        CheckpointError: It is not, with the layer's name.
    """
    plain = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    for name, value in plain.items():
        try:
            kept = json.loads(json.dumps(value)) == value
        except (TypeError, ValueError):
            kept = False
        if not kept:
            layer = name.removesuffix("._extra_state").removeprefix(f"{BASE}.")
            raise CheckpointError(
                f"the extra state of {layer!r} cannot be stored in a file",
                what=f"get_extra_state returns a {type(value).__name__} that JSON does not give back",
                hint="let get_extra_state return a tensor, or dicts, lists, strings and numbers",
            )
    return {name: value for name, value in state.items() if name not in plain}, plain


def untied(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor once, and which names mean one that is stored under another name."""
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            tied[name] = seen[place]
        else:
            seen[place] = name
            tensors[name] = tensor.detach().cpu().contiguous()
    return tensors, tied


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under names that begin with a prefix."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def without_prefix(state: Mapping[str, T], prefix: str) -> dict[str, T]:
    """What is under names that begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the header and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
