"""One attack on one batch of images, and what became of every single one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.attacks import ATTACKS, AttackSpec
from ccn_deploy.attacks.source import Gradient
from ccn_deploy.attacks.spec import TRANSFER
from ccn_deploy.data.dataset import Dataset
from ccn_deploy.extras import require
from ccn_deploy.robustness.attack_session import REFERENCE, AttackSession, labels_of
from ccn_deploy.robustness.evidence import NO_LABEL, Evidence, Integers, Sample, Status
from ccn_deploy.robustness.kept_images import Pixels
from ccn_deploy.runtimes.base import Array
from ccn_deploy.targets import Target

TOLERANCE = 1e-6
"""By how much rounding may take a perturbation beyond epsilon."""


@dataclass(frozen=True)
class AttackJob:
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
    job: AttackJob,
    dataset: Dataset,
    indices: Array,
    *,
    positions: Array,
    seed: int,
    reference: Evidence | None = None,
) -> tuple[list[Sample], Pixels]:
    """Attack one batch and score the result where it is meant to fool, and on the reference.

    Args:
        session: Has the runtimes.
        job: What to do.
        dataset: Has the images.
        indices: int64 [N] in the data set.
        positions: int64 [N] in the evaluation, from 0.
        seed: Of the attack; each image has a state of its own, of this and its index.
        reference: What the same attack did to the reference, at least up to these positions; None
            on the reference itself.

    Returns:
        What became of each image, and the images float32 [N, C, H, W]: NaN where the attack was
        not run or returned pixels that are not finite.

    Raises:
        MissingExtraError: torch or Foolbox is not installed.
        RuntimeUnavailableError: A runtime cannot be had, or not with these gradients.
        IntegrityError: The images that were kept of the reference are damaged.
    """
    for package in ("torch", "foolbox"):
        require(package, "train", "to attack")

    images = dataset.images(indices)
    batch = _Batch(
        images=images,
        labels=dataset.labels[indices],
        clean=session.clean_labels(job.target, dataset, indices, images),
        clean_reference=session.clean_labels(REFERENCE, dataset, indices, images),
        positions=positions,
        seeds=np.stack([np.full(len(indices), seed), indices], axis=1),
    )
    theirs = None
    if reference is not None:
        theirs = _Theirs.of(job.spec, images, reference, positions)
    made = _stages(session, job, batch, theirs) if job.spec.stages else _one(session, job, batch)

    linf, l2 = distances(images, made.images)
    rho = relative(images, l2)
    legal = is_legal(job.spec, images, made.images)
    measured = np.isfinite(l2)
    transferred = np.full(len(images), NO_LABEL)
    labels_reference = made.labels
    if theirs is not None:
        # An image that the attack made on both, as FGSM does nearly always, is known by now.
        same = legal & (theirs.images == made.images).all(axis=(1, 2, 3))
        transferred = _labels(session, job.target, job.spec, theirs.images, theirs.legal & ~same)
        transferred[same] = made.labels[same]
        labels_reference = _labels(session, REFERENCE, job.spec, made.images, legal & ~same)
        labels_reference[same] = theirs.labels[same]
    kept = np.where(measured[:, None, None, None], made.images, np.float32(np.nan))

    samples = []
    for at, index in enumerate(indices):
        changed = bool(legal[at] and made.labels[at] != batch.clean[at])
        status: Status = "fooled" if changed else "held"
        if batch.clean[at] != batch.labels[at]:
            status = "already-wrong"
        elif not legal[at]:
            status = "invalid"
        stage = made.stage[at]
        samples.append(
            Sample(
                index=int(index),
                label=int(batch.labels[at]),
                clean=(_optional(batch.clean[at]), _optional(batch.clean_reference[at])),
                adversarial=(_optional(made.labels[at]), _optional(labels_reference[at])),
                status=status,
                linf=float(linf[at]) if measured[at] else None,
                l2=float(l2[at]) if measured[at] else None,
                rho=float(rho[at]) if changed else None,
                queries=_pair(made.queries[at].sum(axis=0)),
                stage=None if stage < 0 else job.spec.stages[stage].name,
                stages=tuple(map(_pair, made.queries[at])) if job.spec.stages else (),
                transferred=_optional(transferred[at]),
            )
        )
    return samples, kept


def distances(images: Pixels, adversarial: Pixels) -> tuple[NDArray[np.float64], ...]:
    """Return the size of each perturbation, in float64: in Linf and in L2, [N] each.

    Args:
        images: float32 [N, C, H, W].
        adversarial: The same; NaN gives NaN.
    """
    difference = np.abs(adversarial.astype(np.float64) - images).reshape(len(images), -1)
    return difference.max(axis=1), np.sqrt(np.square(difference).sum(axis=1))


def relative(images: Pixels, l2: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return perturbations over the norms of their images, [N] (paper, equation 9)."""
    flat = images.astype(np.float64).reshape(len(images), -1)
    return np.asarray(l2 / np.maximum(np.sqrt(np.square(flat).sum(axis=1)), 1e-12))


def is_legal(spec: AttackSpec, images: Pixels, adversarial: Pixels) -> NDArray[np.bool_]:
    """Whether each image is one that the attack may return: finite, in the box, near enough."""
    flat = adversarial.reshape(len(adversarial), -1)
    legal = np.isfinite(flat).all(axis=1)
    if spec.clip:
        legal &= (flat >= 0.0).all(axis=1) & (flat <= 1.0).all(axis=1)
    if spec.epsilon is not None:
        linf, l2 = distances(images, adversarial)
        legal &= (linf if spec.norm == "linf" else l2) <= spec.epsilon + TOLERANCE
    return np.asarray(legal)


@dataclass(frozen=True)
class _Batch:
    """Images without an attack, in columns of length N.

    Attributes:
        images: float32 [N, C, H, W].
        labels: True ones.
        clean: The target's; ``clean_reference`` the reference's.
        positions: In the evaluation.
        seeds: int64 [N, 2], what makes each image's random state.
    """

    images: Pixels
    labels: Integers
    clean: Integers
    clean_reference: Integers
    positions: Integers
    seeds: Integers


@dataclass(frozen=True)
class _Made:
    """What an attack made of a batch.

    Attributes:
        images: float32 [N, C, H, W], NaN where it made none.
        labels: The target's of the legal images, :data:`NO_LABEL` elsewhere.
        queries: int64 [N, S, 2] by stage; one stage where there are none.
        stage: Place of the stage whose image fooled the target, int64 [N]; else -1.
    """

    images: Pixels
    labels: Integers
    queries: Integers
    stage: Integers

    @classmethod
    def nothing(cls, batch: _Batch, stages: int) -> _Made:
        n = len(batch.images)
        return cls(
            images=np.full_like(batch.images, np.nan),
            labels=np.full(n, NO_LABEL),
            queries=np.zeros((n, stages, 2), dtype=np.int64),
            stage=np.full(n, -1),
        )


@dataclass(frozen=True)
class _Theirs:
    """What the same attack made on the reference.

    Attributes:
        images: float32 [N, C, H, W], NaN where there is none.
        legal: Which of them count.
        labels: The reference's own, :data:`NO_LABEL` where there is no legal image.
    """

    images: Pixels
    legal: NDArray[np.bool_]
    labels: Integers

    @classmethod
    def of(
        cls, spec: AttackSpec, images: Pixels, reference: Evidence, positions: Integers
    ) -> _Theirs:
        made = reference.adversarial(positions)
        return cls(made, is_legal(spec, images, made), reference.adversarial_runtime[positions])


def _one(session: AttackSession, job: AttackJob, batch: _Batch) -> _Made:
    """Run an attack without stages."""
    # A bounded attack on an image that is wrong already shows nothing. The smallest perturbation
    # that changes the label is defined for it all the same: it leaves the label given to it.
    # On the reference, that is its own label: an image to transfer crosses that one's boundary.
    spec, clean = job.spec, batch.clean
    start = clean
    if spec.epsilon is not None:
        attacked = clean == batch.labels
    else:
        if job.gradient == "transfer":
            start = batch.clean_reference
        attacked = (clean >= 0) & (start >= 0)
    made = _Made.nothing(batch, 1)
    rows = np.flatnonzero(attacked)
    made.images[rows], made.queries[rows, 0] = _run(session, job, batch, rows, start)
    # The attack's own word for success is not asked for: what counts is one more forward pass.
    legal = is_legal(spec, batch.images, made.images)
    made.labels[:] = _labels(session, job.target, spec, made.images, legal)
    return made


def _stages(session: AttackSession, job: AttackJob, batch: _Batch, theirs: _Theirs | None) -> _Made:
    """Run the stages of an attack, each on the images that still hold.

    What a stage found counts within the whole attack's bound. An image that nothing fools keeps
    what the first stage with gradients made of it that is legal; if none is, nothing was shown.
    """
    made = _Made.nothing(batch, len(job.spec.stages))
    right = batch.clean == batch.labels
    for place, stage in enumerate(job.spec.stages):
        holding = right & (made.stage < 0)
        if stage.part is not None:
            holding &= batch.positions < stage.part
        shown = stage.name != TRANSFER and ATTACKS[stage.name].knowledge == "gradients"
        found, labels = np.full_like(batch.images, np.nan), np.full(len(right), NO_LABEL)
        if stage.name != TRANSFER:
            rows = np.flatnonzero(holding)
            run = _run(session, replace(job, spec=stage), batch, rows, batch.clean)
            found[rows], made.queries[rows, place] = run
            legal = is_legal(job.spec, batch.images, found)
            labels = _labels(session, job.target, job.spec, found, legal)
        elif theirs is not None:
            legal, found = holding & theirs.legal, theirs.images
            labels = _labels(session, job.target, job.spec, found, legal)
            made.queries[legal, place, 0] = 1
        else:
            continue
        fooled = legal & (labels != batch.clean)
        made.stage[fooled] = place
        kept = fooled
        if shown:
            kept = kept | (legal & np.isnan(made.images).any(axis=(1, 2, 3)))
        made.images[kept], made.labels[kept] = found[kept], labels[kept]
    return made


def _run(
    session: AttackSession, job: AttackJob, batch: _Batch, rows: Integers, start: Integers
) -> tuple[Pixels, Integers]:
    """Attack some rows of a batch, each to leave the label in ``start``.

    Returns:
        Images float32 [n, C, H, W], and queries int64 [n, 2] for logits and for gradients.
    """
    from ccn_deploy.attacks.passes import QueryCounter
    from ccn_deploy.attacks.perform import perform

    spec = job.spec
    counted = QueryCounter(session.model(job.target, spec.clip, job.gradient), len(rows))
    images = perform(spec, counted, batch.images[rows], start[rows], seeds=batch.seeds[rows])
    return images, np.stack([counted.queries.forward, counted.queries.backward], axis=1)


def _labels(
    session: AttackSession,
    target: Target,
    spec: AttackSpec,
    images: Pixels,
    legal: NDArray[np.bool_],
) -> Integers:
    """Return a target's labels of the legal images, :data:`NO_LABEL` elsewhere."""
    found = np.full(len(images), NO_LABEL)
    if legal.any():
        found[legal] = labels_of(session.runtime(target, spec.clip), images[legal])
    return found


def _pair(queries: Integers) -> tuple[int, int]:
    return int(queries[0]), int(queries[1])


def _optional(label: Any) -> int | None:
    return int(label) if label >= 0 else None
