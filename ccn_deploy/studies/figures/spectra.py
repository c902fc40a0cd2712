"""Figure 6: the largest singular values of every layer's weights, by network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.errors import named
from ccn_deploy.studies.figures.style import (
    COLOURS,
    GRID,
    LINES,
    MARKERS,
    cycle,
    new_figure,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERS = ("conv1", "conv2", "conv3", "conv4", "fc1", "fc2")
"""The figure's layers, in ``mnist-cnn``."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one layer of one network.

    Attributes:
        network: Its title.
        layer: Its name.
        values: float64 [at most ``top``], falling.
        effective_rank: Of all singular values: the exponential of the entropy of their shares of
            their sum (Roy and Vetterli, "The effective rank", EUSIPCO 2007); from 1 to ``rank``,
            and independent of the weights' scale.
        rank: How many singular values there are.
    """

    network: str
    layer: str
    values: NDArray[np.float64]
    effective_rank: float
    rank: int


def spectra(
    weights: Mapping[str, Mapping[str, NDArray[np.floating[Any]]]],
    layers: Sequence[str] = LAYERS,
    top: int = 50,
) -> tuple[Spectrum, ...]:
    """Compute the singular values of layers.

    Args:
        weights: By network and layer: [outputs, ...], kernels flattened to [outputs, inputs]; those
            of :func:`ccn_deploy.studies.figures.layer_weights`.
        layers: Which ones.
        top: How many singular values are kept.

    Returns:
        Network by network of the first layer, then of the next.

    Raises:
        UsageError: A network without a layer of this name; the hint suggests the nearest.
    """
    return tuple(
        _spectrum(network, layer, named(f"layer of {network}", layer, of), top)
        for layer in layers
        for network, of in weights.items()
    )


def _spectrum(network: str, layer: str, weight: NDArray[np.floating[Any]], top: int) -> Spectrum:
    matrix = weight.reshape(len(weight), -1).astype(np.float64)
    values = np.asarray(np.linalg.svd(matrix, compute_uv=False), dtype=np.float64)
    shares = values[values > 0] / values.sum()
    return Spectrum(
        network=network,
        layer=layer,
        values=values[:top],
        effective_rank=float(np.exp(-(shares * np.log(shares)).sum())),
        rank=len(values),
    )


def draw_spectra(data: Sequence[Spectrum]) -> Figure:
    """Draw a panel a layer, with a line and its effective rank for each network."""
    layers = tuple(dict.fromkeys(spectrum.layer for spectrum in data))
    networks = tuple(dict.fromkeys(spectrum.network for spectrum in data))
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    with styled():
        figure = new_figure(2.7 * columns, 2.35 * rows)
        for number, layer in enumerate(layers):
            axes: Any = figure.add_subplot(rows, columns, number + 1)
            for spectrum in data:
                if spectrum.layer == layer:
                    _line(axes, spectrum, networks.index(spectrum.network))
            axes.set_title(layer)
            axes.set_xlim(left=0.0)
            axes.set_ylim(0.0, 1.55 * axes.dataLim.ymax)  # what falls leaves room for the legend
            axes.grid(axis="y", color=GRID, linewidth=0.6)
            axes.legend(
                title="effective rank", title_fontsize=7.5, loc="upper right", frameon=False
            )
            if number % columns == 0:
                axes.set_ylabel("singular value")
            if number >= len(layers) - columns:
                axes.set_xlabel("number, the largest first")
    return figure


def _line(axes: Any, spectrum: Spectrum, number: int) -> None:
    count = len(spectrum.values)
    axes.plot(
        np.arange(1, count + 1),
        spectrum.values,
        color=cycle(COLOURS, number),
        linestyle=cycle(LINES, number),
        marker=cycle(MARKERS, number),
        markevery=(number, max(1, count // 6)),  # staggered: lines that meet show all markers
        markersize=4,
        linewidth=1.2,
        label=f"{spectrum.network}: {spectrum.effective_rank:.1f} of {spectrum.rank}",
    )
