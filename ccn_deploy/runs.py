"""A training run: a directory that a trainer writes and an exporter reads.

::

    runs/ccn/
        run.json                what was asked for; when finished, accuracy and weights' digest
        metrics.csv             one line per epoch
        weights.safetensors     the final weights, once training is finished
        checkpoint.safetensors  the last whole epoch, while it is not
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccn_deploy.errors import IntegrityError, NotARunError
from ccn_deploy.storage import sha256

SCHEMA = "ccn-deploy/run/1"
RUN = "run.json"
METRICS = "metrics.csv"
WEIGHTS = "weights.safetensors"
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class TrainedRun:
    """A finished training run.

    Attributes:
        path: The directory.
        architecture: A name in :data:`ccn_deploy.architectures.ARCHITECTURES`.
        defense: A name in :data:`ccn_deploy.defenses.DEFENSES`.
        class_names: One per logit.
        training: Data set, recipe, seed, epochs, threads, final accuracy: for the manifest.
        weights: The verified bytes of the safetensors file.
    """

    path: Path
    architecture: str
    defense: str
    class_names: tuple[str, ...]
    training: Mapping[str, Any]
    weights: bytes


def open_run(path: str | os.PathLike[str]) -> TrainedRun:
    """Open a finished run.

    Raises:
        NotARunError: No run there, or one that has not finished.
        IntegrityError: The weights are not those that training wrote.
    """
    root = Path(path)
    record = root / RUN
    if not record.is_file():
        raise NotARunError(
            f"{root} holds no training run: there is no {RUN} in it.",
            "Make one with: ccn-deploy train --defense ccn --output RUN",
        )
    try:
        document = json.loads(record.read_bytes())
        finished = document["finished"]
        opened = TrainedRun(
            path=root,
            architecture=document["architecture"],
            defense=document["defense"],
            class_names=tuple(document["class_names"]),
            training={
                **document["training"],
                **{k: v for k, v in (finished or {}).items() if k.endswith("_accuracy")},
            },
            weights=b"",
        )
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{record} is damaged: {error}.", "Train the run again.") from error
    if finished is None:
        raise NotARunError(
            f"The training run in {root} has not finished.",
            f"Give the same `ccn-deploy train ... --output {root}` again; it resumes.",
        )
    file = root / WEIGHTS
    if not file.is_file():
        raise IntegrityError(f"{file} is missing.", "Train the run again.")
    data = file.read_bytes()
    if sha256(data) != finished["weights_sha256"]:
        raise IntegrityError(
            f"{file} is not the file that training wrote (SHA-256 differs from {RUN}).",
            "Train the run again, or restore the file.",
        )
    return TrainedRun(**{**opened.__dict__, "weights": data})
