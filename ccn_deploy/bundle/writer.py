"""Writing a bundle, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ccn_deploy.bundle.manifest import MANIFEST, FileRecord, Manifest, check_path
from ccn_deploy.bundle.reader import Bundle, open_bundle
from ccn_deploy.errors import UsageError
from ccn_deploy.storage import atomic_directory, sha256


@dataclass(frozen=True)
class NewFile:
    """A file to put into a bundle; see :class:`~ccn_deploy.bundle.manifest.FileRecord`."""

    path: str
    data: bytes
    role: str
    precision: str = ""
    made_by: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def record(self) -> FileRecord:
        """Return the manifest's line for this file."""
        return FileRecord(
            path=check_path(self.path).as_posix(),
            sha256=sha256(self.data),
            bytes=len(self.data),
            role=self.role,
            precision=self.precision,
            made_by=self.made_by,
            details=self.details,
        )


def write_bundle(
    path: Path,
    *,
    architecture: str,
    defense: str,
    input_shape: tuple[int, int, int],
    class_names: Sequence[str],
    training: Mapping[str, Any],
    files: Sequence[NewFile],
    overwrite: bool = False,
) -> Bundle:
    """Write files and manifest to ``path`` and open the result.

    The same content gives the same bytes: a bundle holds no time and no path.

    Raises:
        UsageError: ``path`` exists and ``overwrite`` is false, or what is there is no bundle.
        StorageError: The disk is full or not writable; nothing half-written is left.
    """
    if overwrite and path.exists() and not (path / MANIFEST).is_file():
        raise UsageError(
            f"{path} is not a bundle, so --overwrite does not replace it.",
            "Choose another --output, or remove it yourself.",
        )
    manifest = Manifest(
        architecture=architecture,
        defense=defense,
        input_shape=input_shape,
        class_names=tuple(class_names),
        training=training,
        files=tuple(file.record() for file in files),
    )
    with atomic_directory(path, overwrite=overwrite) as directory:
        for file in files:
            target = directory / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.data)
        (directory / MANIFEST).write_bytes(manifest.to_bytes())
    return open_bundle(path)
