"""Figure 2: two features in front of the last layer, under softmax and under L2-softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.errors import InputError
from ccn_deploy.studies.figures.style import (
    COLOURS,
    GRID,
    INK,
    MARKERS,
    MUTED,
    cycle,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LastFeatures:
    """A panel of the figure: what the last layer's weights are multiplied by.

    Attributes:
        title: The network.
        class_names: K names.
        labels: int64 [N], the true classes.
        points: float64 [N, 2].
        centroids: float64 [K, 2], the mean of each class; NaN for a class without images.
        spread: Mean distance of a point from its class's centroid, over the mean distance of two
            centroids: how compact classes are. No unit, and independent of the features' scale.
        radius: Of the circle that bounds the points; None where nothing bounds them.
    """

    title: str
    class_names: tuple[str, ...]
    labels: NDArray[np.int64]
    points: Floats
    centroids: Floats
    spread: float
    radius: float | None


def last_features(
    title: str,
    features: NDArray[np.floating[Any]],
    labels: NDArray[np.int64],
    class_names: Sequence[str],
    *,
    alpha: float | None = None,
    delta: float = 0.01,
) -> LastFeatures:
    """Compute a panel.

    Args:
        title: The network.
        features: [N, 2], what the layer in front of the last one returns.
        labels: int64 [N].
        class_names: K names.
        alpha: Of a compact last layer (L2-softmax): the points are then
            ``alpha * x / (||x||_2 + delta)``, equation 6. None for an ordinary one: x itself.
        delta: Of such a layer.

    Raises:
        InputError: Other than two features an image, not finite, or fewer than two classes.
    """
    if features.ndim != 2 or features.shape[1] != 2 or len(features) != len(labels):
        raise InputError(
            f"{title}: features of shape {list(features.shape)} for {len(labels)} labels.",
            "Give two features an image; the architecture mnist-cnn-2d has them in its layer fc3.",
        )
    points = features.astype(np.float64)
    if not np.isfinite(points).all() or len(np.unique(labels)) < 2:
        raise InputError(
            f"{title}: features that are not finite, or of one class only.",
            "Give finite features of two classes or more.",
        )
    if alpha is not None:
        points = alpha * points / (np.linalg.norm(points, axis=1, keepdims=True) + delta)
    centroids = np.full((len(class_names), 2), np.nan)
    for label in np.unique(labels):
        centroids[label] = points[labels == label].mean(axis=0)
    return LastFeatures(
        title=title,
        class_names=tuple(class_names),
        labels=labels,
        points=points,
        centroids=centroids,
        spread=_spread(points, labels, centroids),
        radius=None if alpha is None else abs(alpha),
    )


def _spread(points: Floats, labels: NDArray[np.int64], centroids: Floats) -> float:
    within = np.linalg.norm(points - centroids[labels], axis=1).mean()
    there = centroids[np.isfinite(centroids[:, 0])]
    first, second = np.triu_indices(len(there), k=1)
    between = np.linalg.norm(there[first] - there[second], axis=1).mean()
    return float(within / between)


def draw_last_features(panels: Sequence[LastFeatures]) -> Figure:
    """Draw a scatter by class for each network, with a ray from the origin to each centroid."""
    with styled():
        figure = new_figure(3.9 * len(panels), 4.1)
        for number, panel in enumerate(panels):
            _panel(figure.add_subplot(1, len(panels), number + 1), panel, "abcdefgh"[number % 8])
    return figure


def _panel(axes: Any, panel: LastFeatures, letter: str) -> None:
    axes.axhline(0.0, color=GRID, linewidth=0.8, zorder=0)
    axes.axvline(0.0, color=GRID, linewidth=0.8, zorder=0)
    for label, (name, centroid) in enumerate(zip(panel.class_names, panel.centroids, strict=True)):
        if not np.isfinite(centroid[0]):
            continue
        points = panel.points[panel.labels == label]
        axes.plot(*np.stack([np.zeros(2), centroid]).T, color=MUTED, linewidth=0.6, zorder=1)
        axes.scatter(
            *points.T,
            s=12,
            marker=cycle(MARKERS, label),
            color=cycle(COLOURS, label),
            linewidths=0.6,
            alpha=0.7,
            zorder=2,
        )
        axes.text(*_place(panel, centroid), name, fontweight="bold", **_LABEL)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_box_aspect(1)
    axes.set_xlabel("feature 1")
    axes.set_ylabel("feature 2")
    axes.set_title(f"({letter}) {panel.title}: spread {panel.spread:.2f}")
    if panel.radius is not None:
        circle = np.linspace(0.0, 2 * np.pi, 181)
        axes.plot(
            panel.radius * np.cos(circle), panel.radius * np.sin(circle),
            color=INK, linewidth=0.8, linestyle="--", zorder=1,
        )  # fmt: skip
        axes.set_xlim(-1.35 * panel.radius, 1.35 * panel.radius)
        axes.set_ylim(-1.35 * panel.radius, 1.35 * panel.radius)


_LABEL: dict[str, Any] = {
    "ha": "center",
    "va": "center",
    "zorder": 3,
    "bbox": {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": INK, "alpha": 0.85},
}


def _place(panel: LastFeatures, centroid: Floats) -> Floats:
    """Return where a class's name stands: at its centroid, or behind it outside the circle."""
    if panel.radius is None:
        return centroid
    return 1.13 * panel.radius * centroid / np.linalg.norm(centroid)
