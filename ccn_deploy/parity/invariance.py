"""An image's answer must not depend on its company, its place or the hour.

Compiled programs choose kernels by batch size, and engines have been seen to answer differently
for the same image in another batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.data import Images
from ccn_deploy.parity.comparison import Deviation, compare_logits, scale_of, top_two_margins
from ccn_deploy.records import Count, Record, Text
from ccn_deploy.runtimes.base import Array

DETERMINISTIC = "deterministic"
REPEATS = 32
"""Runs that must agree bit by bit with the first; between them come batches of other sizes."""

REPEATED = 8
"""Images of such a run, at most."""


def batch_sizes(largest: int, usual: int) -> tuple[int, ...]:
    """Return the sizes at which batches are tried, in order.

    Programs choose kernels by the size of the batch, at powers of two above all. So it is each of
    those up to the largest, the largest itself and the usual size, with one less and one more; and
    13, which is near none.

    Args:
        largest: Of the batches that are tried.
        usual: Of the pieces that a runtime cuts larger batches into.
    """
    powers = [1 << exponent for exponent in range(largest.bit_length())]
    near = {n + d for n in (*powers, usual, largest) for d in (-1, 0, 1)} - {0, 1}
    return tuple(sorted(near | ({13} if largest >= 13 else set())))


class Claim(Record, frozen=True):
    """The same images under other circumstances.

    Attributes:
        claim: ``"alone"`` (each image by itself against all in one batch), ``"duplicated"``,
            ``"permuted"``, ``"sizes"``, ``"neighbours"``, or ``"deterministic"``.
        deviation: From the logits of each image alone; the last, from the first run.
        differing: Logits whose bits differ; counted for every claim, demanded by the last.
        batch: Of several sizes, the one with the largest deviation; 0 where there is only one.
    """

    claim: Text
    deviation: Deviation
    differing: Count
    batch: Count = 0


def measure_invariance(
    run: Callable[[Images], Array],
    images: Images,
    reference: Array,
    *,
    unit: float,
    seed: int,
    sizes: Sequence[int],
) -> list[Claim]:
    """Run the same images alone, duplicated, permuted, at other sizes, beside others, and again.

    Args:
        run: Maps images to the runtime's logits, any batch in one piece.
        images: float32 [N, C, H, W], N at least 2. Batches of the sizes are filled with them at
            random, so that no row has the neighbours that it has a few rows further.
        reference: float64 logits [N, classes], for scale and margins.
        unit: What rounding explains on these images.
        seed: Of the permutation and the filling.
        sizes: Of :func:`batch_sizes`.
    """
    everyone = np.arange(len(images))
    rng = np.random.default_rng([seed, 2])
    shuffled = rng.permutation(len(images))
    extremes = np.stack([np.zeros_like(images[0]), np.ones_like(images[0])])
    company = np.concatenate([extremes[:1], images, extremes[1:]])
    margins, scale = top_two_margins(reference), scale_of(reference)

    def claim(
        name: str, found: Array, expected: Array, rows: NDArray[np.int64], batch: int = 0
    ) -> Claim:
        deviation = compare_logits(found, expected, scale=scale, unit=unit, margins=margins[rows])
        return Claim(name, deviation, _differing(found, expected), batch)

    alone = np.concatenate([run(images[at : at + 1]) for at in everyone])
    often = everyone[:: -(-len(images) // REPEATED)]
    first, again = run(images[often]), []
    by_size: list[tuple[Array, NDArray[np.int64]]] = []
    for size in sizes:
        rows = rng.integers(0, len(images), size)
        by_size.append((run(images[rows]), rows))
        again.append(run(images[often]))
    again += [run(images[often]) for _ in range(REPEATS - len(again))]

    every = [np.concatenate(parts) for parts in zip(*by_size, strict=True)]
    errors = [np.nan_to_num(np.abs(found - alone[rows]), nan=np.inf) for found, rows in by_size]
    worst = sizes[int(np.argmax([error.max() for error in errors]))]
    variants: list[tuple[str, Array, NDArray[np.int64], int]] = [
        ("alone", run(images), everyone, 0),
        ("duplicated", run(np.repeat(images, 2, axis=0)), np.repeat(everyone, 2), 0),
        ("permuted", run(images[shuffled]), shuffled, 0),
        ("sizes", every[0], every[1], worst),
        ("neighbours", run(company)[1:-1], everyone, 0),
    ]
    return [
        *(claim(name, found, alone[rows], rows, batch) for name, found, rows, batch in variants),
        claim(
            DETERMINISTIC,
            np.concatenate(again),
            np.tile(first, (len(again), 1)),
            np.tile(often, len(again)),
        ),
    ]


def _differing(a: Array, b: Array) -> int:
    """Count the values whose bits differ."""
    bits = f"V{a.dtype.itemsize}"
    return int((np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)).sum())
