"""The manifest of a bundle: what is inside, and the digest of every byte of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ccn_deploy.errors import EnvironmentUnfitError, IntegrityError
from ccn_deploy.storage import canonical_json, sha256

SCHEMA = "ccn-deploy/bundle/1"
MANIFEST = "manifest.json"
DAMAGED = "Copy or export the bundle again; nothing in it was used."


@dataclass(frozen=True)
class FileRecord:
    """One file of a bundle.

    Attributes:
        path: Relative to the bundle, with forward slashes.
        sha256: Of its bytes, lower-case hex.
        bytes: Its size.
        role: ``"weights"``, ``"forward"`` (a graph from images to logits), ``"forward:RUNTIME"``
            (another one of the same network, written for one runtime), ``"gradient"``.
        precision: Of a graph or engine, for example ``"fp32"``; empty for weights.
        made_by: Libraries that wrote it, by name and version.
        details: Anything else that describes it, such as the opset.
    """

    path: str
    sha256: str
    bytes: int
    role: str
    precision: str = ""
    made_by: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """What a bundle is.

    Attributes:
        architecture: A name in :data:`ccn_deploy.architectures.ARCHITECTURES`.
        defense: A name in :data:`ccn_deploy.defenses.DEFENSES`.
        input_shape: (channels, height, width); images are NCHW float32 in [0, 1].
        class_names: One per logit.
        training: How the weights came about: data set, recipe, seed, epochs, accuracy.
        files: Every file of the bundle but the manifest and the evidence.
    """

    architecture: str
    defense: str
    input_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    training: Mapping[str, Any]
    files: tuple[FileRecord, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form of everything else in the manifest."""
        return sha256(canonical_json(self._document()))

    def to_bytes(self) -> bytes:
        """Return the manifest file: the canonical form, with its own digest in it."""
        return canonical_json({**self._document(), "digest": self.digest})

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Read a manifest file; any changed byte is an error.

        Raises:
            IntegrityError: Not the bytes that were written, or a path that leaves the bundle.
            EnvironmentUnfitError: Written by a newer version of this package.
        """
        try:
            document = json.loads(data)
            digest, schema = document.pop("digest"), document.pop("schema")
            recomputed = sha256(canonical_json({**document, "schema": schema}))
            canonical = canonical_json({**document, "schema": schema, "digest": digest})
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise IntegrityError(f"{MANIFEST} is damaged: {error}.", DAMAGED) from error
        if digest != recomputed or data != canonical:
            raise IntegrityError(
                f"{MANIFEST} does not match its own digest: it was changed after export.", DAMAGED
            )
        if schema != SCHEMA:
            raise EnvironmentUnfitError(
                f"The bundle has schema {schema!r}; this version reads {SCHEMA!r}.",
                "Upgrade with: pip install --upgrade ccn-deploy",
            )
        try:
            manifest = cls(
                architecture=document["architecture"],
                defense=document["defense"],
                input_shape=tuple(document["input_shape"]),
                class_names=tuple(document["class_names"]),
                training=document["training"],
                files=tuple(FileRecord(**record) for record in document["files"]),
            )
            names = (manifest.architecture, manifest.defense, *manifest.class_names)
            if not all(isinstance(name, str) for name in names):
                raise TypeError("names must be strings")
            for record in manifest.files:
                check_path(record.path)
            whole = manifest.to_bytes() == data  # nothing unknown, nothing of another type
        except (KeyError, TypeError) as error:
            raise IntegrityError(
                f"{MANIFEST} lacks or mistypes a field: {error}.", DAMAGED
            ) from error
        if not whole:
            raise IntegrityError(f"{MANIFEST} has fields that its schema does not.", DAMAGED)
        return manifest

    def _document(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            **asdict(self),
            "input": {"dtype": "float32", "layout": "NCHW", "range": [0.0, 1.0]},
            "output": {"dtype": "float32", "meaning": "logits"},
        }


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
