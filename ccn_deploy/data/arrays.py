"""Data sets from arrays in memory: what every small set is made of, and users' own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.data.dataset import Dataset, Images, Split, check_labels
from ccn_deploy.errors import InputError

ROUNDING = 1e-5
"""How far outside [0, 1] pixels are clipped: interpolation in float32 leaves 1 + 2.4e-7."""

PIECE = 4096
"""Images that are looked at together: a set may nearly fill the memory."""


def dataset_from_arrays(
    name: str,
    images: NDArray[Any],
    labels: NDArray[Any],
    class_names: Sequence[str],
    *,
    split: Split = "test",
) -> Dataset:
    """Build a data set from images and labels in memory.

    8-bit pixels stay 8-bit and are divided by 255 as they are asked for. The arrays are kept, not
    copied: do not change them afterwards.

    Floats outside [0, 1] by at most 1e-5, as interpolation leaves them, are clipped, and the data
    set's ``notes`` say so.

    Args:
        name: What results call it.
        images: [N, C, H, W], uint8, or float16, float32 or float64 in [0, 1].
        labels: Integers [N].
        class_names: One per class, in order of label.
        split: Which part of a larger set this is.

    Raises:
        InputError: No image, a wrong shape or dtype, a NaN, a pixel outside [0, 1], a label that
            is no class, or not as many labels as images.
    """
    if images.ndim != 4 or not len(images):
        raise InputError(
            f"{name}: images must be [N, C, H, W] with N at least 1, got {list(images.shape)}.",
            "Put channels first; grey images have one: images[:, None]",
        )
    images, notes = in_unit_interval(images, name)
    labels = check_labels(labels, len(class_names), name)
    if len(images) != len(labels):
        raise InputError(
            f"{name}: {len(images)} images and {len(labels)} labels do not belong together.",
            "Give one label per image, in the same order.",
        )
    channels, height, width = images.shape[1:]
    return Dataset(
        name=name,
        split=split,
        class_names=tuple(class_names),
        input_shape=(channels, height, width),
        labels=labels,
        fetch=partial(_take, images),  # not a lambda: it is sent to other processes
        digest=_digest(images, labels),
        notes=notes,
    )


def as_float(images: NDArray[Any]) -> Images:
    """Return 8-bit pixels as float32 in [0, 1], correctly rounded; floats as they are."""
    if images.dtype == np.uint8:
        scaled: Images = np.divide(images, np.float32(255), dtype=np.float32)
        return scaled
    return images.astype(np.float32, copy=False)


def _take(images: NDArray[Any], indices: NDArray[np.int64]) -> Images:
    return as_float(images[indices])


def in_unit_interval(images: NDArray[Any], name: str) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Return pixels as uint8, or as float32 in [0, 1], and what was done to them.

    Args:
        images: [N, ...]; uint8 is returned as it is, float16 and float64 become float32, and
            what lies outside [0, 1] by at most :data:`ROUNDING` is clipped.
        name: What errors call them.

    Raises:
        InputError: Another dtype, a NaN, or a pixel further outside.
    """
    check_pixel_type(images.dtype, name)
    if images.dtype == np.uint8:
        return images, ()
    low, high = float(images.min()), float(images.max())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # true for NaN
        raise _outside(images, name, low, high)
    images = images.astype(np.float32, copy=False)
    if low >= 0 and high <= 1:
        return images, ()
    excess = max(-low, high - 1)
    clipped = f"{name}: pixels up to {excess:.1e} outside [0, 1] were clipped."
    return images.clip(0.0, 1.0), (clipped,)


def check_pixel_type(dtype: np.dtype[Any], name: str) -> None:
    """Refuse pixels that are neither uint8 nor floats of at most 64 bits.

    Raises:
        InputError: They are.
    """
    if dtype == np.uint8 or (dtype.kind == "f" and dtype.itemsize <= 8):
        return
    hint = "Convert them: images.astype('float32')"
    if dtype.kind in "iu":
        hint = "If all values are from 0 to 255, convert them: images.astype('uint8')"
    raise InputError(f"{name}: images must be uint8, or floats from 0 to 1; got {dtype}.", hint)


def _outside(images: NDArray[Any], name: str, low: float, high: float) -> InputError:
    """Say which image is outside [0, 1], and what its values look like."""
    where = next(
        at
        for at, image in enumerate(images)
        if not (image.min() >= -ROUNDING and image.max() <= 1 + ROUNDING)
    )
    if not np.isfinite([low, high]).all():
        what, hint = "NaN or infinite", "Find out where they come from before you use the images."
    else:
        what = f"outside [0, 1] (all images: {low:.6g} to {high:.6g})"
        if low < -ROUNDING:
            hint = "They look normalised: undo it with images * std + mean."
        elif high > 255:
            hint = "They look 16-bit: divide them by 65535."
        elif high > 2:
            hint = "They look 8-bit: divide them by 255, or give them as uint8."
        else:
            hint = "If they only overshoot, clip them: images.clip(0, 1)"
    return InputError(f"{name}: image {where} has pixels that are {what}.", hint)


def _digest(images: NDArray[Any], labels: NDArray[np.int64]) -> str:
    """Return the SHA-256 of shape and dtype, pixels, and labels, byte order fixed."""
    digest = hashlib.sha256(f"{images.dtype.name} {images.shape}\n".encode())
    little_endian = images.dtype.newbyteorder("<")
    for start in range(0, len(images), PIECE):
        piece = np.ascontiguousarray(images[start : start + PIECE], dtype=little_endian)
        digest.update(piece.data)
    digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()
