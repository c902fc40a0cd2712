"""The manifest of a bundle: what is inside, and the digest of every byte of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any, Literal

import msgspec

from ccn_deploy.bundle.card import ModelCard
from ccn_deploy.bundle.preprocessing import Preprocessing
from ccn_deploy.errors import EnvironmentUnfitError, IntegrityError
from ccn_deploy.records import (
    Count,
    Digest,
    Record,
    Text,
    decode_sealed,
    encode,
    encode_sealed,
    unseal,
)
from ccn_deploy.storage import canonical_json, sha256
from ccn_deploy.targets import DEPLOYED_PRECISIONS, RUNTIMES, Role

SCHEMA = "ccn-deploy/bundle/2"
FIRST_SCHEMA = "ccn-deploy/bundle/1"
MANIFEST = "manifest.json"
DAMAGED = "Copy or export the bundle again; nothing in it was used."


class Lineage(Record, frozen=True, kw_only=True):
    """How a file was made of others of its bundle.

    Attributes:
        sources: Paths in the bundle; empty for what came from outside.
        step: What made it: ``"lower"``, ``"vjp"``, ``"cast"``, ``"qdq"``, ``"optimize"``,
            ``"build"``.
        settings: Of that step.
    """

    sources: tuple[Text, ...] = ()
    step: Text
    settings: dict[str, Any] = msgspec.field(default_factory=dict)


class FileRecord(Record, frozen=True):
    """One file of a bundle.

    Attributes:
        path: Relative to the bundle, with forward slashes.
        sha256: Of its bytes, lower-case hex.
        bytes: Its size.
        role: What it is for.
        precision: Of a graph or engine, one of
            :data:`ccn_deploy.targets.DEPLOYED_PRECISIONS`; empty for weights.
        runtime: The one that a graph was optimised for, or that runs an engine; empty for files
            that are for all.
        lineage: How it was made; None where nothing is known.
        made_by: Libraries that wrote it, by name and version.
        details: Anything else that describes it, such as the opset.
    """

    path: Text
    sha256: Digest
    bytes: Count
    role: Role
    precision: str = ""
    runtime: str = ""
    lineage: Lineage | None = None
    made_by: dict[str, str] = msgspec.field(default_factory=dict)
    details: dict[str, Any] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        role, runtime = Role(self.role), RUNTIMES.get(self.runtime)
        precisions = ("",) if role is Role.WEIGHTS else DEPLOYED_PRECISIONS
        if self.precision not in precisions:
            raise ValueError(f"{self.path} is a {role} file of precision {self.precision!r}")
        for_engines = runtime is not None and runtime.runs_engines
        if (self.runtime and runtime is None) or role.is_engine != for_engines:
            raise ValueError(f"{self.path} is a {role} file for the runtime {self.runtime!r}")


class Manifest(Record, frozen=True):
    """What a bundle is.

    Attributes:
        card: What is known of the network.
        files: Every file of the bundle but the manifest and the evidence.
    """

    card: ModelCard
    files: tuple[FileRecord, ...]
    schema: Literal["ccn-deploy/bundle/2"] = "ccn-deploy/bundle/2"

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form of everything else in the manifest file."""
        return sha256(encode(self))

    def to_bytes(self) -> bytes:
        """Return the manifest file: the canonical form, with its own digest in it."""
        return encode_sealed(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest file; any changed byte is an error.

        A manifest of schema 1 is read as what it says in schema 2.

        Raises:
            IntegrityError: Not the bytes that were written, a path that leaves the bundle, or two
                files for one purpose.
            EnvironmentUnfitError: Written by a newer version of this package.
        """
        plain = unseal(data, MANIFEST, DAMAGED)
        schema = plain.get("schema")
        if schema == FIRST_SCHEMA:
            upgraded = _upgraded(plain)
            data = canonical_json({**upgraded, "digest": sha256(canonical_json(upgraded))})
        elif schema != SCHEMA:
            raise EnvironmentUnfitError(
                f"The bundle has schema {schema!r}; this version reads {SCHEMA!r}.",
                "Upgrade with: pip install --upgrade ccn-deploy",
            )
        manifest = decode_sealed(data, cls, MANIFEST, DAMAGED)
        for record in manifest.files:
            check_path(record.path)
        _check_unique(manifest.files)
        return manifest


def _check_unique(files: Iterable[FileRecord]) -> None:
    """Refuse a second graph, or second weights: one would be measured and another one served.

    Engines of one role may be several, for different GPUs and batches.
    """
    held: dict[tuple[Role, str, str], str] = {}
    paths: set[str] = set()
    for file in files:
        if file.path in paths:
            raise IntegrityError(f"{MANIFEST} names {file.path} twice.", DAMAGED)
        paths.add(file.path)
        purpose = (file.role, file.precision, file.runtime)
        if not file.role.is_engine and purpose in held:
            what = " ".join(filter(None, purpose))
            raise IntegrityError(
                f"{held[purpose]} and {file.path} are both the bundle's {what}: nothing says which "
                "is the network.",
                DAMAGED,
            )
        held[purpose] = file.path


def _upgraded(plain: dict[str, Any]) -> dict[str, Any]:
    """Return a document of schema 1 as one of schema 2; what it mistypes stays mistyped.

    There, a role could have a runtime behind a colon, and the network came from a run.
    """
    try:
        card = {
            key: plain.pop(key)
            for key in ("architecture", "defense", "input_shape", "class_names", "training")
        }
        files = []
        for file in plain.pop("files"):
            role, _, runtime = file.pop("role").partition(":")
            files.append({**file, "role": role, "runtime": runtime, "lineage": None})
        (weights,) = [file["sha256"] for file in files if file["role"] == Role.WEIGHTS]
        name = f"{card['architecture']}-{card['defense']}"
        for constant in ("schema", "input", "output"):
            del plain[constant]
        if plain:
            raise ValueError(f"{', '.join(plain)} are not in schema 1")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{MANIFEST} lacks or mistypes a field: {error}.", DAMAGED) from error
    source = {
        "kind": "run", "name": "", "sha256": weights, "removed": [], "changes": [],
        "preprocessing": msgspec.to_builtins(Preprocessing()), "agreement": {},
    }  # fmt: skip
    card |= {"name": name, "source": source, "evaluation": {}}
    return {"card": card, "files": files, "schema": SCHEMA}


def check_path(path: str) -> PurePosixPath:
    """Return ``path`` if it stays inside a bundle by its spelling.

    Raises:
        IntegrityError: Absolute, or with ``..``, a backslash, a drive or an empty part.
    """
    pure = PurePosixPath(path)
    plain = path == pure.as_posix() and "\\" not in path and ":" not in path and "\0" not in path
    if not plain or pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise IntegrityError(
            f"{MANIFEST} names a file outside the bundle: {path!r}.",
            "Do not use this bundle; get it again from where it was made.",
        )
    return pure
