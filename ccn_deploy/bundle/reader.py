"""Opening a bundle: digests first, parsers after."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ccn_deploy.bundle.card import ModelCard
from ccn_deploy.bundle.manifest import DAMAGED, MANIFEST, FileRecord, Manifest, check_path
from ccn_deploy.errors import (
    EnvironmentUnfitError,
    IntegrityError,
    NotABundleError,
    RuntimeUnavailableError,
)
from ccn_deploy.storage import sha256, sha256_file
from ccn_deploy.targets import Role, Target

EVIDENCE = "evidence"
"""Directory inside a bundle where measurements are cached; the manifest does not cover it."""


@dataclass(frozen=True)
class Bundle:
    """A directory whose every file has been checked against the manifest.

    Attributes:
        path: The directory.
        manifest: What it says of itself.
    """

    path: Path
    manifest: Manifest

    @property
    def evidence(self) -> Path:
        """Directory of cached measurements; may not exist yet.

        Raises:
            IntegrityError: It is a link: what is written there would land outside.
        """
        path = self.path / EVIDENCE
        if path.is_symlink():
            raise _link(EVIDENCE)
        return path

    def evidence_file(self, *parts: str) -> Path:
        """Return a path below :attr:`evidence`; nothing needs to be there.

        Raises:
            IntegrityError: A link on the way: what is written there would land outside.
        """
        path = self.evidence
        for part in parts:
            path = path / part
            if path.is_symlink():
                raise _link(path.relative_to(self.path).as_posix())
        return path

    @property
    def card(self) -> ModelCard:
        """What is known of the network."""
        return self.manifest.card

    def files(self, role: Role, precision: str = "", runtime: str = "") -> tuple[FileRecord, ...]:
        """Return the files of exactly this role, precision and runtime, in the bundle's order."""
        wanted = (role, precision, runtime)
        return tuple(r for r in self.manifest.files if (r.role, r.precision, r.runtime) == wanted)

    def file(self, role: Role, precision: str = "", runtime: str = "") -> FileRecord:
        """Return the first of :meth:`files`.

        Raises:
            RuntimeUnavailableError: The bundle has none; the hint lists what it has.
        """
        for record in self.files(role, precision, runtime):
            return record
        have = sorted({r.precision for r in self.manifest.files if r.role == role})
        raise RuntimeUnavailableError(
            f"The bundle has no {role} file{f' in {precision}' if precision else ''}.",
            f"It has: {', '.join(have) or 'none'}. Export again with --precision {precision}."
            if precision
            else "Export the network again.",
        )

    def program(self, target: Target, role: Role = Role.FORWARD) -> FileRecord:
        """Return the graph that a target executes; the reference evaluates the float32 one.

        It is the one optimised for the target's runtime, or else the one for all. Which engine
        is executed depends on the machine, too:
        :func:`ccn_deploy.runtimes.compatibility.choose_engine`.

        Args:
            target: Runtime and precision.
            role: ``FORWARD`` or ``GRADIENT``.

        Raises:
            RuntimeUnavailableError: The bundle has none; the hint lists what it has.
        """
        precision = "fp32" if target.is_reference else target.precision
        own = self.files(role, precision, target.runtime)
        return own[0] if own else self.file(role, precision)

    def programs(self, target: Target) -> tuple[FileRecord, ...]:
        """Return what a target may execute: any of its engines, or the graph that it takes.

        Args:
            target: Runtime and precision.
        """
        if target.kind.runs_engines:
            return self.files(Role.ENGINE, target.precision, target.runtime)
        try:
            return (self.program(target),)
        except RuntimeUnavailableError:
            return ()

    def read(self, record: FileRecord) -> bytes:
        """Return the bytes of a file, checked again, for a parser to read.

        What is parsed is what was checked: the file is not opened a second time.

        Raises:
            IntegrityError: The bytes are not those of the manifest.
        """
        file = _inside(self.path, record)
        try:
            data = file.read_bytes()
        except OSError as error:
            raise _unreadable(file, error) from error
        if sha256(data) != record.sha256:
            raise _changed(record)
        return data

    def head(self, record: FileRecord, size: int) -> bytes:
        """Return the first bytes of a file, for a look at what it claims to be.

        They are not checked again: what a parser gets comes from :meth:`read`.

        Raises:
            IntegrityError: The file has gone, or is a link.
        """
        file = _inside(self.path, record)
        try:
            with file.open("rb") as stream:
                return stream.read(size)
        except OSError as error:
            raise _unreadable(file, error) from error


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Open a bundle, checking the digest of every file in it.

    Raises:
        NotABundleError: No such directory, or no manifest in it.
        IntegrityError: A file is missing, was changed, is a link, or lies outside.
        EnvironmentUnfitError: Written by a newer version of this package, or unreadable.
    """
    root = Path(path)
    if not root.is_dir():
        raise NotABundleError(
            f"{root} is {'a file, not a directory' if root.exists() else 'not there'}.",
            "Give the directory that `ccn-deploy export` wrote.",
        )
    manifest_path = root / MANIFEST
    if not manifest_path.is_file():
        raise NotABundleError(
            f"{root} is no bundle: it has no {MANIFEST}.",
            "Make one with: ccn-deploy export RUN --output BUNDLE",
        )
    if manifest_path.is_symlink():
        raise _link(MANIFEST)
    try:
        manifest = Manifest.from_bytes(manifest_path.read_bytes())
        for record in manifest.files:
            file = _inside(root, record)
            if file.stat().st_size != record.bytes or sha256_file(file) != record.sha256:
                raise _changed(record)
    except OSError as error:
        raise _unreadable(root, error) from error
    return Bundle(root, manifest)


def _inside(root: Path, record: FileRecord) -> Path:
    """Return the path of a file, refusing links at every step below the bundle."""
    path = root
    for part in check_path(record.path).parts:
        path = path / part
        if path.is_symlink():
            raise _link(record.path)
    if not path.is_file():
        raise IntegrityError(f"{record.path} is listed in {MANIFEST} and is not there.", DAMAGED)
    return path


def _unreadable(path: Path, error: OSError) -> EnvironmentUnfitError:
    return EnvironmentUnfitError(
        f"Could not read {error.filename or path}: {error.strerror or error}.",
        "Check its permissions and the disk.",
    )


def _link(path: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is a symbolic link; a bundle holds its files itself.",
        "Copy the bundle with its files (cp -rL), and make sure you trust where it came from.",
    )


def _changed(record: FileRecord) -> IntegrityError:
    return IntegrityError(
        f"{record.path} is not the file that was exported (SHA-256 differs from {MANIFEST}).",
        DAMAGED,
    )
