"""How much robustness each precision of one runtime costs, attack by attack, paired."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ccn_deploy.records import document
from ccn_deploy.robustness.attack_session import REFERENCE
from ccn_deploy.robustness.collect import Measurement
from ccn_deploy.robustness.evidence import Evidence
from ccn_deploy.robustness.non_inferiority import Mask, PairedDifference, Proportion
from ccn_deploy.robustness.outcomes import invalid, right, robust, robust_within
from ccn_deploy.robustness.result import RobustnessResult, listed
from ccn_deploy.robustness.rows import label_of
from ccn_deploy.robustness.sanity import SanityFinding
from ccn_deploy.verdict import Verdict

SCHEMA = "ccn-deploy/robustness-precisions/2"

BASELINE = "fp32"
"""What precisions are compared with, where it is among them; else the first of them is."""


@dataclass(frozen=True)
class Cell:
    """One precision under one attack at one strength.

    Attributes:
        share: Of images that are right and stay right.
        cost: Against the baseline on the same images; None for the baseline itself.
        invalid: Attacks that returned no legal image: those images count as not robust.
    """

    share: Proportion
    cost: PairedDifference | None
    invalid: int

    def document(self) -> dict[str, Any]:
        """Return this as JSON."""
        return {
            **self.share.document("robust_accuracy"),
            "invalid": self.invalid,
            "cost": None if self.cost is None else self.cost.difference(),
        }


@dataclass(frozen=True)
class PrecisionRow:
    """One attack at one strength, or none, on every precision.

    Attributes:
        attack: Name of the attack; None without one.
        title: For people, without its strength.
        epsilon: Of an attack that takes one.
        d: Of the others: within which an image counts as fooled (paper, equation 8).
        cells: By precision.
    """

    attack: str | None
    title: str
    epsilon: float | None
    d: float | None
    cells: Mapping[str, Cell]

    @property
    def strength(self) -> float | None:
        """Epsilon or d; None without an attack."""
        return self.d if self.epsilon is None else self.epsilon

    @property
    def label(self) -> str:
        """What tables call it."""
        return label_of(self.title, self.strength)

    def document(self) -> dict[str, Any]:
        """Return this as JSON."""
        return {
            "attack": self.attack,
            "title": self.title,
            "epsilon": self.epsilon,
            "d": self.d,
            "precisions": {name: cell.document() for name, cell in self.cells.items()},
        }


@dataclass(frozen=True)
class PrecisionsResult:
    """Several precisions, each judged against the reference, and compared with one of them.

    Attributes:
        results: By precision, in the order that was asked for.
        baseline: The precision that the others are compared with.
        agreement: By precision, images without an attack that have the baseline's label.
        rows: The comparison. It is shown and not judged.
    """

    results: Mapping[str, RobustnessResult]
    baseline: str
    agreement: Mapping[str, Proportion]
    rows: tuple[PrecisionRow, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of all precisions."""
        return Verdict.all_of(result.verdict for result in self.results.values())

    @property
    def first(self) -> Measurement:
        """Of the precision named first; data, seed and count are the same for all."""
        return next(iter(self.results.values())).measurement

    @property
    def deciding(self) -> RobustnessResult:
        """The precision whose verdict is that of the whole."""
        return next(r for r in self.results.values() if r.verdict is self.verdict)

    @property
    def headline(self) -> str:
        """The verdict, in a few words."""
        return self.deciding.headline

    @property
    def shown(self) -> str:
        """What was shown, or why it was not."""
        if self.verdict is Verdict.PASS:
            return self.deciding.passes(f"{self.first.runtime} in {listed(list(self.results))}")
        return f"{self.deciding.measurement.precision}: {self.deciding.shown}"

    @property
    def findings(self) -> tuple[SanityFinding, ...]:
        """What a reader of the comparison should know, beside what is known of each precision."""
        own = self.results[self.baseline].measurement.gradient
        others = [n for n, r in self.results.items() if r.measurement.gradient != own]
        if not others:
            return ()
        given = self.results[others[0]].measurement.gradient
        return (
            SanityFinding(
                code="gradients-of-two-kinds",
                undermines=False,
                sentence=f"Attacks took {given} gradients on {', '.join(others)} and {own} ones on "
                f"{self.baseline}: a difference may be the attack's.",
                figures={"baseline": own, "others": given},
            ),
        )

    def document(self) -> dict[str, Any]:
        """Return the JSON document of schema :data:`SCHEMA`."""
        return {
            "schema": SCHEMA,
            "verdict": self.verdict.value,
            "shown": self.shown,
            "findings": [document(finding) for finding in self.findings],
            "runtime": self.first.runtime,
            "reference": str(REFERENCE),
            "baseline": self.baseline,
            "dataset": self.first.dataset,
            "samples": self.first.n,
            "seed": self.first.seed,
            "precisions": {name: result.document() for name, result in self.results.items()},
            "label_agreement": {
                name: share.document("share") for name, share in self.agreement.items()
            },
            "comparison": [row.document() for row in self.rows],
        }


def compare(results: Sequence[RobustnessResult]) -> PrecisionsResult:
    """Compare precisions of one runtime.

    Args:
        results: Judgements of the same attacks on the same images, one for each precision.

    Raises:
        ValueError: They are not of the same runtime, attacks and images, or a precision is there
            twice.
    """
    by_precision = {result.measurement.precision: result for result in results}
    if len(by_precision) != len(results) or not results:
        raise ValueError("one judgement for each precision is needed")
    measurements = {name: result.measurement for name, result in by_precision.items()}
    _check_alike(list(measurements.values()))
    baseline = BASELINE if BASELINE in by_precision else next(iter(by_precision))

    def row(
        attack: str | None,
        title: str,
        pair: int,
        mask: Callable[[Evidence], Mask],
        *,
        epsilon: float | None = None,
        d: float | None = None,
    ) -> PrecisionRow:
        evidence = {name: m.pairs[pair].runtime for name, m in measurements.items()}
        first = mask(evidence[baseline])
        cells = {
            name: Cell(
                share=Proportion.of(mask(e)),
                cost=None if name == baseline else PairedDifference.of(first, mask(e)),
                invalid=0 if attack is None else invalid(e),
            )
            for name, e in evidence.items()
        }
        return PrecisionRow(attack, title, epsilon, d, cells)

    labels = {name: m.pairs[0].runtime.clean_runtime for name, m in measurements.items()}
    agreement = {name: Proportion.of(own == labels[baseline]) for name, own in labels.items()}
    rows = [row(None, results[0].clean.title, 0, right)]
    for at, pair in enumerate(results[0].measurement.pairs):
        spec = pair.spec
        if spec.epsilon is not None:
            rows.append(row(spec.name, spec.title, at, robust, epsilon=spec.epsilon))
        elif spec.clip:
            gates = next(r for r in results[0].minimal if r.spec == spec).gates
            rows += [
                row(spec.name, spec.title, at, partial(robust_within, norm=spec.norm, d=d), d=d)
                for d in gates
            ]
    return PrecisionsResult(by_precision, baseline, agreement, tuple(rows))


def _check_alike(measurements: Sequence[Measurement]) -> None:
    first = measurements[0]
    for other in measurements[1:]:
        same = (
            other.runtime == first.runtime
            and [p.spec for p in other.pairs] == [p.spec for p in first.pairs]
            and all(
                np.array_equal(a.runtime.index, b.runtime.index)
                for a, b in zip(first.pairs, other.pairs, strict=True)
            )
        )
        if not same:
            raise ValueError("precisions can be compared only under the same attacks and images")
