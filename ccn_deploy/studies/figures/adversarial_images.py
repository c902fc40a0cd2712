"""Figure 1: images that two networks get right, and what it takes to fool each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.data.dataset import Dataset
from ccn_deploy.errors import InputError, UsageError
from ccn_deploy.robustness import Evidence
from ccn_deploy.studies.figures.style import bare, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Integers = NDArray[np.int64]
Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Attacked:
    """What an attack made of N images against one network.

    Attributes:
        clean: int64 [N], the network's classes for the images as they are.
        images: float32 [N, C, H, W], what the attack returned; NaN where nothing.
        predicted: int64 [N], the network's classes for these.
    """

    clean: Integers
    images: Pixels
    predicted: Integers


@dataclass(frozen=True)
class AdversarialImages:
    """Columns of the figure: m images, each under attacks on R networks.

    Attributes:
        networks: R titles.
        class_names: One a class.
        labels: int64 [m], the true classes, which every network gives the clean images.
        clean: float32 [m, C, H, W] in [0, 1].
        attacked: float32 [R, m, C, H, W].
        predicted: int64 [R, m]; none is the label.
        distances: float64 [R, m], the perturbation's L2 norm over the image's (equation 8).
    """

    networks: tuple[str, ...]
    class_names: tuple[str, ...]
    labels: Integers
    clean: Pixels
    attacked: Pixels
    predicted: Integers
    distances: NDArray[np.float64]


def compare_attacked(
    images: Pixels,
    labels: Integers,
    attacked: Mapping[str, Attacked],
    class_names: Sequence[str],
    count: int = 5,
) -> AdversarialImages:
    """Choose images that every network gets right and the attack on each of them fools.

    They are the first of every class, classes in order of their first image, and then the next of
    every class. Nobody's eye chooses.

    Args:
        images: float32 [N, C, H, W] in [0, 1].
        labels: int64 [N].
        attacked: By title of the network, in the order of the rows.
        class_names: One a class.
        count: Number of columns.

    Raises:
        InputError: Arrays of different lengths.
        UsageError: Fewer such images than columns.
    """
    for title, of in attacked.items():
        if not len(images) == len(labels) == len(of.clean) == len(of.images) == len(of.predicted):
            raise InputError(
                f"The attack on {title} and the images differ in number.",
                "Give one row an image in every array.",
            )
    fooled = [
        (of.clean == labels)
        & (of.predicted != labels)
        & np.isfinite(of.images).reshape(len(labels), -1).all(axis=1)
        for of in attacked.values()
    ]
    rows = _choose(labels, np.all(fooled, axis=0), count)
    return _columns(
        images[rows],
        labels[rows],
        {title: (of.images[rows], of.predicted[rows]) for title, of in attacked.items()},
        class_names,
    )


def compare_evidence(
    evidence: Mapping[str, Evidence], dataset: Dataset, count: int = 5
) -> AdversarialImages:
    """Do as :func:`compare_attacked` does with kept evidence of one attack on several networks.

    The figure's attack is DeepFool. Of the kept images only those that are shown are read.

    Args:
        evidence: By title of the network, over the same images of the data set.
        dataset: Where the clean images come from.
        count: Number of columns.

    Raises:
        UsageError: Evidence over different images, or fewer fooling images than columns.
        IntegrityError: The images are not those that were kept.
    """
    first, *others = evidence.values()
    if any(not np.array_equal(first.index, other.index) for other in others):
        raise UsageError(
            f"The evidence of {', '.join(evidence)} is over different images.",
            "Attack every network with the same data, --samples and --seed.",
        )
    fooled = np.all([(e.status == "fooled") & np.isfinite(e.l2) for e in evidence.values()], axis=0)
    rows = _choose(first.label, fooled, count)
    return _columns(
        dataset.images(first.index[rows].tolist()),
        first.label[rows],
        {
            title: (e.adversarial(rows), e.adversarial_runtime[rows])
            for title, e in evidence.items()
        },
        dataset.class_names,
    )


def _choose(labels: Integers, fooled: NDArray[np.bool_], count: int) -> Integers:
    rows = np.flatnonzero(fooled)
    if len(rows) < count:
        raise UsageError(
            f"{len(rows)} images are classified correctly by every network and fool each of them; "
            f"the figure shows {count}.",
            "Attack more images, or ask for fewer columns.",
        )
    rank = np.zeros(len(rows), dtype=np.int64)  # how many of its class are in front of a row
    for label in np.unique(labels[rows]):
        same = labels[rows] == label
        rank[same] = np.arange(same.sum())
    return rows[np.argsort(rank, kind="stable")][:count]


def _columns(
    clean: Pixels,
    labels: Integers,
    attacked: Mapping[str, tuple[Pixels, Integers]],
    class_names: Sequence[str],
) -> AdversarialImages:
    images = np.stack([images for images, _ in attacked.values()])
    away = (images.astype(np.float64) - clean).reshape(len(images), len(clean), -1)
    size = np.linalg.norm(clean.astype(np.float64).reshape(len(clean), -1), axis=1)
    return AdversarialImages(
        networks=tuple(attacked),
        class_names=tuple(class_names),
        labels=labels,
        clean=clean,
        attacked=images,
        predicted=np.stack([predicted for _, predicted in attacked.values()]),
        distances=np.linalg.norm(away, axis=2) / size,
    )


def draw_adversarial_images(data: AdversarialImages) -> Figure:
    """Draw a row of clean images, and one for each network with its class and the distance."""
    rows, columns = len(data.networks) + 1, len(data.clean)
    with styled():
        figure = new_figure(1.15 * columns + 0.6, 1.45 * rows)
        axes = figure.subplots(rows, columns, squeeze=False)
        for column in range(columns):
            name = data.class_names[data.labels[column]]
            _picture(axes[0, column], data.clean[column], name)
            for row in range(1, rows):
                name = data.class_names[data.predicted[row - 1, column]]
                distance = data.distances[row - 1, column]
                note = f"{name}\n$d$ = {distance:.2f}"
                _picture(axes[row, column], data.attacked[row - 1, column], note)
        titles = ("clean", *(f"adversarial\nfor {network}" for network in data.networks))
        for row, title in enumerate(titles):
            axes[row, 0].set_ylabel(title, fontsize=9)
    return figure


def _picture(axes: Any, image: Pixels, note: str) -> None:
    """Show an image [C, H, W]: one channel as grey, three as red, green and blue."""
    pixels = np.clip(image.transpose(1, 2, 0), 0.0, 1.0)
    shown = pixels if pixels.shape[2] == 3 else pixels[:, :, 0]
    axes.imshow(shown, cmap="gray", vmin=0.0, vmax=1.0, interpolation="none")
    bare(axes)
    axes.set_xlabel(note, labelpad=3)
