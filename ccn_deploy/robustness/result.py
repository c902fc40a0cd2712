"""A judged measurement as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ccn_deploy.records import document
from ccn_deploy.robustness.attack_session import REFERENCE
from ccn_deploy.robustness.collect import Measurement
from ccn_deploy.robustness.non_inferiority import NonInferiorityTest
from ccn_deploy.robustness.query_stats import QueryStatsPair
from ccn_deploy.robustness.recheck import Recheck
from ccn_deploy.robustness.rows import AccuracyRow, FixedEpsilonResult, MinimizationResult
from ccn_deploy.robustness.sanity import SanityFinding
from ccn_deploy.robustness.thresholds import ThresholdTest
from ccn_deploy.tables import Mark
from ccn_deploy.verdict import Verdict

SCHEMA = "ccn-deploy/robustness/2"


@dataclass(frozen=True)
class RobustnessResult:
    """A judged measurement.

    Attributes:
        measurement: What was judged.
        max_drop: The allowed drop of accuracy.
        clean: Accuracy without an attack.
        bounded: Attacks with an epsilon, in order of the request.
        minimal: Attacks without.
        findings: What a reader of the numbers should know; nothing passes on numbers that one
            of them undermines.
        thresholds: Whether what was required is left.
        recheck: What was asked again of evidence that was read; None if nothing was.
    """

    measurement: Measurement
    max_drop: float
    clean: FixedEpsilonResult
    bounded: tuple[FixedEpsilonResult, ...]
    minimal: tuple[MinimizationResult, ...]
    findings: tuple[SanityFinding, ...]
    thresholds: tuple[ThresholdTest, ...] = ()
    recheck: Recheck | None = None

    @property
    def verdict(self) -> Verdict:
        """All rows and thresholds together, as far as the numbers bear a verdict."""
        return self.borne(
            Verdict.all_of(
                [*(row.gate.verdict for row in self.rows), *(t.verdict for t in self.thresholds)]
            )
        )

    def borne(self, verdict: Verdict) -> Verdict:
        """Return what is left of a verdict on these numbers: no pass where they are undermined."""
        return Verdict.INCONCLUSIVE if verdict is Verdict.PASS and self.doubts else verdict

    @property
    def doubts(self) -> tuple[SanityFinding, ...]:
        """The findings that undermine the numbers."""
        return tuple(finding for finding in self.findings if finding.undermines)

    @property
    def attacks(self) -> str:
        """Titles of the attacks, for sentences."""
        minimal = [row.title for row in self.minimal if row.clip]
        return listed([*(row.title for row in self.bounded), *minimal])

    @property
    def headline(self) -> str:
        """The verdict, in a few words that promise nothing else than what was shown."""
        if self.verdict is not Verdict.PASS:
            return Mark.of(self.verdict).word
        left = ", and the required accuracy is left" if self.thresholds else ""
        return f"Pass: no worse than the reference{left}"

    @property
    def shown(self) -> str:
        """What was shown, or why it was not, in a sentence or two."""
        if self.verdict is Verdict.PASS:
            return self.passes(self.measurement.target)
        reasons = self._reasons(self.verdict)
        if not reasons:  # every row passes, and yet nothing is shown
            first, *others = (finding.sentence for finding in self.doubts)
            more = f" So do {len(others)} more findings." if others else ""
            return f"The numbers bear no verdict: {first}{more}"
        first, *others = reasons
        also = f"; likewise in {len(others)} more {'row' if len(others) == 1 else 'rows'}"
        return f"{first[0].upper()}{first[1:]}{also if others else ''}."

    def passes(self, whose: str) -> str:
        """Return what a pass says of something by its name: what was shown, and no more."""
        left = "How robust either is, the table says: no accuracy was required (--min-robust)."
        if self.thresholds:
            said = [
                f"at least {100 * test.threshold.share:g} % under {test.threshold.where}"
                for test in self.thresholds
            ]
            left = f"It keeps what was required: {listed(said)}."
        return (
            f"{whose} is no worse than {REFERENCE} by more than {points(self.max_drop)} under "
            f"{self.attacks}, shown at 95 % confidence on {self.measurement.n} images. {left}"
        )

    @property
    def origin(self) -> str:
        """Where the evidence came from, and what asking again showed, in a sentence or two."""
        pairs = self.measurement.pairs
        sides = [pair.sides_read for pair in pairs]
        read = [
            p.spec.label + side for p, side in zip(pairs, sides, strict=True) if side is not None
        ]
        if not read:
            return "All evidence was measured by this run."
        which = "All evidence was" if set(sides) == {""} else f"{listed(read)} were"
        said = f"{which} read, not measured by this run"
        if (again := self.recheck) is None:
            return f"{said}, and not checked again."
        moved = f", of which rounding moved {again.moved}" if again.moved else ""
        what = "target and reference" if again.reference else "the target alone, for want of torch"
        return (
            f"{said}. Checked again on {again.images} images chosen at random: {again.scored} rows "
            f"scored on {what}, {again.repeated} attacked{moved}; all as kept."
        )

    @property
    def rows(self) -> tuple[AccuracyRow, ...]:
        """Everything that is judged: the clean row, every epsilon, and every d in the box."""
        fixed = (row.row for row in (self.clean, *self.bounded))
        return (*fixed, *(row for attack in self.minimal for row in attack.rows))

    @property
    def gates(self) -> dict[str, NonInferiorityTest]:
        """Every gate that is judged, by the name of its row."""
        return {row.name: row.gate for row in self.rows}

    @property
    def efforts(self) -> dict[str, QueryStatsPair]:
        """What each attack took, all its strengths together, by its title."""
        found = {
            title: QueryStatsPair.sum(row.effort for row in self.bounded if row.title == title)
            for title in dict.fromkeys(row.title for row in self.bounded)
        }
        for row in self.minimal:
            for one in (row, row.unclipped):
                if one is not None:
                    found[one.full_title] = one.effort
        return found

    @property
    def reasons(self) -> tuple[str, ...]:
        """One sentence for everything that stands in the way of a pass."""
        return (
            *self._reasons(Verdict.FAIL, Verdict.INCONCLUSIVE),
            *(finding.sentence for finding in self.doubts),
        )

    def _reasons(self, *verdicts: Verdict) -> list[str]:
        return [
            *(f"{n}: {gate.reason}" for n, gate in self.gates.items() if gate.verdict in verdicts),
            *(
                f"{test.threshold.where}: {test.reason}"
                for test in self.thresholds
                if test.verdict in verdicts
            ),
        ]

    def document(self) -> dict[str, Any]:
        """Return the JSON document of schema ``ccn-deploy/robustness/2``."""
        measurement = self.measurement
        agreement = measurement.agreement
        return {
            "schema": SCHEMA,
            "verdict": self.verdict.value,
            "reasons": list(self.reasons),
            "shown": self.shown,
            "findings": [document(finding) for finding in self.findings],
            "thresholds": [test.document() for test in self.thresholds],
            "runtime": measurement.runtime,
            "precision": measurement.precision,
            "reference": str(REFERENCE),
            "gradient": measurement.gradient,
            "gradient_agreement": document(agreement) if agreement is not None else None,
            "dataset": measurement.dataset,
            "samples": measurement.n,
            "seed": measurement.seed,
            "max_drop": self.max_drop,
            "clean": {
                "n": self.clean.runtime.n,
                "reference": self.clean.reference.document("accuracy"),
                "runtime": self.clean.runtime.document("accuracy"),
                "verdict_flips": self.clean.flips,
                **self.clean.gate.document(),
            },
            "evidence": [
                {
                    "attack": pair.spec.label,
                    "reference": pair.reference.origin,
                    "runtime": pair.runtime.origin,
                }
                for pair in measurement.pairs
            ],
            "recheck": None if self.recheck is None else document(self.recheck),
            "attacks": [
                *(row.document() for row in self.bounded),
                *(row.document() for row in self.minimal),
            ],
        }


def points(share: float) -> str:
    """Return a difference of accuracies for sentences, such as ``"1 point"``."""
    number = f"{100 * share:g}"
    return f"{number} point{'' if number == '1' else 's'}"


def listed(texts: Sequence[str]) -> str:
    """Return texts as a list in a sentence, each once."""
    *first, last = dict.fromkeys(texts)
    return f"{', '.join(first)} and {last}" if first else last
