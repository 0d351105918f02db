"""image file -> picture -> what a family takes in."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from detachnet.errors import DataError, first_line, nearest
from detachnet.facts import DataInfo, scale_and_shift
from detachnet.storage import open_file

logger = logging.getLogger("detachnet")
LARGE = 89_478_485
"""Pixels above which a picture is read smaller: Pillow's own limit, whose double it refuses."""
_SIDE = 2048
"""Pixels that the sides of such a picture keep at least."""
SUFFIXES = {
    ".avif": "AVIF",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".pbm": "PPM",
    ".pgm": "PPM",
    ".png": "PNG",
    ".ppm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
"""What is looked for in folders, and the formats that are opened: none that runs another program."""
_MODES = {1: "L", 3: "RGB"}
_DETOURS = {"La": "LA", "LAB": "RGB"}
"""Modes that Pillow converts to others only by way of a third."""


def read_image(source: str | Path | BinaryIO | Image.Image, name: str | None = None) -> Image.Image:
    """Read one picture completely, upright, with 8 bits per channel.

    Of an animation it is the first frame. A JPEG of more than 89 million pixels is decoded at a half, a quarter or
    an eighth of its sides, which is logged. A picture turned by its EXIF orientation is turned back; one whose
    EXIF data is damaged is taken as it is stored.

    Args:
        source: A file's path, an open binary file, or a picture (which stays as it is).
        name: What errors call it; the file's name if not given.

    Raises:
        DataError: There is no such file, or it is no picture, truncated, damaged or too large, or its values have
            no known range.
    """
    name = name or str(source if isinstance(source, str | Path) else getattr(source, "name", "the image"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's about metadata
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # at twice as many it is an error
            if isinstance(source, Image.Image):
                upright = ImageOps.exif_transpose(source)
            else:
                with ExitStack() as opened:
                    file: BinaryIO = source if not isinstance(source, str | Path) else open_file(source)
                    if file is not source:
                        opened.enter_context(file)
                    upright = _loaded(opened.enter_context(Image.open(file, formats=_formats())), name)
                    ImageOps.exif_transpose(upright, in_place=True)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {name}", nearest=_neighbours(name)) from error
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{name} has too many pixels", what=str(error), hint="make it smaller with an image editor"
        ) from error
    except UnidentifiedImageError as error:
        known = ", ".join(sorted(set(_formats())))
        raise DataError(f"{name} is not an image", hint=f"formats that are read: {known}") from error
    except Exception as error:  # a decoder raises anything on damaged bytes
        reason = "" if isinstance(error, OSError) and error.errno else ": it is truncated or damaged"
        raise DataError(f"{name} cannot be read{reason}", what=first_line(error)) from error
    return _common(upright, name)


def _loaded(image: Image.Image, name: str) -> Image.Image:
    """An opened picture with its pixels, fewer of them where there are too many and the format can."""
    size = image.size
    if size[0] * size[1] > LARGE:
        if image.format != "JPEG":
            raise Image.DecompressionBombError(
                f"{size[0]}×{size[1]} pixels of {image.format}, which could be a decompression bomb"
            )
        factor = min(8, max(2, min(size) // _SIDE))
        image.draft(image.mode, (size[0] // factor, size[1] // factor))
        logger.info("%s: read at %d×%d of %d×%d pixels", name, *image.size, *size)
    image.load()
    return image


def to_tensor(image: Image.Image, data: DataInfo, input_size: tuple[int, ...]) -> Tensor:
    """A picture of any size and mode as a family takes it in.

    The shorter side is brought to the input size and the middle is cut out; a picture of that size stays as it
    is. For a family trained on image files it is resized and cropped as timm does for an evaluation. Transparent
    parts become white. Colours are turned to grey, or grey to colours, as the family was trained.

    Args:
        image: The picture.
        data: The family's; each channel is normalized by its mean and deviation.
        input_size: Shape of one image of the family, `(C, H, W)`.

    Returns:
        `(C, H, W)`, float32; exactly what the family was evaluated on, for a picture of its test set.

    Raises:
        DataError: The family takes in no `(1, H, W)` or `(3, H, W)` images, or the picture's values have no
            known range.
    """
    num_chs = input_size[0]
    if len(input_size) != 3 or num_chs not in _MODES or num_chs != len(data.mean):
        raise DataError(
            f"the family takes in {'×'.join(map(str, input_size))} images, which a picture cannot become",
            what=f"mean and deviation of {len(data.mean)} channels are known",
            hint="pictures become (1, H, W) or (3, H, W)",
        )
    height, width = input_size[1:]
    plain = to_mode(_common(image, "the image"), num_chs)
    if data.crop_pct is not None:
        values = evaluation_transform((height, width), data.crop_pct)(plain)[None]
    else:
        if plain.size != (width, height):
            plain = ImageOps.fit(plain, (width, height), Image.Resampling.BICUBIC)
        values = torch.from_numpy(np.array(plain)).view(1, height, width, num_chs).permute(0, 3, 1, 2)
    scale, shift = scale_and_shift(data)
    return (values.float() * scale - shift)[0].contiguous()


def to_mode(image: Image.Image, num_chs: int) -> Image.Image:
    """A picture that `read_image` read, opaque, in grey or in colours: with 1 or 3 channels."""
    opaque, mode = _opaque(image), _MODES[num_chs]
    return opaque if opaque.mode == mode else opaque.convert(mode)


@lru_cache
def evaluation_transform(size: tuple[int, int], crop_pct: float) -> Callable[[Image.Image], Tensor]:
    """timm's for evaluations: shorter side to `size / crop_pct`, bicubic, middle cut out; `(C, H, W)`, uint8."""
    from timm.data import create_transform  # slow to import

    transform: Callable[[Image.Image], Tensor] = create_transform(
        size, interpolation="bicubic", crop_pct=crop_pct, normalize=False
    )
    return transform


def find_images(paths: Iterable[str | Path]) -> Iterator[Path]:
    """Yield files as given, and in the place of a folder the pictures in it and below it, by name.

    Raises:
        DataError: A folder without a picture.
    """
    for path in map(Path, paths):
        if not os.path.isdir(path):
            yield path
            continue
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise DataError(
                f"there is no image in the folder {path}", hint=f"suffixes looked for: {' '.join(SUFFIXES)}"
            )
        yield from found


@lru_cache
def _formats() -> tuple[str, ...]:
    """Those of our formats that the installed Pillow reads."""
    Image.init()
    return tuple(dict.fromkeys(f for f in SUFFIXES.values() if f in Image.OPEN))


def _common(image: Image.Image, name: str) -> Image.Image:
    """A picture of 16-bit or floating-point values, or of a rare mode, as a common one of 8 bits."""
    if image.mode in _DETOURS:
        return image.convert(_DETOURS[image.mode])
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    top = 1.0 if image.mode == "F" else 65535.0
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > top:
        raise DataError(
            f"{name} of mode {image.mode!r} has values from {values.min():g} to {values.max():g}",
            hint=f"save it with values from 0 to {top:g}, or with 8 bits per channel",
        )
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def _opaque(image: Image.Image) -> Image.Image:
    """A picture with transparent parts on white; others as they are."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _neighbours(name: str) -> list[str]:
    """Files beside a missing one with a name like it."""
    folder = Path(name).parent
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [str(folder / near) for near in nearest(Path(name).name, names)]
