"""A judged measurement as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ccn_deploy.records import document
from ccn_deploy.robustness.attack_session import REFERENCE
from ccn_deploy.robustness.collect import Measurement
from ccn_deploy.robustness.non_inferiority import NonInferiorityTest
from ccn_deploy.robustness.query_stats import QueryStatsPair
from ccn_deploy.robustness.rows import AccuracyRow, FixedEpsilonResult, MinimizationResult
from ccn_deploy.verdict import Verdict

SCHEMA = "ccn-deploy/robustness/1"


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
    clean: FixedEpsilonResult
    bounded: tuple[FixedEpsilonResult, ...]
    minimal: tuple[MinimizationResult, ...]
    warnings: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """All rows together."""
        return Verdict.all_of(row.gate.verdict for row in self.rows)

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
            "attacks": [
                *(row.document() for row in self.bounded),
                *(row.document() for row in self.minimal),
            ],
        }
