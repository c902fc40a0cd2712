"""Figure 3: what convolution and compact convolution answer to two patches.

The paper's numbers are in its picture alone; these are our own. A dim patch that is the very edge
the kernel looks for meets a bright one that has hardly any: ordinary convolution answers more to
the brightness, compact convolution to the edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.errors import InputError
from ccn_deploy.studies.figures.style import INK, MUTED, bare, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

PATCHES: Floats = np.array(
    [[[1, 0, 0], [1, 0, 0], [1, 0, 0]], [[9, 5, 6], [8, 7, 8], [9, 6, 5]]], dtype=np.float64
)
KERNEL: Floats = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=np.float64)


@dataclass(frozen=True)
class ToyConvolution:
    """Both convolutions of P patches with one kernel; all float64.

    Attributes:
        patches: [P, k, k].
        kernel: [k, k].
        norms: [P], L2 norms of the patches.
        scaled: [P, k, k], ``alpha * x / (||x||_2 + delta)``.
        ordinary: [P], the kernel's products with the patches.
        compact: [P], its products with the scaled patches, as the package's layer computes them.
        alpha: Scale.
        delta: Added to the norms.
    """

    patches: Floats
    kernel: Floats
    norms: Floats
    scaled: Floats
    ordinary: Floats
    compact: Floats
    alpha: float
    delta: float


def toy_convolution(
    patches: Floats = PATCHES, kernel: Floats = KERNEL, alpha: float = 1.0, delta: float = 0.01
) -> ToyConvolution:
    """Convolve patches with a kernel of their size, by equation 5 and by equation 6.

    Args:
        patches: float64 [P, k, k].
        kernel: float64 [k, k].
        alpha: Scale of the compact convolution.
        delta: Added to its norms.

    Raises:
        InputError: Patches of another size than the kernel.
    """
    import torch

    from ccn_deploy.layers import CompactConv2d

    if patches.shape[1:] != kernel.shape or kernel.ndim != 2:
        raise InputError(
            f"Patches of shape {list(patches.shape)} and a kernel of {list(kernel.shape)}.",
            "Give patches of the kernel's size.",
        )
    height, width = kernel.shape
    layer = CompactConv2d(1, 1, (height, width), bias=False, delta=delta, dtype=torch.float64)
    x, w = torch.from_numpy(patches)[:, None], torch.from_numpy(kernel)[None, None]
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.alpha.fill_(alpha)
        compact = layer(x).flatten()
        ordinary = torch.nn.functional.conv2d(x, w).flatten()
    norms = np.linalg.norm(patches.reshape(len(patches), -1), axis=1)
    return ToyConvolution(
        patches=patches,
        kernel=kernel,
        norms=norms,
        scaled=alpha * patches / (norms + delta)[:, None, None],
        ordinary=ordinary.numpy(),
        compact=compact.numpy(),
        alpha=alpha,
        delta=delta,
    )


def draw_toy_convolution(data: ToyConvolution) -> Figure:
    """Draw patch times kernel is answer, left as convolution and right as compact convolution."""
    title = f"Compact convolution (α = {data.alpha:g}, δ = {data.delta:g})"
    with styled():
        figure = new_figure(7.6, 1.15 * len(data.patches) + 0.55)
        left, right = figure.subplots(1, 2)
        plain = ["patch $x$"] * len(data.patches)
        scaled = [f"α$x$ / (‖$x$‖ + δ),  ‖$x$‖ = {norm:.2f}" for norm in data.norms]
        _half(left, "Convolution", data.patches, data.kernel, answers=data.ordinary, under=plain)
        _half(right, title, data.scaled, data.kernel, answers=data.compact, under=scaled)
    return figure


def _half(
    axes: Any,
    title: str,
    patches: Floats,
    kernel: Floats,
    *,
    answers: Floats,
    under: Sequence[str],
) -> None:
    height, width = kernel.shape
    step = height + 1.3
    for row, (patch, answer) in enumerate(zip(patches, answers, strict=True)):
        top = -row * step
        middle = top - height / 2
        _matrix(axes, 0.0, top, patch)
        _matrix(axes, width + 1.2, top, kernel)
        axes.text(width + 0.6, middle, "∗", ha="center", va="center", fontsize=13)
        axes.text(
            2 * width + 1.6, middle, f"=  {_number(answer)}",
            ha="left", va="center", fontsize=12, fontweight="bold",
        )  # fmt: skip
        axes.text(width / 2, top - height - 0.4, under[row], ha="center", va="center", color=MUTED)
        axes.text(
            1.5 * width + 1.2, top - height - 0.4, "kernel", ha="center", va="center", color=MUTED
        )
    axes.set_xlim(-1.1, 2 * width + 4.2)
    axes.set_ylim(-len(patches) * step + 0.4, 0.2)
    axes.set_aspect("equal")
    axes.set_title(title, fontsize=10, loc="left")
    bare(axes)


def _matrix(axes: Any, left: float, top: float, values: Floats) -> None:
    """Draw a matrix as cells with their numbers, the larger the darker."""
    largest = np.abs(values).max() or 1.0
    for (row, column), value in np.ndenumerate(values):
        shade = f"{1.0 - 0.3 * abs(value) / largest:.3f}"
        x, y = left + column, top - row
        axes.fill(
            [x, x + 1, x + 1, x], [y, y, y - 1, y - 1], facecolor=shade, edgecolor=INK, lw=0.7
        )
        axes.text(x + 0.5, y - 0.5, _number(value), ha="center", va="center", fontsize=8)


def _number(value: float) -> str:
    """Return whole numbers as such, others with two digits behind the point."""
    text = f"{value:.0f}" if value == round(value) else f"{value:.2f}"
    return text.replace("-", "−")
