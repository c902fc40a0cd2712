"""One image file to pixels of the network's size, in bounded memory.

Needs Pillow, which is imported when the first image is read.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.data.arrays import as_float
from ccn_deploy.data.dataset import Images
from ccn_deploy.data.files import printable, read_regular
from ccn_deploy.data.options import DataOptions, parse_resize
from ccn_deploy.errors import InputError, UnreadableImageError, one_line

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 1 << 26
"""Pixels of one image, before it is decoded: 8192x8192, 200 MB as RGB."""

MAX_BYTES = 1 << 28
"""Bytes of one image file."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names. Others, such as EPS, which starts a program, are not opened."""

SUFFIXES = frozenset(
    {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg"}
    | {".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)

SIXTEEN_BIT = ("PNG", "PPM")
"""Formats whose mode "I" has 16 bits, stored in 32."""


@dataclass(frozen=True)
class Geometry:
    """How an image becomes one of a fixed shape.

    Attributes:
        shape: (channels, height, width); 1 or 3 channels.
        mode: ``"shortest"``, ``"stretch"`` or ``"none"``; see
            :class:`ccn_deploy.data.options.DataOptions`.
        shorter: Pixels of the shorter side after resizing; None for as few as cover the shape.
        crop: Whether the middle is kept.
        interpolation: A name in :data:`ccn_deploy.data.options.INTERPOLATIONS`.
    """

    shape: tuple[int, int, int]
    mode: str = "shortest"
    shorter: int | None = None
    crop: bool = True
    interpolation: str = "bilinear"

    @classmethod
    def of(cls, options: DataOptions, shape: tuple[int, int, int]) -> Geometry:
        """Return what options mean for a shape; ``options.size`` goes before the shape's.

        Raises:
            InputError: Neither 1 nor 3 channels.
        """
        channels, *size = shape
        if channels not in (1, 3):
            raise InputError(
                f"The network takes {channels} channels; image files give 1 or 3.",
                "Give the images as an .npz file.",
            )
        height, width = options.size or size
        mode, shorter = parse_resize(options.resize or "shortest")
        return cls(
            (channels, height, width),
            mode,
            shorter,
            (options.crop or "center") == "center",
            options.interpolation or "bilinear",
        )

    def described(self) -> dict[str, str]:
        """Return it in the words of the options, for what is written down."""
        return {
            "shape": "x".join(map(str, self.shape)),
            "resize": f"{self.mode}:{self.shorter}" if self.shorter else self.mode,
            "crop": "center" if self.crop else "none",
            "interpolation": self.interpolation,
        }

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) after resizing and before cropping."""
        _, high, wide = self.shape
        if self.mode == "none":
            return width, height
        if self.mode == "stretch":
            return wide, high
        if self.shorter:
            scale = self.shorter / min(width, height)
            return max(self.shorter, round(width * scale)), max(self.shorter, round(height * scale))
        scale = max(wide / width, high / height)
        return max(wide, round(width * scale)), max(high, round(height * scale))


def read_image(path: str, geometry: Geometry) -> Images:
    """Return one image: float32 [C, H, W] in [0, 1].

    Of an animation or a document of several pages, the first. A rotation in its EXIF data is
    applied. Grey of 16 bits is divided by 65535. An alpha channel is dropped if all of it is
    opaque.

    Raises:
        UnreadableImageError: The file is damaged, no image, or too large.
        InputError: It cannot be opened, is no regular file, is one whose white is not known (32-bit
            integers, or floats outside [0, 1]), has transparent pixels, or has not the size that
            is needed; or the memory is full.
    """
    image = _open(path, geometry.shape[0])
    pixels = np.asarray(_fit(image, geometry, path))
    if pixels.dtype == np.float32:
        pixels = pixels.clip(0.0, 1.0)  # lanczos and bicubic overshoot at edges
    pixels = pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.broadcast_to(as_float(pixels), geometry.shape)


def shape_of(path: str) -> tuple[int, int, int]:
    """Return the (channels, height, width) of an image file as it is.

    Raises:
        InputError: As for :func:`read_image`.
    """
    from PIL import Image

    data = read_regular(path, MAX_BYTES)
    with _explained(path), Image.open(io.BytesIO(data), formats=_formats()) as image:
        width, height = image.size
        if image.getexif().get(_ORIENTATION, 1) >= 5:  # those that swap the sides
            width, height = height, width
        grey = image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I")
        return (1 if grey else 3), height, width


def _open(path: str, channels: int) -> Image.Image:
    """Return the decoded image, upright, in mode L, RGB, or F with values in [0, 1]."""
    from PIL import Image, ImageOps

    data = read_regular(path, MAX_BYTES)
    with _explained(path), Image.open(io.BytesIO(data), formats=_formats()) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:  # known from the header
            raise UnreadableImageError(
                f"{printable(path)} has {width}x{height} pixels; {MAX_PIXELS:,} are the most.",
                "Make the image smaller, or remove it.",
            )
        kind = image.format or ""
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I") or upright.mode == "F":
            return _scaled(upright, kind, path)
        return _coloured(upright, channels, path)


def _scaled(image: Image.Image, kind: str, path: str) -> Image.Image:
    """Return grey of more than 8 bits in mode F with values in [0, 1]."""
    from PIL import Image

    values = np.asarray(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and kind in SIXTEEN_BIT):
        return Image.fromarray(np.divide(values, np.float32(65535), dtype=np.float32))
    if image.mode == "I":
        raise InputError(
            f"{printable(path)} has 32-bit integers, of which none is known to be white.",
            "Convert it to 8 or 16 bits.",
        )
    if not ((values >= 0) & (values <= 1)).all():  # false for NaN too
        raise InputError(
            f"{printable(path)} has floats outside [0, 1], of which none is known to be white.",
            "Scale them to [0, 1], or convert the image to 8 or 16 bits.",
        )
    return image


def _coloured(image: Image.Image, channels: int, path: str) -> Image.Image:
    """Return an image of 8 bits as L for one channel and as RGB for three."""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        if not (np.asarray(image.getchannel("A")) == 255).all():
            raise InputError(
                f"{printable(path)} has transparent pixels; what shows through them is not known.",
                "Flatten it onto the background that the network is used with.",
            )
    if image.mode not in ("1", "L"):
        image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def _fit(image: Image.Image, geometry: Geometry, path: str) -> Image.Image:
    """Resize, then crop; in one step where what is between would be too large."""
    from PIL import Image

    (width, height), (_, high, wide) = image.size, geometry.shape
    across, down = geometry.resized(width, height)
    if (across, down) != (wide, high) and (not geometry.crop or across < wide or down < high):
        raise InputError(
            f"{printable(path)} has {width}x{height} pixels, {across}x{down} after resizing; the "
            f"network takes {wide}x{high}.",
            "Use --resize stretch, or --resize shortest with --crop center.",
        )
    left, top = (across - wide) // 2, (down - high) // 2
    if (across, down) == image.size:
        return image.crop((left, top, left + wide, top + high))
    method = Image.Resampling[geometry.interpolation.upper()]
    with _explained(path):
        if across * down <= MAX_PIXELS:
            return image.resize((across, down), method).crop((left, top, left + wide, top + high))
        # The same pixels, but for rounding of the box's corners to float32: only for 3 x 60000.
        x, y = width / across, height / down
        box = (left * x, top * y, min((left + wide) * x, width), min((top + high) * y, height))
        return image.resize((wide, high), method, box)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turn whatever Pillow raises into an error that names the file."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # The limit is MAX_PIXELS here, and what is above it gets an error of its own.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    except InputError:
        raise
    except MemoryError as error:  # the machine is to blame, not the file
        raise InputError(
            f"{printable(path)} cannot be decoded: the memory is full.",
            "Free memory, or use smaller batches.",
        ) from error
    except Image.DecompressionBombError as error:
        raise UnreadableImageError(
            f"{printable(path)} has far more than {MAX_PIXELS:,} pixels, which are the most.",
            "Make the image smaller, or remove it.",
        ) from error
    except Exception as error:  # its parsers raise whatever a damaged file makes of them
        why = one_line(error)
        if "cannot identify image file" in why:
            why = "it is damaged, or no image of a kind that is read"
        raise UnreadableImageError(
            f"{printable(path)} cannot be read as an image: {why}.",
            "Get the file again, or remove it.",
        ) from error


@cache
def _formats() -> tuple[str, ...]:
    """Return those of :data:`FORMATS` that this Pillow has."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def stack(paths: list[str], geometry: Geometry, indices: NDArray[np.int64]) -> Images:
    """Return the images at ``indices``: float32 [n, C, H, W] in [0, 1]."""
    batch = np.empty((len(indices), *geometry.shape), dtype=np.float32)
    for row, index in enumerate(indices):
        batch[row] = read_image(paths[index], geometry)
    return batch


_ORIENTATION = 0x0112
