"""What is to be in a bundle: made of a run, or taken over from a bundle that gets more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ccn_deploy
from ccn_deploy.bundle import Bundle, NewFile
from ccn_deploy.runs import WEIGHTS, TrainedRun

OURS = {"ccn-deploy": ccn_deploy.__version__}


@dataclass(frozen=True)
class Network:
    """What a run and a bundle both say of their network.

    Attributes:
        architecture: A name in :data:`ccn_deploy.architectures.ARCHITECTURES`.
        defense: A name in :data:`ccn_deploy.defenses.DEFENSES`.
        class_names: One per logit.
        training: How the weights came about.
        weights: The bytes of the safetensors file.
    """

    architecture: str
    defense: str
    class_names: tuple[str, ...]
    training: Mapping[str, Any]
    weights: bytes


class BundleDraft:
    """The files of a bundle that is being made.

    Attributes:
        network: What they are of.
        files: In the order of the manifest.
        added: Paths of those that were not there from the start.
    """

    def __init__(self, source: TrainedRun | Bundle) -> None:
        self.added: list[str] = []
        if isinstance(source, Bundle):
            manifest = source.manifest
            self.files = [
                NewFile(
                    record.path,
                    source.read(record),
                    record.role,
                    record.precision,
                    record.made_by,
                    record.details,
                )
                for record in manifest.files
            ]
            self.network = Network(
                manifest.architecture,
                manifest.defense,
                manifest.class_names,
                manifest.training,
                source.read(source.file("weights")),
            )
        else:
            self.files = [NewFile(WEIGHTS, source.weights, "weights", made_by=OURS)]
            self.network = Network(
                source.architecture,
                source.defense,
                source.class_names,
                source.training,
                source.weights,
            )

    def find(self, role: str, precision: str) -> NewFile | None:
        """Return the first file of a role and precision, or None."""
        return next(iter(self.every(role, precision)), None)

    def every(self, role: str, precision: str) -> list[NewFile]:
        """Return the files of a role and precision; of engines there may be several."""
        return [file for file in self.files if (file.role, file.precision) == (role, precision)]

    def add(self, file: NewFile) -> NewFile:
        """Add a file and return it."""
        self.files.append(file)
        self.added.append(file.path)
        return file

    def free_path(self, stem: str, suffix: str) -> str:
        """Return ``stem + suffix``, or the first of ``stem-2``, ``stem-3``, ... that is free."""
        taken = {file.path for file in self.files}
        path, number = stem + suffix, 1
        while path in taken:
            number += 1
            path = f"{stem}-{number}{suffix}"
        return path
