"""What is measured: the paper's networks, plain and compact, exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save

from ccn_deploy.architectures import architecture_named
from ccn_deploy.bundle import Bundle, ModelCard, Source, open_bundle
from ccn_deploy.data import Dataset, load_dataset
from ccn_deploy.exporters import export_bundle
from ccn_deploy.models import build_model
from ccn_deploy.runs import TrainedRun
from ccn_deploy.runtimes import RuntimeOptions
from ccn_deploy.storage import sha256
from ccn_deploy.trainers import TrainConfig, train

DATASET = "mnist5k"
DEFENSES = ("sm", "ccn")
ONE_THREAD = RuntimeOptions(threads=1)


@dataclass(frozen=True)
class Subjects:
    """The paper's MNIST network, trained, and the images to run it on.

    Attributes:
        bundles: By defense.
        images: float32 [N, 1, 28, 28] in [0, 1].
        labels: int64 [N].
        order: Their places in the data set, int64 [N].
        scratch: A directory for what a measurement writes; removed at the end.
        made: The directory with bundles that was given, or None.
        samples: On how many images the strength of attacks is measured.
        keep: A directory for what took long, so that a killed run goes on; or None.
    """

    bundles: dict[str, Bundle]
    images: NDArray[np.float32]
    labels: NDArray[Any]
    order: NDArray[np.int64]
    scratch: Path
    made: Path | None
    samples: int
    keep: Path | None


def make_subjects(
    scratch: Path, made: Path | None = None, samples: int = 100, keep: Path | None = None
) -> Subjects:
    """Train and export both networks below ``scratch``: a minute on two cores.

    Args:
        scratch: An empty directory.
        made: A directory with the bundles ``sm`` and ``ccn``, to measure those instead.
        samples: See :class:`Subjects`.
        keep: See :class:`Subjects`.
    """
    test_data = load_dataset(DATASET, "test")
    order = test_data.order()
    bundles = {
        defense: trained(defense, test_data, scratch)
        if made is None
        else open_bundle(made / defense)
        for defense in DEFENSES
    }
    images, labels = test_data.images(order), test_data.labels[order]
    return Subjects(bundles, images, labels, order, scratch, made, samples, keep)


def trained(defense: str, test_data: Dataset, scratch: Path, **settings: Any) -> Bundle:
    """Train the paper's MNIST network, with the quick recipe if not told otherwise, and export it.

    Args:
        defense: A name in :data:`ccn_deploy.defenses.DEFENSES`.
        test_data: The test split of :data:`DATASET`.
        scratch: A directory.
        **settings: Of :class:`~ccn_deploy.trainers.TrainConfig`.
    """
    config = TrainConfig(defense=defense, dataset=DATASET, **settings)
    run = train(config, load_dataset(DATASET, "train"), test_data, scratch / "runs" / defense)
    return export_bundle(run, scratch / "bundles" / defense)


def untrained(
    architecture: str, defense: str, output: Path, class_names: tuple[str, ...], **options: Any
) -> Bundle:
    """Export a network with the weights it starts from; its speed is that of a trained one.

    Args:
        architecture: A name in :data:`ccn_deploy.architectures.ARCHITECTURES`.
        defense: A name in :data:`ccn_deploy.defenses.DEFENSES`.
        output: Directory to make.
        class_names: One per logit.
        **options: Of :func:`ccn_deploy.exporters.export_bundle`.
    """
    with torch.no_grad():
        weights = save(build_model(architecture, defense, classes=len(class_names)).state_dict())
    card = ModelCard(
        name=f"{architecture}-{defense}",
        input_shape=architecture_named(architecture).input_shape,
        class_names=class_names,
        architecture=architecture,
        defense=defense,
        training={"dataset": "none", "seed": 0},
        source=Source(kind="run", sha256=sha256(weights)),
    )
    return export_bundle(TrainedRun(output, card, weights), output, **options)
