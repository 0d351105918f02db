"""A file of weights -> what a run starts from: a base-model's tensors, and of a family those of its sub-models."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from detachnet.checkpoint.content import KEY, read, without_prefix
from detachnet.errors import CheckpointError, first_line
from detachnet.storage import locate_checkpoint
from detachnet.surgery.ownership import HEADS, NORMS
from detachnet.surgery.plan import BASE, DetachPlan
from detachnet.surgery.routes import BRIDGES, STEPDOWNS

logger = logging.getLogger("detachnet")
_INSIDE = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
"""Where training scripts keep a state dict in a larger one; averaged weights first, as timm takes them."""
OWN = tuple(f"{place}." for place in (STEPDOWNS, BRIDGES, NORMS, HEADS))
"""Where sub-models have what is theirs alone."""
_EXTRA_STATE = "_extra_state"
"""How torch ends the name of what a layer keeps besides its tensors."""
_PREFIXES = ("", "module.", "_orig_mod.", "model.", "base.", "module._orig_mod.", "_orig_mod.module.")
"""What wrappers put in front of a model's names."""


class Start(NamedTuple):
    """What is in a file that a run starts from.

    Attributes:
        base: The base-model's tensors, and what its layers keep besides, by its own names.
        plan: Of the trained models of its family; None of a base-model alone.
        own: What these have for themselves, by their names in the family.
    """

    base: dict[str, Any]
    plan: DetachPlan | None = None
    own: Mapping[str, Any] = MappingProxyType({})


def read_start(path: str | Path, names: Collection[str]) -> Start:
    """What is in a file that a run starts from.

    Args:
        path: The file of a family, the folder of its run, or a state dict in `.safetensors` or, read without
            executing anything of it, what `torch.save` wrote.
        names: Those of the base-model.

    Raises:
        CheckpointError: The file is missing, damaged, of a run that did not train its base-model, or of another.
    """
    path = locate_checkpoint(path)
    if not _is_plain(path):
        header, stored = read(path)
        if header.detached not in (None, BASE):
            raise CheckpointError(
                f"{path} cannot be started from: it holds {header.detached} alone, detached from its family",
                hint="give the file of the whole family, or the folder of its run",
            )
        if header.trained and "base" not in header.trained:
            raise CheckpointError(f"{path} cannot be started from: its base-model was not trained")
        tied = {name: stored[kept] for name, kept in header.tied.items()}
        state: dict[str, Any] = {**stored, **tied, **header.extra_state}
        if header.detached is not None:
            return Start(state)
        base = without_prefix(state, f"{BASE}.")
        trained = tuple(m for m in header.plan.models if m.name in (header.trained or header.plan.names))
        own = {name: value for name, value in state.items() if name.startswith(OWN)}
        return Start(base, header.plan.model_copy(update={"models": trained}), own)
    given = _read_plain(path)
    prefix = max(_PREFIXES, key=lambda prefix: sum(f"{prefix}{name}" in given for name in names))
    found = {name.removeprefix(prefix): tensor for name, tensor in given.items() if name.startswith(prefix)}
    if not set(found) & set(names):
        raise CheckpointError(
            f"{path} cannot be started from: it has no weights of this model",
            what=f"it has {next(iter(given), 'nothing')!r}, the model {next(iter(names), 'nothing')!r}",
        )
    if prefix:
        logger.info("%s: %r in front of its names is left out", path, prefix)
    return Start(found)


def _is_plain(path: Path) -> bool:
    """Whether a file is no family of ours; a damaged one is left to the reader of those."""
    if not os.path.isfile(path):  # which a pipe is not either
        return False
    if path.suffix != ".safetensors":
        return not _is_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            return KEY not in (file.metadata() or {})
    except (OSError, SafetensorError, ValueError):
        return False


def _is_safetensors(path: Path) -> bool:
    """Whether a file of another ending is one all the same."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (OSError, SafetensorError, ValueError):
        return False


def _read_plain(path: Path) -> dict[str, Any]:
    """The state dict in a file: tensors, and what layers keep besides."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler raises anything on damaged bytes
        raise CheckpointError(
            f"{path} cannot be started from: it is no state dict",
            what=_reason(error),
            hint="torch.save(model.state_dict(), path) writes one; files that hold objects are not opened",
        ) from error
    inside = next(
        (key for key in _INSIDE if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)), ""
    )
    if inside:
        logger.info("%s: the weights under %r are taken", path, inside)
        content = content[inside]
    named = {str(key): value for key, value in content.items()} if isinstance(content, Mapping) else {}
    found = {n: v for n, v in named.items() if isinstance(v, Tensor) or n.endswith(_EXTRA_STATE)}
    if not found:
        raise CheckpointError(
            f"{path} cannot be started from: it holds no tensors by name",
            hint="torch.save(model.state_dict(), path) writes a state dict",
        )
    return found


def _reason(error: BaseException) -> str:
    """Why torch did not read a file; without its advice to read it with code."""
    if isinstance(error, pickle.UnpicklingError):
        return "it holds other objects than tensors, or is no file of torch.save"
    return first_line(error)
