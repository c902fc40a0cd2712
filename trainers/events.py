"""What a training tells whoever watches it: small values that cross process boundaries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ccn_deploy.records import Count, Record


@dataclass(frozen=True)
class Started:
    """Training begins, or goes on after an interruption.

    Attributes:
        step: Steps that are done already; 0 unless resumed.
        steps: Steps in all.
        epochs: Epochs in all.
    """

    step: int
    steps: int
    epochs: int


@dataclass(frozen=True)
class Stepped:
    """Some steps are done.

    Attributes:
        step: Steps done, over all epochs.
        epoch: The epoch they belong to, from 1.
        loss: Mean over this epoch so far.
        accuracy: On training images, this epoch so far, in [0, 1].
    """

    step: int
    epoch: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Skipped:
    """An image file cannot be read and is left out; told in every epoch, as it counts in none.

    Attributes:
        what: Which file, and why, one sentence.
    """

    what: str


class EpochEnded(Record, frozen=True, omit_defaults=True):
    """An epoch is done and its checkpoint and line of metrics are on disk.

    Attributes:
        epoch: From 1.
        step: Steps done, over all epochs.
        loss: Mean training loss over the epoch, as the weights moved.
        train_accuracy: On training images over the epoch, as the weights moved, in [0, 1]; on
            crafted ones where the loss sees no others (``pgd``).
        test_accuracy: On the test split with the weights after the epoch, in [0, 1].
        learning_rate: Of the epoch's last step.
        seconds: Spent training so far, interruptions not counted.
        crafted_accuracy: On the crafted training images, of adversarial training, in [0, 1].
        skipped_train: Training images that could not be read and were left out.
        skipped_test: Those of the test split; ``test_accuracy`` is of the others.
    """

    epoch: Count
    step: Count
    loss: float
    train_accuracy: float
    test_accuracy: float
    learning_rate: float
    seconds: float
    crafted_accuracy: float | None = None
    skipped_train: Count = 0
    skipped_test: Count = 0


Event = Started | Stepped | Skipped | EpochEnded
Watcher = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Watch nothing."""
