"""The tables of a document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ccn_deploy.report.claim_text import Json, interval, norm, number, percent, target, title
from ccn_deploy.report.view import Cell, Mark, Row, Table
from ccn_deploy.verdict import Verdict


def bounded_table(document: Json, rows: Sequence[Json]) -> Table:
    """Return accuracy without an attack, and under every attack with an epsilon."""
    clean = document["clean"]
    lines = [
        Row(
            "No attack",
            [
                Cell("0"),
                _share(clean["reference"], "accuracy"),
                _share(clean["runtime"], "accuracy"),
                *_comparison(clean),
            ],
            Mark.of(clean["verdict"]),
        )
    ]
    lines += [
        Row(
            title({**row, "epsilon": None, "clip": True}),
            [
                Cell(f"{row['epsilon']:g}"),
                _share(row["reference"], "robust_accuracy"),
                _share(row["runtime"], "robust_accuracy"),
                *_comparison(row),
            ],
            Mark.of(row["verdict"]),
        )
        for row in rows
    ]
    return Table(
        title="Reference and runtime, side by side",
        columns=["Attack", "ε", "Reference", "Runtime", "Differ", "Drop at most", "Verdict"],
        rows=lines,
        about="Accuracy with exact 95 % intervals. Each of the two is attacked itself. “Differ” "
        "counts images that one gets right and the other does not; “drop at most” is its "
        "one-sided 95 % bound in points, the number that is judged.",
    )


def minimal_table(row: Json) -> Table:
    """Return accuracy at every d, and the paper's rho_adv, of an attack without an epsilon."""
    sides = row["reference"], row["runtime"]
    gates: Json = row.get("gates", {})
    lines = [
        Row(
            f"Accuracy at d = {d}",
            [
                *(
                    Cell(percent(side["accuracy_at"][d]), interval(side["accuracy_at_ci95"][d]))
                    for side in sides
                ),
                Cell(_bound(gates[d]) if d in gates else ""),
            ],
            Mark.of(gates[d]["verdict"]) if d in gates else None,
        )
        for d in sides[0]["accuracy_at"]
    ]
    lines.append(
        Row(
            "Found (success)",
            [
                *(Cell(percent(side["success"]), interval(side["success_ci95"])) for side in sides),
                Cell(""),
            ],
        )
    )
    for name, key in (
        ("Mean ρ (ρ_adv)", "rho_adv_mean"),
        ("Median ρ", "rho_adv_median"),
        ("Mean L2 distance", "l2_mean"),
    ):
        lines.append(Row(name, [*(Cell(number(side[key])) for side in sides), Cell("")]))
    for name, key in (("Already wrong", "already_wrong"), ("Nothing found", "failed")):
        lines.append(Row(name, [*(Cell(str(side[key])) for side in sides), Cell("")]))
    unclipped: Json | None = row.get("unclipped")
    if unclipped:
        both = unclipped["reference"], unclipped["runtime"]
        cells = [Cell(number(side["rho_adv_mean"])) for side in both]
        lines.append(Row("Mean ρ without the box [0, 1]", [*cells, Cell("")]))
    return Table(
        title=f"{title(row)}: the smallest perturbation that changes the label",
        columns=["", "Reference", "Runtime", "Drop at most", "Verdict"],
        rows=lines,
        about=f"ρ is the {norm(row['norm'])} of the perturbation over that of the image. An image "
        "counts as right at d if it was right before and needs more than ρ = d to be fooled. Means "
        "are over the images for which something was found.",
    )


def effort_table(rows: Sequence[Json]) -> Table:
    """Return what every attack asked of the two, and how long it took."""
    every = [one for row in rows for one in (row, row.get("unclipped")) if one]
    return Table(
        title="What the attacks took",
        columns=["Attack", *(f"{what}, {side}" for what in ("Forward", "Backward", "Seconds")
                             for side in ("reference", "runtime")), ""],
        rows=[
            Row(
                title(row),
                [
                    *(
                        Cell("none" if side[key] is None else f"{side[key]:.1f}")
                        for key in ("forward_mean", "backward_mean", "seconds")
                        for side in (row["effort"]["reference"], row["effort"]["runtime"])
                    ),
                ],
            )
            for row in every
        ],
        about="Logits and input gradients that an attack asked for, a mean over the images that it "
        "attacked; and the time of all of them, in which every answer is checked too.",
    )  # fmt: skip


def precision_table(document: Json) -> Table:
    """Return precisions across and attacks down, with what each costs against the baseline.

    Args:
        document: Of schema ``ccn-deploy/robustness-precisions/1``.
    """
    baseline, precisions = document["baseline"], document["precisions"]
    lines = [
        Row(_strength(row), [_precision(cell) for cell in row["precisions"].values()])
        for row in document["comparison"]
    ]
    first = next(iter(precisions.values()))
    for at, attack in enumerate(first["attacks"]):
        if attack["epsilon"] is None and attack["clip"]:
            sides = [one["attacks"][at]["runtime"] for one in precisions.values()]
            for name, key in (("mean ρ", "rho_adv_mean"), ("mean L2 distance", "l2_mean")):
                cells = [Cell(number(side[key])) for side in sides]
                lines.append(Row(f"{title(attack)}, {name}", cells))
    same = [Cell(f"{100 * own['share']:.1f} %") for own in document["label_agreement"].values()]
    lines.append(Row(f"No attack, label of {baseline}", same))
    lines.append(Row("Gradients", [Cell(one["gradient"]) for one in precisions.values()]))
    words = [Cell(Mark.of(one["verdict"]).word) for one in precisions.values()]
    lines.append(Row("Verdict against the reference", words))
    return Table(
        title="What each precision costs",
        columns=["Attack", *precisions, ""],
        rows=lines,
        about=f"Accuracy of {document['runtime']} under attack, each precision attacked itself, "
        f"on the same images. Beside it the drop against {baseline} in points, and its one-sided "
        "95 % bound. What is judged is each precision against the reference.",
    )


def _strength(row: Json) -> str:
    if row["attack"] is None:
        return "No attack"
    at = f"ε = {row['epsilon']:g}" if row["epsilon"] is not None else f"d = {row['d']:g}"
    return f"{row['title']}, {at}"


def _precision(cell: Json) -> Cell:
    cost = cell["cost"]
    beside = "" if cost is None else f"{100 * cost['drop']:.1f}, at most {_bound(cost)}"
    return Cell(percent(cell["robust_accuracy"]), beside)


def parity_table(parity: Json) -> Table:
    """Return a row per kind of input, with the worst of its batch sizes."""
    lines = []
    slopes = parity["gradients"]["rows"] if parity["gradients"] else []
    for kind in dict.fromkeys(row["kind"] for row in parity["inputs"]):
        rows = [row for row in parity["inputs"] if row["kind"] == kind]
        gradients = [row for row in slopes if row["kind"] == kind]
        verdict = Verdict.all_of(Verdict(row["verdict"]) for row in (*rows, *gradients))
        lines.append(
            Row(
                kind,
                [
                    Cell(", ".join(str(row["batch"]) for row in rows)),
                    Cell(_largest((row["max_abs"] for row in rows), "{:.1e}")),
                    Cell(_largest((row["rounding_units"] for row in rows), "{:.2f}")),
                    Cell(str(sum(row["argmax_flips"] for row in rows))),
                    Cell(str(sum(row["nonfinite"] for row in rows))),
                    Cell(_largest((row["relative"] for row in gradients), "{:.1e}") or "none"),
                ],
                Mark.of(verdict.value),
            )
        )
    return Table(
        title="Parity with the float64 reference",
        columns=["Input", "Batches", "Largest error", "In rounding units", "Labels differ",
                 "Not finite", "Gradients", "Verdict"],
        rows=lines,
        about=f"Logits of {target(parity)} against those of the network in float64, the worst of "
        "the batch sizes. A rounding unit is the largest error that a model of its rounding made. "
        "Gradients: the runtime's own, largest error over the largest slope, away from kinks.",
    )  # fmt: skip


def _largest(values: Iterable[float | None], form: str) -> str:
    """Return the largest value, "" of none; a document says null for one that is not finite."""
    found = list(values)
    if not found:
        return ""
    finite = [value for value in found if value is not None]
    return form.format(max(finite)) if len(finite) == len(found) else "not finite"


def _share(side: Json, key: str) -> Cell:
    return Cell(percent(side[key]), interval(side["ci95"]))


def _comparison(row: Json) -> list[Cell]:
    return [Cell(str(row["verdict_flips"])), Cell(_bound(row))]


def _bound(gate: Json) -> str:
    return f"{100 * gate['drop_upper95']:.2f}"
