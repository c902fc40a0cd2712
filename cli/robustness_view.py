"""What `ccn-deploy verify-robustness` shows on a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from ccn_deploy.robustness import PrecisionsResult, RobustnessResult
    from ccn_deploy.robustness.non_inferiority import NonInferiorityTest, Proportion
    from ccn_deploy.robustness.precisions import Cell
    from ccn_deploy.robustness.query_stats import QueryStatsPair
    from ccn_deploy.robustness.rows import MinimizationResult
    from ccn_deploy.verdict import Verdict

_COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow"}


def show(result: RobustnessResult | PrecisionsResult, report: Path | None) -> None:
    """Print the tables, what to know about them, and the verdict on the last line.

    Args:
        result: Of one precision, or of several.
        report: Where the page is, if there is one.
    """
    from ccn_deploy.cli.console import out
    from ccn_deploy.robustness import PrecisionsResult

    if isinstance(result, PrecisionsResult):
        _show_precisions(result)
        max_drop = next(iter(result.results.values())).max_drop
    else:
        _show_one(result)
        max_drop = result.max_drop
    if report is not None:
        out.print(f"Report: {report}", markup=False, soft_wrap=True)
    colour = _COLOURS[result.verdict.value]
    out.print(
        f"[bold {colour}]{result.verdict.value.upper()}[/]: every row passes if its drop is shown, "
        f"at 95 %, to be at most {max_drop:g} (--max-drop), and fails if it is larger.",
        soft_wrap=True,
    )


def _show_one(result: RobustnessResult) -> None:
    from ccn_deploy.cli.console import out

    out.print(_table(result))
    out.print(f"Gradients on the runtime: {_gradients(result)}.", soft_wrap=True)
    for row in result.minimal:
        if row.clip:
            out.print(f"{row.title} d: moved by at most d times the norm of the image.")
        for one in (row, row.unclipped):
            if one is not None:
                out.print(_smallest(one), markup=False, soft_wrap=True)
    out.print("Queries of an attacked image, and seconds in all (reference | runtime):")
    out.print(_efforts(result.efforts))
    _notes(result.warnings)
    _reasons(result)


def _show_precisions(result: PrecisionsResult) -> None:
    from ccn_deploy.cli.console import out

    out.print(_precisions(result))
    for name, one in result.results.items():
        out.print(f"{name}: gradients {_gradients(one)}.", soft_wrap=True)
    for name, one in result.results.items():
        for row in one.minimal:
            if row.clip:
                out.print(f"{name}, {_smallest(row)}", markup=False, soft_wrap=True)
    _notes(result.warnings)
    for name, one in result.results.items():
        _notes(f"{name}: {warning}" for warning in one.warnings)
        _reasons(one, f"{name}, ")


def _notes(warnings: Iterable[str]) -> None:
    from ccn_deploy.cli.console import out

    for warning in warnings:
        out.print(f"[yellow]note:[/] {warning}", soft_wrap=True)


def _reasons(result: RobustnessResult, before: str = "") -> None:
    """Say why rows did not pass, those with the same reason together."""
    from ccn_deploy.cli.console import out

    for reason, names in _doubts(result).items():
        more = f" and {len(names) - 2} more" if len(names) > 3 else ""
        shown = names[:2] if more else names
        out.print(f"[yellow]{before}{', '.join(shown)}{more}:[/] {reason}", soft_wrap=True)


def _precisions(result: PrecisionsResult) -> Table:
    """Lay attacks down and precisions across, with what each costs against the baseline."""
    first = result.first
    table = _empty(
        f"Accuracy (%) under attack on {first.n:,} images of {first.dataset['name']}, "
        f"{first.runtime}"
    )
    table.add_column("attack", no_wrap=True)
    for name in result.results:
        less = "" if name == result.baseline else f"\ndrop to {result.baseline} (at most)"
        table.add_column(f"{name}{less}", justify="right", no_wrap=True)
    for row in result.rows:
        title = "none" if row.strength is None else f"{row.title} {row.strength:g}"
        table.add_row(title, *(_cell(cell) for cell in row.cells.values()))
    same = (f"{100 * share.value:.1f}" for share in result.agreement.values())
    table.add_row(f"labels of {result.baseline}", *same)
    verdicts = (_coloured(one.verdict) for one in result.results.values())
    table.add_row("verdict", *verdicts)
    return table


def _cell(cell: Cell) -> str:
    share = f"{100 * cell.share.value:.1f}"
    if cell.cost is None:
        return share
    return f"{share}  {100 * cell.cost.drop:+.1f} ({100 * cell.cost.upper95:.1f})"


def _doubts(result: RobustnessResult) -> dict[str, list[str]]:
    """Group the rows that did not pass by the reason."""
    found: dict[str, list[str]] = {}
    for name, gate in result.gates.items():
        if gate.reason:
            found.setdefault(gate.reason, []).append(name)
    return found


def _table(result: RobustnessResult) -> Table:
    measurement = result.measurement
    table = _empty(
        f"Accuracy (%) under attack on {measurement.n:,} images of "
        f"{measurement.dataset['name']}, with 95 % intervals"
    )
    target = f"{measurement.runtime}\n{measurement.precision}"
    for name in ("attack", "reference\nPyTorch", target, "drop\n(at most)", "differ", "verdict"):
        side = "left" if name in {"attack", "verdict"} else "right"
        table.add_column(name, justify=side, no_wrap=True)  # type: ignore[arg-type]
    for row in (result.clean, *result.bounded):
        name = "none" if row.norm is None else f"{row.title} {row.epsilon:g}"
        table.add_row(name, _share(row.reference), _share(row.runtime), *_judged(row.gate))
    for minimal in result.minimal:
        if not minimal.clip:
            continue
        for d, gate in minimal.gates.items():
            table.add_row(
                f"{minimal.title} {d:g}",
                _share(minimal.reference.accuracy_at[d]),
                _share(minimal.runtime.accuracy_at[d]),
                *_judged(gate),
            )
    return table


def _empty(title: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    return Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        title=title,
        title_justify="left",
        title_style="bold",
    )


def _gradients(result: RobustnessResult) -> str:
    """Say where the gradients on the runtime came from, and how far to trust the choice."""
    from ccn_deploy.attacks.source import GRADIENTS, source

    name = source(result.measurement.gradient)
    said = f"{name}, {GRADIENTS[name]}"
    agreement = result.measurement.agreement
    if agreement is None:
        return said
    clean, attacked = agreement.clean, agreement.adversarial
    return (
        f"{said}; native and reference agree on {clean.n} clean images (cosine "
        f"{clean.cosine_mean:.4f}, "
        f"least {clean.cosine_min:.4f}; signs {100 * clean.sign_mean:.1f} %) and on them attacked "
        f"({attacked.cosine_mean:.4f}, {attacked.cosine_min:.4f}; {100 * attacked.sign_mean:.1f} %)"
    )


def _smallest(row: MinimizationResult) -> str:
    """Say in one line how far the images had to be moved, and how many could be."""
    where = "" if row.clip else " leaving [0, 1], not judged"
    runtime, reference = row.runtime, row.reference
    return (
        f"{row.title}{where}: mean rho_adv {_number(runtime.rho_adv)} (reference "
        f"{_number(reference.rho_adv)}), mean L2 distance {_number(runtime.l2_mean)} "
        f"({_number(reference.l2_mean)}), found for {100 * runtime.found.value:.1f} % "
        f"({100 * reference.found.value:.1f} %) of {row.n:,}"
    )


def _efforts(efforts: dict[str, QueryStatsPair]) -> Table:
    """Lay out what each attack asked of the two, and how long it took."""
    from rich.markup import escape

    table = _empty()
    table.add_column("attack", no_wrap=True)
    for what in ("forward", "backward", "seconds"):
        table.add_column(what, justify="right", no_wrap=True)
    for title, both in efforts.items():
        sides = both.reference, both.runtime
        table.add_row(
            escape(title),
            " | ".join(_mean(side.forward_mean) for side in sides),
            " | ".join(_mean(side.backward_mean) for side in sides),
            " | ".join(f"{side.seconds:.1f}" for side in sides),
        )
    return table


def _share(share: Proportion) -> str:
    low, high = share.ci95
    return f"{100 * share.value:.1f} \\[{100 * low:.0f}, {100 * high:.0f}]"


def _judged(gate: NonInferiorityTest) -> tuple[str, str, str]:
    return (
        f"{100 * gate.drop:.1f} ({100 * gate.upper95:.1f})",
        str(gate.lost + gate.gained),
        _coloured(gate.verdict),
    )


def _coloured(verdict: Verdict) -> str:
    return f"[{_COLOURS[verdict.value]}]{verdict.value}[/]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
