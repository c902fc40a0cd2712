"""How every figure looks, and how it is written: readable in black and white, equal bytes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ccn_deploy.extras import require
from ccn_deploy.storage import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1a1a1a", "#5f5f5f", "#d9d9d9"

# Okabe and Ito's colours, which colour-blind people tell apart, and black; no two neighbours are
# equally dark. Whatever has a colour has a marker or a line of its own as well.
COLOURS = (
    "#0072b2", "#d55e00", "#000000", "#cc79a7", "#009e73",
    "#e69f00", "#56b4e9", "#7f7f7f", "#8c510a", "#5e3c99",
)  # fmt: skip
MARKERS = ("o", "^", "s", "x", "D", "v", "+", "P", "<", "*")
LINES = ("-", "--", "-.", ":")

_STYLE = {
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "font.size": 8,
    "legend.fontsize": 7.5,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "ccn-deploy",
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}

_PURPOSE = "to draw a figure"


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Hold matplotlib's settings to this style in a block, whatever the user's own file says."""
    with require("matplotlib.style", "train", _PURPOSE).context(["default", _STYLE]):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches; call it inside :func:`styled`."""
    figure: Figure = require("matplotlib.figure", "train", _PURPOSE).Figure(
        (width, height), layout="constrained"
    )
    return figure


def cycle(choices: tuple[str, ...], at: int) -> str:
    """Return the choice of the number ``at``, from the front again after the last."""
    return choices[at % len(choices)]


def bare(axes: Any) -> None:
    """Take ticks and frame from axes that hold a picture."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def save(figure: Figure, path: Path) -> tuple[Path, Path]:
    """Write a figure as ``path.svg`` and ``path.png`` (200 dots an inch).

    Both are rendered before either is written. Equal figures give equal bytes under one version of
    matplotlib: no date, no version, no random id.

    Args:
        figure: What was drawn.
        path: Without suffix; its directory is made if it is not there.

    Returns:
        The two paths.

    Raises:
        StorageError: The disk is full or not writable.
    """
    written = {".svg": {"Date": None, "Creator": None}, ".png": {"Software": None}}
    rendered = {}
    for suffix, metadata in written.items():
        buffer = io.BytesIO()
        with styled():
            figure.savefig(buffer, format=suffix[1:], dpi=200, metadata=metadata)
        rendered[path.with_name(path.name + suffix)] = buffer.getvalue()
    for file, data in rendered.items():
        write_atomic(file, data)
    svg, png = rendered
    return svg, png
