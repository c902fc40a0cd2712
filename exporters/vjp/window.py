"""Sliding windows of convolutions and pools: sizes, strides, and padding as it is applied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ccn_deploy.exporters.vjp.tape import Site


@dataclass(frozen=True)
class Window:
    """How windows lie on an input of some spatial axes.

    Attributes:
        kernel: Size of a window.
        strides: From a window to the next.
        dilations: From a value of a window to the next.
        pads: Before each axis, then behind each.
        inner: Sizes of the input.
        outer: How many windows there are.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[int]
    inner: list[int]
    outer: list[int]

    @property
    def extent(self) -> list[int]:
        """Positions that a window covers, gaps included."""
        return [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]

    @property
    def begin(self) -> list[int]:
        """Padding before each axis."""
        return self.pads[: len(self.kernel)]

    def missed(self) -> list[int]:
        """Return how far the input reaches beyond the last window; negative if it ends before.

        Padding behind does not count: this is what the windows reach, whatever the rounding.
        """
        return [
            size + begin - (count - 1) * stride - extent
            for size, begin, count, stride, extent in zip(
                self.inner, self.begin, self.outer, self.strides, self.extent, strict=True
            )
        ]

    def full_pads(self) -> list[int]:
        """Return the padding of the plain convolution that undoes one of stride 1."""
        before = [e - 1 - p for e, p in zip(self.extent, self.begin, strict=True)]
        behind = [e - 1 + m for e, m in zip(self.extent, self.missed(), strict=True)]
        return [*before, *behind]

    def transposed(self) -> dict[str, Any]:
        """Return the attributes of the ConvTranspose from the windows back to the input."""
        missed = self.missed()
        return {
            "kernel_shape": self.kernel,
            "strides": self.strides,
            "dilations": self.dilations,
            "pads": [*self.begin, *(max(-miss, 0) for miss in missed)],
            "output_padding": [max(miss, 0) for miss in missed],
        }


def window_of(at: Site, kernel: Sequence[int | str], transposed: bool = False) -> Window:
    """Return the window of a Conv, a ConvTranspose or a pool, automatic padding worked out.

    Args:
        at: The node.
        kernel: Sizes of its window.
        transposed: Whether the node's output is what the windows lie on.
    """
    sizes = [int(size) for size in kernel]
    spatial = len(sizes)
    strides = list(at.attribute("strides") or [1] * spatial)
    dilations = list(at.attribute("dilations") or [1] * spatial)
    axes = range(2, 2 + spatial)
    inner, outer = at.sizes(at.x, axes), at.sizes(at.y, axes)
    if transposed:
        inner, outer = outer, inner
    bare = Window(sizes, strides, dilations, [0] * 2 * spatial, inner, outer)
    pads = _pads(at, bare, transposed)
    return Window(sizes, strides, dilations, pads, inner, outer)


def _pads(at: Site, bare: Window, transposed: bool) -> list[int]:
    spatial = len(bare.kernel)
    automatic = at.attribute("auto_pad", "NOTSET")
    if automatic == "VALID":
        return [0] * 2 * spatial
    if automatic == "NOTSET" and not at.attribute("output_shape"):
        return list(at.attribute("pads") or [0] * 2 * spatial)
    # As much as the windows reach beyond the input, the odd one behind or before.
    extra = at.attribute("output_padding") or [0] * spatial
    total = [
        max(-miss + (more if transposed else 0), 0)
        for miss, more in zip(bare.missed(), extra, strict=True)
    ]
    less = [t // 2 for t in total]
    more = [t - t // 2 for t in total]
    return [*less, *more] if automatic == "SAME_UPPER" else [*more, *less]
