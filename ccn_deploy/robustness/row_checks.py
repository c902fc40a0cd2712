"""Whether what evidence says can be: rows against themselves, the selection and the attack.

A seal shows that nobody changed a byte by mistake; anybody can compute a new one. What is checked
here needs no image and no runtime; :mod:`ccn_deploy.robustness.recheck` asks them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from ccn_deploy.attacks.spec import TRANSFER, AttackSpec
from ccn_deploy.data.dataset import Dataset
from ccn_deploy.errors import IntegrityError
from ccn_deploy.robustness.attack_job import TOLERANCE, AttackJob
from ccn_deploy.robustness.attack_session import REFERENCE
from ccn_deploy.robustness.evidence import NO_LABEL, Evidence
from ccn_deploy.robustness.non_inferiority import Mask

_ROUNDING = 1e-9
"""Of distances that are computed in float64."""

Check = tuple[str, Mask]
"""What cannot be, said of an image; and of which rows it is so."""


def check_rows(evidence: Evidence, job: AttackJob, dataset: Dataset, seed: int) -> None:
    """Refuse evidence with a row that this attack on these images cannot give.

    Args:
        evidence: What was read.
        job: What it is of.
        dataset: Whose images were attacked.
        seed: Of their selection.

    Raises:
        IntegrityError: Names the first such image.
    """
    wanted = dataset.order(seed)[: len(evidence)]
    refuse(evidence, "is not the one that the selection gives", evidence.index != wanted)
    refuse(evidence, "has another label in the data", evidence.label != dataset.labels[wanted])
    if not len(evidence):
        return
    # One after another: later checks rest on what earlier ones refuse.
    for why, bad in itertools.chain(
        _labels(evidence, len(dataset.class_names)),
        _outcomes(evidence, job.spec),
        _distances(evidence, job.spec, math.prod(dataset.input_shape)),
        _queries(evidence, job),
        _reference(evidence) if job.target == REFERENCE else (),
        _stages(evidence, job),
    ):
        refuse(evidence, why, bad)


def check_pair(reference: Evidence, runtime: Evidence) -> None:
    """Refuse evidence of a runtime that does not go with that of its reference.

    Raises:
        IntegrityError: Names the first image of which the two speak differently.
    """
    foreign = (runtime.transferred != NO_LABEL) & ~np.isfinite(reference.l2)
    refuse(runtime, "has a label for an image that the reference's evidence has not", foreign)
    differ = runtime.clean_reference != reference.clean_runtime
    # Batches of other sizes may round otherwise.
    if differ.sum() > max(1, len(runtime) // 100):
        refuse(runtime, "has another label than in the reference's own evidence", differ)


def refuse(evidence: Evidence, why: str, bad: Mask) -> None:
    """Raise if there is a bad row.

    Args:
        evidence: Has the rows.
        why: What is said of the image; completes "image 7 ...".
        bad: Mask of the rows.

    Raises:
        IntegrityError: Names the first bad image, by its index in the data set.
    """
    if not bad.any():
        return
    name = "" if evidence.path is None else f" {evidence.path.name}"
    raise IntegrityError(
        f"The evidence{name} says what cannot be: image {evidence.index[bad.argmax()]} {why} "
        f"({int(bad.sum())} of {len(evidence)} rows).",
        "" if evidence.path is None else f"Delete {evidence.path} and measure again.",
    )


def _labels(e: Evidence, classes: int) -> Iterator[Check]:
    for column in (
        e.clean_runtime, e.clean_reference, e.adversarial_runtime, e.adversarial_reference,
        e.transferred,
    ):  # fmt: skip
        yield "has a label that is no class", column >= classes
    wrong = e.clean_runtime != e.label
    yield (
        "is wrong without an attack, or is not, against its status",
        wrong != _is(e, "already-wrong"),
    )
    changed = np.isfinite(e.rho)
    kept = e.adversarial_runtime == e.clean_runtime
    yield "held with its label changed", _is(e, "held") & ~kept
    yield "was fooled with its label kept", changed & kept
    answered = e.adversarial_runtime != NO_LABEL
    yield "changed its label at no distance", answered & ~kept & ~changed
    silent = ~answered & (e.adversarial_reference == NO_LABEL)
    yield "has labels for an image that is not legal", _is(e, "invalid") & ~silent


def _outcomes(e: Evidence, spec: AttackSpec) -> Iterator[Check]:
    measured, changed = np.isfinite(e.l2), np.isfinite(e.rho)
    yield "has one distance without the other", measured != np.isfinite(e.linf)
    yield "has no distance from what was made of it", (_legal(e) | changed) & ~measured
    yield "was fooled, or was not, against its rho", _is(e, "fooled") & ~changed
    yield "was fooled, or was not, against its rho", changed & (_is(e, "held") | _is(e, "invalid"))
    if spec.epsilon is not None:
        touched = measured | changed | (e.adversarial_runtime != NO_LABEL)
        touched |= e.adversarial_reference != NO_LABEL
        yield "was attacked though it was wrong before", _is(e, "already-wrong") & touched


def _distances(e: Evidence, spec: AttackSpec, pixels: int) -> Iterator[Check]:
    side, more = math.sqrt(pixels), 1 + _ROUNDING
    yield "has distances of no image", (e.linf > e.l2 * more) | (e.l2 > e.linf * side * more)
    # No image in [0, 1] is longer than the diagonal of the box.
    yield "has a rho that its distance rules out", e.rho * side * more < e.l2
    if spec.clip:
        yield "left [0, 1]", _legal(e) & (e.linf > 1)
    if spec.epsilon is not None:
        size = e.linf if spec.norm == "linf" else e.l2
        beyond = _legal(e) & (size > spec.epsilon + TOLERANCE)
        yield f"is further than epsilon {spec.epsilon:g} allows", beyond


def _queries(e: Evidence, job: AttackJob) -> Iterator[Check]:
    attacked = e.clean_runtime == e.label
    if job.spec.epsilon is None:
        attacked = e.clean_runtime != NO_LABEL
        if job.gradient == "transfer":
            attacked &= e.clean_reference != NO_LABEL
    asked = e.forward > 0
    if not job.spec.stages:  # a stage may be run on a part only
        yield "was attacked without a query", attacked & ~asked
    yield "has queries though it was not attacked", ~attacked & (asked | (e.backward > 0))
    yield "was attacked, or was not, against its distance", np.isfinite(e.l2) & ~attacked


def _reference(e: Evidence) -> Iterator[Check]:
    yield "has two labels of one network", e.clean_runtime != e.clean_reference
    yield "has two labels of one network", e.adversarial_runtime != e.adversarial_reference
    yield "is transferred from the reference to itself", e.transferred != NO_LABEL


def _stages(e: Evidence, job: AttackJob) -> Iterator[Check]:
    stages = job.spec.stages
    count = (e.stage_queries >= 0).all(axis=2).sum(axis=1)
    yield "has not the stages of its attack", count != len(stages)
    if not stages:
        yield "has a stage of no attack", e.stage != ""
        return
    names = [stage.name for stage in stages]
    yield "was fooled, or was not, against its stage", (e.stage != "") != _is(e, "fooled")
    yield "was fooled by a stage that its attack has not", ~np.isin(e.stage, ["", *names])
    total = np.stack([e.forward, e.backward], axis=1)
    yield "has other queries than its stages", (e.stage_queries.sum(axis=1) != total).any(axis=1)
    place = np.array([names.index(name) if name else len(names) for name in e.stage.tolist()])
    right = e.clean_runtime == e.label
    for at, stage in enumerate(stages):
        due = right & (place >= at)
        if stage.part is not None:
            due &= np.arange(len(e)) < stage.part
        asked = (e.stage_queries[:, at] > 0).any(axis=1)
        if stage.name == TRANSFER:  # where the reference's evidence has an image
            due &= asked | (e.transferred != NO_LABEL)
            of_another = (place == at) & (e.adversarial_runtime != e.transferred)
            yield "has another label than the image it was fooled by", of_another
        yield f"was asked at stage {stage.name}, or was not, against its course", asked != due


def _is(e: Evidence, status: str) -> Mask:
    return np.asarray(e.status == status)


def _legal(e: Evidence) -> Mask:
    return _is(e, "fooled") | _is(e, "held")
