"""What `ccn-deploy verify-robustness` shows on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ccn_deploy.robustness import PrecisionsResult, RobustnessResult


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
    from ccn_deploy.robustness.tables import precision_table

    if isinstance(result, PrecisionsResult):
        results = list(result.results.values())
        show_table(precision_table(result))
        for warning in result.warnings:
            _note(warning)
    else:
        results = [result]
        _show_tables(result)
    for one in results:
        name = f"{one.measurement.precision}: " if len(results) > 1 else ""
        whose = f"{name}gradients" if name else "Gradients on the runtime:"
        out.print(f"{whose} {_gradients(one)}.", soft_wrap=True)
        for warning in one.warnings:
            _note(f"{name}{warning}")
        for reason, names in _doubts(one).items():
            more = f" and {len(names) - 2} more" if len(names) > 3 else ""
            rows = ", ".join(names[:2] if more else names)
            out.print(f"[yellow]{name}{rows}{more}:[/] {reason}", soft_wrap=True)
    if report is not None:
        out.print(f"Report: {report}", markup=False, soft_wrap=True)
    show_verdict(
        result.verdict,
        "every row passes if its drop is shown, at 95 %, to be at most "
        f"{results[0].max_drop:g} (--max-drop), and fails if it is larger.",
    )


def _show_tables(result: RobustnessResult) -> None:
    from ccn_deploy.cli.console import out
    from ccn_deploy.cli.tables import show as show_table
    from ccn_deploy.robustness.tables import accuracy_table, effort_table, perturbation_table

    show_table(accuracy_table(result))
    for row in result.minimal:
        if row.clip:
            out.print(f"{row.title} d: moved by at most d times the norm of the image.\n")
        show_table(perturbation_table(row))
    show_table(effort_table(result.efforts))


def _note(warning: str) -> None:
    from ccn_deploy.cli.console import out

    out.print(f"[yellow]note:[/] {warning}", soft_wrap=True)


def _doubts(result: RobustnessResult) -> dict[str, list[str]]:
    """Group the rows that did not pass by the reason."""
    found: dict[str, list[str]] = {}
    for name, gate in result.gates.items():
        if gate.reason:
            found.setdefault(gate.reason, []).append(name)
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
