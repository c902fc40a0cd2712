"""What `ccn-deploy verify-robustness` shows on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ccn_deploy.robustness import PrecisionsResult, RobustnessResult
    from ccn_deploy.robustness.sanity import SanityFinding


def show(result: RobustnessResult | PrecisionsResult, report: Path | None) -> None:
    """Print the tables, what to know about them, and the verdict on the last line.

    Args:
        result: Of one precision, or of several.
        report: Where the page is, if there is one.
    """
    from ccn_deploy.cli.console import out
    from ccn_deploy.cli.tables import show as show_table
    from ccn_deploy.cli.tables import show_verdict
    from ccn_deploy.robustness import PrecisionsResult
    from ccn_deploy.robustness.tables import precision_table, settings_table

    if isinstance(result, PrecisionsResult):
        results = list(result.results.values())
        show_table(precision_table(result))
        for finding in result.findings:
            say(finding)
    else:
        results = [result]
        _show_tables(result)
    for setting in settings_table(results[0]).rows:
        said = f"Settings of {setting.name}: {setting.cells[0].text}"
        out.print(said, markup=False, soft_wrap=True)
    for one in results:
        name = f"{one.measurement.precision}: " if len(results) > 1 else ""
        whose = f"{name}gradients" if name else "Gradients on the runtime:"
        out.print(f"{whose} {_gradients(one)}.", soft_wrap=True)
        out.print(f"{name}{one.origin}", soft_wrap=True, markup=False)
        for finding in one.findings:
            say(finding, name)
        for reason, names in _doubts(one).items():
            more = f" and {len(names) - 2} more" if len(names) > 3 else ""
            rows = ", ".join(names[:2] if more else names)
            out.print(f"[yellow]{name}{rows}{more}:[/] {reason}", soft_wrap=True)
    if report is not None:
        out.print(f"Report: {report}", markup=False, soft_wrap=True)
    show_verdict(result.verdict, result.shown)


def _show_tables(result: RobustnessResult) -> None:
    from ccn_deploy.cli.console import out
    from ccn_deploy.cli.tables import show as show_table
    from ccn_deploy.robustness.tables import (
        accuracy_table,
        effort_table,
        perturbation_table,
        stage_table,
        threshold_table,
    )

    show_table(accuracy_table(result))
    if result.thresholds:
        show_table(threshold_table(result))
    for row in result.bounded:
        if row.stages:
            show_table(stage_table(row))
    for minimal in result.minimal:
        if minimal.clip:
            by = "d times the norm of the image" if minimal.norm == "l2" else "d, any pixel"
            out.print(f"{minimal.title} d: moved by at most {by}.\n")
        show_table(perturbation_table(minimal))
    show_table(effort_table(result.efforts))


def say(finding: SanityFinding, name: str = "") -> None:
    """Print a finding on a line.

    Args:
        finding: What to know about the numbers.
        name: Before it, of what it is about.
    """
    from ccn_deploy.cli.console import out
    from ccn_deploy.cli.text import plain

    text = plain(f"{name}{finding.sentence}")
    out.print(f"[yellow]{finding.word}:[/] {text}", soft_wrap=True)


def _doubts(result: RobustnessResult) -> dict[str, list[str]]:
    """Group the rows and thresholds that did not pass by the reason."""
    found: dict[str, list[str]] = {}
    reasons = [
        *((name, gate.reason) for name, gate in result.gates.items()),
        *((test.threshold.where, test.reason) for test in result.thresholds),
    ]
    for name, reason in reasons:
        if reason:
            found.setdefault(reason, []).append(name)
    return found


def _gradients(result: RobustnessResult) -> str:
    """Say where the gradients on the runtime came from, and how far to trust the choice."""
    said, agreement = result.measurement.gradient_source, result.measurement.agreement
    if agreement is None:
        return said
    clean, attacked = agreement.clean, agreement.adversarial
    return (
        f"{said}; native and reference agree on {clean.n} clean images (cosine "
        f"{clean.cosine_mean:.4f}, "
        f"least {clean.cosine_min:.4f}; signs {100 * clean.sign_mean:.1f} %) and on them attacked "
        f"({attacked.cosine_mean:.4f}, {attacked.cosine_min:.4f}; {100 * attacked.sign_mean:.1f} %)"
    )
