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

    Args:
        name: What results call it.
        images: [N, C, H, W], uint8 or float32 in [0, 1].
        labels: Integers [N].
        class_names: One per class, in order of label.
        split: Which part of a larger set this is.

    Raises:
        InputError: A wrong shape or dtype, a NaN, a pixel outside [0, 1], a label that is no
            class, or not as many labels as images.
    """
    _check_images(name, images)
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
    )


def as_float(images: NDArray[Any]) -> Images:
    """Return 8-bit pixels as float32 in [0, 1], correctly rounded; floats as they are."""
    if images.dtype == np.uint8:
        scaled: Images = np.divide(images, np.float32(255), dtype=np.float32)
        return scaled
    return images.astype(np.float32, copy=False)


def _take(images: NDArray[Any], indices: NDArray[np.int64]) -> Images:
    return as_float(images[indices])


def _check_images(name: str, images: NDArray[Any]) -> None:
    if images.ndim != 4 or images.dtype not in (np.uint8, np.float32):
        raise InputError(
            f"{name}: images must be [N, C, H, W] of uint8 or float32, got {images.dtype} "
            f"{list(images.shape)}.",
            "Put channels first, and convert floats with images.astype('float32').",
        )
    if images.dtype == np.uint8:
        return
    inside = ((images >= 0.0) & (images <= 1.0)).all(axis=(1, 2, 3))  # false for NaN too
    if not inside.all():
        where = int(np.argmin(inside))
        kind = "outside [0, 1]" if np.isfinite(images[where]).all() else "NaN or infinite"
        raise InputError(
            f"{name}: image {where} has pixels that are {kind} ({int((~inside).sum())} of "
            f"{len(images)} images do).",
            "Divide 8-bit pixels by 255; the mean is subtracted inside the model.",
        )


def _digest(images: NDArray[Any], labels: NDArray[np.int64]) -> str:
    """Return the SHA-256 of shape and dtype, pixels, and labels, byte order fixed."""
    digest = hashlib.sha256(f"{images.dtype.name} {images.shape}\n".encode())
    little_endian = images.dtype.newbyteorder("<")
    for start in range(0, len(images), 4096):  # in pieces: a set may nearly fill the memory
        piece = np.ascontiguousarray(images[start : start + 4096], dtype=little_endian)
        digest.update(piece.data)
    digest.update(labels.astype("<i8").tobytes())
    return digest.hexdigest()
