"""Files and folders that appear whole or not at all, and where a family is among them."""

from __future__ import annotations

import errno
import os
import platform
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from itertools import islice
from pathlib import Path

from detachnet.errors import CheckpointError, ExportError
from detachnet.hub import fetched

LAST = "last.safetensors"
"""The checkpoint in the folder of a run."""
MANIFEST = "manifest.json"
"""What says what is in an export folder."""


def open_file(path: str | Path) -> BufferedReader:
    """A regular file, opened to read; a pipe, a device or a link to one is refused before it is opened.

    Raises:
        OSError: There is none, it cannot be read, or the name is no possible one.
    """
    try:
        _check_regular(os.stat(path).st_mode, path)
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a name with a 0 in it
        raise OSError(errno.EINVAL, str(error)) from error
    try:
        _check_regular(os.fstat(descriptor).st_mode, path)  # it may have been exchanged
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular(mode: int, path: str | Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, no file", str(path))


def read_file(path: str | Path) -> bytes:
    """All of a regular file, through one descriptor: what another one is renamed to meanwhile does not matter.

    Raises:
        OSError: As `open_file`.
    """
    with open_file(path) as file:
        try:
            return file.read()
        except MemoryError as error:  # a file may have holes, and be larger than any disk
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path)) from error


LOCK = ".lock"
"""What is locked in a folder while a run writes it; gone afterwards."""
WAIT_S = 0.1
"""Between two looks at a lock that another process has."""


@dataclass(frozen=True)
class Place:
    """Where a family is.

    Attributes:
        path: Its file, or an export folder.
        is_export: Which of them.
    """

    path: Path
    is_export: bool

    @property
    def profile(self) -> Path:
        """Where its profile is: `last.profile.json` beside `last.safetensors`, `profile.json` in an export."""
        if self.is_export:
            return self.path / "profile.json"
        return self.path.with_name(self.path.name.removesuffix(".safetensors") + ".profile.json")


def locate(path: str | Path) -> Place:
    """Where a path leads: a family's file, here or on the Hub, the last checkpoint of the run in a folder, or an
    export folder.

    Raises:
        CheckpointError: A folder with neither.
    """
    path = fetched(path)
    if not os.path.isdir(path):
        return Place(path, is_export=False)
    if (path / MANIFEST).exists():
        return Place(path, is_export=True)
    if (path / LAST).exists():
        return Place(path / LAST, is_export=False)
    raise CheckpointError(
        f"there is no family in the folder {path}: it has no {LAST} and no {MANIFEST}",
        nearest=_families_below(path),
    )


def _families_below(folder: Path, most: int = 3, looked_at: int = 2000) -> list[str]:
    """Some families' files in a folder and those in it, the nearest first; of a large one a part is enough."""
    found: list[str] = []
    waiting = [folder]
    while waiting and len(found) < most and looked_at > 0:
        with suppress(OSError), os.scandir(waiting.pop(0)) as entries:
            for entry in sorted(islice(entries, looked_at), key=lambda entry: entry.name):
                looked_at -= 1
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(Path(entry.path))
                elif entry.name.endswith(".safetensors") and not entry.name.startswith("."):
                    found.append(entry.path)
    return found[:most]


def locate_checkpoint(path: str | Path) -> Path:
    """`locate`, where an export is not enough.

    Raises:
        CheckpointError: A folder without a checkpoint.
    """
    place = locate(path)
    if place.is_export:
        raise CheckpointError(
            f"there is no family in the folder {path}: it has no {LAST}",
            hint="it is an export; give the checkpoint it was made from",
        )
    return place.path


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Keep a folder for this process as long as it runs; what a process that died has left is no obstacle.

    Args:
        folder: Where the lock is.
        wait: Until another process, or another thread of this one, is done with it.

    Raises:
        CheckpointError: Another one has it, and is not waited for; or there is no such folder.
    """
    path = folder / LOCK
    try:
        while (descriptor := _lock(path)) is None and wait:
            time.sleep(WAIT_S)
    except OSError as error:
        raise CheckpointError(f"cannot write in {folder}", what=str(error)) from error
    if descriptor is None:
        raise CheckpointError(
            f"{folder} is being written by another process",
            what=_first_line(path),
            hint="wait for it, stop it, or choose another folder",
        )
    _held.add(descriptor)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is locked: who waits for it sees that it is gone
        _held.discard(descriptor)
        os.close(descriptor)


_held: set[int] = set()


def _lock(path: Path) -> int | None:
    """A locked file; None if another one has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            if not _try_lock(descriptor):
                os.close(descriptor)
                return None
            if _is_at(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # who had it has removed it


def _try_lock(descriptor: int) -> bool:
    """Lock a file if nobody has."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # another one has it
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still what a path leads to."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _close_in_child() -> None:
    """A worker process that outlives its parent must not keep the parent's folders."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _first_line(path: Path) -> str:
    """What a lock says of its owner."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:
        return ""


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, put in its place when all went well and removed when not, Ctrl-C included."""
    if os.path.lexists(folder):
        raise ExportError(f"{folder} exists already", hint="name a new folder, or remove this one")
    inside = _beside(folder)
    if inside is None:
        raise ExportError(f"{str(folder)!r} is no name of a folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        inside.mkdir()
        yield inside
        _sync(inside)
        os.rename(inside, folder)
        _sync(folder.parent)
    except OSError as error:
        raise ExportError(f"cannot write {folder}", what=str(error)) from error
    finally:
        shutil.rmtree(inside, ignore_errors=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part.

    It is written beside its place under a name that nobody knows before, safe on the disk, and renamed.

    Raises:
        CheckpointError: It cannot be written; what was there is still there, if that is said.
    """
    temporary = _beside(path)
    if temporary is None:
        raise CheckpointError(f"cannot write {str(path)!r}: it is no name of a file")
    if not os.path.isdir(path.parent):
        raise CheckpointError(f"cannot write {path}: there is no folder {path.parent}")
    try:
        try:
            write_new(temporary, content)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        kept = "; the previous file is unchanged" if os.path.lexists(path) else ""
        raise CheckpointError(f"cannot write {path}{kept}", what=str(error)) from error
    try:
        _sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path} is written, but perhaps not safe on the disk", what=str(error)) from error


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet, nor a link; it is safe on the disk when this returns.

    Raises:
        OSError: It is there, or cannot be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        left = memoryview(content)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path | None:
    """A name for a temporary file or folder beside a place; None if that has no possible name."""
    if not path.name or "\0" in str(path):
        return None
    return path.with_name(f".{path.name[:60]}.{os.getpid()}.{secrets.token_hex(8)}.tmp")


def _sync(folder: Path) -> None:
    """Make safe on the disk which files are in a folder, where the system can."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
