"""folder -> the folders and images in it, in their order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from timm.utils.misc import natural_key

from detachnet.data.images import SUFFIXES
from detachnet.errors import DataError


def folders_in(place: Path) -> list[str]:
    """Names of the folders in a place, if it is there."""
    return [path.name for path in entries(place) if path.is_dir()] if place.is_dir() else []


def entries(folder: Path) -> list[Path]:
    """What is in a folder, in order, but for names that begin with a dot."""
    try:
        inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise _unreadable(error) from error
    return sorted(inside, key=lambda path: in_order(path.name))


def images_below(folder: Path) -> Iterator[str]:
    """Paths of the images in a folder and in those in it, linked ones too; none that begins with a dot.

    A link to a folder that it is in, which would go on forever, is passed over.
    """

    def refuse(error: OSError) -> None:
        raise _unreadable(error) from error

    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and not _leads_back(place, name)]
        yield from (os.path.join(place, name) for name in files if is_image(name))


def _leads_back(place: str, name: str) -> bool:
    """Whether a folder is a link to one on the way to it."""
    path = Path(os.path.abspath(place), name)
    if not path.is_symlink():
        return False
    target = os.path.realpath(path)
    return any(Path(os.path.realpath(above)).is_relative_to(target) for above in path.parents)


def _unreadable(error: OSError) -> DataError:
    """What is said of a folder of images that cannot be looked into."""
    return DataError(f"the folder {error.filename} cannot be read", what=str(error))


def is_image(name: str) -> bool:
    """Whether a file is one of those that are looked for."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def in_order(name: str) -> tuple[list[str | int], str]:
    """What names are sorted by, as timm's reader does: numbers as numbers, letters of either case alike."""
    return natural_key(name), name
