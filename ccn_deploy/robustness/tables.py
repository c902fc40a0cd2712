"""The tables of a judged measurement."""

from __future__ import annotations

from collections.abc import Mapping

from ccn_deploy.attacks.spec import AttackSpec, title_of
from ccn_deploy.robustness.non_inferiority import PairedDifference, Proportion
from ccn_deploy.robustness.precisions import PrecisionsResult
from ccn_deploy.robustness.query_stats import QueryStatsPair
from ccn_deploy.robustness.result import RobustnessResult
from ccn_deploy.robustness.rows import (
    FixedEpsilonResult,
    MinimizationResult,
    label_of,
    settings_text,
)
from ccn_deploy.tables import Cell, Mark, Row, Table, number, percent, texts


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
            "if it was right before and must be moved by more than d times its norm, or where it "
            "is the L∞ norm that is small, by more than d."
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
    rows = [Row("Found (success)", [_share(side.found) for side in sides])]
    if result.norm == "linf":
        rows += [
            Row("Mean L∞ distance", texts(*(number(side.linf_mean) for side in sides))),
            Row("Median L∞ distance", texts(*(number(side.linf_median) for side in sides))),
        ]
    else:
        rows += [
            Row("Mean rho (rho_adv)", texts(*(number(side.rho_adv) for side in sides))),
            Row("Median rho", texts(*(number(side.rho_median) for side in sides))),
        ]
    rows += [
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
        about="rho is the L2 norm of the perturbation over that of the image. Means are over the "
        "images for which something was found. What leaves [0, 1] is not judged.",
    )


def threshold_table(result: RobustnessResult) -> Table:
    """Return what was required of the runtime, and what is shown."""
    return Table(
        title="What was required of the runtime (accuracy, %)",
        columns=("Attack", "Required", result.measurement.target, "Shown"),
        rows=[
            Row(
                label_of(title_of(test.threshold.attack or ""), test.threshold.strength or None),
                [
                    *texts(f"{100 * test.threshold.share:g}"),
                    _share(test.reached),
                    *texts(percent(test.lower95)),
                ],
                Mark.of(test.verdict),
            )
            for test in result.thresholds
        ],
        about="Shown is the one-sided 95 % lower bound of the accuracy (Clopper and Pearson). A "
        "threshold is passed if that reaches it, and failed if the accuracy itself does not.",
    )


def stage_table(row: FixedEpsilonResult) -> Table:
    """Return what each stage of an attack that has some added on the reference and runtime."""
    return Table(
        title=f"{row.row.label}, stage by stage (reference | runtime)",
        columns=("Stage", "Images", "Fell", "Left", "Forward", "Backward"),
        rows=[
            Row(
                _stage_name(stage.spec),
                texts(
                    *(
                        f"{getattr(stage.reference, what)} | {getattr(stage.runtime, what)}"
                        for what in ("attacked", "fooled", "left", "forward", "backward")
                    )
                ),
            )
            for stage in row.stages
        ],
        about="Each stage attacks what the ones before it left; an image that one of them fooled "
        "does not hold. The last runs the images of the reference's own audit on the runtime. "
        "Queries are those of all images together.",
    )


def settings_table(result: RobustnessResult) -> Table:
    """Return every setting of every attack; strengths stand with the results."""
    rows = []
    for spec in {pair.spec.title: pair.spec for pair in result.measurement.pairs}.values():
        rows.append(Row(spec.title, texts(settings_text(spec.parameters))))
        rows += [
            Row(f"{spec.title}: {_stage_name(stage)}", texts(settings_text(stage.parameters)))
            for stage in spec.stages
        ]
    return Table("How the attacks were set", ("Attack", "Settings"), rows)


def _stage_name(spec: AttackSpec) -> str:
    return spec.title if spec.part is None else f"{spec.title}, first {spec.part}"


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
            if attacks[0].norm == "linf":
                sizes = (number(one.runtime.linf_mean) for one in attacks)
                rows.append(Row(f"{attacks[0].title} mean L∞", texts(*sizes)))
            else:
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
