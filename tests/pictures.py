"""Pictures whose labels are known because they are drawn here."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

TEXT = (
    "the of and to in is was for that on with as by at from his were are which this also be has "
    "had its not first their one after who but two new been other when all there during into "
    "school more time years city world most united state over made between"
)


def pages(count: int, size: int = 224) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return pages of text in each of four directions, float32 [4 count, 3, size, size].

    Returns:
        Images, and labels: 0 upright, then turned clockwise by 90, 180 and 270 degrees.
    """
    rng = np.random.default_rng(0)
    turned = []
    for _ in range(count):
        page = _written(rng, size, size, pixels=int(rng.integers(11, 20)))
        turned += [np.rot90(page, -quarters) for quarters in range(4)]
    return _in_colour(turned), np.tile(np.arange(4), count)


def strips(
    count: int, height: int = 48, width: int = 192
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return lines of text, upright (label 0) and upside down (1)."""
    rng = np.random.default_rng(1)
    drawn = []
    for _ in range(count):
        line = _written(rng, height, width, pixels=34)
        drawn += [line, line[::-1, ::-1]]
    return _in_colour(drawn), np.tile(np.arange(2), count)


def _written(rng: np.random.Generator, height: int, width: int, pixels: int) -> NDArray[np.float32]:
    """Return dark text on a light ground, [height, width] in [0, 1]."""
    picture = Image.new("L", (width, height), int(rng.integers(225, 256)))
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(pixels)
    for top in range(2, max(3, height - pixels), int(1.4 * pixels)):
        line = ""
        while draw.textlength(line, font) < width - 60:
            line += f"{rng.choice(TEXT.split())} "
        if rng.random() < 0.15:
            line = line[: len(line) // 2]
        draw.text((6, top), line.capitalize(), fill=int(rng.integers(0, 80)), font=font)
    return np.asarray(picture, np.float32) / 255


def _in_colour(grey: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.repeat(np.stack(grey)[:, None], 3, axis=1)
