"""Attack a deployed runtime and its reference, image by image, keeping what happened."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ccn_deploy.attacks import ATTACKS, AttackSpec, suite
from ccn_deploy.attacks.source import GRADIENTS, Gradient, no_gradients, source
from ccn_deploy.bundle import Bundle
from ccn_deploy.certificates.commitment import commitments
from ccn_deploy.data.dataset import Dataset
from ccn_deploy.errors import UsageError
from ccn_deploy.evaluation import check_fits
from ccn_deploy.extras import require
from ccn_deploy.robustness.agreement import PROBE, GradientAgreement
from ccn_deploy.robustness.attack_job import AttackJob, attack
from ccn_deploy.robustness.attack_session import REFERENCE, AttackSession
from ccn_deploy.robustness.cache_key import cache_key, differentiable
from ccn_deploy.robustness.diagnostics import Diagnostics, diagnostics_path
from ccn_deploy.robustness.evidence import (
    SCHEMA,
    Evidence,
    Origin,
    evidence_path,
    read_evidence,
    writing,
)
from ccn_deploy.robustness.row_checks import check_pair, check_rows
from ccn_deploy.runtimes.base import RuntimeOptions
from ccn_deploy.targets import Target


@dataclass(frozen=True)
class RobustnessRequest:
    """What to measure.

    Attributes:
        dataset: Its first ``samples`` images in the order that ``seed`` gives are attacked.
        runtime: A name in :data:`ccn_deploy.targets.RUNTIMES`.
        precision: Of the deployed graph.
        attacks: Each is run on the reference and on the runtime.
        gradient: Where the gradients of attacks on the runtime come from, a name in
            :data:`ccn_deploy.attacks.source.GRADIENTS`; the runtime's own if it has some and else
            the reference's, if None. The reference is always attacked with its own.
        samples: How many images; all if there are fewer.
        seed: Of the selection and of the attacks.
        options: Threads and memory of the runtimes.
        batch: Images attacked at a time; what an interruption loses at most.
        diagnose: Whether to look for signs of hidden slopes, which takes seconds.
    """

    dataset: Dataset
    runtime: str = "onnxruntime-cpu"
    precision: str = "fp32"
    attacks: tuple[AttackSpec, ...] = field(default_factory=suite)
    gradient: Gradient | None = None
    samples: int = 500
    seed: int = 0
    options: RuntimeOptions = field(default_factory=RuntimeOptions)
    batch: int = 100
    diagnose: bool = True

    @property
    def target(self) -> Target:
        """Runtime and precision."""
        return Target(self.runtime, self.precision)

    @property
    def n(self) -> int:
        """How many images are attacked."""
        return min(self.samples, len(self.dataset))


@dataclass(frozen=True)
class Pair:
    """One attack on the reference and on the runtime, each attacked by itself."""

    spec: AttackSpec
    reference: Evidence
    runtime: Evidence

    @property
    def origin(self) -> Origin:
        """Whether all of both was measured by the call that returned it, or some was read."""
        return "measured" if self.sides_read is None else "read"

    @property
    def sides_read(self) -> str | None:
        """Which of the two was read, for the end of a name: empty for both, None for neither."""
        return {
            ("measured", "measured"): None,
            ("read", "measured"): " on the reference",
            ("measured", "read"): " on the runtime",
            ("read", "read"): "",
        }[self.reference.origin, self.runtime.origin]


@dataclass(frozen=True)
class Measurement:
    """All evidence for one runtime.

    Attributes:
        runtime: Name of the runtime.
        precision: Of the deployed graph.
        gradient: Where the gradients of the attacks on the runtime came from, a name in
            :data:`ccn_deploy.attacks.source.GRADIENTS`.
        dataset: Name, split and digest.
        seed: Of the selection and of the attacks.
        n: How many images.
        pairs: One per attack, in order of the request.
        diagnostics: Signs of hidden slopes, on a few images; None if nobody looked.
        diagnosed: The file of those; None likewise.
    """

    runtime: str
    precision: str
    gradient: Gradient
    dataset: dict[str, str]
    seed: int
    n: int
    pairs: tuple[Pair, ...]
    diagnostics: Diagnostics | None = None
    diagnosed: Path | None = None

    @property
    def agreement(self) -> GradientAgreement | None:
        """How well its own and the reference's gradients agree.

        None if it has none of its own, or is its reference.
        """
        native = self.diagnostics.native if self.diagnostics is not None else None
        return None if native is None else native.agreement

    @property
    def target(self) -> str:
        """Runtime and precision, as tables have them."""
        return f"{self.runtime}-{self.precision}"

    @property
    def gradient_source(self) -> str:
        """Where the gradients came from, for people."""
        return f"{self.gradient}, {GRADIENTS[self.gradient]}"


class Progress(Protocol):
    """Told how far a measurement is; see :func:`collect_all`."""

    def __call__(self, what: str, done: float, total: float) -> None:
        """Take note of ``done`` of ``total`` units of work, the current one being ``what``."""
        ...


def collect(
    bundle: Bundle, request: RobustnessRequest, progress: Progress | None = None
) -> Measurement:
    """Return the evidence that a request asks for; see :func:`collect_all`."""
    return collect_all(bundle, [request], progress)[0]


def collect_all(
    bundle: Bundle, requests: Sequence[RobustnessRequest], progress: Progress | None = None
) -> list[Measurement]:
    """Return the evidence that requests ask for, measuring what is not there yet.

    Evidence is kept in the bundle after every batch: interrupted and called again, this goes on
    where it was. A larger request extends what a smaller one left, and the reference is measured
    once for all runtimes. Nothing is measured if one of the requests cannot be, as far as that can
    be told before, and nothing heavy is imported if nothing is missing.

    Args:
        bundle: An open bundle.
        requests: What to measure.
        progress: Called before and after every batch that is measured, with work in rough units
            of one gradient an image; not called at all if everything is there.

    Raises:
        UsageError: A data set that does not fit the bundle, or no samples.
        IntegrityError: Evidence was changed after it was written.
        StorageError: The disk is full or the bundle cannot be written to.
        RuntimeUnavailableError: The runtime cannot be had here, or not in this precision or with
            these gradients.
        EnvironmentUnfitError: The target is on a GPU, and there is none that fits.
        MissingExtraError: Something is to be measured and torch or Foolbox is not installed.
    """
    plans = [_plan(bundle, request) for request in requests]
    collected: Collected = {}
    return [
        _measure(bundle, request, plan, collected, progress)
        for request, plan in zip(requests, plans, strict=True)
    ]


def missing(bundle: Bundle, request: RobustnessRequest) -> dict[tuple[AttackSpec, Target], int]:
    """Return which evidence of a request is not whole, and how many images it has; measure nothing.

    Raises:
        CcnDeployError: As :func:`collect_all`.
    """
    _, jobs = _plan(bundle, request)
    found = {
        (job.spec, job.target): len(
            read_evidence(evidence_path(bundle, header, job.spec.label), header, request.n)
        )
        for job, header in jobs
    }
    return {which: count for which, count in found.items() if count < request.n}


Collected = dict[tuple[Path, int], Evidence]
"""What a call has at hand already, by file and number of images: requests share the reference's."""


def _measure(
    bundle: Bundle,
    request: RobustnessRequest,
    plan: tuple[Gradient, list[Planned]],
    collected: Collected,
    progress: Progress | None,
) -> Measurement:
    gradient, jobs = plan
    n = request.n
    total, done = float(sum(job.spec.cost * n for job, _ in jobs)), 0.0
    found: dict[tuple[AttackSpec, Target], Evidence] = {}
    with AttackSession(bundle, request.options) as session:
        for job, header in jobs:
            spec, target = job.spec, job.target
            # The reference is attacked first: its images are tried on the target.
            reference = None if target == REFERENCE else found[spec, REFERENCE]
            path = evidence_path(bundle, header, spec.label)
            evidence = collected.get((path, n)) or _read(path, header, job, request)
            if len(evidence) < n:
                counts = _extend(session, request, job, header, reference)
                origin: Origin | None = None
                for count in counts:
                    origin = origin or ("read" if count else "measured")
                    if progress is not None:
                        progress(f"{spec.label} on {target}", done + spec.cost * count, total)
                evidence = replace(_read(path, header, job, request), origin=origin or "read")
            if reference is not None:
                check_pair(reference, evidence)
            found[spec, target] = collected[path, n] = evidence
            done += spec.cost * n
        diagnostics, diagnosed = (
            _diagnostics(session, request, gradient) if request.diagnose else (None, None)
        )
    dataset = request.dataset
    return Measurement(
        runtime=request.runtime,
        precision=request.precision,
        gradient=gradient,
        dataset=dataset.identity,
        seed=request.seed,
        n=n,
        pairs=tuple(
            Pair(spec, found[spec, REFERENCE], found[spec, request.target])
            for spec in request.attacks
        ),
        diagnostics=diagnostics,
        diagnosed=diagnosed,
    )


Planned = tuple[AttackJob, dict[str, Any]]
"""An attack on a target, with everything that its evidence depends on."""


def _plan(bundle: Bundle, request: RobustnessRequest) -> tuple[Gradient, list[Planned]]:
    """Return whose gradients the attacks on the runtime use, and everything there is to do."""
    _check(bundle, request)
    gradient = _gradient(bundle, request)
    sources: dict[Target, Gradient] = {REFERENCE: "native", request.target: gradient}
    jobs = [
        AttackJob(spec, target, own) for spec in request.attacks for target, own in sources.items()
    ]
    return gradient, [(job, _header(bundle, request, job)) for job in jobs]


def _read(
    path: Path, header: dict[str, Any], job: AttackJob, request: RobustnessRequest
) -> Evidence:
    """Return the evidence that is there, if it can be.

    Raises:
        IntegrityError: It is damaged, or says what cannot be.
    """
    evidence = read_evidence(path, header, request.n)
    check_rows(evidence, job, request.dataset, request.seed)
    return evidence


def _extend(
    session: AttackSession,
    request: RobustnessRequest,
    job: AttackJob,
    header: dict[str, Any],
    reference: Evidence | None,
) -> Iterator[int]:
    """Measure what is missing of one job, yielding the count of samples after every batch."""
    path = evidence_path(session.bundle, header, job.spec.label)
    order = request.dataset.order(request.seed)
    policies = tuple(found.digest for found in commitments(session.bundle))
    with writing(path, header, policies) as writer:
        yield min(writer.count, request.n)
        while writer.count < request.n:
            # Batches end at multiples of their size, so that resuming meets the same batches.
            end = min((writer.count // request.batch + 1) * request.batch, request.n)
            positions = np.arange(writer.count, end)
            started = time.perf_counter()
            samples, images = attack(
                session,
                job,
                request.dataset,
                order[positions],
                positions=positions,
                seed=request.seed,
                reference=reference,
            )
            writer.append(samples, images, time.perf_counter() - started)
            yield writer.count


def _check(bundle: Bundle, request: RobustnessRequest) -> None:
    if request.samples < 1 or request.batch < 1:
        raise UsageError("No image to attack was asked for.", "Give --samples 1 or more.")
    if not request.attacks:
        raise UsageError("No attack was asked for.", "Give --attack at least once.")
    if request.gradient is not None:
        source(request.gradient)
    check_fits(bundle, request.dataset)


def _gradient(bundle: Bundle, request: RobustnessRequest) -> Gradient:
    """Return the source of gradients to use on the runtime, without opening it.

    Raises:
        RuntimeUnavailableError: Its own are asked for, and it has none.
    """
    if request.target == REFERENCE:
        return "native"  # it is the reference
    native = differentiable(bundle, request.target, device=request.options.device)
    if request.gradient == "native" and not native:
        raise no_gradients(str(request.target))
    return request.gradient or ("native" if native else "reference")


def _diagnostics(
    session: AttackSession, request: RobustnessRequest, gradient: Gradient
) -> tuple[Diagnostics, Path]:
    """Return the signs of hidden slopes, measured if they are not kept yet, and their file."""
    bundle, target, dataset = session.bundle, request.target, request.dataset
    strengths = [spec.epsilon for spec in request.attacks if spec.norm == "linf" and spec.epsilon]
    epsilon = max(strengths, default=PROBE.epsilon or 0.0)
    setting = {
        **_cache_key(bundle, request, target, gradient),
        "samples": request.n,
        "epsilon": epsilon,
        "attack": dict(ATTACKS["pgd"].parameters),
        "training": bundle.card.training,
    }
    path = diagnostics_path(bundle, setting, target)
    kept = Diagnostics.read(path, setting)
    if kept is not None:
        return kept, path
    require("foolbox", "train", "to attack")
    from ccn_deploy.robustness.diagnose import diagnose

    indices = dataset.order(request.seed)[: request.n]
    found = diagnose(
        session, target, gradient, dataset, indices, epsilon=epsilon, seed=request.seed
    )
    found.write(path, setting)
    return found, path


def _header(bundle: Bundle, request: RobustnessRequest, job: AttackJob) -> dict[str, Any]:
    """Return everything that the evidence depends on, without opening a runtime."""
    return {
        "schema": SCHEMA,
        "attack": job.spec.document(),
        **_cache_key(bundle, request, job.target, job.gradient),
        "batch": request.batch,
        "shape": list(request.dataset.input_shape),
    }


def _cache_key(
    bundle: Bundle, request: RobustnessRequest, target: Target, gradient: Gradient
) -> dict[str, Any]:
    device = request.options.device
    return cache_key(bundle, target, gradient, request.dataset, seed=request.seed, device=device)
