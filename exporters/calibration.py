"""The images that ranges of activations are found on; never those that a bundle is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccn_deploy.data import load_dataset
from ccn_deploy.errors import UsageError
from ccn_deploy.exporters.precision import Calibration
from ccn_deploy.models import Classifier


@dataclass(frozen=True)
class CalibrationRequest:
    """Which images to take, and what to do with them.

    Attributes:
        method: One of :data:`ccn_deploy.exporters.precision.METHODS`.
        samples: How many images of the training split; all of it if it has fewer.
        seed: Of their choice.
        dataset: Name of the data set; by default the one the network was trained on.
        directory: Where its files are.

    Raises:
        UsageError: Less than one sample.
    """

    method: str = "min-max"
    samples: int = 512
    seed: int = 0
    dataset: str | None = None
    directory: Path | None = None

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(
                f"{self.samples} images calibrate nothing.", "Give --calibration-samples 512"
            )


def load_calibration(
    request: CalibrationRequest, training: Mapping[str, Any], model: Classifier
) -> Calibration:
    """Load images of the training split.

    Args:
        request: Which and how many.
        training: Of a run or a manifest; names the data set.
        model: What they are run through.

    Raises:
        UsageError: No such data set or method, no data set named, or images of another shape.
        DatasetNotFoundError: Its files are not there.
    """
    name = request.dataset or training.get("dataset")
    if not name:
        raise UsageError(
            "Nothing says what data the network was trained on.", "Name it with --dataset."
        )
    data = load_dataset(str(name), "train", request.directory)
    if data.input_shape != model.architecture.input_shape:
        raise UsageError(
            f"Images of {data.name} have shape {list(data.input_shape)}; the network takes "
            f"{list(model.architecture.input_shape)}.",
            "Choose the data set that the network was trained on.",
        )
    chosen = data.order(request.seed)[: request.samples]
    return Calibration(
        data.images(chosen),
        request.method,
        {
            "dataset": data.name,
            "split": data.split,
            "digest": data.digest,
            "samples": len(chosen),
            "seed": request.seed,
        },
    )
