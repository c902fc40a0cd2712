"""The run directory (:mod:`ccn_deploy.runs`) as its writer sees it.

Every file is replaced whole, and in such an order that a kill between any two leaves a directory
from which the same command goes on: ``run.json`` opens a run; each epoch replaces the checkpoint,
then the metrics that are copied from it; at the end come the weights, then ``run.json`` with their
digest, which is the moment the run is finished, and then the checkpoint is removed.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from ccn_deploy.errors import IntegrityError, StorageError, UsageError
from ccn_deploy.records import encode
from ccn_deploy.runs import (
    CHECKPOINT,
    METRICS,
    RUN,
    WEIGHTS,
    Finished,
    RunRecord,
    read_record,
)
from ccn_deploy.storage import sha256, write_atomic
from ccn_deploy.trainers.config import OwnNetwork, Plan, describe_differences
from ccn_deploy.trainers.events import EpochEnded

_FILES = (RUN, METRICS, WEIGHTS, CHECKPOINT)


@dataclass(frozen=True)
class RunDirectory:
    """A directory that holds one run or nothing yet."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """The file with the state after the last whole epoch."""
        return self.path / CHECKPOINT

    def record(self) -> RunRecord | None:
        """Return what ``run.json`` says; None if there is none.

        Raises:
            IntegrityError: The file is damaged.
            UsageError: The path is a file, or a directory with other things in it.
        """
        hint = "Start the run anew with --overwrite."
        found = read_record(self.path, hint)
        if found is None:
            self._refuse_other_content()
        elif not isinstance(found.training.get("threads"), int):
            raise IntegrityError(f"{self.path / RUN} does not say how many threads it had.", hint)
        return found

    def begin(self, plan: Plan) -> bool:
        """Open the directory for ``plan``; return whether that run is finished already.

        Raises:
            UsageError: It holds a run with other settings; the error names them.
            StorageError: It cannot be written.
        """
        asked, found = _record(plan), self.record()
        if found is None:
            write_atomic(self.path / RUN, encode(asked))
            return False
        finished = found.finished
        before, now = (_settings(record) for record in (found, asked))
        if differences := describe_differences(before, now):
            raise UsageError(
                f"{self.path} holds a run with other settings: {differences}.",
                f"To go on, give its settings again; to start anew, add --overwrite or choose "
                f"another directory than --output {shlex.quote(str(self.path))}.",
            )
        self._sweep()
        if finished is not None:  # a kill may have come before this last step of finish()
            self.checkpoint.unlink(missing_ok=True)
        return finished is not None

    def write_metrics(self, epochs: Sequence[EpochEnded]) -> None:
        """Replace ``metrics.csv``: a header and one line per epoch."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(EpochEnded.__struct_fields__)
        writer.writerows(msgspec.structs.astuple(epoch) for epoch in epochs)
        write_atomic(self.path / METRICS, text.getvalue().encode())

    def finish(self, plan: Plan, weights: bytes, epochs: Sequence[EpochEnded]) -> None:
        """Write the final weights and declare the run finished."""
        last = epochs[-1]
        finished = Finished(
            weights_sha256=sha256(weights),
            epochs=last.epoch,
            steps=last.step,
            train_accuracy=last.train_accuracy,
            test_accuracy=last.test_accuracy,
            skipped_train=last.skipped_train,
            skipped_test=last.skipped_test,
        )
        self.write_metrics(epochs)
        write_atomic(self.path / WEIGHTS, weights)
        write_atomic(self.path / RUN, encode(_record(plan, finished)))
        self.checkpoint.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove a run, and nothing that is not part of one.

        Raises:
            UsageError: The directory holds other things than a run.
            StorageError: A file cannot be removed.
        """
        if not (self.path / RUN).exists():
            self._refuse_other_content()
            return
        self._sweep()
        try:
            for name in reversed(_FILES):  # run.json last: until then this is a run to discard
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"Could not remove {error.filename}: {error.strerror}.",
                "Make the directory writable or choose another --output.",
            ) from error

    def _refuse_other_content(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"{self.path} is a file.", "Choose another --output.")
        if self.path.is_dir() and any(not f.name.startswith(".") for f in self.path.iterdir()):
            raise UsageError(
                f"{self.path} holds files and no training run.",
                "Choose another --output; nothing here is overwritten.",
            )

    def _sweep(self) -> None:
        """Remove what a kill in the middle of a write left behind."""
        for name in _FILES:
            for left in self.path.glob(f".{name}.*"):
                with contextlib.suppress(OSError):
                    left.unlink()


def _record(plan: Plan, finished: Finished | None = None) -> RunRecord:
    network = plan.network
    named: dict[str, Any]
    if isinstance(network, OwnNetwork):
        named = {"network": network.factory, "compact": network.compact or None}
        named["input_shape"] = network.input_shape
    else:
        named = {"architecture": network.architecture.name, "defense": network.defense.name}
        named["compact"] = network.compact
    return RunRecord(
        schema="ccn-deploy/run/1",
        **named,
        class_names=plan.class_names,
        training=plan.settings(),
        finished=finished,
    )


def _settings(record: RunRecord) -> dict[str, Any]:
    """Return everything that was asked for, as it would be read: a tuple is a list in JSON."""
    plain: dict[str, Any] = json.loads(encode(record))
    del plain["finished"]
    training: dict[str, Any] = plain.pop("training")
    return plain | training
