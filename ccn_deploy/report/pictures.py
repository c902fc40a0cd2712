"""The examples as a table of pictures."""

from __future__ import annotations

from collections.abc import Sequence

from ccn_deploy.report.examples import Attacked, Example, data_uri
from ccn_deploy.report.view import Picture, PictureColumn, PictureRow, Pictures


def pictures_of(examples: Sequence[Example], class_names: Sequence[str]) -> Pictures | None:
    """Return attacks down and images across; None without an example."""
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
