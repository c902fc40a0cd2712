"""What the page says, worked out from the judgement; the template only sets it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ccn_deploy.bundle import Bundle
from ccn_deploy.report.curves import curves
from ccn_deploy.report.examples import Example
from ccn_deploy.report.parity import parity_table
from ccn_deploy.report.provenance import digests, provenance
from ccn_deploy.report.view import Fact, Page, Target
from ccn_deploy.robustness import PrecisionsResult, RobustnessResult
from ccn_deploy.robustness.attack_session import REFERENCE
from ccn_deploy.robustness.tables import (
    accuracy_table,
    effort_table,
    perturbation_table,
    precision_table,
)
from ccn_deploy.tables import Mark, percent
from ccn_deploy.verdict import Verdict


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
    targets = [_target(one) for one in results]
    measurements = [one.measurement for one in results]
    deciding = next(t for t in targets if t.verdict == Mark.of(result.verdict))
    warnings = [
        f"{one.measurement.precision}: {warning}" if several else warning
        for one in results
        for warning in one.warnings
    ]
    if isinstance(result, PrecisionsResult):
        warnings = [*result.warnings, *warnings]
    return Page(
        verdict=deciding.verdict,
        reason=f"{deciding.name}: {deciding.reason}" if several else deciding.reason,
        model=bundle.card.title,
        target=", ".join(one.name for one in targets),
        reference=str(REFERENCE),
        facts=_facts(results[0]),
        precisions=precision_table(result) if isinstance(result, PrecisionsResult) else None,
        targets=targets,
        parity=parity_table(parity) if parity else None,
        examples=examples,
        class_names=bundle.card.class_names,
        pictured=targets[0].name,
        warnings=warnings,
        command=command,
        provenance=provenance(bundle, measurements),
        digests=digests(bundle, measurements),
        version=__version__,
    )


def _target(result: RobustnessResult) -> Target:
    bounded = {row.row.label: row.effort for row in result.bounded}
    others = {row.title for row in result.bounded}
    minimal = {title: e for title, e in result.efforts.items() if title not in others}
    return Target(
        name=result.measurement.target,
        verdict=Mark.of(result.verdict),
        reason=_reason(result),
        curves=curves(result),
        tables=[
            accuracy_table(result),
            *map(perturbation_table, result.minimal),
            effort_table({**bounded, **minimal}),
        ],
    )


def _reason(result: RobustnessResult) -> str:
    """Return the verdict's reason in one sentence."""
    if result.verdict is Verdict.PASS:
        worst = max(row.gate.upper95 for row in result.rows)
        allowed = f"{100 * result.max_drop:g}"
        measurement = result.measurement
        return (
            f"In none of {len(result.rows)} comparisons on {measurement.n} images does "
            f"{measurement.target} fall behind {REFERENCE} by more than {100 * worst:.2f} points, "
            f"at 95 % confidence; {allowed} {'is' if allowed == '1' else 'are'} allowed."
        )
    first, *others = (row for row in result.rows if row.gate.verdict is result.verdict)
    also = f"; likewise in {len(others)} more {'row' if len(others) == 1 else 'rows'}"
    name = first.name[0].upper() + first.name[1:]
    return f"{name}: {first.gate.reason}{also if others else ''}."


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
        Fact("Allowed drop", f"{100 * result.max_drop:g} points"),
    ]
