"""From a row of a judgement to what a claim says when it is run.

The verdicts are those of :mod:`ccn_deploy.parity.judge` and :mod:`ccn_deploy.robustness.judge`;
nothing is judged here a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ccn_deploy.parity.judge import AnyFinding, GradientFinding, KinkFinding
from ccn_deploy.parity.judge import Finding as ParityFinding
from ccn_deploy.parity.tolerances import Tolerance
from ccn_deploy.robustness.non_inferiority import NonInferiorityTest, Proportion
from ccn_deploy.robustness.result import RobustnessResult, points
from ccn_deploy.robustness.rows import FixedEpsilonResult, MinimizationResult
from ccn_deploy.robustness.thresholds import ThresholdTest
from ccn_deploy.verdict import Verdict

if TYPE_CHECKING:
    from ccn_deploy.exporters.rederive import Rederived


@dataclass(frozen=True)
class Finding:
    """What became of a claim.

    Attributes:
        verdict: Only :attr:`Verdict.PASS` lets the claim hold: too little evidence shows nothing.
        measured: The numbers, one line.
        bound: What they had to keep to, one line.
        advice: What to do if it does not hold, one line.
        void: Why there is nothing to judge, one line; empty if there is.
    """

    verdict: Verdict
    measured: str
    bound: str
    advice: str = ""
    void: str = ""

    @property
    def text(self) -> str:
        """A few lines for someone whose release has just been stopped."""
        return (
            f"{self.verdict.value}\nmeasured  {self.measured}\nbound     {self.bound}\n"
            f"to do     {self.advice}"
        )


@dataclass(frozen=True)
class ClaimText:
    """Puts rows into words that name the bundle and the runtime.

    Attributes:
        bundle: Its path as the user gave it.
        runtime: Name of the runtime.
        precision: Of the deployed graph.
    """

    bundle: Path
    runtime: str
    precision: str

    @property
    def target(self) -> str:
        """Runtime and precision, as in tables."""
        return f"{self.runtime}-{self.precision}"

    def derived(self, file: Rederived) -> Finding:
        """Put into words what became of a graph that was derived again."""
        if file.verdict is None:
            return Finding(Verdict.INCONCLUSIVE, "", "", void=f"{file.path} is {file.why}")
        return Finding(
            file.verdict,
            f"{file.status}: {file.why}",
            "byte for byte what its pass makes of its sources",
            "Export it again with the versions that are here."
            if file.verdict is Verdict.INCONCLUSIVE
            else "Do not ship it. Export the network again, or find out who changed it.",
        )

    def parity(
        self,
        findings: Sequence[ParityFinding],
        policy: Tolerance,
        gradients: Sequence[GradientFinding] = (),
        kinks: KinkFinding | None = None,
    ) -> Finding:
        """Put all findings on one claim into words: the first that fails, else the worst."""
        worst = max(findings, key=lambda finding: finding.row.deviation.relative)
        deviation = worst.row.deviation
        measured = (
            f"largest error {deviation.max_abs:.2g} ({worst.name}), {deviation.relative:.2g} of "
            f"the scale, {deviation.units:.2g} times what rounding explains"
        )
        bound = (
            f"an error of at most {policy.max_relative:g} of the scale and {policy.max_units:g} "
            "times what rounding explains, and no label changed beyond that"
        )
        if slopes := [finding.row.slopes for finding in gradients]:
            steepest = max(slopes, key=lambda found: found.relative)
            measured += (
                f"; gradients {steepest.relative:.2g} of the largest slope ({steepest.judged} of "
                f"{steepest.n} images judged)"
            )
            bound += f"; gradients {policy.max_gradient:g} of the largest slope, away from kinks"
        every: list[AnyFinding] = [*findings, *gradients]
        if kinks is not None:
            every.append(kinks)
        failing = [finding for finding in every if finding.reasons]
        if failing:
            more = f"; {len(failing) - 1} more alike" if len(failing) > 1 else ""
            measured = f"{failing[0].name}: {'; '.join(failing[0].reasons)}{more}"
        return Finding(
            Verdict.all_of(finding.verdict for finding in every),
            measured,
            bound,
            f"{self._verify_parity()} names the first layer that departs.",
        )

    def accurate(self, result: RobustnessResult, tests: Sequence[ThresholdTest]) -> Finding:
        """Put accuracy without an attack into words, with what is required of it."""
        found = self._gate(result, result.clean.gate, self._row(result.clean))
        for test in tests:
            other = self.threshold(result, test)
            decides = found if found.verdict is not Verdict.PASS else other
            found = Finding(
                Verdict.all_of([found.verdict, other.verdict]),
                f"{found.measured}; {other.measured}",
                f"{found.bound}; {other.bound}",
                decides.advice,
            )
        return found

    def bounded(self, result: RobustnessResult, row: FixedEpsilonResult) -> Finding:
        """Put an attack at one epsilon into words."""
        return self._gate(result, row.gate, self._row(row))

    def minimal(self, result: RobustnessResult, row: MinimizationResult) -> Finding:
        """Put a search for the smallest perturbation into words, at the d that decides."""
        d = next(d for d, gate in row.gates.items() if gate == row.gate)
        shares = self._shares(row.reference.accuracy_at[d], row.runtime.accuracy_at[d])
        return self._gate(result, row.gate, f"at d = {d:g}, {shares}")

    def threshold(self, result: RobustnessResult, test: ThresholdTest) -> Finding:
        """Put what must be left, and what is, into words."""
        advice = "Do not ship it: attacks leave less than was required."
        if test.verdict is Verdict.INCONCLUSIVE:
            needed = None if test.invalid else test.needed
            advice = f"Inconclusive: {test.reason}." + (
                f" Give --ccn-samples {needed}." if needed else ""
            )
        return self._borne(
            result,
            Finding(
                test.verdict,
                f"{self.target} {_percent(test.reached)} under {test.threshold.where}, at least "
                f"{100 * test.lower95:.2f} % at 95 % confidence",
                f"at least {100 * test.threshold.share:g} %, shown at 95 % confidence",
                advice,
            ),
        )

    def sane(self, result: RobustnessResult) -> Finding:
        """Put what the numbers give away of themselves into words."""
        doubts = result.doubts
        said = [f"{finding.word}: {finding.sentence}" for finding in doubts or result.findings]
        return Finding(
            Verdict.INCONCLUSIVE if doubts else Verdict.PASS,
            " ".join(said) or "none of the automatic checks raised a doubt",
            "nothing that undermines the numbers",
            "Find the cause; “Sanity checks” in docs/robustness.md says what each finding means.",
        )

    def _borne(self, result: RobustnessResult, finding: Finding) -> Finding:
        """Take a pass back where the numbers that it rests on are undermined."""
        if (verdict := result.borne(finding.verdict)) is finding.verdict:
            return finding
        first = result.doubts[0]
        return Finding(
            verdict,
            f"{finding.measured}; {first.word}: {first.sentence}",
            f"{finding.bound}, on numbers that nothing undermines",
            f"Inconclusive: see the claim sane[{self.target}].",
        )

    def _row(self, row: FixedEpsilonResult) -> str:
        return self._shares(row.reference, row.runtime)

    def _shares(self, reference: Proportion, runtime: Proportion) -> str:
        return f"reference {_percent(reference)}, {self.target} {_percent(runtime)}"

    def _gate(self, result: RobustnessResult, gate: NonInferiorityTest, shares: str) -> Finding:
        return self._borne(
            result,
            Finding(
                gate.verdict,
                f"{shares}; of {gate.n} images {gate.lost} lost and {gate.gained} gained: a drop "
                f"of {100 * gate.drop:.2f} points, at most {100 * gate.upper95:.2f} at 95 % "
                "confidence",
                f"a drop of at most {points(gate.max_drop)}, shown at 95 % confidence",
                self._advice(gate),
            ),
        )

    def _advice(self, gate: NonInferiorityTest) -> str:
        if gate.invalid:
            return (
                f"{gate.invalid} attacks returned no legal image; {self._verify_parity()} shows "
                "whether the runtime's numbers are finite."
            )
        if gate.verdict is Verdict.FAIL:
            return f"Do not ship it. {self._verify_parity()} shows where the runtime departs."
        if (needed := gate.needed()) is None:
            return (
                "Inconclusive, and at this rate no number of images will change that: find the "
                "cause, or allow more with --ccn-max-drop."
            )
        return (
            f"Inconclusive: {gate.n} images are too few, about {needed} would do. Give "
            f"--ccn-samples {needed}, or allow more with --ccn-max-drop."
        )

    def _verify_parity(self) -> str:
        return (
            f"`ccn-deploy verify-parity {self.bundle} --runtime {self.runtime} --precision "
            f"{self.precision} --per-layer`"
        )


def _percent(share: Proportion) -> str:
    low, high = share.ci95
    return f"{100 * share.value:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
