import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detachnet
from detachnet.data.batches import Batches
from detachnet.data.datasets import describe_data, load_data
from detachnet.data.images import find_images, read_image, to_tensor
from detachnet.facts import DataInfo

COLOUR = DataInfo(name="toy", classes=("a", "b"), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
PLAIN = DataInfo(name="toy", classes=("a", "b"), mean=(0.0,) * 3, std=(1.0,) * 3)
GREY = DataInfo(name="toy", classes=("a", "b"), mean=(0.0,), std=(1.0,))
RED = (200, 40, 10)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_a_test_image_becomes_what_the_family_was_evaluated_on() -> None:
    splits = load_data("cifar10-mini")
    info = describe_data("cifar10-mini", splits)
    batch, _ = next(Batches(splits[1], info, 5).epoch())
    for i in range(5):
        image = Image.fromarray(splits[1].images[i].permute(1, 2, 0).numpy())
        assert torch.equal(to_tensor(read_image(io.BytesIO(encoded(image))), info, (3, 32, 32)), batch[i])


def test_each_channel_is_normalized_by_its_own_constants() -> None:
    tensor = to_tensor(Image.new("RGB", (4, 4), RED), COLOUR, (3, 4, 4))
    assert tensor.dtype == torch.float32
    expected = [(200 / 255 - 0.5) / 0.5, (40 / 255 - 0.25) / 0.25, 10 / 255]
    torch.testing.assert_close(tensor[:, 2, 1], torch.tensor(expected))


MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", [PLAIN, GREY])
def test_white_is_white_in_every_mode(mode: str, info: DataInfo) -> None:
    steps = ["RGBA", mode] if mode in ("RGBa",) else ["LA", mode] if mode in ("La",) else [mode]
    image = Image.new("RGB", (5, 4), "white")
    if mode == "LAB":
        image = Image.new("LAB", (5, 4), (255, 128, 128))
        steps = []
    for step in steps:
        image = image.convert(step)
    tensor = to_tensor(image, info, (len(info.mean), 4, 5))
    torch.testing.assert_close(tensor, torch.ones(len(info.mean), 4, 5), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("image", "value"),
    [
        (Image.fromarray(np.full((3, 3), 51 * 257, np.uint16)), 0.2),
        (Image.fromarray(np.full((3, 3), 51 * 257, np.int32)), 0.2),
        (Image.fromarray(np.full((3, 3), 0.2, np.float32)), 0.2),
        (Image.fromarray(np.full((3, 3), 51, np.uint8)), 0.2),
    ],
)
def test_deep_images_keep_their_brightness(image: Image.Image, value: float) -> None:
    torch.testing.assert_close(to_tensor(image, GREY, (1, 3, 3)), torch.full((1, 3, 3), value))
    torch.testing.assert_close(to_tensor(image, PLAIN, (3, 3, 3)), torch.full((3, 3, 3), value))


def test_a_16_bit_png_file_keeps_its_brightness() -> None:
    file = io.BytesIO(encoded(Image.fromarray(np.full((3, 3), 51 * 257, np.uint16))))
    torch.testing.assert_close(to_tensor(read_image(file), GREY, (1, 3, 3)), torch.full((1, 3, 3), 0.2))


@pytest.mark.parametrize("values", [np.full((2, 2), 70000, np.int32), np.full((2, 2), 2, np.float32)])
def test_values_without_a_known_range_are_refused(values: np.ndarray) -> None:
    with pytest.raises(detachnet.DataError, match=r"has values from .* to .*\n  try      save it with values"):
        to_tensor(Image.fromarray(values), GREY, (1, 2, 2))


def test_transparent_parts_are_white() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    for kind in (image, image.convert("LA"), image.convert("PA"), image.quantize(2)):
        tensor = to_tensor(kind, PLAIN, (3, 1, 2))
        torch.testing.assert_close(tensor[:, 0], torch.tensor([[1.0, 0.0]] * 3))


@pytest.mark.parametrize(("size", "target"), [((90, 30), (10, 10)), ((30, 90), (10, 10)), ((60, 60), (10, 20))])
def test_the_middle_is_kept(size: tuple[int, int], target: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "black")
    width, height = size
    if size == (60, 60):
        image.paste("white", (0, 15, 60, 45))
    else:
        image.paste("white", (width // 2 - 15, height // 2 - 15, width // 2 + 15, height // 2 + 15))
    tensor = to_tensor(image, PLAIN, (3, *target))
    assert tensor.min() > 0.9  # the filter reaches over the edge
    assert tensor[:, 2:-2, 2:-2].min() == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (7, 5), (33, 32)])
def test_any_size(size: tuple[int, int]) -> None:
    tensor = to_tensor(Image.new("RGB", size, RED), PLAIN, (3, 32, 32))
    torch.testing.assert_close(tensor[:, 5, 7] * 255, torch.tensor(RED, dtype=torch.float32))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, tmp_path: Path) -> None:
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    back = {
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: np.rot90,
        7: lambda a: np.rot90(a.T, 2),
        8: lambda a: np.rot90(a, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(back.get(orientation, np.array)(upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    stored.save(path, exif=exif)
    assert np.array_equal(np.array(read_image(path)), upright)
    assert np.array_equal(np.array(read_image(Image.open(path))), upright)


def test_the_picture_given_stays_as_it_is() -> None:
    image = Image.new("RGBA", (6, 4), (1, 2, 3, 4))
    before = image.tobytes()
    to_tensor(read_image(image), PLAIN, (3, 2, 2))
    assert (image.mode, image.size, image.tobytes()) == ("RGBA", (6, 4), before)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_named(tmp_path: Path, kind: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    content = encoded(noise, kind)
    path = tmp_path / "half.img"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(detachnet.DataError, match=r"half\.img (cannot be read: it is truncated|is not an image)"):
        read_image(path)


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("milk, eggs")
    with pytest.raises(
        detachnet.DataError, match=r"notes\.png is not an image\n  try +formats that are read: .*PNG"
    ):
        read_image(tmp_path / "notes.png")
    with pytest.raises(detachnet.DataError, match=r"there is no file .*note\.png\n  nearest +'.*notes\.png'"):
        read_image(tmp_path / "note.png")
    (tmp_path / "sub").mkdir()
    with pytest.raises(detachnet.DataError, match=r"sub cannot be read\n  what .*Is a directory"):
        read_image(tmp_path / "sub")
    with pytest.raises(detachnet.DataError, match="standard input is not an image"):
        read_image(io.BytesIO(b""), name="standard input")


def test_a_program_is_no_image() -> None:
    """Pillow hands PostScript to Ghostscript."""
    with pytest.raises(detachnet.DataError, match="the image is not an image"):
        read_image(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"))


@pytest.mark.parametrize("side", [10_000, 30_000])
def test_a_decompression_bomb(tmp_path: Path, side: int) -> None:
    small = encoded(Image.new("L", (1, 1)))
    header = struct.pack(">II", side, side)
    content = bytearray(small)
    content[16:24] = header
    content[29:33] = struct.pack(">I", __import__("zlib").crc32(content[12:29]))
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(detachnet.DataError, match=r"bomb\.png has too many pixels\n  what .*decompression bomb"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(("damage", "size"), [(b"MM\0*", (2, 3)), (b"??\0*", (3, 2))])
def test_a_picture_with_damaged_exif_is_taken_as_it_is_stored(damage: bytes, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.new("RGB", (3, 2)), "JPEG", exif=exif)
    assert content.count(b"MM\0*") == 1
    assert read_image(io.BytesIO(content.replace(b"MM\0*", damage))).size == size


@pytest.mark.parametrize(
    ("info", "input_size"), [(PLAIN, (2, 4, 4)), (PLAIN, (1, 4, 4)), (GREY, (3, 4, 4)), (PLAIN, (3, 2, 4, 4))]
)
def test_a_family_of_other_channels(info: DataInfo, input_size: tuple[int, ...]) -> None:
    with pytest.raises(detachnet.DataError, match=r"the family takes in .* images, which a picture cannot become"):
        to_tensor(Image.new("RGB", (4, 4)), info, input_size)


def test_folders_are_searched_by_name(tmp_path: Path) -> None:
    for name in ("b.PNG", "a/z.jpeg", "a/notes.txt", "c.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    found = list(find_images([tmp_path / "c.tif", tmp_path]))
    assert [str(p.relative_to(tmp_path)) for p in found] == ["c.tif", "a/z.jpeg", "b.PNG", "c.tif"]
    with pytest.raises(detachnet.DataError, match=r"no image in the folder .*folder\.png\n  try .*\.webp"):
        list(find_images([tmp_path / "folder.png"]))


def test_a_large_photograph_is_read_smaller(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("detachnet.data.images.LARGE", 1000)
    monkeypatch.setattr("detachnet.data.images._SIDE", 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    red = Image.new("RGB", (120, 90), "red")
    with caplog.at_level("INFO"):
        small = read_image(io.BytesIO(encoded(red, "JPEG", exif=exif)), "photo")
    assert small.size == (23, 30)
    assert small.getpixel((5, 5))[0] > 250  # type: ignore[index]
    assert "photo: read at 30×23 of 120×90 pixels" in caplog.text


@pytest.mark.slow
def test_a_photograph_of_108_million_pixels(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        photo = read_image(io.BytesIO(encoded(Image.new("RGB", (12000, 9000), "red"), "JPEG")), "photo.jpg")
    assert photo.size == (3000, 2250)
