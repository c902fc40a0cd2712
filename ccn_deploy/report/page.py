"""What the page says, worked out from the judgement; the template only sets it."""

from __future__ import annotations

from collections.abc import Sequence

from ccn_deploy.bundle import Bundle
from ccn_deploy.report.claim_text import Json, interval, percent, reason, target, title
from ccn_deploy.report.curves import bounded_curves, minimal_curve
from ccn_deploy.report.examples import Example
from ccn_deploy.report.pictures import pictures_of
from ccn_deploy.report.provenance import digests, provenance
from ccn_deploy.report.tables import (
    bounded_table,
    effort_table,
    minimal_table,
    parity_table,
    precision_table,
)
from ccn_deploy.report.view import Fact, Mark, Page, Target
from ccn_deploy.robustness import PrecisionsResult, RobustnessResult


def page_of(
    bundle: Bundle,
    result: RobustnessResult | PrecisionsResult,
    examples: Sequence[Example],
    command: str,
    parity: Json | None,
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
    documents = [one.document() for one in results]
    targets = [_target(document) for document in documents]
    measurements = [one.measurement for one in results]
    deciding = next(t for t in targets if t.verdict.css == result.verdict.value)
    warnings = [
        f"{document['precision']}: {warning}" if several else warning
        for document in documents
        for warning in document["warnings"]
    ]
    if isinstance(result, PrecisionsResult):
        warnings = [*result.warnings, *warnings]
    return Page(
        verdict=deciding.verdict,
        reason=f"{deciding.name}: {deciding.reason}" if several else deciding.reason,
        model=bundle.card.title,
        target=", ".join(one.name for one in targets),
        reference=documents[0]["reference"],
        facts=_facts(documents[0]),
        precisions=precision_table(result.document()) if several else None,
        targets=targets,
        parity=parity_table(parity) if parity else None,
        pictures=pictures_of(examples, bundle.card.class_names),
        pictured=targets[0].name,
        warnings=warnings,
        command=command,
        provenance=provenance(bundle, measurements),
        digests=digests(bundle, measurements),
        version=__version__,
    )


def _target(document: Json) -> Target:
    bounded = [row for row in document["attacks"] if row["epsilon"] is not None]
    minimal = [row for row in document["attacks"] if row["epsilon"] is None]
    return Target(
        name=target(document),
        verdict=Mark.of(document["verdict"]),
        reason=reason(document),
        curves=[
            *bounded_curves(document, bounded),
            *(minimal_curve(document, row) for row in minimal),
        ],
        tables=[
            *([bounded_table(document, bounded)] if bounded else []),
            *(minimal_table(row) for row in minimal),
            effort_table(document["attacks"]),
        ],
    )


def _facts(document: Json) -> list[Fact]:
    clean = document["clean"]
    data = document["dataset"]
    kinds = dict.fromkeys(
        title({**row, "epsilon": None, "clip": True}) for row in document["attacks"]
    )
    return [
        Fact(
            f"Accuracy without attack, {document['precision']}",
            percent(clean["runtime"]["accuracy"]),
            interval(clean["runtime"]["ci95"]),
        ),
        Fact("Images", f"{document['samples']}", f"{data['name']}, {data['split']}"),
        Fact("Attacks", ", ".join(kinds)),
        Fact("Allowed drop", f"{100 * document['max_drop']:g} points"),
    ]
