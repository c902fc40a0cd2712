"""Figure 5: how far the features of two classes of adversarial images lie apart, by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.errors import InputError
from ccn_deploy.extras import require
from ccn_deploy.studies.figures.style import COLOURS, bare, cycle, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERS = {"act1": "conv1", "act5": "fc1", "act6": "fc2"}
"""The figure's layers in ``mnist-cnn``, by the activation behind each: what the next layer sees."""

FOLDS = NEIGHBOURS = 5

_SHAPES = ({"marker": "o", "alpha": 0.7}, {"marker": "x", "alpha": 0.9})


@dataclass(frozen=True)
class Panel:
    """Features of one layer of one network.

    Attributes:
        network: Its title.
        layer: Its name.
        points: float64 [N, 2], the features' t-SNE embedding: for the eye alone.
        accuracy: Of 5 nearest neighbours in the features themselves, over 5 stratified folds; in
            [0, 1].
        silhouette: Mean silhouette of the images in the features themselves; in [-1, 1], 0 where
            the classes lie in each other.
    """

    network: str
    layer: str
    points: NDArray[np.float64]
    accuracy: float
    silhouette: float


@dataclass(frozen=True)
class Separability:
    """The figure: networks times layers.

    Attributes:
        panels: Layer by layer of the first network, then of the next.
        labels: int64 [N], 0 or 1, the true class of each image.
        class_names: Of the two.
    """

    panels: tuple[Panel, ...]
    labels: NDArray[np.int64]
    class_names: tuple[str, str]


def separability(
    features: Mapping[str, Mapping[str, NDArray[np.floating[Any]]]],
    labels: NDArray[np.int64],
    class_names: Sequence[str],
    *,
    seed: int = 0,
    perplexity: float = 30.0,
) -> Separability:
    """Embed features of images of two classes, and measure how separable the features are.

    The figure's images are those of FGSM at epsilon 0.3 against each network itself, of two
    classes of MNIST. Where evidence lacks one's image, its row is left out of all. The embedding
    begins at the two first principal components; a machine gives equal features equal embeddings.

    Args:
        features: By network and layer: [N, D], row by row of the same N images.
        labels: int64 [N], the true classes; two different ones.
        class_names: One a class of the data set.
        seed: Of t-SNE.
        perplexity: Of t-SNE; a third of the images at most.

    Raises:
        InputError: Other than two classes, fewer than 5 images of one, another number of rows, or
            features that are not finite or all the same.
        MissingExtraError: scikit-learn is not installed.
    """
    both = np.unique(labels)
    if len(both) != 2 or min((labels == label).sum() for label in both) < FOLDS:
        raise InputError(
            f"The images are of {len(both)} classes, or fewer than {FOLDS} are of one.",
            f"Give images of two classes, {FOLDS} or more of each.",
        )
    second: NDArray[np.int64] = (labels == both[1]).astype(np.int64)
    panels = [
        _measure(network, layer, values, second, seed=seed, perplexity=perplexity)
        for network, layers in features.items()
        for layer, values in layers.items()
    ]
    names = class_names[both[0]], class_names[both[1]]
    return Separability(tuple(panels), second, names)


def _measure(
    network: str,
    layer: str,
    features: NDArray[np.floating[Any]],
    labels: NDArray[np.int64],
    *,
    seed: int,
    perplexity: float,
) -> Panel:
    values = features.reshape(len(features), -1).astype(np.float64)
    if len(values) != len(labels) or not np.isfinite(values).all() or not np.ptp(values, 0).any():
        raise InputError(
            f"The features of {layer} of {network} are of {len(values)} images for {len(labels)} "
            "labels, not finite, or all the same.",
            "Give finite features of the labelled images; a dead layer has none to show.",
        )
    manifold, metrics, selection, neighbours = (
        require(f"sklearn.{part}", "train", "to compare features")
        for part in ("manifold", "metrics", "model_selection", "neighbors")
    )
    tsne = manifold.TSNE(
        init="pca",
        perplexity=min(perplexity, (len(values) - 1) / 3),
        random_state=seed,
        n_jobs=1,
    )
    scores = selection.cross_val_score(
        neighbours.KNeighborsClassifier(NEIGHBOURS, n_jobs=1),
        values,
        labels,
        cv=selection.StratifiedKFold(FOLDS),
    )
    return Panel(
        network=network,
        layer=layer,
        points=np.asarray(tsne.fit_transform(values), dtype=np.float64),
        accuracy=float(np.mean(scores)),
        silhouette=float(metrics.silhouette_score(values, labels)),
    )


def draw_separability(data: Separability) -> Figure:
    """Draw a row a network and a column a layer, with both measures above each panel."""
    networks = tuple(dict.fromkeys(panel.network for panel in data.panels))
    layers = tuple(dict.fromkeys(panel.layer for panel in data.panels))
    with styled():
        figure = new_figure(2.5 * len(layers), 2.35 * len(networks) + 0.4)
        axes = figure.subplots(len(networks), len(layers), squeeze=False)
        for panel in data.panels:
            at = axes[networks.index(panel.network), layers.index(panel.layer)]
            _scatter(at, panel, data)
        for row, network in enumerate(networks):
            axes[row, 0].set_ylabel(f"{network}\nt-SNE 2")
        for column in range(len(layers)):
            axes[-1, column].set_xlabel("t-SNE 1")
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=2, frameon=False)
    return figure


def _scatter(axes: Any, panel: Panel, data: Separability) -> None:
    for label, name in enumerate(data.class_names):
        axes.scatter(
            *panel.points[data.labels == label].T,
            s=11,
            linewidths=0.7,
            color=cycle(COLOURS, label),
            label=name,
            **_SHAPES[label],
        )
    bare(axes)
    for spine in axes.spines.values():
        spine.set_visible(True)
    axes.set_title(
        f"{panel.layer}: 5-NN {100 * panel.accuracy:.1f} %, silhouette {panel.silhouette:.2f}",
        fontsize=8,
    )
