"""From evidence to a verdict: pure arithmetic on columns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ccn_deploy.attacks import AttackSpec
from ccn_deploy.robustness.collect import Measurement, Pair
from ccn_deploy.robustness.evidence import Evidence
from ccn_deploy.robustness.non_inferiority import NonInferiorityTest, Proportion
from ccn_deploy.robustness.outcomes import invalid, right, robust, robust_at
from ccn_deploy.robustness.query_stats import QueryStats, QueryStatsPair
from ccn_deploy.robustness.result import RobustnessResult
from ccn_deploy.robustness.rows import FixedEpsilonResult, MinimizationResult, MinimizationSide
from ccn_deploy.robustness.sanity import sanity_findings

MAX_DROP = 0.01
DISTANCES = (0.1, 0.2, 0.3, 0.4, 0.5)
"""The paper's max-residue-ratios d (section 5.1, equation 8, and table 2)."""


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
    clean, minimal = _clean(measurement.pairs[0], max_drop), _nested(smallest)
    findings = sanity_findings(measurement, clean, bounded, minimal, max_drop)
    return RobustnessResult(
        measurement=measurement,
        max_drop=max_drop,
        clean=clean,
        bounded=tuple(bounded),
        minimal=minimal,
        warnings=tuple(finding.sentence for finding in findings),
    )


def _clean(pair: Pair, max_drop: float) -> FixedEpsilonResult:
    reference, runtime = right(pair.reference), right(pair.runtime)
    return FixedEpsilonResult(
        name="clean",
        norm=None,
        epsilon=0.0,
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
        name=pair.spec.name,
        norm=pair.spec.norm,
        epsilon=float(pair.spec.epsilon or 0.0),
        reference=Proportion.of(reference),
        runtime=Proportion.of(runtime),
        already_wrong=int((pair.runtime.status == "already-wrong").sum()),
        invalid=invalid(pair.runtime),
        flips=int((reference != runtime).sum()),
        gate=NonInferiorityTest.between(reference, runtime, max_drop, _doubtful(pair)),
        effort=_efforts(pair),
    )


def _minimal(pair: Pair, max_drop: float) -> MinimizationResult:
    robust = {d: (robust_at(pair.reference, d), robust_at(pair.runtime, d)) for d in DISTANCES}
    differ = np.any([reference != runtime for reference, runtime in robust.values()], axis=0)
    return MinimizationResult(
        name=pair.spec.name,
        norm=pair.spec.norm,
        clip=pair.spec.clip,
        n=len(pair.runtime),
        reference=_side(pair.reference),
        runtime=_side(pair.runtime),
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


def _side(evidence: Evidence) -> MinimizationSide:
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
        rho_correct=evidence.rho[found & attackable],
        accuracy_at={d: Proportion.of(robust_at(evidence, d)) for d in DISTANCES},
    )
