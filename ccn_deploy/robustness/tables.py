"""The tables of a judged measurement."""

from __future__ import annotations

from collections.abc import Mapping

from ccn_deploy.robustness.non_inferiority import PairedDifference, Proportion
from ccn_deploy.robustness.precisions import PrecisionsResult
from ccn_deploy.robustness.query_stats import QueryStatsPair
from ccn_deploy.robustness.result import RobustnessResult
from ccn_deploy.robustness.rows import MinimizationResult
from ccn_deploy.tables import NORMS, Cell, Mark, Row, Table, number, percent, texts


def accuracy_table(result: RobustnessResult) -> Table:
    """Return accuracy without an attack and under every one that is judged."""
    about = (
        "Each of the two is attacked itself. Beside the drop in points stands its one-sided 95 % "
        "bound, the number that is judged. “Differ” counts images that one gets right and the "
        "other does not. An attack stands with its epsilon."
    )
    if result.minimal:
        about += (
            " One that looks for the smallest perturbation stands with d: an image counts as right "
            "if it was right before and must be moved by more than d times its norm."
        )
    measurement = result.measurement
    return Table(
        title=f"Accuracy (%) under attack on {measurement.n:,} images of "
        f"{measurement.dataset['name']}, with 95 % intervals",
        columns=(
            "Attack",
            "Reference\nPyTorch",
            f"{measurement.runtime}\n{measurement.precision}",
            "Drop\n(at most)",
            "Differ",
        ),
        rows=[
            Row(
                row.label,
                [
                    _share(row.reference),
                    _share(row.runtime),
                    _drop(row.gate),
                    *texts(row.gate.lost + row.gate.gained),
                ],
                Mark.of(row.gate.verdict),
            )
            for row in result.rows
        ],
        about=about,
    )


def perturbation_table(result: MinimizationResult) -> Table:
    """Return how far images had to be moved by an attack without an epsilon."""
    sides = (result.reference, result.runtime)
    rows = [
        Row("Found (success)", [_share(side.found) for side in sides]),
        Row("Mean rho (rho_adv)", texts(*(number(side.rho_adv) for side in sides))),
        Row("Median rho", texts(*(number(side.rho_median) for side in sides))),
        Row("Mean L2 distance", texts(*(number(side.l2_mean) for side in sides))),
        Row("Already wrong", texts(*(side.already_wrong for side in sides))),
        Row("Nothing found", texts(*(side.failed for side in sides))),
    ]
    if (free := result.unclipped) is not None:
        both = (free.reference, free.runtime)
        rows.append(Row("Mean rho leaving [0, 1]", texts(*(number(s.rho_adv) for s in both))))
    return Table(
        title=f"{result.full_title}: the smallest perturbation that changes the label",
        columns=("", "Reference", "Runtime"),
        rows=rows,
        about=f"rho is the {NORMS[result.norm]} of the perturbation over that of the image. Means "
        "are over the images for which something was found. What leaves [0, 1] is not judged.",
    )


def effort_table(efforts: Mapping[str, QueryStatsPair]) -> Table:
    """Return what attacks asked of the two, by their names, and how long it took."""
    return Table(
        title="What the attacks took (reference | runtime)",
        columns=("Attack", "Forward", "Backward", "Seconds"),
        rows=[
            Row(
                title,
                texts(
                    *(
                        " | ".join(number(value, 1) for value in both)
                        for both in (
                            (effort.reference.forward_mean, effort.runtime.forward_mean),
                            (effort.reference.backward_mean, effort.runtime.backward_mean),
                            (effort.reference.seconds, effort.runtime.seconds),
                        )
                    )
                ),
            )
            for title, effort in efforts.items()
        ],
        about="Logits and input gradients that an attack asked for, a mean over the images that it "
        "attacked; and the time of all of them, in which every answer is checked too.",
    )


def precision_table(result: PrecisionsResult) -> Table:
    """Return precisions across and attacks down, with what each costs against the baseline."""
    results = result.results
    rows = [
        Row(
            row.label,
            [Cell(percent(c.share.value), note=_cost(c.cost)) for c in row.cells.values()],
        )
        for row in result.rows
    ]
    for attacks in zip(*(one.minimal for one in results.values()), strict=True):
        if attacks[0].clip:
            rhos = (number(one.runtime.rho_adv) for one in attacks)
            rows.append(Row(f"{attacks[0].title} mean rho", texts(*rhos)))
            distances = (number(one.runtime.l2_mean) for one in attacks)
            rows.append(Row(f"{attacks[0].title} mean L2", texts(*distances)))
    same = (percent(share.value) for share in result.agreement.values())
    rows.append(Row(f"labels of {result.baseline}", texts(*same)))
    sources = (one.measurement.gradient for one in results.values())
    rows.append(Row("gradients", texts(*sources)))
    rows.append(Row("verdict", texts(*(one.verdict.value for one in results.values()))))
    first = result.first
    drop = f"\ndrop to {result.baseline} (at most)"
    return Table(
        title=f"What each precision costs: accuracy (%) under attack on {first.n:,} images of "
        f"{first.dataset['name']}, {first.runtime}",
        columns=("Attack", *(n if n == result.baseline else f"{n}{drop}" for n in results)),
        rows=rows,
        about="Each precision is attacked itself, on the same images. Beside its accuracy stands "
        f"the drop against {result.baseline} in points, and its one-sided 95 % bound. What is "
        "judged is each precision against the reference.",
    )


def _share(share: Proportion) -> Cell:
    low, high = share.ci95
    return Cell(percent(share.value), (100 * low, 100 * high))


def _drop(difference: PairedDifference) -> Cell:
    return Cell(f"{100 * difference.drop:+.1f}", note=f"({100 * difference.upper95:.2f})")


def _cost(difference: PairedDifference | None) -> str:
    if difference is None:
        return ""
    cell = _drop(difference)
    return f"{cell.text} {cell.note}"
