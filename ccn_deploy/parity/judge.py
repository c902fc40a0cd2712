"""From evidence to a verdict: pure, fast, and the same for every caller. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ccn_deploy.parity.comparison import Deviation, finite_or_none
from ccn_deploy.parity.evidence import InputRow, LayerRow, ParityEvidence
from ccn_deploy.parity.gradients import GradientEvidence, GradientRow, KinkRow
from ccn_deploy.parity.invariance import DETERMINISTIC, Claim
from ccn_deploy.parity.tolerances import Tolerance, tolerance_for
from ccn_deploy.records import document
from ccn_deploy.verdict import Verdict

SCHEMA = "ccn-deploy/parity/2"

MAX_NEAR = 2.0
"""Bound on the median error near kinks, in what rounding typically makes there."""

LEAST_NEAR = 5
"""Images near a kink from which on they are judged together. A median of fewer says little: a
single one may exceed what eight draws of rounding found."""


@dataclass(frozen=True)
class Finding:
    """What the policy says of one row.

    Attributes:
        row: The evidence.
        reasons: Why it is not a pass, one phrase each; empty if it passes.
        stated_error: Absolute error the policy allows here.
        blank: Whether the row shows nothing, because all that was to be compared is 0.
    """

    row: InputRow | Claim | LayerRow
    reasons: tuple[str, ...]
    stated_error: float
    blank: bool = False

    @property
    def verdict(self) -> Verdict:
        """Pass; inconclusive if the row shows nothing; fail for any other reason."""
        if self.blank:
            return Verdict.INCONCLUSIVE
        return Verdict.FAIL if self.reasons else Verdict.PASS

    @property
    def subject(self) -> str:
        """The kind of input, the claim or the layer."""
        if isinstance(self.row, Claim):
            return self.row.claim
        return self.row.layer if isinstance(self.row, LayerRow) else self.row.kind

    @property
    def name(self) -> str:
        """What the row is about, for messages."""
        if isinstance(self.row, Claim):
            at = f" (batch of {self.row.batch})" if self.row.batch else ""
            return f"{self.row.claim}{at}"
        if isinstance(self.row, LayerRow):
            return f"{self.row.layer} ({self.row.kind})"
        return f"{self.row.kind} at batch {self.row.batch}"

    def document(self) -> dict[str, Any]:
        """Return the evidence with the verdict beside it."""
        deviation, row = self.row.deviation, document(self.row)
        row |= row.pop("deviation")
        if isinstance(self.row, LayerRow):
            del row["argmax_flips"], row["flips"]  # a layer has no labels
        return {
            **row,
            "relative": finite_or_none(deviation.relative),
            "rounding_units": finite_or_none(deviation.units),
            "stated_error": finite_or_none(self.stated_error),
            "verdict": self.verdict.value,
            "reasons": list(self.reasons),
        }


@dataclass(frozen=True)
class GradientFinding:
    """What the policy says of gradients on one kind of input.

    Attributes:
        row: The evidence.
        reasons: Why it fails, one phrase each; empty if it passes.
    """

    row: GradientRow
    reasons: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """Pass, or fail for any reason."""
        return Verdict.FAIL if self.reasons else Verdict.PASS

    @property
    def subject(self) -> str:
        """The gradients of a kind of input."""
        return f"gradients on {self.row.kind}"

    @property
    def name(self) -> str:
        """What the row is about, for messages."""
        many = f"{self.row.candidates} for each image" if self.row.candidates > 1 else "one alone"
        return f"{self.subject}, {many}"

    def document(self) -> dict[str, Any]:
        """Return the evidence with the verdict beside it."""
        return {
            **document(self.row),
            "relative": finite_or_none(self.row.slopes.relative),
            "verdict": self.verdict.value,
            "reasons": list(self.reasons),
        }


@dataclass(frozen=True)
class KinkFinding:
    """What can be said of all images near a kink.

    Attributes:
        row: The evidence.
        verdict: Inconclusive if no gradient of any image could be judged.
        reasons: Why it is not a pass, one phrase each.
    """

    row: KinkRow
    verdict: Verdict
    reasons: tuple[str, ...]

    subject = name = "gradients near a kink"

    def document(self) -> dict[str, Any]:
        """Return the evidence with the verdict beside it."""
        return {
            **document(self.row),
            "verdict": self.verdict.value,
            "reasons": list(self.reasons),
        }


AnyFinding = Finding | GradientFinding | KinkFinding


@dataclass(frozen=True)
class ParityResult:
    """The judgement of one runtime.

    Attributes:
        evidence: What was judged.
        policy: By what.
        inputs: A finding for each kind and batch.
        invariance: A finding for each claim.
        gradients: A finding for each kind and batch; None if the runtime has no gradients.
        kinks: The finding on all images near a kink; None likewise.
        layers: Findings in order of execution; None if layers were not measured.
    """

    evidence: ParityEvidence
    policy: Tolerance
    inputs: tuple[Finding, ...]
    invariance: tuple[Finding, ...]
    gradients: tuple[GradientFinding, ...] | None
    kinks: KinkFinding | None
    layers: tuple[Finding, ...] | None

    @property
    def verdict(self) -> Verdict:
        """Of logits and gradients under every input and circumstance; layers only explain it."""
        return Verdict.all_of(finding.verdict for finding in self.checks)

    @property
    def checks(self) -> tuple[AnyFinding, ...]:
        """Every finding that the verdict depends on."""
        kinks = () if self.kinks is None else (self.kinks,)
        return (*self.inputs, *self.invariance, *(self.gradients or ()), *kinks)

    @property
    def failures(self) -> tuple[AnyFinding, ...]:
        """Those of them that do not pass."""
        return tuple(finding for finding in self.checks if finding.verdict is not Verdict.PASS)

    @property
    def first_departure(self) -> Finding | None:
        """The first layer, in order of execution, that leaves the policy: its worst finding."""
        departing = [finding for finding in self.layers or () if finding.reasons]
        same = [f for f in departing if f.subject == departing[0].subject]
        return max(same, key=lambda finding: finding.row.deviation.units, default=None)

    def document(self) -> dict[str, Any]:
        """Return the JSON document of the command; no NaN, no infinity (null instead)."""
        told: dict[str, Any] = {
            "schema": SCHEMA,
            "verdict": self.verdict.value,
            "runtime": self.evidence.runtime,
            "precision": self.evidence.precision,
            "inputs": [finding.document() for finding in self.inputs],
            "invariance": [finding.document() for finding in self.invariance],
            "gradients": None
            if self.gradients is None or self.kinks is None
            else {
                "rows": [finding.document() for finding in self.gradients],
                "kinks": self.kinks.document(),
            },
            "policy": self.policy.document(),
            "setting": dict(self.evidence.setting),
        }
        if self.layers is not None:
            first = self.first_departure
            told["layers"] = [finding.document() for finding in self.layers]
            told["first_departure"] = first.subject if first else None
        return told


def judge(evidence: ParityEvidence, policy: Tolerance | None = None) -> ParityResult:
    """Compare evidence with the policy of its precision, or with another.

    Raises:
        UsageError: No policy for that precision.
    """
    policy = policy or tolerance_for(evidence.precision)
    layers, gradients = evidence.layers, evidence.gradients
    return ParityResult(
        evidence=evidence,
        policy=policy,
        inputs=tuple(_finding(row, policy) for row in evidence.inputs),
        invariance=tuple(_finding(claim, policy) for claim in evidence.invariance),
        gradients=None
        if gradients is None
        else tuple(_gradient_finding(row, policy) for row in gradients.rows),
        kinks=None if gradients is None else _kink_finding(gradients),
        layers=None if layers is None else tuple(_finding(row, policy) for row in layers),
    )


def _finding(row: InputRow | Claim | LayerRow, policy: Tolerance) -> Finding:
    deviation = row.deviation
    reasons = _reasons(deviation, policy)
    if isinstance(row, Claim) and row.claim == DETERMINISTIC and row.differing:
        reasons.append(f"{row.differing} logits differ in their bits between runs")
    blank = isinstance(row, InputRow) and row.kind == "clean" and _is_blank(deviation)
    if blank:
        reasons.append("every logit is 0, of the reference as of the runtime: an untrained head?")
    return Finding(row, tuple(reasons), policy.stated_error(deviation.scale), blank)


def _is_blank(deviation: Deviation) -> bool:
    return deviation.scale == 0.0 and deviation.max_abs == 0.0


def _reasons(deviation: Deviation, policy: Tolerance) -> list[str]:
    """Say everything that is wrong, the gravest first."""
    reasons = []
    if not math.isfinite(deviation.scale):
        reasons.append("the reference itself is not finite")
    if deviation.nonfinite:
        reasons.append(f"{deviation.nonfinite} values are NaN or infinite")
    stated = policy.stated_error(deviation.scale)
    sure = [flip for flip in deviation.flips if not flip.margin <= stated]
    if sure:
        many = "at least " if len(sure) == len(deviation.flips) < deviation.argmax_flips else ""
        reasons.append(
            f"label flips: {many}{len(sure)} where the margin, up to {sure[0].margin:.2g}, is over "
            f"the stated error {stated:.2g}"
        )
    if deviation.scale == 0.0 and deviation.max_abs > 0.0:
        reasons.append(
            f"largest error is {deviation.max_abs:.2g} where the reference gives nothing but 0"
        )
        return reasons
    # No float arithmetic can promise more than rounding lets it: logits that cancel to nearly
    # nothing on a white image are off by as much as if they had not.
    explained = not policy.arithmetic.grid and deviation.units <= 1.0
    if not (deviation.relative <= policy.max_relative or explained):
        reasons.append(
            f"largest error is {deviation.relative:.2g} of the scale, allowed "
            f"{policy.max_relative:.2g}"
        )
    if not deviation.units <= policy.max_units:
        reasons.append(
            f"largest error is {deviation.units:.3g} times what rounding explains, allowed "
            f"{policy.max_units:g}"
        )
    return reasons


def _gradient_finding(row: GradientRow, policy: Tolerance) -> GradientFinding:
    slopes, allowed = row.slopes, policy.max_gradient
    reasons = []
    if not math.isfinite(slopes.scale):
        reasons.append("the reference's gradient itself is not finite")
    if slopes.nonfinite:
        reasons.append(f"{slopes.nonfinite} slopes are NaN or infinite")
    if not slopes.relative <= allowed:
        reasons.append(
            f"largest error is {slopes.relative:.2g} of the largest slope, allowed {allowed:.2g}"
        )
    if not slopes.of_rounding <= policy.max_units:
        reasons.append(
            f"largest error is {slopes.of_rounding:.3g} times what rounding made of that gradient, "
            f"allowed {policy.max_units:g}"
        )
    if not 1.0 - slopes.cosine <= allowed:
        reasons.append(f"smallest cosine is {slopes.cosine:.6f}, allowed {1 - allowed:g}")
    reasons += [f"logits beside the gradients: {why}" for why in _reasons(row.logits, policy)]
    return GradientFinding(row, tuple(reasons))


def _kink_finding(gradients: GradientEvidence) -> KinkFinding:
    """Judge the images near a kink by their median, if there are enough of them for one."""
    kinks = gradients.kinks
    if kinks.n >= LEAST_NEAR:
        if kinks.median <= MAX_NEAR:
            return KinkFinding(kinks, Verdict.PASS, ())
        reason = (
            f"the median error is {kinks.median:.3g} times what rounding makes, allowed "
            f"{MAX_NEAR:g}"
        )
        return KinkFinding(kinks, Verdict.FAIL, (reason,))
    if any(row.slopes.judged for row in gradients.rows):
        return KinkFinding(kinks, Verdict.PASS, ())
    reason = f"all of only {kinks.n} images are near a kink, so no gradient was judged"
    return KinkFinding(kinks, Verdict.INCONCLUSIVE, (reason,))
