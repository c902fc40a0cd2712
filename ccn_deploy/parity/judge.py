"""From evidence to a verdict: pure, fast, and the same for every caller. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ccn_deploy.parity.comparison import Deviation, finite_or_none
from ccn_deploy.parity.evidence import InputRow, LayerRow, ParityEvidence
from ccn_deploy.parity.invariance import DETERMINISTIC, Claim
from ccn_deploy.parity.policy import Policy, policy_for
from ccn_deploy.verdict import Verdict

SCHEMA = "ccn-deploy/parity/1"


@dataclass(frozen=True)
class Finding:
    """What the policy says of one row.

    Attributes:
        row: The evidence.
        reasons: Why it fails, one phrase each; empty if it passes.
        stated_error: Absolute error the policy allows here.
    """

    row: InputRow | Claim | LayerRow
    reasons: tuple[str, ...]
    stated_error: float

    @property
    def verdict(self) -> Verdict:
        """Pass, or fail for any reason."""
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
            return self.row.claim
        if isinstance(self.row, LayerRow):
            return f"{self.row.layer} ({self.row.kind})"
        return f"{self.row.kind} at batch {self.row.batch}"

    def document(self) -> dict[str, Any]:
        """Return the evidence with the verdict beside it."""
        deviation = self.row.deviation
        return {
            **self.row.document(),
            "relative": finite_or_none(deviation.relative),
            "rounding_units": finite_or_none(deviation.units),
            "stated_error": finite_or_none(self.stated_error),
            "verdict": self.verdict.value,
            "reasons": list(self.reasons),
        }


@dataclass(frozen=True)
class ParityResult:
    """The judgement of one runtime.

    Attributes:
        evidence: What was judged.
        policy: By what.
        inputs: A finding for each kind and batch.
        invariance: A finding for each claim.
        layers: Findings in order of execution; None if layers were not measured.
    """

    evidence: ParityEvidence
    policy: Policy
    inputs: tuple[Finding, ...]
    invariance: tuple[Finding, ...]
    layers: tuple[Finding, ...] | None

    @property
    def verdict(self) -> Verdict:
        """Of logits under every input and circumstance; layers only explain it."""
        return Verdict.all_of(finding.verdict for finding in (*self.inputs, *self.invariance))

    @property
    def failures(self) -> tuple[Finding, ...]:
        """Findings on logits that fail."""
        return tuple(f for f in (*self.inputs, *self.invariance) if f.reasons)

    @property
    def first_departure(self) -> Finding | None:
        """The first layer, in order of execution, that leaves the policy: its worst finding."""
        departing = [finding for finding in self.layers or () if finding.reasons]
        same = [f for f in departing if f.subject == departing[0].subject]
        return max(same, key=lambda finding: finding.row.deviation.units, default=None)

    def document(self) -> dict[str, Any]:
        """Return the JSON document of the command; no NaN, no infinity (null instead)."""
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "verdict": self.verdict.value,
            "runtime": self.evidence.runtime,
            "precision": self.evidence.precision,
            "inputs": [finding.document() for finding in self.inputs],
            "invariance": [finding.document() for finding in self.invariance],
            "policy": self.policy.document(),
            "setting": dict(self.evidence.setting),
        }
        if self.layers is not None:
            first = self.first_departure
            document["layers"] = [finding.document() for finding in self.layers]
            document["first_departure"] = first.subject if first else None
        return document


def judge(evidence: ParityEvidence, policy: Policy | None = None) -> ParityResult:
    """Compare evidence with the policy of its precision, or with another.

    Raises:
        UsageError: No policy for that precision.
    """
    policy = policy or policy_for(evidence.precision)
    layers = evidence.layers
    return ParityResult(
        evidence=evidence,
        policy=policy,
        inputs=tuple(_finding(row, policy) for row in evidence.inputs),
        invariance=tuple(_finding(claim, policy) for claim in evidence.invariance),
        layers=None if layers is None else tuple(_finding(row, policy) for row in layers),
    )


def _finding(row: InputRow | Claim | LayerRow, policy: Policy) -> Finding:
    deviation = row.deviation
    reasons = _reasons(deviation, policy)
    if isinstance(row, Claim) and row.claim == DETERMINISTIC and row.differing:
        reasons.append(f"{row.differing} logits differ in their bits between runs")
    return Finding(row, tuple(reasons), policy.stated_error(deviation.scale))


def _reasons(deviation: Deviation, policy: Policy) -> list[str]:
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
    if not deviation.relative <= policy.max_relative:
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
