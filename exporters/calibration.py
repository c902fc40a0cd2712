"""The images that ranges of activations are found on; never those that a bundle is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ccn_deploy.bundle.card import ModelCard
from ccn_deploy.data import DataOptions, ModelInput, load_dataset
from ccn_deploy.data.options import DEFAULT
from ccn_deploy.errors import UsageError
from ccn_deploy.evaluation import trained_on
from ccn_deploy.exporters.precision import Calibration


@dataclass(frozen=True)
class CalibrationRequest:
    """Which images to take, and what to do with them.

    Attributes:
        method: One of :data:`ccn_deploy.exporters.precision.METHODS`.
        samples: How many images of the training split; all of it if it has fewer.
        seed: Of their choice.
        dataset: Name of the data set, or path of a directory of class folders or an .npz file; by
            default the data set that the network was trained on.
        directory: Where the files of a named data set are.
        options: How images are made of a directory's or an .npz file's.
        note: Told what a user should know of the data.

    Raises:
        UsageError: Less than one sample.
    """

    method: str = "min-max"
    samples: int = 512
    seed: int = 0
    dataset: str | None = None
    directory: Path | None = None
    options: DataOptions = DEFAULT
    note: Callable[[str], None] = field(default=lambda sentence: None, compare=False)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError(
                f"{self.samples} images calibrate nothing.", "Give --calibration-samples 512"
            )


def load_calibration(request: CalibrationRequest, card: ModelCard) -> Calibration:
    """Load images of the training split.

    Args:
        request: Which and how many.
        card: Of the network that they are run through; its training names the data set.

    Raises:
        UsageError: No such data set or method, no data set named, or images of another shape.
        DatasetNotFoundError: Its files are not there.
    """
    data = load_dataset(
        request.dataset or trained_on(card.training),
        "train",
        request.directory,
        options=request.options,
        like=ModelInput(card.input_shape),
    )
    for sentence in data.notes:
        request.note(sentence)
    chosen = data.order(request.seed)[: request.samples]
    return Calibration(
        data.images(chosen),
        request.method,
        {
            **data.described,
            "dataset": data.name,
            "split": data.split,
            "digest": data.digest,
            "samples": len(chosen),
            "seed": request.seed,
        },
    )
