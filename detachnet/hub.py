"""Files of a repository on the Hugging Face Hub: fetched into its cache, or put there in one commit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from detachnet.errors import CheckpointError, one_line

PREFIX = "hf-hub:"
FAMILY = "family.safetensors"
"""The file of a family in its repository."""


def is_on_hub(path: str | Path) -> bool:
    """Whether a name is `hf-hub:OWNER/NAME`, where `@REVISION` may follow."""
    return str(path).startswith(PREFIX)


def fetched(path: str | Path) -> Path:
    """The file that a path leads to; of a family on the Hub the one in the cache, fetched if need be.

    Nothing of it is executed. `HF_HUB_OFFLINE=1` takes what the cache has.

    Raises:
        CheckpointError: This is no path, or there is no such repository, it has no family or cannot be reached.
    """
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"a family is read from a path, not from {type(path).__name__}")
    if not is_on_hub(path):
        return Path(path)
    from huggingface_hub import HfApi

    repo, _, revision = str(path).removeprefix(PREFIX).partition("@")
    with _explained(f"{path} cannot be fetched", f"{PREFIX}OWNER/NAME"):
        return Path(HfApi().hf_hub_download(repo, FAMILY, revision=revision or None))


def upload(repo: str, files: Mapping[str, bytes | Path], message: str, private: bool = False) -> str:
    """Put files into a repository, which is made if it is not there, in one commit.

    Args:
        repo: `OWNER/NAME`.
        files: Name in the repository → content, or the file that has it.
        message: Of the commit.
        private: Whether it may be seen by its owner only.

    Returns:
        The commit's address.

    Raises:
        CheckpointError: The Hub refuses it, cannot be reached, or has it in public where it was to be private.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api, writing = HfApi(), partial(_explained, f"{repo!r} cannot be written on the Hub", "OWNER/NAME")
    with writing():
        api.create_repo(repo, private=private, exist_ok=True)
        exposed = private and not api.model_info(repo).private
    if exposed:
        raise CheckpointError(
            f"{repo!r} is on the Hub already and public, not private: nothing was written",
            hint="another name, or make it private in its settings on the Hub first",
        )
    with writing():
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        return str(api.create_commit(repo, additions, commit_message=message).commit_url)


@contextmanager
def _explained(summary: str, form: str) -> Iterator[None]:
    """Say in our words that something failed, whatever the library raises."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            summary,
            what=one_line(error),
            hint=f"a name is {form}; hf auth login or HF_TOKEN says who you are",
        ) from error
