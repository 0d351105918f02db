"""Photographs of three kinds of things, drawn by the tests that read them."""

import csv
import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

CLASSES = ("coin", "leaf", "screw")
PER_CLASS = 40
Draw = ImageDraw.ImageDraw
Point = tuple[float, float]


def write_photographs(folder: Path, per_class: int = PER_CLASS, seed: int = 0) -> Path:
    """A folder per class of JPEGs of several sizes."""
    chance = random.Random(seed)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            photograph(name, chance).save(folder / name / f"{name}_{i:02}.jpg", quality=90)
    return folder


def write_table(folder: Path, splits: bool = False) -> Path:
    """A CSV file beside the photographs of a folder; every fifth one is a test image where it says the splits."""
    file = folder / "labels.csv"
    with file.open("w", newline="") as out:
        table = csv.writer(out)
        table.writerow(["path", "label", *(["split"] if splits else [])])
        for i, path in enumerate(sorted(folder.glob("*/*.jpg"))):
            split = ["train" if i % 5 else "val"] if splits else []
            table.writerow([path.relative_to(folder), path.parent.name, *split])
    return file


def photograph(name: str, chance: random.Random) -> Image.Image:
    """A thing on a table under some light."""
    width, height = chance.choice([(120, 90), (90, 120), (108, 108)])
    grain = np.random.default_rng(chance.getrandbits(32)).normal(0, 9, (height, width, 1))
    light = np.linspace(chance.uniform(0.75, 1), chance.uniform(0.75, 1), width)[None, :, None]
    table = np.array([chance.uniform(110, 200) for _ in range(3)])
    image = Image.fromarray((table * light + grain).clip(0, 255).astype(np.uint8))
    centre = (width * chance.uniform(0.4, 0.6), height * chance.uniform(0.4, 0.6))
    THINGS[name](ImageDraw.Draw(image), centre, min(width, height) * chance.uniform(0.28, 0.4), chance)
    return image.filter(ImageFilter.GaussianBlur(chance.uniform(0.3, 0.9)))


def coin(draw: Draw, centre: Point, size: float, chance: random.Random) -> None:
    x, y = centre
    metal = chance.choice([(190, 150, 70), (175, 175, 180), (170, 100, 60)])
    for share, shade in ((1.0, 0.7), (0.88, 1.0), (0.45, 0.8), (0.36, 1.0)):
        r = size * share
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(int(shade * c) for c in metal))


def leaf(draw: Draw, centre: Point, size: float, chance: random.Random) -> None:
    angle, green = chance.uniform(0, math.tau), (chance.randint(30, 90), chance.randint(90, 150), 40)
    rim = [
        (size * math.cos(t), 0.42 * size * math.sin(t) * abs(math.sin(t))) for t in np.linspace(0, math.tau, 40)
    ]
    draw.polygon([turned(point, centre, angle) for point in rim], fill=green)
    stalk = [turned((end * size, 0), centre, angle) for end in (-1.25, 0.9)]
    draw.line(stalk, fill=(60, 70, 30), width=2)


def screw(draw: Draw, centre: Point, size: float, chance: random.Random) -> None:
    angle, grey = chance.uniform(0, math.tau), chance.randint(60, 110)
    draw.line([turned((end * size, 0), centre, angle) for end in (-1, 1)], fill=(grey, grey, grey), width=8)
    for i in range(8):
        at = -0.9 + 0.2 * i
        thread = [turned((at * size, -6), centre, angle), turned(((at + 0.1) * size, 6), centre, angle)]
        draw.line(thread, fill=(210, 210, 215), width=2)
    head = [turned((0.9 * size, side), centre, angle) for side in (-11, 11)]
    draw.line(head, fill=(grey, grey, grey + 10), width=7)


def turned(point: Point, centre: Point, angle: float) -> Point:
    x, y = point
    return (
        centre[0] + x * math.cos(angle) - y * math.sin(angle),
        centre[1] + x * math.sin(angle) + y * math.cos(angle),
    )


THINGS: dict[str, Callable[[Draw, Point, float, random.Random], None]] = {
    "coin": coin,
    "leaf": leaf,
    "screw": screw,
}
