"""Are the slopes that a runtime gives those of the network? Imports no torch.

Two things make gradients harder to compare than logits; ``docs/parity.md`` derives both rules.

* *Ties.* Where equal patches tie in a max-pool, any of them may take the slope. Which one does
  moves slope between pixels of equal colour and nowhere else, so :func:`untied` compares what is
  left when that freedom is taken away.
* *Kinks.* Where rounding alone may decide an activation or a maximum the other way, the network
  has two gradients. :mod:`ccn_deploy.parity.kinks` finds such images; they are judged together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from ccn_deploy.data import Images
from ccn_deploy.parity.comparison import Deviation, compare_logits, scale_of
from ccn_deploy.records import Count, Extended, Measured, Record, Text
from ccn_deploy.runtimes.base import Array

CANDIDATES = 5
"""Gradients of each image: see :func:`make_cotangents`."""

COSINE_FLOOR = 1e-2
"""Least length of a gradient, in that of the longest of its kind, whose direction is compared."""

Vjp = Callable[[Images, Array], tuple[Array, Array]]
"""A runtime's ``vjp``: images [N, ...], cotangents [N, K, classes] -> logits and gradients."""


class SlopeDeviation(Measured, frozen=True):
    """How far gradients are from those they should be, once freed of ties.

    Attributes:
        n: Images compared.
        near: Those of them near a kink.
        max_abs: Largest absolute error on the others; infinite where a value is not finite.
        cosine: Smallest cosine with the reference on the others; 1 if there are none.
        of_rounding: Largest error of an image on the others over what rounding made of its
            gradient; 0 if there are none.
        max_abs_near: Largest absolute error near a kink; reported, and judged with all of them.
        nonfinite: Gradient values that are NaN or infinite, on all images.
        scale: Largest slope of the reference on the same kind of input.
    """

    n: Count
    near: Count = msgspec.field(name="near_a_kink")
    max_abs: Extended
    cosine: Extended
    of_rounding: Extended
    max_abs_near: Extended = msgspec.field(name="max_abs_near_a_kink")
    nonfinite: Count
    scale: Extended

    def __post_init__(self) -> None:
        if self.cosine is None:  # the worst there is
            msgspec.structs.force_setattr(self, "cosine", -math.inf)
        super().__post_init__()

    @property
    def judged(self) -> int:
        """Images that are judged one by one."""
        return self.n - self.near

    @property
    def relative(self) -> float:
        """Largest error over the largest slope, away from kinks."""
        if self.max_abs == 0.0:
            return 0.0
        sound = 0.0 < self.scale < math.inf
        return self.max_abs / self.scale if sound else math.inf


class GradientRow(Record, frozen=True):
    """Gradients on one kind of input, at one batch size and number of candidates.

    Attributes:
        kind: Of input.
        batch: Images of one call.
        candidates: Gradients asked for each image in one call.
        logits: Of the gradient graph, from those of the forward graph in the same runtime.
        slopes: From the reference.
    """

    kind: Text
    batch: Count
    candidates: Count
    logits: Deviation
    slopes: SlopeDeviation


class KinkRow(Measured, frozen=True):
    """All images near a kink, whatever their kind.

    Attributes:
        n: How many.
        median: Of their errors, each over what rounding typically makes of the gradient of that
            very image, or over what is allowed away from kinks if that is more; 0 if there are
            none, infinite if the median image has a value that is not finite.
        largest: The largest such ratio.
    """

    n: Count
    median: Extended = msgspec.field(name="median_of_rounding")
    largest: Extended = msgspec.field(name="largest_of_rounding")

    @classmethod
    def of(cls, ratios: Sequence[float]) -> KinkRow:
        """Sum up the ratios of all images near a kink."""
        found = np.array(ratios, dtype=np.float64)
        if not found.size:
            return cls(0, 0.0, 0.0)
        # "lower" is a ratio that occurred; interpolating could meet inf - inf.
        median = float(np.quantile(found, 0.5, method="lower"))
        return cls(found.size, median, float(found.max()))


class GradientEvidence(Record, frozen=True):
    """Everything measured about gradients.

    Attributes:
        rows: In order of kind and batch.
        kinks: The images that single rows leave out.
    """

    rows: tuple[GradientRow, ...]
    kinks: KinkRow


@dataclass(frozen=True)
class GradientProbe:
    """One kind of input with all that gradients are judged by.

    Attributes:
        kind: Its name.
        images: float32 [n, C, H, W], all different.
        cotangents: float32 [n, :data:`CANDIDATES`, classes].
        truth: The reference's gradients, float64 [n, :data:`CANDIDATES`, C, H, W].
        shifts: For each image, the largest change of an untied gradient that errors as large as
            the policy's made, over the largest slope, [n].
        typical: The same for errors of the size that rounding usually has, [n].
        unit: What rounding explains of the logits.
        scale: Of the reference's logits.
    """

    kind: str
    images: Images
    cotangents: Array
    truth: Array
    shifts: NDArray[np.float64]
    typical: NDArray[np.float64]
    unit: float
    scale: float


def make_cotangents(logits: Array, seed: int) -> NDArray[np.float32]:
    """Return weightings of the logits, float32 [n, :data:`CANDIDATES`, classes].

    For each image: its largest logit, its second largest, the first less the second, and two rows
    of normal numbers.

    Args:
        logits: Of the reference, [n, classes].
        seed: Of the random rows.
    """
    count, classes = logits.shape
    first, second = np.argsort(-logits, axis=1, kind="stable")[:, :2].T
    one_hot = np.eye(classes, dtype=np.float32)
    random = np.random.default_rng([seed, 3]).standard_normal((count, 2, classes))
    fixed = np.stack([one_hot[first], one_hot[second], one_hot[first] - one_hot[second]], axis=1)
    return np.concatenate([fixed, random.astype(np.float32)], axis=1)


def untied(gradients: Array, images: Images) -> NDArray[np.float64]:
    """Project gradients onto the directions that move pixels of equal colour alike.

    Along such a direction equal patches stay equal, so the slope along it does not depend on which
    of them a max-pool chose. Each group of n pixels of one colour gives, for each channel, its sum
    over sqrt(n): the coordinates in an orthonormal basis, as long as the gradient itself where no
    two pixels are equal.

    Args:
        gradients: [N, K, C, H, W].
        images: [N, C, H, W].

    Returns:
        float64 [N, K, C * H * W]; zeros where an image has fewer colours than pixels.
    """
    count, rows, channels = gradients.shape[:3]
    flat = gradients.reshape(count, rows, channels, -1).astype(np.float64)
    found = np.zeros_like(flat)
    for at, image in enumerate(images):
        pixels = np.ascontiguousarray(image.reshape(channels, -1).T)
        _, group, size = np.unique(pixels, axis=0, return_inverse=True, return_counts=True)
        order = np.argsort(group.reshape(-1), kind="stable")
        starts = np.cumsum(size) - size
        summed = np.add.reduceat(flat[at][..., order], starts, axis=-1)
        found[at, ..., : len(size)] = summed / np.sqrt(size)
    return found.reshape(count, rows, -1)


def measure_gradients(
    run: Vjp, forward: Callable[[Images], Array], probe: GradientProbe, *, allowed: float
) -> tuple[list[GradientRow], list[float]]:
    """Compare a runtime's gradients with the reference's on one kind of input.

    One image and one gradient at a time, image after image with another candidate; then all images
    and all candidates at once.

    Args:
        run: The runtime's ``vjp``.
        forward: The runtime's logits, of the forward graph.
        probe: What to compare on and with.
        allowed: An image is near a kink if rounding alone moves its gradient by more than this
            part of the largest slope.

    Returns:
        The rows, and the ratios of :class:`KinkRow` of the images near a kink, all at once.
    """
    count = len(probe.images)
    turns = np.arange(count) % CANDIDATES
    single = [
        run(probe.images[i : i + 1], probe.cotangents[i : i + 1, k : k + 1])
        for i, k in enumerate(turns)
    ]
    alone = np.concatenate([forward(probe.images[i : i + 1]) for i in range(count)])
    logits, gradients = (np.concatenate(parts) for parts in zip(*single, strict=True))
    truth = probe.truth[np.arange(count), turns][:, None]
    scale = scale_of(probe.truth)
    _, slopes = _compare(gradients, truth, probe, scale, allowed)

    def agreement(found: Array, expected: Array) -> Deviation:
        return compare_logits(found, expected, scale=probe.scale, unit=probe.unit)

    rows = [GradientRow(probe.kind, 1, 1, agreement(logits, alone), slopes)]
    logits, gradients = run(probe.images, probe.cotangents)
    errors, slopes = _compare(gradients, probe.truth, probe, scale, allowed)
    whole = agreement(logits, forward(probe.images))
    rows.append(GradientRow(probe.kind, count, CANDIDATES, whole, slopes))
    ratios = errors / np.maximum(probe.typical, allowed)
    return rows, ratios[probe.shifts > allowed].tolist()


def _compare(
    found: Array, truth: Array, probe: GradientProbe, scale: float, allowed: float
) -> tuple[NDArray[np.float64], SlopeDeviation]:
    """Return each image's largest error over the largest slope, [n], and what is reported."""
    near = probe.shifts > allowed
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        got, wanted = untied(found, probe.images), untied(truth, probe.images)
        errors = np.abs(got - wanted).max(axis=(1, 2))
        errors[~np.isfinite(errors)] = math.inf
        ratios = np.divide(errors, probe.shifts * scale)
        ratios[errors == 0.0] = 0.0
        cosines = _cosines(got, wanted, np.linalg.norm(truth.reshape(wanted.shape), axis=2).max())
    return errors / scale if scale else errors, SlopeDeviation(
        n=len(found),
        near=int(near.sum()),
        max_abs=float(errors[~near].max(initial=0.0)),
        cosine=float(cosines[~near].min(initial=1.0)),
        of_rounding=float(ratios[~near].max(initial=0.0)),
        max_abs_near=float(errors[near].max(initial=0.0)),
        nonfinite=int((~np.isfinite(found)).sum()),
        scale=scale,
    )


def _cosines(
    got: NDArray[np.float64], wanted: NDArray[np.float64], longest: float
) -> NDArray[np.float64]:
    """Return the smallest cosine of each image [n]; rows too short to have a direction give 1."""
    lengths = np.linalg.norm(got, axis=2) * np.linalg.norm(wanted, axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        cosines = (got * wanted).sum(axis=2) / lengths
    cosines[lengths == 0.0] = 0.0  # one of the two is no direction at all
    cosines[~np.isfinite(cosines)] = -math.inf
    cosines[np.linalg.norm(wanted, axis=2) < COSINE_FLOOR * longest] = 1.0
    return np.asarray(cosines.min(axis=1))
