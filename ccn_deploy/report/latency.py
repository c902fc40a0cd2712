"""Latency and throughput against the batch, as a figure."""

from __future__ import annotations

import io
import math
from typing import Any

from ccn_deploy.bench import BenchResult, Row
from ccn_deploy.extras import require

_COLOURS = ("#0b6e99", "#c4501b", "#4c8c2b", "#7a4fa3", "#8a6d00", "#5c5c5c")
_MARKERS, _STROKES = ("o", "s", "^", "D"), ("-", "--", ":", "-.")
_INK, _MUTED, _GRID = "#1d1d1f", "#5f6368", "#dcdcdc"


def draw(result: BenchResult, form: str) -> bytes:
    """Draw both against the batch: a line for each bundle, runtime and precision.

    Colours tell runtimes and precisions apart, strokes and markers tell bundles. Whiskers of the
    latency reach from the median to the 99th percentile, or to the 90th of too few calls. The same
    result gives the same bytes.

    Args:
        result: What was measured.
        form: ``"png"``, ``"svg"`` or ``"pdf"``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = require("matplotlib", "train", "to draw a plot")
    settings = {
        "font.size": 9,
        "text.color": _INK,
        "axes.edgecolor": _MUTED,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "svg.fonttype": "none",
        "svg.hashsalt": "ccn-deploy",
    }
    with matplotlib.rc_context(settings):
        figure = require("matplotlib.figure", "train", "to draw a plot").Figure(
            (8.4, 4.0), layout="constrained"
        )
        latency, throughput = figure.subplots(1, 2)
        lines = list(dict.fromkeys((_target(row), row.network) for row in result.rows))
        for at, (target, network) in enumerate(lines):
            rows = [row for row in result.rows if (_target(row), row.network) == (target, network)]
            style = _style(result, target, network)
            # Beside one another, so that no whisker hides another.
            aside = 2 ** (0.08 * (at - (len(lines) - 1) / 2))
            batches = [row.latency.batch * aside for row in rows]
            medians = [1000 * row.latency.p50 for row in rows]
            above = [1000 * _slow(row) - median for row, median in zip(rows, medians, strict=True)]
            whiskers = {"capsize": 2.5, "elinewidth": 0.9}
            latency.errorbar(batches, medians, yerr=[[0] * len(rows), above], **whiskers, **style)
            throughput.plot(batches, [row.latency.images_per_second for row in rows], **style)
        times = [1000 * time for row in result.rows for time in (row.latency.p50, _slow(row))]
        _axes(latency, result, "Time of a call in ms: median, whisker to p99", times)
        speeds = [row.latency.images_per_second for row in result.rows]
        _axes(throughput, result, "Images per second", speeds)
        handles, labels = throughput.get_legend_handles_labels()
        columns = min(3, len(labels))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        buffer = io.BytesIO()
        stamp = {"png": "Creation Time", "svg": "Date", "pdf": "CreationDate"}[form]
        figure.savefig(buffer, format=form, dpi=160, metadata={stamp: None})
    return buffer.getvalue()


def _target(row: Row) -> str:
    return f"{row.runtime}-{row.precision}"


def _slow(row: Row) -> float:
    return row.latency.p99 or row.latency.p90 or row.latency.p50


def _style(result: BenchResult, target: str, network: str) -> dict[str, Any]:
    targets = list(dict.fromkeys(map(_target, result.rows)))
    colour, bundle = targets.index(target), list(result.bundles).index(network)
    return {
        "label": f"{network}, {target}",
        "color": _COLOURS[colour % len(_COLOURS)],
        "marker": _MARKERS[bundle % len(_MARKERS)],
        "linestyle": _STROKES[bundle % len(_STROKES)],
        "markersize": 4.5,
        "linewidth": 1.4,
    }


def _axes(axes: Any, result: BenchResult, title: str, values: list[float]) -> None:
    """Label axes in plain numbers: batches as they were asked for, and 1, 2, 5, 10, ..."""
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("images a call (batch)", color=_INK)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    batches = sorted({row.latency.batch for row in result.rows})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlim(batches[0] / 1.5, batches[-1] * 1.5)
    ticks = _ticks(min(values), max(values))
    axes.set_yticks(ticks, [f"{tick:,g}" if tick < 1e4 else f"{tick:,.0f}" for tick in ticks])
    axes.set_ylim(ticks[0], ticks[-1])
    axes.minorticks_off()
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten, from at most ``low`` to at least ``high``."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    first = max(at for at, tick in enumerate(ticks) if tick < low)
    last = min((at for at, tick in enumerate(ticks) if tick > high), default=len(ticks) - 1)
    return ticks[first : last + 1]
