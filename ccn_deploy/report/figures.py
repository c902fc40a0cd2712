"""Accuracy against the size of the perturbation, as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ccn_deploy.extras import require

# matplotlib wants colours, the page has themes: each stand-in below becomes a CSS variable.
INK, MUTED, GRID, RUNTIME, REFERENCE = (f"#0000f{n}" for n in range(1, 6))
_THEME = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    RUNTIME: "var(--runtime)",
    REFERENCE: "var(--reference)",
}


@dataclass(frozen=True)
class Point:
    """An accuracy at one size of perturbation, both ends of its 95 % interval; all in [0, 1]."""

    size: float
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """Accuracy under one attack, on the reference and on the runtime.

    Attributes:
        title: The attack.
        axis: What the size is, with its symbol.
        reference: Points in order of size, the clean one first where there is one.
        runtime: Likewise.
    """

    title: str
    axis: str
    reference: Sequence[Point]
    runtime: Sequence[Point]

    @property
    def description(self) -> str:
        """The figure in words, for those who do not see it."""
        return f"Accuracy on the runtime under {self.title}: " + ", ".join(
            f"{100 * point.accuracy:.1f} % at {point.size:g}" for point in self.runtime
        )


def draw(curve: Curve, prefix: str) -> str:
    """Return the curve as an ``<svg>`` element.

    Equal curves give equal text; ``prefix`` keeps the ids of several figures on a page apart.
    """
    matplotlib = require("matplotlib", "train", "to write a report")
    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ccn-deploy",
        "font.size": 9,
        "text.color": INK,
        "axes.labelcolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
    }
    with matplotlib.rc_context(settings):
        figure = require("matplotlib.figure", "train", "to write a report").Figure((3.7, 2.75))
        axes = figure.add_axes((0.12, 0.17, 0.85, 0.79))
        _style(axes, curve)
        # The reference lies wide below, the runtime narrow above: agreement shows as one in
        # the other, and neither hides.
        _plot(axes, curve.reference, REFERENCE, linewidth=5.0, markersize=8.0, alpha=0.55)
        _plot(axes, curve.runtime, RUNTIME, linewidth=1.6, markersize=4.0, alpha=1.0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), curve.description, prefix)


def _style(axes: Any, curve: Curve) -> None:
    largest = max(point.size for point in (*curve.runtime, *curve.reference))
    axes.set_xlim(-0.03 * largest, 1.03 * largest)
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0], ["0", "25", "50", "75", "100 %"])
    sizes = sorted({point.size for point in curve.runtime})
    axes.set_xticks(sizes, [f"{size:g}" for size in sizes])
    axes.set_xlabel(curve.axis)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(length=0, pad=5)
    axes.set_axisbelow(True)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)


def _plot(
    axes: Any,
    points: Sequence[Point],
    colour: str,
    *,
    linewidth: float,
    markersize: float,
    alpha: float,
) -> None:
    sizes = [point.size for point in points]
    lows, highs = [point.low for point in points], [point.high for point in points]
    axes.fill_between(sizes, lows, highs, color=colour, alpha=0.16, linewidth=0)
    axes.plot(
        sizes,
        [point.accuracy for point in points],
        color=colour,
        marker="o",
        linewidth=linewidth,
        markersize=markersize,
        markeredgewidth=0,
        alpha=alpha,
        solid_capstyle="round",
        clip_on=False,
    )


def _inline(svg: str, description: str, prefix: str) -> str:
    """Make a stand-alone SVG file a part of a page."""
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style).*?</\1>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows them
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family:[^;\"]*;?", "", svg)  # the page's own font
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    for colour, variable in _THEME.items():
        svg = svg.replace(colour, variable)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
