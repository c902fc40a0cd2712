"""A training run: a directory that a trainer writes and an exporter reads.

::

    runs/ccn/
        run.json                what was asked for; when finished, accuracy and weights' digest
        metrics.csv             one line per epoch
        weights.safetensors     the final weights, once training is finished
        checkpoint.safetensors  the last whole epoch, while it is not
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from ccn_deploy.architectures import architecture_named
from ccn_deploy.bundle.card import ModelCard, Source
from ccn_deploy.defenses import defense_named
from ccn_deploy.errors import CcnDeployError, IntegrityError, NotARunError
from ccn_deploy.records import Count, Digest, Record, Text, decode
from ccn_deploy.storage import sha256

RUN = "run.json"
METRICS = "metrics.csv"
WEIGHTS = "weights.safetensors"
CHECKPOINT = "checkpoint.safetensors"


class Finished(Record, frozen=True, omit_defaults=True):
    """How a training ended.

    Attributes:
        weights_sha256: Of the file of weights.
        epochs: That were trained.
        steps: In all of them.
        train_accuracy: Of the last epoch, in [0, 1].
        test_accuracy: After it, in [0, 1].
        skipped_train: Training images that could not be read and were left out.
        skipped_test: Those of the test split; ``test_accuracy`` is of the others.
    """

    weights_sha256: Digest
    epochs: Count
    steps: Count
    train_accuracy: float
    test_accuracy: float
    skipped_train: Count = 0
    skipped_test: Count = 0

    def skipped(self) -> dict[str, int]:
        """Return how many images of each split were left out, of those where any was."""
        counts = {"skipped_train": self.skipped_train, "skipped_test": self.skipped_test}
        return {split: count for split, count in counts.items() if count}


class RunRecord(Record, frozen=True, kw_only=True, omit_defaults=True):
    """What ``run.json`` says.

    Attributes:
        architecture: A name in :data:`ccn_deploy.architectures.ARCHITECTURES`; empty if it is
            none of ours.
        defense: A name in :data:`ccn_deploy.defenses.DEFENSES`; empty if it is none of ours.
        network: The factory of a network of the user's own, as it was named.
        compact: Names of the layers that are compact; None where nobody chose any: those that
            the defense says, and none of a network of the user's own.
        input_shape: (channels, height, width) of a network of the user's own.
        class_names: One per logit.
        training: Data set, recipe, seed, epochs, threads.
        finished: None as long as it is not.
    """

    schema: Literal["ccn-deploy/run/1"]
    architecture: Text = ""
    defense: Text = ""
    network: Text = ""
    compact: tuple[Text, ...] | None = None
    input_shape: tuple[int, int, int] | None = None
    class_names: tuple[Text, ...]
    training: dict[str, Any]
    finished: Finished | None

    def card(self) -> ModelCard:
        """Return what the finished run says of its network.

        Raises:
            UsageError: An unknown architecture, defense or layer, or sizes or classes that no
                network has.
        """
        assert self.finished is not None
        network = self.network.rpartition("/")[2]  # a card holds no path of anybody's machine
        card = ModelCard(
            name=network,
            input_shape=self.input_shape or architecture_named(self.architecture).input_shape,
            class_names=self.class_names,
            architecture=self.architecture,
            defense=self.defense,
            training={
                **self.training,
                "train_accuracy": self.finished.train_accuracy,
                "test_accuracy": self.finished.test_accuracy,
                **self.finished.skipped(),
            },
            source=Source(kind="run", name=network, sha256=self.finished.weights_sha256),
        )
        if not self.architecture:
            return card
        if self.compact is not None:
            card = msgspec.structs.replace(card, compact=self.compact_layers())
        return msgspec.structs.replace(card, name=f"{self.architecture}-{card.system}")

    def compact_layers(self) -> tuple[str, ...]:
        """Return the names of the layers that are compact.

        Raises:
            UsageError: An unknown architecture, defense or layer.
        """
        if not self.architecture:
            return self.compact or ()
        defense = defense_named(self.defense)
        where = defense.compact if self.compact is None else self.compact
        return architecture_named(self.architecture).choose_layers(where)


@dataclass(frozen=True)
class TrainedRun:
    """A finished training run.

    Attributes:
        path: The directory.
        card: What is known of the network; its training has the final accuracy.
        weights: The verified bytes of the safetensors file.
        network: The factory of a network of the user's own; empty for those of the package.
        compact: Names of the layers that are compact.
    """

    path: Path
    card: ModelCard
    weights: bytes
    network: str = ""
    compact: tuple[str, ...] = ()


def read_record(path: Path, hint: str) -> RunRecord | None:
    """Return what ``run.json`` in a directory says; None if there is none.

    Args:
        path: The directory.
        hint: What to do about a damaged one.

    Raises:
        IntegrityError: It is damaged.
    """
    file = path / RUN
    return decode(file.read_bytes(), RunRecord, str(file), hint) if file.is_file() else None


def open_run(path: str | os.PathLike[str]) -> TrainedRun:
    """Open a finished run.

    Raises:
        NotARunError: No run there, or one that has not finished.
        IntegrityError: The weights are not those that training wrote.
    """
    root = Path(path)
    record = read_record(root, "Train the run again.")
    if record is None:
        raise NotARunError(
            f"{root} holds no training run: there is no {RUN} in it.",
            "Make one with: ccn-deploy train --defense ccn --output RUN",
        )
    if record.finished is None:
        raise NotARunError(
            f"The training run in {root} has not finished.",
            f"Give the same `ccn-deploy train ... --output {root}` again; it resumes.",
        )
    try:
        card, compact = record.card(), record.compact_layers()
    except CcnDeployError as error:
        raise IntegrityError(
            f"{root / RUN} is damaged: {error.what}", "Train the run again."
        ) from error
    file = root / WEIGHTS
    if not file.is_file():
        raise IntegrityError(f"{file} is missing.", "Train the run again.")
    data = file.read_bytes()
    if sha256(data) != record.finished.weights_sha256:
        raise IntegrityError(
            f"{file} is not the file that training wrote (SHA-256 differs from {RUN}).",
            "Train the run again, or restore the file.",
        )
    return TrainedRun(root, card, data, record.network, compact)
