"""What the page says, worked out from the judgement; the template only sets it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ccn_deploy.bundle import Bundle
from ccn_deploy.report.curves import curves
from ccn_deploy.report.examples import Example
from ccn_deploy.report.parity import parity_tables
from ccn_deploy.report.provenance import digests, provenance
from ccn_deploy.report.view import Fact, Note, Page, Target
from ccn_deploy.robustness import PrecisionsResult, RobustnessResult
from ccn_deploy.robustness.attack_session import REFERENCE
from ccn_deploy.robustness.result import points
from ccn_deploy.robustness.tables import (
    accuracy_table,
    effort_table,
    perturbation_table,
    precision_table,
    settings_table,
    stage_table,
    threshold_table,
)
from ccn_deploy.tables import Mark, percent


def page_of(
    bundle: Bundle,
    result: RobustnessResult | PrecisionsResult,
    examples: Sequence[Example],
    command: str,
    parity: Mapping[str, Any] | None,
) -> Page:
    """Work out what the page says.

    Args:
        bundle: What was measured.
        result: Its judgement, or those of several precisions.
        examples: Images to show, of the precision judged first.
        command: What the user typed.
        parity: A document of schema ``ccn-deploy/parity/2``, if parity was measured.
    """
    from ccn_deploy import __version__

    several = isinstance(result, PrecisionsResult)
    results = list(result.results.values()) if isinstance(result, PrecisionsResult) else [result]
    targets = [target_of(one) for one in results]
    measurements = [one.measurement for one in results]
    findings = [
        Note(finding.word, f"{one.measurement.precision}: {text}" if several else text)
        for one in results
        for finding in one.findings
        for text in [finding.sentence]
    ]
    if isinstance(result, PrecisionsResult):
        findings = [*(Note(f.word, f.sentence) for f in result.findings), *findings]
    return Page(
        verdict=Mark(result.headline, result.verdict.value),
        reason=result.shown,
        model=bundle.card.title,
        target=", ".join(one.name for one in targets),
        reference=str(REFERENCE),
        facts=_facts(results[0]),
        precisions=[precision_table(result)] if isinstance(result, PrecisionsResult) else [],
        targets=targets,
        parity=parity_tables(parity) if parity else [],
        examples=examples,
        class_names=bundle.card.class_names,
        pictured=targets[0].name,
        findings=findings,
        command=command,
        provenance=[*provenance(bundle, measurements), Fact("Evidence", _origin(results))],
        digests=digests(bundle, measurements),
        version=__version__,
    )


def target_of(result: RobustnessResult) -> Target:
    """Work out what was found of one target: curves, then tables, settings and effort last."""
    bounded = {row.row.label: row.effort for row in result.bounded}
    others = {row.title for row in result.bounded}
    minimal = {title: e for title, e in result.efforts.items() if title not in others}
    return Target(
        name=result.measurement.target,
        verdict=Mark.of(result.verdict),
        reason=result.shown,
        curves=curves(result),
        tables=[
            *([threshold_table(result)] if result.thresholds else []),
            accuracy_table(result),
            *(stage_table(row) for row in result.bounded if row.stages),
            *map(perturbation_table, result.minimal),
            settings_table(result),
            effort_table({**bounded, **minimal}),
        ],
    )


def _origin(results: Sequence[RobustnessResult]) -> str:
    """Return whether evidence was measured or read, once if it is the same of all."""
    said = {one.measurement.precision: one.origin for one in results}
    if len(set(said.values())) == 1:
        return results[0].origin
    return " ".join(f"{precision}: {origin}" for precision, origin in said.items())


def _facts(result: RobustnessResult) -> list[Fact]:
    clean, measurement = result.clean.runtime, result.measurement
    data = measurement.dataset
    low, high = clean.ci95
    titles = [*(row.title for row in result.bounded), *(row.full_title for row in result.minimal)]
    return [
        Fact(
            f"Accuracy without attack, {measurement.precision}",
            f"{percent(clean.value)}\N{NO-BREAK SPACE}%",
            f"{percent(low)} to {percent(high)}",
        ),
        Fact("Images", f"{measurement.n}", f"{data['name']}, {data['split']}"),
        Fact("Attacks", ", ".join(dict.fromkeys(titles))),
        Fact("Allowed drop", points(result.max_drop)),
        *(
            Fact(f"Required, {label}", f"{100 * test.threshold.share:g}\N{NO-BREAK SPACE}%")
            for test in result.thresholds
            for label in [test.threshold.where]
        ),
        *(
            []
            if result.thresholds
            else [Fact("Required accuracy", "none", "only the drop is judged")]
        ),
    ]
