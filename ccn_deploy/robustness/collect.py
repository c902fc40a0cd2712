"""Attack a deployed runtime and its reference, image by image, keeping what happened."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.attacks import AttackSpec, suite
from ccn_deploy.bundle import Bundle
from ccn_deploy.data.dataset import Dataset
from ccn_deploy.errors import UsageError, unknown
from ccn_deploy.evaluation import check_fits
from ccn_deploy.extras import require
from ccn_deploy.robustness.evidence import (
    SCHEMA,
    Evidence,
    Sample,
    Status,
    evidence_path,
    read_evidence,
    writing,
)
from ccn_deploy.runtimes import RUNTIMES, open_runtime
from ccn_deploy.runtimes.base import Runtime, RuntimeOptions

if TYPE_CHECKING:
    from foolbox.models.pytorch import PyTorchModel

    from ccn_deploy.models import Classifier

REFERENCE = ("torch", "fp32")
"""The target that deployed ones are compared with: the PyTorch network, attacked itself."""

GRADIENT: Literal["twin"] = "twin"
"""Where gradients come from; see :mod:`ccn_deploy.attacks.surrogate`."""

TOLERANCE = 1e-6
"""By how much rounding may take a perturbation beyond epsilon."""

KEPT_IMAGES = 8
"""How many attacked images an evidence file keeps, for people to look at."""

Array = NDArray[Any]


@dataclass(frozen=True)
class RobustnessRequest:
    """What to measure.

    Attributes:
        dataset: Its first ``samples`` images in the order that ``seed`` gives are attacked.
        runtime: A name in :data:`ccn_deploy.runtimes.RUNTIMES`.
        precision: Of the deployed graph.
        attacks: Each is run on the reference and on the runtime.
        samples: How many images; all if there are fewer.
        seed: Of the selection and of the attacks.
        options: Threads and memory of the runtimes.
        batch: Images attacked at a time; what an interruption loses at most.
    """

    dataset: Dataset
    runtime: str = "onnxruntime-cpu"
    precision: str = "fp32"
    attacks: tuple[AttackSpec, ...] = field(default_factory=suite)
    samples: int = 500
    seed: int = 0
    options: RuntimeOptions = field(default_factory=RuntimeOptions)
    batch: int = 100

    @property
    def target(self) -> tuple[str, str]:
        """Runtime and precision."""
        return self.runtime, self.precision

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


@dataclass(frozen=True)
class Measurement:
    """All evidence for one runtime.

    Attributes:
        runtime: Name of the runtime.
        precision: Of the deployed graph.
        gradient: Where the gradients of the attacks on the runtime came from.
        dataset: Name, split and digest.
        seed: Of the selection and of the attacks.
        n: How many images.
        pairs: One per attack, in order of the request.
    """

    runtime: str
    precision: str
    gradient: str
    dataset: dict[str, str]
    seed: int
    n: int
    pairs: tuple[Pair, ...]


class Progress(Protocol):
    """Told how far a measurement is; see :func:`collect`."""

    def __call__(self, what: str, done: float, total: float) -> None:
        """Take note of ``done`` of ``total`` units of work, the current one being ``what``."""
        ...


def collect(
    bundle: Bundle, request: RobustnessRequest, progress: Progress | None = None
) -> Measurement:
    """Return the evidence that a request asks for, measuring what is not there yet.

    Evidence is kept in the bundle after every batch: interrupted and called again, this goes on
    where it was. A larger request extends what a smaller one left, and the reference is measured
    once for all runtimes. Nothing heavy is imported if nothing is missing.

    Args:
        bundle: An open bundle.
        request: What to measure.
        progress: Called before and after every batch that is measured, with work in rough units
            of one gradient an image; not called at all if everything is there.

    Raises:
        UsageError: A data set that does not fit the bundle, or no samples.
        IntegrityError: Evidence was changed after it was written.
        StorageError: The disk is full or the bundle cannot be written to.
        RuntimeUnavailableError: The runtime cannot be had here.
        MissingExtraError: Something is to be measured and torch or Foolbox is not installed.
    """
    _check(bundle, request)
    jobs = [
        _Job(spec, target, _header(bundle, request, spec, target))
        for spec in request.attacks
        for target in dict.fromkeys((REFERENCE, request.target))
    ]
    n = request.n
    total, done = float(sum(_cost(job.spec) * n for job in jobs)), 0.0
    found: dict[tuple[str, tuple[str, str]], Evidence] = {}
    with _Laboratory(bundle, request.options) as laboratory:
        for job in jobs:
            what = f"{job.spec.label} on {'-'.join(job.target)}"
            path = evidence_path(bundle.evidence, job.header, job.spec.label)
            evidence = read_evidence(path, job.header, n)
            if len(evidence) < n:
                for count in _extend(laboratory, request, job):
                    if progress is not None:
                        progress(what, done + _cost(job.spec) * count, total)
                evidence = read_evidence(path, job.header, n)
            found[job.spec.label, job.target] = evidence
            done += _cost(job.spec) * n
    dataset = request.dataset
    return Measurement(
        runtime=request.runtime,
        precision=request.precision,
        gradient=GRADIENT,
        dataset={"name": dataset.name, "split": dataset.split, "digest": dataset.digest},
        seed=request.seed,
        n=n,
        pairs=tuple(
            Pair(spec, found[spec.label, REFERENCE], found[spec.label, request.target])
            for spec in request.attacks
        ),
    )


@dataclass(frozen=True)
class _Job:
    """One attack on one target."""

    spec: AttackSpec
    target: tuple[str, str]
    header: dict[str, Any]


def _extend(laboratory: _Laboratory, request: RobustnessRequest, job: _Job) -> Iterator[int]:
    """Measure what is missing of one job, yielding the count of samples after every batch."""
    path = evidence_path(laboratory.bundle.evidence, job.header, job.spec.label)
    order = request.dataset.order(request.seed)
    with writing(path, job.header) as writer:
        yield min(writer.count, request.n)
        while writer.count < request.n:
            # Batches end at multiples of their size, so that resuming meets the same batches.
            end = min((writer.count // request.batch + 1) * request.batch, request.n)
            positions = np.arange(writer.count, end)
            started = time.perf_counter()
            samples = _attack(laboratory, request, job, positions, order[positions])
            writer.append(samples, time.perf_counter() - started)
            yield writer.count


def _attack(
    laboratory: _Laboratory,
    request: RobustnessRequest,
    job: _Job,
    positions: Array,
    indices: Array,
) -> list[Sample]:
    """Attack one batch and score the result where it is meant to fool, and on the reference."""
    for package in ("torch", "foolbox"):
        require(package, "train", "to attack")
    from ccn_deploy.attacks.perform import perform

    spec = job.spec
    target = laboratory.runtime(job.target, spec.clip)
    reference = laboratory.runtime(REFERENCE, spec.clip)
    images = request.dataset.images(indices)
    labels = request.dataset.labels[indices]
    clean = _labels(target, images)
    clean_reference = _labels(reference, images)

    # A bounded attack on an image that is wrong already shows nothing. The smallest perturbation
    # that changes the label is defined for it all the same: it leaves the label given to it.
    attacked = (clean == labels) if spec.epsilon is not None else (clean >= 0)
    adversarial = np.full_like(images, np.nan)
    adversarial[attacked] = perform(
        spec,
        laboratory.model(job.target, spec.clip),
        images[attacked],
        clean[attacked],
        seeds=np.stack([np.full(len(indices), request.seed), indices], axis=1)[attacked],
    )

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
                image=_pixels(adversarial[at]) if keep else None,
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


class _Laboratory:
    """Runtimes and models, opened when first needed and closed together."""

    def __init__(self, bundle: Bundle, options: RuntimeOptions) -> None:
        self.bundle = bundle
        self._options = options
        self._open: dict[tuple[tuple[str, str], bool], Runtime] = {}
        self._models: dict[tuple[tuple[str, str], bool], PyTorchModel] = {}
        self._twin: Classifier | None = None
        self._stack = ExitStack()

    def __enter__(self) -> _Laboratory:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def runtime(self, target: tuple[str, str], clip: bool) -> Runtime:
        """Return a runtime; for an attack that leaves the box, one that takes such images."""
        if (target, clip) not in self._open:
            options = replace(self._options, check_range=clip)
            runtime = open_runtime(self.bundle, *target, options)
            self._open[target, clip] = self._stack.enter_context(runtime)
        return self._open[target, clip]

    def model(self, target: tuple[str, str], clip: bool) -> PyTorchModel:
        """Return what Foolbox attacks: the twin itself, or a runtime with the twin's gradients."""
        from ccn_deploy.attacks.surrogate import foolbox_model, twin_model
        from ccn_deploy.runtimes.torch_runtime import load_twin

        if self._twin is None:
            self._stack.enter_context(_torch_threads(self._options.threads))
            self._twin = load_twin(self.bundle)
        if (target, clip) not in self._models:
            self._models[target, clip] = (
                twin_model(self._twin)
                if target == REFERENCE
                else foolbox_model(self.runtime(target, clip), self._twin, gradient=GRADIENT)
            )
        return self._models[target, clip]


@contextmanager
def _torch_threads(threads: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(bundle: Bundle, request: RobustnessRequest) -> None:
    if request.runtime not in RUNTIMES:
        raise unknown("runtime", request.runtime, RUNTIMES)
    if request.samples < 1 or request.batch < 1:
        raise UsageError("No image to attack was asked for.", "Give --samples 1 or more.")
    if not request.attacks:
        raise UsageError("No attack was asked for.", "Give --attack at least once.")
    check_fits(bundle, request.dataset)


def _header(
    bundle: Bundle, request: RobustnessRequest, spec: AttackSpec, target: tuple[str, str]
) -> dict[str, Any]:
    """Return everything that the evidence depends on, without opening a runtime."""
    runtime, precision = target
    torch_only = runtime.startswith("torch")
    dataset = request.dataset
    return {
        "schema": SCHEMA,
        "target": {"runtime": runtime, "precision": precision},
        "attack": spec.document(),
        "gradient": GRADIENT,
        "bundle": {
            "weights": bundle.file("weights").sha256,
            "graph": None if torch_only else bundle.file("forward", precision).sha256,
        },
        "dataset": {"name": dataset.name, "split": dataset.split, "digest": dataset.digest},
        "selection": {"rule": "permutation", "seed": request.seed},
        "seed": request.seed,
        "batch": request.batch,
        "versions": {
            "torch": _version("torch"),
            "foolbox": _version("foolbox"),
            **({} if torch_only else {"onnxruntime": _version("onnxruntime", "onnxruntime-gpu")}),
        },
        "machine": platform.machine(),
    }


def _version(*distributions: str) -> str | None:
    """Return the version of the first of these that is installed, without importing it."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _cost(spec: AttackSpec) -> float:
    """Return roughly how many gradients an image takes, to tell the time left."""
    if spec.name == "pgd":
        return float(spec.parameters["steps"]) * float(spec.parameters["restarts"])
    if spec.name == "deepfool":
        return 5.0 * float(spec.parameters["candidates"])
    return 1.0
