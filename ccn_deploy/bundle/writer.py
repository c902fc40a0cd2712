"""Writing a bundle, whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ccn_deploy.bundle.card import ModelCard
from ccn_deploy.bundle.manifest import MANIFEST, FileRecord, Lineage, Manifest, check_path
from ccn_deploy.bundle.reader import Bundle, open_bundle
from ccn_deploy.errors import UsageError
from ccn_deploy.storage import atomic_directory, sha256
from ccn_deploy.targets import Role


@dataclass(frozen=True)
class NewFile:
    """A file to put into a bundle; see :class:`~ccn_deploy.bundle.manifest.FileRecord`."""

    path: str
    data: bytes
    role: Role
    precision: str = ""
    runtime: str = ""
    lineage: Lineage | None = None
    made_by: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def copy(cls, bundle: Bundle, record: FileRecord) -> NewFile:
        """Take a file over from another bundle, its bytes checked again.

        Raises:
            IntegrityError: The bytes are not those of the manifest.
        """
        said = msgspec.structs.asdict(record)
        del said["sha256"], said["bytes"]
        return cls(data=bundle.read(record), **said)

    def record(self) -> FileRecord:
        """Return the manifest's line for this file.

        Raises:
            IntegrityError: The path leaves the bundle.
            ValueError: A role with a precision or runtime that it cannot have.
        """
        said = {key: value for key, value in vars(self).items() if key != "data"}
        check_path(self.path)
        return FileRecord(sha256=sha256(self.data), bytes=len(self.data), **said)


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a path where no bundle may be written: what is no bundle is never replaced.

    Raises:
        UsageError: Something is there and ``overwrite`` is false, or it is no bundle.
    """
    if not path.exists():
        return
    if not overwrite:
        raise UsageError(
            f"{path} exists already.",
            "Choose another --output, or add --overwrite to replace it.",
        )
    if not (path / MANIFEST).is_file():
        raise UsageError(
            f"{path} exists and is no bundle: it has no {MANIFEST}, so it is not replaced.",
            "Choose another --output, or remove it yourself.",
        )


def write_bundle(
    path: Path, *, card: ModelCard, files: Sequence[NewFile], overwrite: bool = False
) -> Bundle:
    """Write files and manifest to ``path`` and open the result.

    The same content gives the same bytes: a bundle holds no time and no path.

    Raises:
        UsageError: As :func:`check_target`.
        StorageError: The disk is full or not writable; nothing half-written is left.
    """
    check_target(path, overwrite)
    manifest = Manifest(card, tuple(file.record() for file in files)).to_bytes()
    with atomic_directory(path, overwrite=overwrite) as directory:
        for file in files:
            target = directory / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.data)
        (directory / MANIFEST).write_bytes(manifest)
    return open_bundle(path)
