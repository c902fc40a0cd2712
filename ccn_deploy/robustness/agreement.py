"""How well the gradients of a runtime and those of its PyTorch reference agree.

Where they do, it matters little which of the two an attack walks along; where they do not, an
evaluation with the reference's gradients attacks another function than the one that is deployed.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
import numpy as np

from ccn_deploy.attacks.spec import AttackSpec
from ccn_deploy.extras import require
from ccn_deploy.records import Count, Record
from ccn_deploy.robustness.attack_session import REFERENCE, AttackSession
from ccn_deploy.runtimes.base import Array, Runtime
from ccn_deploy.targets import Target

PROBE = AttackSpec(
    "pgd", "linf", 0.1, True, {"steps": 10, "rel_stepsize": 0.2, "random_start": False}
)
"""Makes the adversarial points: where it stops, an attack walks."""

Cosine = Annotated[float, msgspec.Meta(ge=-1, le=1)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]


class Agreement(Record, frozen=True):
    """Two gradients of the loss at each of some points.

    Attributes:
        n: Points.
        vanished: Points where one of the two is zero or not finite, and the other is not so.
            They count with a cosine of 0.
        cosine_mean: Of the angle between the two.
        cosine_min: The worst point's.
        sign_mean: Proportion of pixels where both have the same sign.
        sign_min: The worst point's.
    """

    n: Count
    vanished: Count
    cosine_mean: Cosine
    cosine_min: Cosine
    sign_mean: Fraction
    sign_min: Fraction

    @classmethod
    def between(cls, ours: Array, theirs: Array) -> Agreement:
        """Compare gradients [N, ...], N at least 1, point by point in float64."""
        a, b = (np.array(g, dtype=np.float64).reshape(len(g), -1) for g in (ours, theirs))
        whole = np.asarray(np.isfinite(a + b).all(axis=1))
        a[~whole] = b[~whole] = 0.0
        size_a, size_b = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
        both_zero = whole & (size_a == 0) & (size_b == 0)
        sound = (size_a > 0) & (size_b > 0)
        product = np.where(sound, size_a * size_b, 1.0)
        cosine = np.where(both_zero, 1.0, np.clip((a * b).sum(axis=1) / product, -1.0, 1.0))
        sign = np.where(whole, (np.sign(a) == np.sign(b)).mean(axis=1), 0.0)
        return cls(
            n=len(a),
            vanished=int((~sound & ~both_zero).sum()),
            cosine_mean=float(cosine.mean()),
            cosine_min=float(cosine.min()),
            sign_mean=float(sign.mean()),
            sign_min=float(sign.min()),
        )


class GradientAgreement(Record, frozen=True):
    """Native against reference gradients of the cross-entropy, each at its own logits.

    Attributes:
        clean: At images of the data set.
        adversarial: At the same images after :data:`PROBE` with native gradients.
    """

    clean: Agreement
    adversarial: Agreement


def compare_gradients(
    session: AttackSession, target: Target, images: Array, labels: Array
) -> GradientAgreement:
    """Compare a runtime's own gradients with its reference's, on clean and on attacked images.

    Args:
        session: Has both.
        target: A runtime with gradients of its own.
        images: float32 [N, C, H, W].
        labels: int64 [N].

    Raises:
        MissingExtraError: torch or Foolbox is not installed.
        RuntimeUnavailableError: The runtime has no gradients of its own.
    """
    for package in ("torch", "foolbox"):
        require(package, "train", "to compare gradients")
    from ccn_deploy.attacks.perform import perform

    native, reference = session.runtime(target), session.runtime(REFERENCE)
    model = session.model(target, True, "native")
    seeds = np.arange(len(images))[:, None]
    attacked = perform(PROBE, model, images, labels, seeds=seeds)
    # Where the attack found no slope it gives no point, and the clean one tells whose fault it is.
    attacked = np.where(np.isfinite(attacked), attacked, images)
    clean, adversarial = (
        Agreement.between(slopes(native, points, labels), slopes(reference, points, labels))
        for points in (images, attacked)
    )
    return GradientAgreement(clean, adversarial)


def slopes(runtime: Runtime, images: Array, labels: Array) -> Array:
    """Return the direction [N, C, H, W] of the gradient of the cross-entropy.

    Its cotangent is softmax less one-hot. Divided by one less the label's probability, which
    changes no direction, that is the softmax over the other classes and -1 at the label: it
    neither rounds to zero nor underflows where the network is sure. NaN stands for what no
    gradient can be taken of: an image outside [0, 1], or logits that are not finite.
    """
    gradients = np.full(images.shape, np.nan)
    flat = images.reshape(len(images), -1)
    legal = np.flatnonzero((flat >= 0).all(axis=1) & (flat <= 1).all(axis=1))  # NaN is neither
    logits = runtime.logits(images[legal]).astype(np.float64)
    legal = legal[np.isfinite(logits).all(axis=1)]
    others = logits[np.isfinite(logits).all(axis=1)]
    rows, chosen = np.arange(len(legal)), labels[legal]
    others[rows, chosen] = -np.inf
    cotangents = np.exp(others - others.max(axis=1, keepdims=True))
    cotangents /= cotangents.sum(axis=1, keepdims=True)
    cotangents[rows, chosen] = -1.0
    _, found = runtime.vjp(images[legal], cotangents[:, None].astype(np.float32))
    gradients[legal] = found[:, 0]
    return gradients
