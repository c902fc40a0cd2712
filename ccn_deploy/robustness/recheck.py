"""Whether evidence that was read is true: kept images scored again, and attacks repeated.

Digests show that a file is what somebody wrote. Whether a runtime answered so, only the runtime can
say. Which images are asked is decided after the evidence lies there, so nobody can have prepared
those alone.

* **Scored again**: the distances of a kept image, from it and from the data set's; and what target
  and reference say of both. It exposes rows that no runtime answered.
* **Attacked again**: a kept image that does not fool anything is easily made, and says nothing
  about the attack. The same attack with the same random states must end as it did, up to an image
  at the edge that rounding moves, since a batch of another size may round otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ccn_deploy.bundle import Bundle
from ccn_deploy.errors import MissingExtraError
from ccn_deploy.extras import require
from ccn_deploy.records import Count, Record
from ccn_deploy.robustness.attack_job import (
    AttackJob,
    attack,
    distances,
    is_legal,
    relative,
)
from ccn_deploy.robustness.attack_session import REFERENCE, AttackSession
from ccn_deploy.robustness.collect import Measurement, RobustnessRequest
from ccn_deploy.robustness.evidence import NO_LABEL, Evidence, Integers
from ccn_deploy.robustness.kept_images import Pixels
from ccn_deploy.robustness.non_inferiority import Mask
from ccn_deploy.robustness.row_checks import refuse
from ccn_deploy.targets import Target

REPEATED = 32
"""Images of one evidence that are attacked again at most."""

EFFORT = 200.0
"""Gradients an evidence that attacking again may take, roughly; a few images are, whatever that
takes."""

FEWEST = 8

ROUNDING = {"fp32": 1e-4}
"""By how much of the span of the logits a batch of another size may move them, by precision."""

LOW_PRECISION = 2e-2
"""The same where it is not said."""


class Recheck(Record, frozen=True):
    """What was asked again, and found to be as the evidence has it.

    Attributes:
        seed: Chose the images.
        images: How many were chosen.
        evidence: How many files of evidence they were looked up in.
        scored: Rows whose distances and labels were computed again.
        repeated: Rows that were attacked again.
        moved: Those among them that ended otherwise; few enough to be rounding.
        reference: Whether the reference's labels were asked, too; it needs torch, as repeating an
            attack does.
    """

    seed: Count
    images: Count
    evidence: Count
    scored: Count
    repeated: Count
    moved: Count
    reference: bool


def default_count(measurement: Measurement) -> int:
    """Return how many images to ask for: a tenth, or none if nothing of this was read."""
    if all(pair.origin == "measured" for pair in measurement.pairs):
        return 0
    return -(-measurement.n // 10)


def recheck(
    bundle: Bundle,
    request: RobustnessRequest,
    measurement: Measurement,
    count: int | Literal["all"],
    rng: np.random.Generator | None = None,
) -> Recheck:
    """Ask runtimes and attacks again about images of the evidence that was read.

    What this process has just measured is not asked again.

    Args:
        bundle: An open bundle.
        request: What was asked for.
        measurement: What :func:`ccn_deploy.robustness.collect` returned for it.
        count: How many images to choose at random, or ``"all"``.
        rng: Chooses; from the system's entropy if None.

    Raises:
        IntegrityError: The evidence says what is not so; names the first such image.
        RuntimeUnavailableError: The runtime cannot be had here.
    """
    rng = rng or np.random.default_rng(int.from_bytes(os.urandom(16), "big"))
    seed = int(rng.integers(2**53))
    rng = np.random.default_rng(seed)
    n = measurement.n if count == "all" else min(count, measurement.n)
    rows = np.sort(rng.permutation(measurement.n)[:n])
    scored = repeated = moved = evidence = 0
    with_torch = _has_torch()
    if n:
        with AttackSession(bundle, request.options, read_programs=with_torch) as session:
            for job, found, reference in _read(request, measurement):
                if job.target == REFERENCE and not with_torch:
                    continue
                evidence += 1
                asked = _Asked(session, job, request, found, reference, with_torch)
                asked.score(rows)
                scored += n
                if with_torch:
                    again, other = asked.repeat(rng.permutation(rows))
                    repeated, moved = repeated + again, moved + other
    return Recheck(
        seed=seed,
        images=n,
        evidence=evidence,
        scored=scored,
        repeated=repeated,
        moved=moved,
        reference=with_torch,
    )


def _has_torch() -> bool:
    try:
        for package in ("torch", "foolbox"):
            require(package, "train", "to attack")
    except MissingExtraError:
        return False
    return True


def _read(
    request: RobustnessRequest, measurement: Measurement
) -> Iterator[tuple[AttackJob, Evidence, Evidence | None]]:
    """Return what of a measurement was read, the reference's own evidence beside the target's."""
    for pair in measurement.pairs:
        if pair.reference.origin == "read":
            yield AttackJob(pair.spec, REFERENCE, "native"), pair.reference, None
        if request.target != REFERENCE and pair.runtime.origin == "read":
            job = AttackJob(pair.spec, request.target, measurement.gradient)
            yield job, pair.runtime, pair.reference


@dataclass(frozen=True)
class _Asked:
    """One evidence under question.

    Attributes:
        session: Has the runtimes.
        job: What the evidence is of.
        request: Has the data.
        evidence: What is asked about.
        reference: The reference's own, for evidence of a target.
        with_torch: Whether the reference can be asked.
    """

    session: AttackSession
    job: AttackJob
    request: RobustnessRequest
    evidence: Evidence
    reference: Evidence | None
    with_torch: bool

    def score(self, rows: Integers) -> None:
        """Compute distances and labels again, and compare.

        Raises:
            IntegrityError: They are others.
        """
        for at in range(0, len(rows), self.request.batch):
            self._score(rows[at : at + self.request.batch])

    def _score(self, rows: Integers) -> None:
        e, spec = self.evidence, self.job.spec
        images = self.request.dataset.images(e.index[rows])
        kept = e.adversarial(rows)
        linf, l2 = distances(images, kept)
        for name, column, again in (("Linf", e.linf, linf), ("L2", e.l2, l2)):
            self._refuse(
                rows,
                f"is at another {name} distance than its kept image",
                ~np.isclose(column[rows], again, rtol=1e-6, atol=1e-9, equal_nan=True),
            )
        rho, changed = relative(images, l2), np.isfinite(e.rho[rows])
        wrong = changed & ~np.isclose(e.rho[rows], rho, rtol=1e-6)
        self._refuse(rows, "has another rho than its kept image", wrong)
        legal = is_legal(spec, images, kept)
        counted = (e.status[rows] == "fooled") | (e.status[rows] == "held")
        self._refuse(rows, "has a kept image that the attack may not return", counted & ~legal)

        kept[~legal] = np.nan
        target = self.job.target
        self._compare(target, rows, images, e.clean_runtime, "clean image")
        self._compare(target, rows, kept, e.adversarial_runtime, "kept image")
        if self.reference is None:
            return
        if self.with_torch:
            self._compare(REFERENCE, rows, images, e.clean_reference, "clean image")
            self._compare(REFERENCE, rows, kept, e.adversarial_reference, "kept image")
        theirs = self.reference.adversarial(rows)
        theirs[~is_legal(spec, images, theirs)] = np.nan
        self._compare(target, rows, theirs, e.transferred, "reference's kept image")

    def _compare(
        self, target: Target, rows: Integers, images: Pixels, column: Integers, what: str
    ) -> None:
        """Compare labels with those that a target gives now; where there is no image, none may."""
        kept = column[rows]
        differ = kept != NO_LABEL
        asked = np.flatnonzero(np.isfinite(images).all(axis=(1, 2, 3)))
        if len(asked):
            logits = self.session.runtime(target, self.job.spec.clip).logits(images[asked])
            differ[asked] = ~_possible(logits, kept[asked], target)
        self._refuse(rows, f"has another label of its {what} than {target} gives", differ)

    def repeat(self, rows: Integers) -> tuple[int, int]:
        """Attack images again, as many of those that were attacked as the attack's cost allows.

        Args:
            rows: In the order in which they may be taken.

        Returns:
            How many were attacked, and how many of them ended otherwise.

        Raises:
            IntegrityError: More did than rounding explains.
        """
        e, spec = self.evidence, self.job.spec
        limit = int(np.clip(EFFORT / max(spec.cost, 1.0), FEWEST, REPEATED))
        rows = np.sort(rows[e.forward[rows] > 0][:limit])
        if not len(rows):
            return 0, 0
        samples, _ = attack(
            self.session,
            self.job,
            self.request.dataset,
            e.index[rows],
            positions=rows,
            seed=self.request.seed,
            reference=self.reference,
        )
        again = Evidence.of(samples)
        other = again.status != e.status[rows]
        if spec.epsilon is None:  # the distance is the result
            other |= ~np.isclose(again.rho, e.rho[rows], rtol=0.05, equal_nan=True)
        if other.sum() > max(1, len(rows) // 10):
            why = f"does not end as it did under the same attack ({spec.label}, {self.job.target})"
            self._refuse(rows, why, other)
        return len(rows), int(other.sum())

    def _refuse(self, rows: Integers, why: str, bad: Mask) -> None:
        whole = np.zeros(len(self.evidence), dtype=bool)
        whole[rows] = bad
        refuse(self.evidence, why, whole)


def _possible(logits: Pixels, labels: Integers, target: Target) -> Mask:
    """Whether labels [n] are those of logits [n, classes], or as good as any up to rounding."""
    finite = np.isfinite(logits).all(axis=1)
    rows = np.arange(len(labels))
    chosen = logits[rows, labels]  # of a label that is not there, the last, and not used
    span = logits.max(axis=1) - logits.min(axis=1)
    rounding = ROUNDING.get(target.precision, LOW_PRECISION)
    with np.errstate(invalid="ignore"):  # of logits that are not finite
        near = logits.max(axis=1) - chosen <= rounding * span
    return np.asarray(np.where(finite, (labels != NO_LABEL) & near, labels == NO_LABEL))
