"""What a data set is: labels at hand, images on request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.errors import InputError
from ccn_deploy.storage import sha256

Split = Literal["train", "test"]
Images = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """Labelled images of one split.

    Images are produced on request, so that a set larger than memory has the same type as one
    that fits: ask for a batch at a time.

    Attributes:
        name: The name it was loaded by, for example ``"mnist5k"``.
        split: ``"train"`` or ``"test"``.
        class_names: One per class, in order of label.
        input_shape: (channels, height, width).
        labels: int64 [N].
        fetch: Maps indices int64 [n] to float32 [n, C, H, W] in [0, 1].
        digest: SHA-256 that changes when any image or label does, or how images are made of files.
        described: How images are made of files and labels of classes, as words to write down;
            empty for data sets that have one way only.
        notes: What a user should know of the data, a sentence each: what was skipped or changed.
        whole: Whether the other split has the same images, since the data are not divided.
        numbered: Whether labels are bare numbers, ``class_names`` having been given by nobody.

    Raises:
        InputError: A label that is no class.
    """

    name: str
    split: Split
    class_names: tuple[str, ...]
    input_shape: tuple[int, int, int]
    labels: Labels
    fetch: Callable[[NDArray[np.int64]], Images]
    digest: str
    described: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    whole: bool = False
    numbered: bool = False

    def __post_init__(self) -> None:
        check_labels(self.labels, len(self.class_names), f"{self.name} ({self.split})")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def identity(self) -> dict[str, str]:
        """What evidence says of the data: name, split, digest, and ``described``."""
        named = {"name": self.name, "split": self.split, "digest": self.digest}
        return {**self.described, **named}

    def images(self, indices: Sequence[int] | NDArray[np.int64]) -> Images:
        """Return the images at ``indices``: float32 [n, C, H, W] in [0, 1]."""
        return self.fetch(np.asarray(indices, dtype=np.int64))

    def first(self, count: int) -> Dataset:
        """Return the first images in the order of :meth:`order`; the whole if there are no more."""
        if count >= len(self):
            return self
        chosen = self.order()[:count]
        return replace(
            self,
            labels=self.labels[chosen],
            fetch=partial(_fetch_chosen, self.fetch, chosen),
            digest=sha256(f"{self.digest} first {count}".encode()),
        )

    def order(self, seed: int = 0) -> NDArray[np.int64]:
        """Return a fixed permutation of all indices.

        Its first n entries are the sample that an evaluation of n images uses, so a larger
        evaluation contains every smaller one. It ranks the raw words of PCG64, whose stream
        NumPy keeps across versions, which it does not promise of ``Generator.permutation``.
        """
        words = np.random.PCG64(seed).random_raw(len(self))
        return np.argsort(words, kind="stable")


def _fetch_chosen(
    fetch: Callable[[NDArray[np.int64]], Images],
    chosen: NDArray[np.int64],
    indices: NDArray[np.int64],
) -> Images:
    return fetch(chosen[indices])


def check_labels(labels: NDArray[Any], classes: int, name: str = "labels") -> Labels:
    """Return ``labels`` as int64 [N] after checking that each is one of ``classes``.

    Args:
        labels: Integers [N].
        classes: How many classes there are; labels run from 0 to one less.
        name: What the error calls them.

    Raises:
        InputError: Not one row of integers, or a label outside ``0..classes - 1``.
    """
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == classes > 1:
        raise InputError(
            f"{name}: labels of shape {list(labels.shape)} look one-hot encoded.",
            "Give the index of the class, one per image: labels.argmax(axis=1)",
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(
            f"{name}: labels must be integers of shape [N], got {labels.dtype} "
            f"{list(labels.shape)}.",
            "Give the index of the class, one per image, as integers.",
        )
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(bad):
        raise InputError(
            f"{name}: label {labels[bad[0]]} at index {bad[0]} is outside 0..{classes - 1}.",
            "Check that the label file belongs to this data set and is not damaged.",
        )
    return labels.astype(np.int64)
