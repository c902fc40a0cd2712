"""What the page says, worked out from the judgement; the template only sets it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ccn_deploy.architectures import ARCHITECTURES
from ccn_deploy.attacks.source import GRADIENTS
from ccn_deploy.bundle import Bundle
from ccn_deploy.defenses import DEFENSES
from ccn_deploy.report.examples import Attacked, Example, data_uri
from ccn_deploy.report.figures import Curve, Point
from ccn_deploy.robustness import RobustnessResult
from ccn_deploy.storage import sha256_file
from ccn_deploy.verdict import Verdict

Json = Mapping[str, Any]

_WORDS = {"pass": "Pass", "fail": "Fail", "inconclusive": "Inconclusive"}


@dataclass(frozen=True)
class Mark:
    """A verdict as it is shown: a word and the class that colours it."""

    word: str
    css: str

    @classmethod
    def of(cls, verdict: str) -> Mark:
        """Mark a verdict of a document."""
        return cls(_WORDS[verdict], verdict)


@dataclass(frozen=True)
class Fact:
    """A name and what it names; ``code`` for what is read letter by letter."""

    name: str
    value: str
    note: str = ""
    code: bool = False


@dataclass(frozen=True)
class Cell:
    """A number of a table, with its interval if it has one."""

    text: str
    interval: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table; the verdict, if any, stands at its end."""

    name: str
    values: Sequence[Cell]
    verdict: Mark | None = None


@dataclass(frozen=True)
class Table:
    """A table; the first column is the row's name, the last its verdict."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    about: str = ""


@dataclass(frozen=True)
class Picture:
    """An image with what the runtime says of it."""

    uri: str
    alt: str
    prediction: str
    fooled: bool
    note: str


@dataclass(frozen=True)
class PictureRow:
    """One attack, or none, on every example; None where there is no image."""

    name: str
    cells: Sequence[Picture | None]


@dataclass(frozen=True)
class PictureColumn:
    """One example."""

    label: str
    index: int


@dataclass(frozen=True)
class Pictures:
    """The examples as a table: attacks down, images across."""

    columns: Sequence[PictureColumn]
    rows: Sequence[PictureRow]


@dataclass(frozen=True)
class Page:
    """Everything on the page, in its order."""

    verdict: Mark
    reason: str
    model: str
    target: str
    reference: str
    facts: Sequence[Fact]
    curves: Sequence[Curve]
    tables: Sequence[Table]
    parity: Table | None
    pictures: Pictures | None
    warnings: Sequence[str]
    command: str
    provenance: Sequence[Fact]
    digests: Sequence[Fact]
    version: str


def page_of(
    bundle: Bundle,
    result: RobustnessResult,
    examples: Sequence[Example],
    command: str,
    parity: Json | None,
) -> Page:
    """Work out what the page says.

    Args:
        bundle: What was measured.
        result: Its judgement.
        examples: Images to show.
        command: What the user typed.
        parity: A document of schema ``ccn-deploy/parity/1``, if parity was measured.
    """
    from ccn_deploy import __version__

    document = result.document()
    bounded = [row for row in document["attacks"] if row["epsilon"] is not None]
    minimal = [row for row in document["attacks"] if row["epsilon"] is None]
    tables = [_bounded_table(document, bounded)] if bounded else []
    tables += [_minimal_table(row) for row in minimal]
    tables.append(_effort_table(document["attacks"]))
    return Page(
        verdict=Mark.of(document["verdict"]),
        reason=reason(document),
        model=_model(bundle),
        target=_target(document),
        reference=document["reference"],
        facts=_facts(document),
        curves=[
            *_bounded_curves(document, bounded),
            *(_minimal_curve(document, row) for row in minimal),
        ],
        tables=tables,
        parity=_parity_table(parity) if parity else None,
        pictures=_pictures(examples, bundle.manifest.class_names),
        warnings=document["warnings"],
        command=command,
        provenance=_provenance(bundle, result),
        digests=_digests(bundle, result),
        version=__version__,
    )


def reason(document: Json) -> str:
    """Return the verdict's reason in one sentence."""
    judged = [document["clean"], *(row for row in document["attacks"] if "verdict" in row)]
    allowed = f"{100 * document['max_drop']:g}"
    if document["verdict"] == Verdict.PASS.value:
        worst = max(_worst_bound(row) for row in judged)
        return (
            f"In none of {len(judged)} comparisons on {document['samples']} images does "
            f"{_target(document)} fall behind {document['reference']} by more than "
            f"{100 * worst:.2f} points, at 95 % confidence; {_points(allowed)} allowed."
        )
    names = {id(row): _title(row) for row in judged}
    deciding = [row for row in judged if row["verdict"] == document["verdict"]]
    more = len(deciding) - 1
    also = f"; likewise in {more} more {'row' if more == 1 else 'rows'}" if more else ""
    return f"{names[id(deciding[0])]}: {deciding[0]['reason']}{also}."


def _worst_bound(row: Json) -> float:
    gates = [row, *row.get("gates", {}).values()]
    return float(max(gate["drop_upper95"] for gate in gates))


def _points(allowed: str) -> str:
    return f"{allowed} is" if allowed == "1" else f"{allowed} are"


def _title(row: Json) -> str:
    """Return what a row is about, for people."""
    if "attack" not in row:
        return "Without an attack"
    name = row["title"]
    if row["epsilon"] is not None:
        return f"{name}, ε = {row['epsilon']:g}"
    return str(name) if row["clip"] else f"{name}, not clipped to [0, 1]"


def _model(bundle: Bundle) -> str:
    manifest = bundle.manifest
    defense = DEFENSES.get(manifest.defense)
    return f"{defense.title if defense else manifest.defense} ({manifest.architecture})"


def _target(document: Json) -> str:
    return f"{document['runtime']}-{document['precision']}"


def _facts(document: Json) -> list[Fact]:
    clean = document["clean"]
    data = document["dataset"]
    kinds = dict.fromkeys(
        _title({**row, "epsilon": None, "clip": True}) for row in document["attacks"]
    )
    return [
        Fact(
            "Accuracy without attack",
            _percent(clean["runtime"]["accuracy"]),
            _interval(clean["runtime"]["ci95"]),
        ),
        Fact("Images", f"{document['samples']}", f"{data['name']}, {data['split']}"),
        Fact("Attacks", ", ".join(kinds)),
        Fact("Allowed drop", f"{100 * document['max_drop']:g} points"),
    ]


def _bounded_curves(document: Json, rows: Sequence[Json]) -> list[Curve]:
    """Return a curve per attack with an epsilon, each beginning at the clean accuracy."""
    curves = []
    for name in dict.fromkeys(row["attack"] for row in rows):
        same = sorted((r for r in rows if r["attack"] == name), key=lambda r: r["epsilon"])
        sides = {
            side: [
                _clean_point(document, side),
                *(
                    _point(row["epsilon"], row[side]["robust_accuracy"], row[side]["ci95"])
                    for row in same
                ),
            ]
            for side in ("reference", "runtime")
        }
        title = _title({**same[0], "epsilon": None, "clip": True})
        curves.append(Curve(title, f"ε, {_norm(same[0]['norm'])} of the perturbation", **sides))
    return curves


def _minimal_curve(document: Json, row: Json) -> Curve:
    sides = {
        side: [
            _clean_point(document, side),
            *(
                _point(float(d), accuracy, row[side]["accuracy_at_ci95"][d])
                for d, accuracy in row[side]["accuracy_at"].items()
            ),
        ]
        for side in ("reference", "runtime")
    }
    return Curve(_title(row), f"d, {_norm(row['norm'])} over that of the image", **sides)


def _clean_point(document: Json, side: str) -> Point:
    return _point(0.0, document["clean"][side]["accuracy"], document["clean"][side]["ci95"])


def _point(size: float, accuracy: float, ci95: Sequence[float]) -> Point:
    return Point(size, accuracy, *ci95)


def _norm(norm: str) -> str:
    return {"linf": "L∞ norm", "l2": "L2 norm"}.get(norm, norm)


def _bounded_table(document: Json, rows: Sequence[Json]) -> Table:
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
            _title({**row, "epsilon": None, "clip": True}),
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


def _minimal_table(row: Json) -> Table:
    """Return accuracy at every d, and the paper's rho_adv, of an attack without an epsilon."""
    sides = row["reference"], row["runtime"]
    gates: Json = row.get("gates", {})
    lines = [
        Row(
            f"Accuracy at d = {d}",
            [
                *(
                    Cell(_percent(side["accuracy_at"][d]), _interval(side["accuracy_at_ci95"][d]))
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
                *(
                    Cell(_percent(side["success"]), _interval(side["success_ci95"]))
                    for side in sides
                ),
                Cell(""),
            ],
        )
    )
    for name, key in (
        ("Mean ρ (ρ_adv)", "rho_adv_mean"),
        ("Median ρ", "rho_adv_median"),
        ("Mean L2 distance", "l2_mean"),
    ):
        lines.append(Row(name, [*(Cell(_number(side[key])) for side in sides), Cell("")]))
    for name, key in (("Already wrong", "already_wrong"), ("Nothing found", "failed")):
        lines.append(Row(name, [*(Cell(str(side[key])) for side in sides), Cell("")]))
    unclipped: Json | None = row.get("unclipped")
    if unclipped:
        both = unclipped["reference"], unclipped["runtime"]
        cells = [Cell(_number(side["rho_adv_mean"])) for side in both]
        lines.append(Row("Mean ρ without the box [0, 1]", [*cells, Cell("")]))
    return Table(
        title=f"{_title(row)}: the smallest perturbation that changes the label",
        columns=["", "Reference", "Runtime", "Drop at most", "Verdict"],
        rows=lines,
        about=f"ρ is the {_norm(row['norm'])} of the perturbation over that of the image. An image "
        "counts as right at d if it was right before and needs more than ρ = d to be fooled. Means "
        "are over the images for which something was found.",
    )


def _effort_table(rows: Sequence[Json]) -> Table:
    """Return what every attack asked of the two, and how long it took."""
    every = [one for row in rows for one in (row, row.get("unclipped")) if one]
    return Table(
        title="What the attacks took",
        columns=["Attack", *(f"{what}, {side}" for what in ("Forward", "Backward", "Seconds")
                             for side in ("reference", "runtime")), ""],
        rows=[
            Row(
                _title(row),
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


def _parity_table(parity: Json) -> Table:
    """Return a row per kind of input, with the worst of its batch sizes."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in parity["inputs"]):
        rows = [row for row in parity["inputs"] if row["kind"] == kind]
        verdict = Verdict.all_of(Verdict(row["verdict"]) for row in rows)
        lines.append(
            Row(
                kind,
                [
                    Cell(", ".join(str(row["batch"]) for row in rows)),
                    Cell(_largest((row["max_abs"] for row in rows), "{:.1e}")),
                    Cell(_largest((row["rounding_units"] for row in rows), "{:.2f}")),
                    Cell(str(sum(row["argmax_flips"] for row in rows))),
                    Cell(str(sum(row["nonfinite"] for row in rows))),
                ],
                Mark.of(verdict.value),
            )
        )
    return Table(
        title="Parity with the float64 reference",
        columns=["Input", "Batches", "Largest error", "In rounding units", "Labels differ",
                 "Not finite", "Verdict"],
        rows=lines,
        about=f"Logits of {_target(parity)} against those of the network in float64, the worst of "
        "the batch sizes. A rounding unit is the largest error that a model of its rounding made.",
    )  # fmt: skip


def _largest(values: Iterable[float | None], form: str) -> str:
    """Return the largest value; a document says null for one that is not finite."""
    found = list(values)
    finite = [value for value in found if value is not None]
    return form.format(max(finite)) if len(finite) == len(found) else "not finite"


def _share(side: Json, key: str) -> Cell:
    return Cell(_percent(side[key]), _interval(side["ci95"]))


def _comparison(row: Json) -> list[Cell]:
    return [Cell(str(row["verdict_flips"])), Cell(_bound(row))]


def _bound(gate: Json) -> str:
    return f"{100 * gate['drop_upper95']:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _interval(ci95: Sequence[float]) -> str:
    return f"{100 * ci95[0]:.1f} to {100 * ci95[1]:.1f}"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _pictures(examples: Sequence[Example], class_names: Sequence[str]) -> Pictures | None:
    if not examples:
        return None
    attacks = dict.fromkeys(name for example in examples for name in example.attacked)
    rows = [
        PictureRow("Clean", [_picture(e.clean, e, "clean", class_names) for e in examples]),
        *(
            PictureRow(
                name,
                [
                    _picture(e.attacked[name], e, name, class_names) if name in e.attacked else None
                    for e in examples
                ],
            )
            for name in attacks
        ),
    ]
    columns = [PictureColumn(_class(class_names, e.label), e.index) for e in examples]
    return Pictures(columns, rows)


def _picture(attacked: Attacked, example: Example, how: str, class_names: Sequence[str]) -> Picture:
    label = _class(class_names, example.label)
    prediction = _class(class_names, attacked.prediction)
    return Picture(
        uri=data_uri(attacked.image),
        alt=f"Image {example.index}, a {label}, {how}: classified as {prediction}",
        prediction=prediction,
        fooled=attacked.prediction != example.label,
        note=attacked.note,
    )


def _class(class_names: Sequence[str], label: int) -> str:
    return class_names[label] if 0 <= label < len(class_names) else "no answer"


def _provenance(bundle: Bundle, result: RobustnessResult) -> list[Fact]:
    manifest, measurement = bundle.manifest, result.measurement
    dataset = measurement.dataset
    architecture = ARCHITECTURES.get(manifest.architecture)
    headers = [e.header for pair in measurement.pairs for e in (pair.reference, pair.runtime)]
    versions = {
        name: version
        for header in headers
        for name, version in header.get("versions", {}).items()
        if version
    }
    machines = dict.fromkeys(header["machine"] for header in headers if "machine" in header)
    facts = [
        Fact("Architecture", architecture.title if architecture else manifest.architecture),
        Fact("Training", _training(manifest.training)),
        Fact("Data", f"{dataset['name']}, {dataset['split']} split"),
        Fact(
            "Selection",
            f"the first {measurement.n} images of the permutation with seed {measurement.seed}",
        ),
        Fact(
            "Gradients",
            f"{measurement.gradient}: {GRADIENTS[measurement.gradient]}; "
            "every verdict is the runtime's own",
        ),
        Fact("Versions", _list(f"{name} {version}" for name, version in sorted(versions.items()))),
        Fact("Machine", ", ".join(machines)),
        Fact("Manifest", manifest.digest, code=True),
    ]
    return [fact for fact in facts if fact.value]


def _digests(bundle: Bundle, result: RobustnessResult) -> list[Fact]:
    """Return the digests of the bundle's files, the data, and every evidence file."""
    found = [Fact(record.path, record.sha256, code=True) for record in bundle.manifest.files]
    data = result.measurement.dataset
    found.append(Fact(f"{data['name']}, {data['split']} split", data["digest"], code=True))
    for pair in result.measurement.pairs:
        for evidence in (pair.reference, pair.runtime):
            if evidence.path is not None and evidence.path.is_file():
                inside = evidence.path.is_relative_to(bundle.path)
                name = evidence.path.relative_to(bundle.path) if inside else evidence.path.name
                found.append(Fact(str(name), sha256_file(evidence.path), code=True))
    return list(dict.fromkeys(found))


def _training(training: Json) -> str:
    """Return what the manifest says of the training, on a line; digests stand elsewhere."""
    return _list(
        f"{name.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
        for name, value in training.items()
        if isinstance(value, str | int | float) and not name.endswith("digest")
    )


def _list(items: Iterable[str]) -> str:
    return ", ".join(items)
