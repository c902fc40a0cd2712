"""What is measured: the paper's MNIST network, plain and compact, trained and exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.bundle import Bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.exporters import export_run
from ccn_deploy.trainers import TrainConfig, train

DATASET = "mnist5k"
DEFENSES = ("sm", "ccn")


@dataclass(frozen=True)
class Subjects:
    """Two bundles and the images to run them on.

    Attributes:
        bundles: By defense.
        images: float32 [N, 1, 28, 28] in [0, 1].
        labels: int64 [N].
    """

    bundles: dict[str, Bundle]
    images: NDArray[np.float32]
    labels: NDArray[Any]


def make_subjects(root: Path) -> Subjects:
    """Train and export both networks below ``root``: a minute on two cores."""
    train_data, test_data = load_dataset(DATASET, "train"), load_dataset(DATASET, "test")
    bundles = {}
    for defense in DEFENSES:
        config = TrainConfig(defense=defense, dataset=DATASET)
        run = train(config, train_data, test_data, root / "runs" / defense)
        bundles[defense] = export_run(run, root / "bundles" / defense)
    order = test_data.order()
    return Subjects(bundles, test_data.images(order), test_data.labels[order])
