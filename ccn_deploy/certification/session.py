"""One run of the claims: evidence collected when first needed, judged as the commands judge it.

Knows nothing of pytest.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from ccn_deploy.attacks.spec import AttackSpec
from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.certification.copies import TemporaryCopy, writable
from ccn_deploy.certification.findings import ClaimText, Finding
from ccn_deploy.data import DataOptions, Dataset
from ccn_deploy.data.options import DEFAULT
from ccn_deploy.errors import CcnDeployError, IntegrityError, StorageError, UsageError
from ccn_deploy.evaluation import evaluation_data
from ccn_deploy.extras import require
from ccn_deploy.parity.collect import ParityRequest
from ccn_deploy.parity.collect import collect as collect_parity
from ccn_deploy.parity.evidence import KINDS
from ccn_deploy.parity.invariance import DETERMINISTIC
from ccn_deploy.parity.judge import ParityResult
from ccn_deploy.parity.judge import judge as judge_parity
from ccn_deploy.parity.tolerances import tolerance_for
from ccn_deploy.robustness import (
    Evidence,
    Measurement,
    Pair,
    RobustnessRequest,
    RobustnessResult,
)
from ccn_deploy.robustness import collect as collect_robustness
from ccn_deploy.robustness import judge as judge_robustness
from ccn_deploy.robustness.attack_session import REFERENCE
from ccn_deploy.robustness.collect import Progress, missing
from ccn_deploy.robustness.judge import MAX_DROP
from ccn_deploy.robustness.options import AttackOptions, parse_recheck, rechecked
from ccn_deploy.robustness.recheck import Recheck
from ccn_deploy.robustness.thresholds import Threshold, parse_max_drop, thresholds_of
from ccn_deploy.runtimes import RuntimeOptions
from ccn_deploy.targets import Role, Target
from ccn_deploy.verdict import Verdict

if TYPE_CHECKING:
    from ccn_deploy.exporters.rederive import Rederived

log = logging.getLogger("ccn_deploy.certification")
"""Progress, for ``pytest --log-cli-level=INFO``."""

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What to claim, of which bundle.

    Attributes:
        bundle: Path of the bundle.
        runtime: A name in :data:`ccn_deploy.targets.RUNTIMES`.
        precision: Of the deployed graph.
        max_drop: How much accuracy the runtime may lose to the reference, as it was typed.
        min_robust: What must be left under attacks, as it was typed.
        min_accuracy: What accuracy must be without one, as it was typed.
        recheck: How many images of evidence that was read to ask again about, as it was typed.
        samples: Images to attack.
        parity_samples: Images of each kind to compare with the reference; verify-parity's own
            choice if None.
        parity_layers: Whether to compare every layer, too; they explain, and are no claim.
        seed: Of selection and attacks.
        attack: What to attack with.
        dataset: Name or path; the one the network was trained on if None.
        data_dir: Where the files of a named data set are.
        data: How images are made of a directory's or an .npz file's.
        threads: CPU threads; the runtime's own choice if None.

    Raises:
        UsageError: One of them means nothing.
    """

    bundle: Path
    runtime: str = "onnxruntime-cpu"
    precision: str = "fp32"
    max_drop: str = f"{MAX_DROP}"
    min_robust: Sequence[str] = ()
    min_accuracy: str | None = None
    recheck: str | None = None
    samples: int = RobustnessRequest.samples
    parity_samples: int | None = None
    parity_layers: bool = False
    seed: int = 0
    attack: AttackOptions = field(default_factory=AttackOptions)
    dataset: str | None = None
    data_dir: Path | None = None
    data: DataOptions = DEFAULT
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        Target(self.runtime, self.precision)
        tolerance_for(self.precision)
        _ = self.allowed, self.again
        for name, count in (("--ccn-samples", self.samples), ("--ccn-threads", self.threads)):
            if count is not None and count < 1:
                raise UsageError(f"{name} {count} is not a count.", "Give 1 or more.")
        _ = self.suite

    @property
    def allowed(self) -> float:
        """The drop that is allowed, a share."""
        return parse_max_drop(self.max_drop, "--ccn-max-drop")

    @property
    def again(self) -> int | Literal["all"] | None:
        """How many images of evidence that was read to ask again about; None for a tenth."""
        return parse_recheck(self.recheck, "--ccn-recheck")

    @property
    def thresholds(self) -> tuple[Threshold, ...]:
        """What must be left whatever the reference leaves."""
        return thresholds_of(self.min_robust, self.min_accuracy, "--ccn-")

    @property
    def suite(self) -> tuple[AttackSpec, ...]:
        """The attacks at their strengths."""
        return self.attack.suite(self.thresholds)


class Certification:
    """The claims about a bundle, and the evidence as far as it is there.

    Args:
        options: What to claim.
        progress: Told what is being measured and how far it is; logged if None.

    Raises:
        NotABundleError: There is no bundle. A damaged one is no error here: that it is intact is
            a claim.
    """

    def __init__(self, options: Options, progress: Progress | None = None) -> None:
        self._options = options
        self._tell: Progress = _log if progress is None else progress
        self._say = ClaimText(options.bundle, options.runtime, options.precision)
        self._fresh: frozenset[tuple[AttackSpec, Target]] = frozenset()
        self._bundle = _Once(partial(open_bundle, options.bundle))
        self._copy = _Once(lambda: TemporaryCopy.of(self._bundle()))
        self._lineage = _Once(self._rederived)
        self._images = _Once(self._evaluation_data)
        self._parity = _Once(self._judged_parity)
        self._robustness = _Once(self._judged_robustness)
        with contextlib.suppress(IntegrityError):
            self._bundle()

    @property
    def note(self) -> str:
        """What a reader of the results should know; empty if nothing."""
        if not self._copy.done:
            return ""
        return (
            f"{self._options.bundle} cannot be written to: evidence was kept for this run only, "
            "and will be collected again by the next."
        )

    @property
    def options(self) -> Options:
        """What is claimed, of which bundle."""
        return self._options

    @property
    def target(self) -> Target:
        """What the claims are about."""
        return Target(self._options.runtime, self._options.precision)

    def lineage(self) -> tuple[Rederived, ...]:
        """Return what became of every file when it was derived again."""
        return self._lineage()

    def parity_result(self) -> ParityResult:
        """Return how the runtime computes the reference's function."""
        return self._parity()

    def missing(self) -> dict[tuple[AttackSpec, Target], int]:
        """Return which evidence is not whole, and how many images it has."""
        return missing(self._bundle(), self._request())

    def told_measured(self, which: Collection[tuple[AttackSpec, Target]]) -> None:
        """Take note that other processes of this run measured evidence, which is then as fresh."""
        self._fresh = frozenset(which)

    def measure(self, spec: AttackSpec) -> None:
        """Collect the evidence of one attack; what is there already is left as it is."""
        request = replace(self._request(), attacks=(spec,), diagnose=False)
        collect_robustness(self._bundle(), request, self._tell)

    def robustness_result(self) -> RobustnessResult:
        """Return how the runtime stands up to the attacks."""
        return self._robustness()

    def claims(self) -> Iterator[tuple[str, Callable[[], Finding]]]:
        """Yield the name of each claim and what judges it; nothing is measured by this."""
        target = self._say.target
        yield "intact[bundle]", self.intact
        for path in self._graphs():
            yield f"derived[{path}]", partial(self.derived, path)
        for kind in KINDS:
            yield f"parity[{target}-{kind}]", partial(self.parity, kind)
        yield f"batch-invariant[{target}]", self.batch_invariant
        yield f"deterministic[{target}]", self.deterministic
        yield f"accurate[{target}]", self.accurate
        yield f"sane[{target}]", self.sane
        for spec in self._options.suite:
            if spec.clip:  # outside the box is for comparison with the paper, and not judged
                yield f"no-worse[{spec.label}]", partial(self.no_worse, spec)
        for threshold in self._options.thresholds:
            if threshold.attack is not None:
                yield f"robust[{threshold.label}]", partial(self.robust, threshold)

    def intact(self) -> Finding:
        """Judge whether every file of the bundle is the one that was exported."""
        manifest = self._bundle().manifest
        return Finding(
            Verdict.PASS,
            f"{len(manifest.files)} files, manifest {manifest.digest}",
            "every SHA-256 as in the manifest",
        )

    def derived(self, path: str) -> Finding:
        """Judge whether a graph is what its pass makes of its sources, byte for byte."""
        return self._say.derived(next(file for file in self._lineage() if file.path == path))

    def parity(self, kind: str) -> Finding:
        """Judge whether the runtime computes the reference's logits and slopes on a kind of input.

        What is said of images near a kink, which are judged together, counts for each of theirs.
        """
        result = self._parity()
        findings = [f for f in result.inputs if getattr(f.row, "kind", None) == kind]
        gradients = [f for f in result.gradients or () if f.row.kind == kind]
        near = any(finding.row.slopes.near for finding in gradients)
        return self._say.parity(findings, result.policy, gradients, result.kinks if near else None)

    def batch_invariant(self) -> Finding:
        """Judge whether an image's answer is the same whatever stands beside it."""
        result = self._parity()
        findings = [f for f in result.invariance if f.name != DETERMINISTIC]
        return self._say.parity(findings, result.policy)

    def deterministic(self) -> Finding:
        """Judge whether the same images give the same answer again, bit by bit."""
        result = self._parity()
        findings = [f for f in result.invariance if f.name == DETERMINISTIC]
        return self._say.parity(findings, result.policy)

    def accurate(self) -> Finding:
        """Judge whether the runtime is as accurate as the reference, and as required."""
        result = self._robustness()
        tests = [test for test in result.thresholds if test.threshold.attack is None]
        return self._say.accurate(result, tests)

    def sane(self) -> Finding:
        """Judge whether the numbers of the evaluation bear a verdict at all."""
        return self._say.sane(self._robustness())

    def no_worse(self, spec: AttackSpec) -> Finding:
        """Judge whether the runtime holds under an attack as well as the reference does."""
        result = self._robustness()
        if spec.epsilon is None:
            minimal = next(row for row in result.minimal if row.spec == spec)
            return self._say.minimal(result, minimal)
        return self._say.bounded(result, next(r for r in result.bounded if r.spec == spec))

    def robust(self, threshold: Threshold) -> Finding:
        """Judge whether as much is left under an attack as is required."""
        result = self._robustness()
        test = next(test for test in result.thresholds if test.threshold == threshold)
        return self._say.threshold(result, test)

    def _graphs(self) -> list[str]:
        """Return the paths of all graphs; none of a damaged bundle, whose manifest says nothing."""
        try:
            files = self._bundle().manifest.files
        except IntegrityError:
            return []
        return [file.path for file in files if file.role in (Role.FORWARD, Role.GRADIENT)]

    def _rederived(self) -> tuple[Rederived, ...]:
        for module in ("torch", "safetensors", "onnx"):
            require(module, "train", "to derive the graphs again")
        from ccn_deploy.exporters.rederive import rederive

        return rederive(self._bundle(), lambda path: self._tell(f"deriving {path} again", 0, 1))

    def _judged_parity(self) -> ParityResult:
        options = self._options
        request = ParityRequest(
            dataset=self._images(),
            runtime=options.runtime,
            precision=options.precision,
            samples=options.parity_samples,
            per_layer=options.parity_layers,
            seed=options.seed,
            threads=options.threads,
        )
        evidence = self._measured(
            lambda bundle: collect_parity(bundle, request, progress=self._tell)
        )
        return judge_parity(evidence)

    def _request(self) -> RobustnessRequest:
        options = self._options
        return RobustnessRequest(
            dataset=self._images(),
            runtime=options.runtime,
            precision=options.precision,
            attacks=options.suite,
            samples=options.samples,
            seed=options.seed,
            options=RuntimeOptions(threads=options.threads),
        )

    def _judged_robustness(self) -> RobustnessResult:
        options, request = self._options, self._request()

        def measure(bundle: Bundle) -> tuple[Measurement, Recheck | None]:
            measurement = self._freshened(collect_robustness(bundle, request, self._tell))
            return measurement, rechecked(bundle, request, measurement, options.again)

        measurement, again = self._measured(measure)
        return judge_robustness(
            measurement,
            options.allowed,
            options.thresholds,
            epsilons=options.attack.linf,
            recheck=again,
        )

    def dataset(self) -> Dataset:
        """Return what everything is measured on."""
        return self._images()

    def _freshened(self, measurement: Measurement) -> Measurement:
        def freshened(spec: AttackSpec, target: Target, side: Evidence) -> Evidence:
            return replace(side, origin="measured") if (spec, target) in self._fresh else side

        pairs = (
            Pair(
                pair.spec,
                freshened(pair.spec, REFERENCE, pair.reference),
                freshened(pair.spec, self.target, pair.runtime),
            )
            for pair in measurement.pairs
        )
        return replace(measurement, pairs=tuple(pairs))

    def _evaluation_data(self) -> Dataset:
        options = self._options
        data = evaluation_data(self._bundle(), options.dataset, options.data_dir, options.data)
        for note in data.notes:
            log.warning("%s", note)
        return data

    def _measured(self, measure: Callable[[Bundle], T]) -> T:
        """Measure on the bundle, or on a copy of it if it cannot keep evidence."""
        bundle = self._bundle()
        try:
            return measure(bundle)
        except StorageError:
            if writable(bundle.evidence):
                raise
            return measure(self._copy().bundle)


class _Once(Generic[T]):
    """Makes something at the first call and remembers it, an error of ours included."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: list[T] = []
        self._error: CcnDeployError | None = None

    @property
    def done(self) -> bool:
        """Whether it was made."""
        return bool(self._made)

    def __call__(self) -> T:
        """Return it, or raise what went wrong the first time."""
        if self._error is not None:
            raise self._error
        if not self._made:
            try:
                self._made.append(self._make())
            except CcnDeployError as error:
                self._error = error
                raise
        return self._made[0]


def _log(what: str, done: float, total: float) -> None:
    log.info("%s: %.0f %%", what, 100 * done / total if total else 100.0)
