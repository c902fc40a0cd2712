"""An image's answer must not depend on its company, its place or the hour.

Compiled programs choose kernels by batch size, and engines have been seen to answer differently
for the same image in another batch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.data import Images
from ccn_deploy.parity.comparison import Deviation, compare_logits, scale_of, top_two_margins
from ccn_deploy.records import Count, Record, Text
from ccn_deploy.runtimes.base import Array

SIZES = (2, 3, 5, 8, 13)
"""Batch sizes between one and all."""

DETERMINISTIC = "deterministic"
REPEATS = 3
"""Runs that must agree bit by bit."""


class Claim(Record, frozen=True):
    """The same images under other circumstances.

    Attributes:
        claim: ``"alone"`` (each image by itself against all in one batch), ``"duplicated"``,
            ``"permuted"``, ``"sizes"``, ``"neighbours"``, or ``"deterministic"``.
        deviation: From the logits of each image alone; the last, from the first run.
        differing: Logits whose bits differ; counted for every claim, demanded by the last.
    """

    claim: Text
    deviation: Deviation
    differing: Count


def measure_invariance(
    run: Callable[[Images], Array], images: Images, reference: Array, *, unit: float, seed: int
) -> list[Claim]:
    """Run the same images alone, duplicated, permuted, at other sizes, beside others, and again.

    Args:
        run: Maps images to the runtime's logits, any batch in one piece.
        images: float32 [N, C, H, W], N at least 2.
        reference: float64 logits [N, classes], for scale and margins.
        unit: What rounding explains on these images.
        seed: Of the permutation.
    """
    everyone = np.arange(len(images))
    shuffled = np.random.default_rng([seed, 2]).permutation(len(images))
    extremes = np.stack([np.zeros_like(images[0]), np.ones_like(images[0])])
    company = np.concatenate([extremes[:1], images, extremes[1:]])

    def pieces(size: int) -> Array:
        return np.concatenate([run(images[at : at + size]) for at in everyone[::size]])

    alone, whole = pieces(1), run(images)
    variants: list[tuple[str, Array, NDArray[np.int64]]] = [
        ("alone", whole, everyone),
        ("duplicated", run(np.repeat(images, 2, axis=0)), np.repeat(everyone, 2)),
        ("permuted", run(images[shuffled]), shuffled),
        ("sizes", np.concatenate([pieces(s) for s in SIZES]), np.tile(everyone, len(SIZES))),
        ("neighbours", run(company)[1:-1], everyone),
    ]
    again = np.concatenate([run(images) for _ in range(1, REPEATS)])
    margins, scale = top_two_margins(reference), scale_of(reference)

    def claim(name: str, found: Array, expected: Array, rows: NDArray[np.int64]) -> Claim:
        deviation = compare_logits(found, expected, scale=scale, unit=unit, margins=margins[rows])
        return Claim(name, deviation, _differing(found, expected))

    repeated = np.tile(everyone, REPEATS - 1)
    return [
        *(claim(name, found, alone[rows], rows) for name, found, rows in variants),
        claim(DETERMINISTIC, again, whole[repeated], repeated),
    ]


def _differing(a: Array, b: Array) -> int:
    """Count the values whose bits differ."""
    bits = f"V{a.dtype.itemsize}"
    return int((np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)).sum())
