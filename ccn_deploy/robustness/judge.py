"""From evidence to a verdict: pure arithmetic on columns, with intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.attacks import AttackSpec
from ccn_deploy.robustness.collect import Measurement, Pair
from ccn_deploy.robustness.evidence import Evidence
from ccn_deploy.robustness.laboratory import REFERENCE
from ccn_deploy.statistics import clopper_pearson, drop_upper_bound, samples_needed
from ccn_deploy.verdict import Verdict

SCHEMA = "ccn-deploy/robustness/1"
MAX_DROP = 0.01
DISTANCES = (0.1, 0.2, 0.3, 0.4, 0.5)
"""The paper's max-residue-ratios d (section 5.1, equation 8, and table 2)."""

FLATTERY = 0.1
"""FGSM accuracy this far above PGD's at the same epsilon is worth a warning."""

_ROUNDING = 1e-12
"""Slack of a comparison of two ratios that may be equal."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Share:
    """A proportion with its exact 95 % interval.

    Attributes:
        count: Successes.
        n: Trials.
    """

    count: int
    n: int

    @classmethod
    def of(cls, successes: Mask) -> Share:
        """Count the true ones."""
        return cls(int(successes.sum()), len(successes))

    @property
    def value(self) -> float:
        """The proportion; 0 without trials."""
        return self.count / self.n if self.n else 0.0

    @property
    def ci95(self) -> tuple[float, float]:
        """Clopper and Pearson's two-sided interval."""
        return clopper_pearson(self.count, self.n)


@dataclass(frozen=True)
class Gate:
    """Whether the runtime is worse than the reference by more than is allowed, paired.

    Attributes:
        lost: Images that only the reference gets right.
        gained: Images that only the runtime gets right.
        n: All images.
        max_drop: What is allowed.
        invalid: Images for which an attack returned no legal image, on either side.
    """

    lost: int
    gained: int
    n: int
    max_drop: float
    invalid: int = 0

    @classmethod
    def between(cls, reference: Mask, runtime: Mask, max_drop: float, invalid: int = 0) -> Gate:
        """Compare the same images on both."""
        lost, gained = reference & ~runtime, runtime & ~reference
        return cls(int(lost.sum()), int(gained.sum()), len(reference), max_drop, invalid)

    @property
    def drop(self) -> float:
        """Accuracy of the reference less that of the runtime."""
        return (self.lost - self.gained) / self.n if self.n else 0.0

    @property
    def upper95(self) -> float:
        """One-sided 95 % upper bound of the drop."""
        return drop_upper_bound(self.lost, self.gained, self.n)

    @property
    def verdict(self) -> Verdict:
        """Fail if the drop itself is too large, pass only if its upper bound is small enough."""
        if self.invalid:
            return Verdict.INCONCLUSIVE
        if self.drop > self.max_drop + _ROUNDING:
            return Verdict.FAIL
        if self.upper95 <= self.max_drop + _ROUNDING:
            return Verdict.PASS
        return Verdict.INCONCLUSIVE

    @property
    def reason(self) -> str:
        """One sentence for a gate that did not pass; empty for one that did."""
        if self.verdict is Verdict.PASS:
            return ""
        if self.invalid:
            return f"the attack returned {self.invalid} images that are no legal ones"
        if self.verdict is Verdict.FAIL:
            return (
                f"{self.lost} of {self.n} images lost and {self.gained} gained, a drop of "
                f"{100 * self.drop:.2f} points; {100 * self.max_drop:g} are allowed"
            )
        needed = self.needed()
        more = (
            f"about {needed} images would, at this rate" if needed else "no number of images will"
        )
        return (
            f"{self.n} images ({self.lost} lost, {self.gained} gained) bound the drop only by "
            f"{100 * self.upper95:.2f} points, not by {100 * self.max_drop:g}; {more}"
        )

    def needed(self) -> int | None:
        """Return how many images would pass if they went on like these; None if none would."""
        if self.max_drop <= max(self.drop, 0.0):
            return None
        if self.lost == 0 and self.gained == 0:
            return samples_needed(self.max_drop)
        for factor in (1.1**k for k in range(1, 73)):  # to a thousand times as many
            n = math.ceil(self.n * factor)
            lost, gained = round(self.lost * factor), round(self.gained * factor)
            if drop_upper_bound(lost, gained, n) <= self.max_drop:
                return n
        return None

    def document(self) -> dict[str, Any]:
        """Return this as JSON."""
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            "lost": self.lost,
            "gained": self.gained,
            "drop": self.drop,
            "drop_upper95": self.upper95,
            "max_drop": self.max_drop,
        }


@dataclass(frozen=True)
class BoundedRow:
    """One attack at one epsilon, or no attack at all.

    Attributes:
        name: ``"clean"``, ``"fgsm"`` or ``"pgd"``.
        norm: In which epsilon is measured; None without an attack.
        epsilon: Strength; 0 without an attack.
        reference: Share of images that are right and stay right on the reference.
        runtime: The same on the runtime.
        already_wrong: Images that the runtime gets wrong without an attack.
        invalid: Attacks on the runtime that returned no legal image.
        flips: Images that one of the two gets right and the other does not.
        gate: The comparison.
        seconds: What the two attacks took.
    """

    name: str
    norm: str | None
    epsilon: float
    reference: Share
    runtime: Share
    already_wrong: int
    invalid: int
    flips: int
    gate: Gate
    seconds: float

    def document(self) -> dict[str, Any]:
        """Return this as JSON."""
        return {
            "attack": self.name,
            "norm": self.norm,
            "epsilon": self.epsilon,
            "n": self.runtime.n,
            "already_wrong": self.already_wrong,
            "invalid": self.invalid,
            "reference": _share("robust_accuracy", self.reference),
            "runtime": _share("robust_accuracy", self.runtime),
            "verdict_flips": self.flips,
            **self.gate.document(),
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class MinimalSide:
    """What the smallest perturbations say of one target (paper, equations 8 and 9).

    Attributes:
        already_wrong: Images wrong without an attack.
        failed: Images for which nothing was found; their rho stands for infinity.
        failed_correct: Those among them that are right without an attack.
        rho: Of the images where something was found.
        rho_correct: Those among them that are right without an attack.
        accuracy_at: By d: share that is right, and not fooled within ``rho <= d``.
    """

    already_wrong: int
    failed: int
    failed_correct: int
    rho: NDArray[np.float64]
    rho_correct: NDArray[np.float64]
    accuracy_at: dict[float, Share]

    @property
    def rho_adv(self) -> float | None:
        """Mean rho over the images where something was found (paper, equation 9)."""
        return _mean(self.rho)

    def document(self) -> dict[str, Any]:
        """Return this as JSON."""
        return {
            "already_wrong": self.already_wrong,
            "failed": self.failed,
            "rho_adv_mean": _mean(self.rho),
            "rho_adv_median": _median(self.rho),
            "accuracy_at": {f"{d:g}": share.value for d, share in self.accuracy_at.items()},
            "accuracy_at_ci95": {
                f"{d:g}": list(share.ci95) for d, share in self.accuracy_at.items()
            },
            "without_already_wrong": {
                "failed": self.failed_correct,
                "rho_adv_mean": _mean(self.rho_correct),
                "rho_adv_median": _median(self.rho_correct),
            },
        }


@dataclass(frozen=True)
class MinimalRow:
    """An attack that looks for the smallest perturbation.

    Attributes:
        name: ``"deepfool"``.
        norm: In which it is small.
        clip: Whether images stayed in [0, 1].
        n: Images.
        reference: The reference, attacked itself.
        runtime: The runtime, attacked itself.
        invalid: Attacks on the runtime that returned no legal image.
        flips: Images on whose verdict the two differ at some d.
        gates: One comparison per d.
        seconds: What the two attacks took.
        unclipped: The same attack without the box, for comparison with the paper; not judged.
    """

    name: str
    norm: str
    clip: bool
    n: int
    reference: MinimalSide
    runtime: MinimalSide
    invalid: int
    flips: int
    gates: dict[float, Gate]
    seconds: float
    unclipped: MinimalRow | None = None

    @property
    def gate(self) -> Gate:
        """The gate that decides: the first that fails, else the first in doubt, else the worst."""
        rank = [Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.PASS]
        return min(self.gates.values(), key=lambda gate: (rank.index(gate.verdict), -gate.upper95))

    def document(self) -> dict[str, Any]:
        """Return this as JSON."""
        document = {
            "attack": self.name,
            "norm": self.norm,
            "epsilon": None,
            "clip": self.clip,
            "n": self.n,
            "already_wrong": self.runtime.already_wrong,
            "failed": self.runtime.failed,
            "invalid": self.invalid,
            "reference": self.reference.document(),
            "runtime": self.runtime.document(),
            "verdict_flips": self.flips,
            "seconds": round(self.seconds, 3),
        }
        if self.clip:
            document |= self.gate.document()
            document["gates"] = {f"{d:g}": gate.document() for d, gate in self.gates.items()}
        if self.unclipped is not None:
            document["unclipped"] = self.unclipped.document()
        return document


@dataclass(frozen=True)
class RobustnessResult:
    """A judged measurement.

    Attributes:
        measurement: What was judged.
        max_drop: The allowed drop of accuracy.
        clean: Accuracy without an attack.
        bounded: Attacks with an epsilon, in order of the request.
        minimal: Attacks without.
        warnings: What a reader of the numbers should know.
    """

    measurement: Measurement
    max_drop: float
    clean: BoundedRow
    bounded: tuple[BoundedRow, ...]
    minimal: tuple[MinimalRow, ...]
    warnings: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """All gates together: of the clean row, of every epsilon, and of DeepFool in the box."""
        return Verdict.all_of(gate.verdict for gate in self.gates.values())

    @property
    def gates(self) -> dict[str, Gate]:
        """Every gate that is judged, by the name of its row."""
        named = {_title(row): row.gate for row in (self.clean, *self.bounded)}
        for row in self.minimal:
            if row.clip:
                named |= {f"{row.name} at d = {d:g}": gate for d, gate in row.gates.items()}
        return named

    @property
    def reasons(self) -> tuple[str, ...]:
        """One sentence for every gate that did not pass."""
        return tuple(f"{name}: {gate.reason}" for name, gate in self.gates.items() if gate.reason)

    def document(self) -> dict[str, Any]:
        """Return the JSON document of schema ``ccn-deploy/robustness/1``."""
        measurement = self.measurement
        agreement = measurement.agreement
        return {
            "schema": SCHEMA,
            "verdict": self.verdict.value,
            "reasons": list(self.reasons),
            "warnings": list(self.warnings),
            "runtime": measurement.runtime,
            "precision": measurement.precision,
            "reference": "-".join(REFERENCE),
            "gradient": measurement.gradient,
            "gradient_agreement": agreement.document() if agreement is not None else None,
            "dataset": measurement.dataset,
            "samples": measurement.n,
            "seed": measurement.seed,
            "max_drop": self.max_drop,
            "clean": {
                "n": self.clean.runtime.n,
                "reference": _share("accuracy", self.clean.reference),
                "runtime": _share("accuracy", self.clean.runtime),
                "verdict_flips": self.clean.flips,
                **self.clean.gate.document(),
            },
            "attacks": [
                *(row.document() for row in self.bounded),
                *(row.document() for row in self.minimal),
            ],
        }


def judge(measurement: Measurement, max_drop: float = MAX_DROP) -> RobustnessResult:
    """Judge a measurement: may this runtime stand in for the reference?

    Args:
        measurement: From :func:`ccn_deploy.robustness.collect`.
        max_drop: By how much its accuracy may be below the reference's, in every row.
    """
    if not measurement.pairs:
        raise ValueError("nothing was measured")
    bounded = [_bounded(p, max_drop) for p in measurement.pairs if p.spec.epsilon is not None]
    smallest = [(p.spec, _minimal(p, max_drop)) for p in measurement.pairs if not p.spec.epsilon]
    clean = _clean(measurement.pairs[0], max_drop)
    return RobustnessResult(
        measurement=measurement,
        max_drop=max_drop,
        clean=clean,
        bounded=tuple(bounded),
        minimal=_nested(smallest),
        warnings=tuple(_warnings(measurement, clean, bounded)),
    )


def _clean(pair: Pair, max_drop: float) -> BoundedRow:
    reference = pair.reference.clean_runtime == pair.reference.label
    runtime = pair.runtime.clean_runtime == pair.runtime.label
    return BoundedRow(
        name="clean",
        norm=None,
        epsilon=0.0,
        reference=Share.of(reference),
        runtime=Share.of(runtime),
        already_wrong=int((~runtime).sum()),
        invalid=0,
        flips=int((reference != runtime).sum()),
        gate=Gate.between(reference, runtime, max_drop),
        seconds=0.0,
    )


def _bounded(pair: Pair, max_drop: float) -> BoundedRow:
    # Wrong before the attack counts as not robust, and so does a runtime that was not attacked.
    reference, runtime = pair.reference.status == "held", pair.runtime.status == "held"
    invalid, invalid_reference = _invalid(pair.runtime), _invalid(pair.reference)
    return BoundedRow(
        name=pair.spec.name,
        norm=pair.spec.norm,
        epsilon=float(pair.spec.epsilon or 0.0),
        reference=Share.of(reference),
        runtime=Share.of(runtime),
        already_wrong=int((pair.runtime.status == "already-wrong").sum()),
        invalid=invalid,
        flips=int((reference != runtime).sum()),
        gate=Gate.between(reference, runtime, max_drop, invalid + invalid_reference),
        seconds=pair.reference.seconds + pair.runtime.seconds,
    )


def _minimal(pair: Pair, max_drop: float) -> MinimalRow:
    robust = {d: (_robust_at(pair.reference, d), _robust_at(pair.runtime, d)) for d in DISTANCES}
    invalid, invalid_reference = _invalid(pair.runtime), _invalid(pair.reference)
    differ = np.any([reference != runtime for reference, runtime in robust.values()], axis=0)
    return MinimalRow(
        name=pair.spec.name,
        norm=pair.spec.norm,
        clip=pair.spec.clip,
        n=len(pair.runtime),
        reference=_side(pair.reference),
        runtime=_side(pair.runtime),
        invalid=invalid,
        flips=int(differ.sum()),
        gates={
            d: Gate.between(reference, runtime, max_drop, invalid + invalid_reference)
            for d, (reference, runtime) in robust.items()
        },
        seconds=pair.reference.seconds + pair.runtime.seconds,
    )


def _nested(rows: Sequence[tuple[AttackSpec, MinimalRow]]) -> tuple[MinimalRow, ...]:
    """Put the unclipped run of an attack below its clipped one."""
    unclipped = {spec.name: row for spec, row in rows if not spec.clip}
    clipped = [
        MinimalRow(**{**row.__dict__, "unclipped": unclipped.pop(spec.name, None)})
        for spec, row in rows
        if spec.clip
    ]
    return (*clipped, *unclipped.values())


def _side(evidence: Evidence) -> MinimalSide:
    right = evidence.status != "already-wrong"
    found = np.isfinite(evidence.rho)
    failed = ~found & (evidence.status != "invalid")
    return MinimalSide(
        already_wrong=int((~right).sum()),
        failed=int(failed.sum()),
        failed_correct=int((failed & right).sum()),
        rho=evidence.rho[found],
        rho_correct=evidence.rho[found & right],
        accuracy_at={d: Share.of(_robust_at(evidence, d)) for d in DISTANCES},
    )


def _robust_at(evidence: Evidence, d: float) -> Mask:
    """Right, and the attack failed or needed more than d (paper, equation 8)."""
    far = (evidence.status == "fooled") & (evidence.rho > d)
    return np.asarray((evidence.status == "held") | far)


def _invalid(evidence: Evidence) -> int:
    return int((evidence.status == "invalid").sum())


def _warnings(
    measurement: Measurement, clean: BoundedRow, bounded: Sequence[BoundedRow]
) -> list[str]:
    """Return what the numbers themselves give away about how far to trust them."""
    found: list[str] = []
    if (measurement.runtime, measurement.precision) == REFERENCE:
        found.append("The runtime is the reference itself: nothing is compared.")
    if clean.runtime.count == 0:
        found.append("Every image is wrong before any attack: no robustness was measured.")
    if clean.flips > 0.01 * clean.runtime.n:
        found.append(
            f"Runtime and reference give {clean.flips} clean images different verdicts: gradients "
            "of the reference may mislead an attack on the runtime. See `verify-parity`."
        )
    at = {(row.name, row.epsilon): row.runtime.value for row in bounded}
    for (name, epsilon), accuracy in at.items():
        other = at.get(("pgd", epsilon))
        if name != "fgsm" or other is None:
            continue
        if accuracy - other > FLATTERY:
            found.append(
                f"FGSM flatters this model at epsilon {epsilon:g}: {100 * accuracy:.1f} % "
                f"against {100 * other:.1f} % under PGD. Quote PGD."
            )
        elif other - accuracy > FLATTERY / 10:
            found.append(
                f"PGD found less than FGSM at epsilon {epsilon:g}: {100 * other:.1f} % against "
                f"{100 * accuracy:.1f} %. Its gradients mislead; neither number is a bound."
            )
    for name in dict.fromkeys(row.name for row in bounded):
        rows = sorted((row for row in bounded if row.name == name), key=lambda row: row.epsilon)
        for weak, strong in itertools.pairwise(rows):
            if strong.runtime.value > weak.runtime.value + FLATTERY / 10:
                found.append(
                    f"{name} at epsilon {strong.epsilon:g} leaves more images right than at "
                    f"{weak.epsilon:g}: the attack is not finding what is there."
                )
    strengths = {row.name for row in bounded}
    if strengths and "pgd" not in strengths:
        found.append("No PGD was run: FGSM alone flatters networks like these.")
    return found


def _title(row: BoundedRow) -> str:
    return row.name if row.norm is None else f"{row.name} at epsilon {row.epsilon:g}"


def _share(name: str, share: Share) -> dict[str, Any]:
    return {name: share.value, "ci95": list(share.ci95)}


def _mean(values: NDArray[np.float64]) -> float | None:
    return float(values.mean()) if len(values) else None


def _median(values: NDArray[np.float64]) -> float | None:
    return float(np.median(values)) if len(values) else None
