"""Pictures for the report: an image, what attacks made of it, and what the runtime says."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.attacks.spec import AttackSpec
from ccn_deploy.data.dataset import Dataset
from ccn_deploy.extras import require
from ccn_deploy.report.rounding import to_8_bits
from ccn_deploy.robustness import Evidence, Measurement, Pair
from ccn_deploy.robustness.non_inferiority import Mask

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Attacked:
    """What one attack made of an image.

    Attributes:
        image: uint8 [C, H, W].
        prediction: The runtime's class for it; negative where it gave none.
        note: Anything worth a few words beside it, such as the perturbation's size.
    """

    image: Pixels
    prediction: int
    note: str = ""


@dataclass(frozen=True)
class Example:
    """One image and its adversarial versions: a column of the paper's figure 1.

    Attributes:
        index: Position in the data set.
        label: The true class.
        clean: The image as it is, with the runtime's prediction.
        attacked: By name of the attack, for example ``"FGSM, ε = 0.3"``.
    """

    index: int
    label: int
    clean: Attacked
    attacked: Mapping[str, Attacked]


def examples_of(measurement: Measurement, dataset: Dataset, count: int = 8) -> list[Example]:
    """Return the first images that were attacked, at one strength per attack.

    Images that the runtime gets right come first, since only those can be fooled.

    Args:
        measurement: Whose attacked images are shown.
        dataset: Where their clean versions come from.
        count: How many images at most.
    """
    shown = _shown(measurement)
    if not shown:
        return []
    first = next(iter(shown.values()))
    attacked = np.any([_attacked(evidence) for evidence in shown.values()], axis=0)
    rows = np.flatnonzero(attacked)
    rows = rows[np.argsort(first.status[rows] == "already-wrong", kind="stable")][:count]
    return _examples(shown, rows, dataset)


def hardest_examples(measurement: Measurement, dataset: Dataset, count: int = 8) -> list[Example]:
    """Return the images that the smallest perturbations fooled the runtime with.

    Of every image that is right without an attack, the smallest perturbation counts that any attack
    inside the box found, in the norm that most of them are bounded in. There are fewer where fewer
    were fooled.

    Args:
        measurement: Whose attacked images are shown.
        dataset: Where their clean versions come from.
        count: How many images at most.
    """
    shown = _shown(measurement)
    if not shown:
        return []
    pairs = [pair for pair in measurement.pairs if pair.spec.clip]
    norms = [pair.spec.norm for pair in pairs]
    norm = max(dict.fromkeys(norms), key=norms.count)
    found = [getattr(pair.runtime, norm) for pair in pairs]
    fooled = [pair.runtime.status == "fooled" for pair in pairs]
    smallest = np.fmin.reduce(np.where(fooled, found, np.inf))  # NaN: not measured in that norm
    rows = np.argsort(smallest, kind="stable")[:count]
    return _examples(shown, rows[np.isfinite(smallest[rows])], dataset)


def _shown(measurement: Measurement) -> dict[str, Evidence]:
    """Return what is shown of each attack, by its name."""
    return {_name(pair.spec): pair.runtime for pair in _one_strength_each(measurement.pairs)}


def _examples(
    shown: Mapping[str, Evidence], rows: NDArray[np.int64], dataset: Dataset
) -> list[Example]:
    first = next(iter(shown.values()))
    images = {name: evidence.adversarial(rows) for name, evidence in shown.items()}
    return [
        _example(row, first, shown, {name: kept[at] for name, kept in images.items()}, dataset)
        for at, row in enumerate(rows.tolist())
    ]


def data_uri(image: Pixels) -> str:
    """Return an image [C, H, W] as the URI of a PNG that holds its bytes.

    One channel is shown as grey, three as red, green and blue; of any other number the first.
    """
    imsave = require("matplotlib.image", "train", "to write a report").imsave
    planes = image if len(image) == 3 else np.repeat(image[:1], 3, axis=0)
    buffer = io.BytesIO()
    # Without its default metadata, which names a version, equal images are equal bytes.
    pixels = np.ascontiguousarray(planes.transpose(1, 2, 0))
    imsave(buffer, pixels, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _one_strength_each(pairs: Sequence[Pair]) -> list[Pair]:
    """Choose, of every attack inside the box, a strength in the upper middle."""
    chosen = []
    for name in dict.fromkeys(pair.spec.name for pair in pairs if pair.spec.clip):
        same = [pair for pair in pairs if pair.spec.name == name and pair.spec.clip]
        same.sort(key=lambda pair: pair.spec.epsilon or 0.0)
        chosen.append(same[len(same) // 2])
    return chosen


def _attacked(evidence: Evidence) -> Mask:
    """Which rows have an image that the attack was allowed to return."""
    return np.asarray(np.isfinite(evidence.l2) & (evidence.status != "invalid"))


def _example(
    at: int,
    first: Evidence,
    shown: Mapping[str, Evidence],
    images: Mapping[str, NDArray[np.float32]],
    dataset: Dataset,
) -> Example:
    index = int(first.index[at])
    return Example(
        index=index,
        label=int(first.label[at]),
        clean=Attacked(to_8_bits(dataset.images([index])[0]), int(first.clean_runtime[at])),
        attacked={
            name: Attacked(
                to_8_bits(images[name]),
                int(evidence.adversarial_runtime[at]),
                f"ρ = {evidence.rho[at]:.2f}"
                if evidence.header["attack"]["epsilon"] is None
                else "",
            )
            for name, evidence in shown.items()
            if _attacked(evidence)[at]
        },
    )


def _name(spec: AttackSpec) -> str:
    return spec.title if spec.epsilon is None else f"{spec.title}, ε = {spec.epsilon:g}"
