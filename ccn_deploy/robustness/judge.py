"""From evidence to a verdict: pure arithmetic on columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ccn_deploy.attacks import DEFAULT_EPSILONS, AttackSpec
from ccn_deploy.attacks.spec import Norm
from ccn_deploy.robustness.collect import Measurement, Pair
from ccn_deploy.robustness.evidence import Evidence
from ccn_deploy.robustness.non_inferiority import NonInferiorityTest, Proportion
from ccn_deploy.robustness.outcomes import invalid, right, robust, robust_within
from ccn_deploy.robustness.query_stats import QueryStats, QueryStatsPair
from ccn_deploy.robustness.recheck import Recheck
from ccn_deploy.robustness.result import RobustnessResult
from ccn_deploy.robustness.rows import FixedEpsilonResult, MinimizationResult, MinimizationSide
from ccn_deploy.robustness.sanity import sanity_findings
from ccn_deploy.robustness.stages import stages_of
from ccn_deploy.robustness.thresholds import Threshold, ThresholdTest

MAX_DROP = 0.01
DISTANCES = (0.1, 0.2, 0.3, 0.4, 0.5)
"""The paper's max-residue-ratios d (section 5.1, equation 8, and table 2), of attacks in L2."""


def judge(
    measurement: Measurement,
    max_drop: float = MAX_DROP,
    thresholds: Sequence[Threshold] = (),
    *,
    epsilons: Sequence[float] | None = None,
    recheck: Recheck | None = None,
) -> RobustnessResult:
    """Judge a measurement: may this runtime stand in for the reference, and is enough left?

    Args:
        measurement: From :func:`ccn_deploy.robustness.collect`.
        max_drop: By how much its accuracy may be below the reference's, in every row.
        thresholds: What must be left whatever the reference leaves.
        epsilons: Distances in Linf at which attacks that look for the smallest perturbation in
            that norm are judged; those of the attacks bounded in it if None.
        recheck: What asking again about evidence that was read showed, to be told.

    Raises:
        ValueError: Nothing was measured, or not what a threshold is about.
    """
    if not measurement.pairs:
        raise ValueError("nothing was measured")
    pairs = measurement.pairs
    if epsilons is None:
        found = {p.spec.epsilon for p in pairs if p.spec.epsilon and p.spec.norm == "linf"}
        epsilons = sorted(found) or DEFAULT_EPSILONS
    bounded = [_bounded(p, max_drop) for p in pairs if p.spec.epsilon is not None]
    smallest = []
    for pair in pairs:
        if pair.spec.epsilon is None:
            own = [t.strength for t in thresholds if t.attack == pair.spec.name]
            usual = DISTANCES if pair.spec.norm == "l2" else epsilons
            smallest.append((pair.spec, _minimal(pair, max_drop, sorted({*usual, *own}))))
    clean, minimal = _clean(pairs[0], max_drop), _nested(smallest)
    return RobustnessResult(
        measurement=measurement,
        max_drop=max_drop,
        clean=clean,
        bounded=tuple(bounded),
        minimal=minimal,
        thresholds=tuple(_test(threshold, clean, bounded, minimal) for threshold in thresholds),
        findings=tuple(sanity_findings(measurement, clean, bounded, minimal, max_drop)),
        recheck=recheck,
    )


def _test(
    threshold: Threshold,
    clean: FixedEpsilonResult,
    bounded: Sequence[FixedEpsilonResult],
    minimal: Sequence[MinimizationResult],
) -> ThresholdTest:
    if threshold.attack is None:
        return ThresholdTest(threshold, clean.runtime)
    at = threshold.attack, threshold.strength
    for row in bounded:
        if (row.name, row.epsilon) == at:
            return ThresholdTest(threshold, row.runtime, row.invalid)
    for attack in minimal:
        if attack.name == threshold.attack and attack.clip:
            reached = attack.runtime.accuracy_at[threshold.strength]
            return ThresholdTest(threshold, reached, attack.invalid)
    raise ValueError(f"nothing was measured of {threshold.label}")


def _clean(pair: Pair, max_drop: float) -> FixedEpsilonResult:
    reference, runtime = right(pair.reference), right(pair.runtime)
    return FixedEpsilonResult(
        spec=None,
        reference=Proportion.of(reference),
        runtime=Proportion.of(runtime),
        already_wrong=int((~runtime).sum()),
        invalid=0,
        flips=int((reference != runtime).sum()),
        gate=NonInferiorityTest.between(reference, runtime, max_drop),
        effort=QueryStatsPair(),
    )


def _bounded(pair: Pair, max_drop: float) -> FixedEpsilonResult:
    # Wrong before the attack counts as not robust, and so does a runtime that was not attacked.
    reference, runtime = robust(pair.reference), robust(pair.runtime)
    return FixedEpsilonResult(
        spec=pair.spec,
        reference=Proportion.of(reference),
        runtime=Proportion.of(runtime),
        already_wrong=int((pair.runtime.status == "already-wrong").sum()),
        invalid=invalid(pair.runtime),
        flips=int((reference != runtime).sum()),
        gate=NonInferiorityTest.between(reference, runtime, max_drop, _doubtful(pair)),
        effort=_efforts(pair),
        stages=stages_of(pair.spec, pair.reference, pair.runtime),
    )


def _minimal(pair: Pair, max_drop: float, distances: Sequence[float]) -> MinimizationResult:
    norm = pair.spec.norm
    robust = {
        d: (robust_within(pair.reference, norm, d), robust_within(pair.runtime, norm, d))
        for d in distances
    }
    differ = np.any([reference != runtime for reference, runtime in robust.values()], axis=0)
    return MinimizationResult(
        spec=pair.spec,
        n=len(pair.runtime),
        reference=_side(pair.reference, norm, distances),
        runtime=_side(pair.runtime, norm, distances),
        invalid=invalid(pair.runtime),
        flips=int(differ.sum()),
        gates={
            d: NonInferiorityTest.between(reference, runtime, max_drop, _doubtful(pair))
            for d, (reference, runtime) in robust.items()
        },
        effort=_efforts(pair),
    )


def _doubtful(pair: Pair) -> int:
    return invalid(pair.runtime) + invalid(pair.reference)


def _efforts(pair: Pair) -> QueryStatsPair:
    return QueryStatsPair(QueryStats.of(pair.reference), QueryStats.of(pair.runtime))


def _nested(
    rows: Sequence[tuple[AttackSpec, MinimizationResult]],
) -> tuple[MinimizationResult, ...]:
    """Put the unclipped run of an attack below its clipped one."""
    unclipped = {spec.name: row for spec, row in rows if not spec.clip}
    clipped = [
        MinimizationResult(**{**row.__dict__, "unclipped": unclipped.pop(spec.name, None)})
        for spec, row in rows
        if spec.clip
    ]
    return (*clipped, *unclipped.values())


def _side(evidence: Evidence, norm: Norm, distances: Sequence[float]) -> MinimizationSide:
    attackable = evidence.status != "already-wrong"
    found = np.isfinite(evidence.rho)
    failed = ~found & (evidence.status != "invalid")
    return MinimizationSide(
        already_wrong=int((~attackable).sum()),
        failed=int(failed.sum()),
        failed_correct=int((failed & attackable).sum()),
        found=Proportion.of(found),
        rho=evidence.rho[found],
        l2=evidence.l2[found],
        linf=evidence.linf[found],
        rho_correct=evidence.rho[found & attackable],
        accuracy_at={d: Proportion.of(robust_within(evidence, norm, d)) for d in distances},
    )
