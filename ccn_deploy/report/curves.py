"""The curves of a document: accuracy against the size of the perturbation."""

from __future__ import annotations

from collections.abc import Sequence

from ccn_deploy.report.claim_text import Json, norm, title
from ccn_deploy.report.figures import Curve, Point


def bounded_curves(document: Json, rows: Sequence[Json]) -> list[Curve]:
    """Return a curve per attack with an epsilon, each beginning at the clean accuracy."""
    curves = []
    for attack in dict.fromkeys(row["attack"] for row in rows):
        same = sorted((r for r in rows if r["attack"] == attack), key=lambda r: r["epsilon"])
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
        name = title({**same[0], "epsilon": None, "clip": True})
        curves.append(Curve(name, f"ε, {norm(same[0]['norm'])} of the perturbation", **sides))
    return curves


def minimal_curve(document: Json, row: Json) -> Curve:
    """Return accuracy against d of an attack without an epsilon."""
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
    return Curve(title(row), f"d, {norm(row['norm'])} over that of the image", **sides)


def _clean_point(document: Json, side: str) -> Point:
    return _point(0.0, document["clean"][side]["accuracy"], document["clean"][side]["ci95"])


def _point(size: float, accuracy: float, ci95: Sequence[float]) -> Point:
    return Point(size, accuracy, *ci95)
