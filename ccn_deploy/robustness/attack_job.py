"""One attack on one batch of images, and what became of every single one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.attacks import AttackSpec
from ccn_deploy.attacks.source import Gradient
from ccn_deploy.data.dataset import Dataset
from ccn_deploy.extras import require
from ccn_deploy.robustness.attack_session import REFERENCE, AttackSession
from ccn_deploy.robustness.evidence import Picture, Sample, Status
from ccn_deploy.runtimes.base import Array, Runtime
from ccn_deploy.targets import Target

TOLERANCE = 1e-6
"""By how much rounding may take a perturbation beyond epsilon."""

KEPT_IMAGES = 8
"""How many attacked images an evidence file keeps, for people to look at."""


@dataclass(frozen=True)
class Trial:
    """One attack on one target.

    Attributes:
        spec: The attack.
        target: What it is meant to fool.
        gradient: Where its gradients come from.
    """

    spec: AttackSpec
    target: Target
    gradient: Gradient


def attack(
    session: AttackSession,
    trial: Trial,
    dataset: Dataset,
    indices: Array,
    *,
    positions: Array,
    seed: int,
) -> list[Sample]:
    """Attack one batch and score the result where it is meant to fool, and on the reference.

    Args:
        session: Has the runtimes.
        trial: What to do.
        dataset: Has the images.
        indices: int64 [N] in the data set.
        positions: int64 [N] in the evaluation; the first images are kept.
        seed: Of the attack; each image has a state of its own, of this and its index.

    Raises:
        MissingExtraError: torch or Foolbox is not installed.
        RuntimeUnavailableError: A runtime cannot be had, or not with these gradients.
    """
    for package in ("torch", "foolbox"):
        require(package, "train", "to attack")
    from ccn_deploy.attacks.passes import QueryCounter
    from ccn_deploy.attacks.perform import perform

    spec = trial.spec
    target = session.runtime(trial.target, spec.clip)
    reference = session.runtime(REFERENCE, spec.clip)
    images = dataset.images(indices)
    labels = dataset.labels[indices]
    clean = _labels(target, images)
    clean_reference = _labels(reference, images)

    # A bounded attack on an image that is wrong already shows nothing. The smallest perturbation
    # that changes the label is defined for it all the same: it leaves the label given to it.
    # On the reference, that is its own label: an image to transfer crosses that one's boundary.
    bounded = spec.epsilon is not None
    start = clean_reference if trial.gradient == "transfer" and not bounded else clean
    attacked = (clean == labels) if bounded else (clean >= 0) & (start >= 0)
    adversarial = np.full_like(images, np.nan)
    model = session.model(trial.target, spec.clip, trial.gradient)
    counted = QueryCounter(model, int(attacked.sum()))
    adversarial[attacked] = perform(
        spec,
        counted,
        images[attacked],
        start[attacked],
        seeds=np.stack([np.full(len(indices), seed), indices], axis=1)[attacked],
    )

    queries = np.zeros((len(images), 2), dtype=np.int64)
    queries[attacked] = np.stack([counted.queries.forward, counted.queries.backward], axis=1)

    difference = np.abs(adversarial.astype(np.float64) - images).reshape(len(images), -1)
    linf = difference.max(axis=1)
    l2 = np.sqrt(np.square(difference).sum(axis=1))
    size = np.sqrt(np.square(images.astype(np.float64)).reshape(len(images), -1).sum(axis=1))
    legal = _legal(spec, adversarial, linf, l2)

    # The attack's own word for success is not asked for: what counts is one more forward pass.
    fooled = np.full(len(images), -1)
    fooled_reference = np.full(len(images), -1)
    if legal.any():
        fooled[legal] = _labels(target, adversarial[legal])
        fooled_reference[legal] = _labels(reference, adversarial[legal])

    samples = []
    for at, index in enumerate(indices):
        changed = bool(legal[at] and fooled[at] != clean[at])
        status: Status = "fooled" if changed else "held"
        if clean[at] != labels[at]:
            status = "already-wrong"
        elif not legal[at]:
            status = "invalid"
        measured = bool(attacked[at] and np.isfinite(l2[at]))
        keep = legal[at] and positions[at] < KEPT_IMAGES
        samples.append(
            Sample(
                index=int(index),
                label=int(labels[at]),
                clean=(_optional(clean[at]), _optional(clean_reference[at])),
                adversarial=(_optional(fooled[at]), _optional(fooled_reference[at])),
                status=status,
                linf=float(linf[at]) if measured else None,
                l2=float(l2[at]) if measured else None,
                rho=float(l2[at] / max(size[at], 1e-12)) if changed else None,
                queries=(int(queries[at, 0]), int(queries[at, 1])),
                image=Picture.of(_pixels(adversarial[at])) if keep else None,
            )
        )
    return samples


def _legal(spec: AttackSpec, adversarial: Array, linf: Array, l2: Array) -> NDArray[np.bool_]:
    """Whether each image is one that the attack may return: finite, in the box, near enough."""
    flat = adversarial.reshape(len(adversarial), -1)
    legal = np.isfinite(flat).all(axis=1)
    if spec.clip:
        legal &= (flat >= 0.0).all(axis=1) & (flat <= 1.0).all(axis=1)
    if spec.epsilon is not None:
        legal &= (linf if spec.norm == "linf" else l2) <= spec.epsilon + TOLERANCE
    return np.asarray(legal)


def _labels(runtime: Runtime, images: Array) -> NDArray[np.int64]:
    """Return the labels a runtime gives, -1 where its logits are not finite."""
    logits = runtime.logits(np.ascontiguousarray(images))
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)


def _optional(label: Any) -> int | None:
    return int(label) if label >= 0 else None


def _pixels(image: Array) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.rint(np.clip(image, 0.0, 1.0) * 255).astype(np.uint8)
    return pixels
