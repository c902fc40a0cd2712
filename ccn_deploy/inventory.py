"""What is inside a bundle, told from its manifest alone.

Nothing here parses a graph or deserializes an engine: of every file only the digest was computed
and, of an engine, the first bytes are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ccn_deploy.bundle import Bundle, FileRecord
from ccn_deploy.errors import CcnDeployError
from ccn_deploy.machine import Machine
from ccn_deploy.runtimes.compatibility import PREFERENCE, files_for, incompatibility
from ccn_deploy.runtimes.tensorrt.library import LIBRARIES

SCHEMA = "ccn-deploy/inspect/1"


def inventory(bundle: Bundle, machine: Machine) -> dict[str, Any]:
    """Return everything a bundle says of itself, and what of it a machine can run.

    Args:
        bundle: An open bundle.
        machine: For which to say what runs.
    """
    manifest = bundle.manifest
    return {
        "schema": SCHEMA,
        "bundle": str(bundle.path),
        "digest": manifest.digest,
        "architecture": manifest.architecture,
        "defense": manifest.defense,
        "input": {
            "shape": list(manifest.input_shape),
            "dtype": "float32",
            "layout": "NCHW",
            "range": [0.0, 1.0],
        },
        "class_names": list(manifest.class_names),
        "training": manifest.training,
        "files": [_file(bundle, record, machine) for record in manifest.files],
        "evidence": list(_evidence(bundle)),
    }


def _file(bundle: Bundle, record: FileRecord, machine: Machine) -> dict[str, Any]:
    return {
        "path": record.path,
        "role": record.role,
        "precision": record.precision,
        "bytes": record.bytes,
        "sha256": record.sha256,
        "made_by": record.made_by,
        "details": record.details,
        "here": [
            {"runtime": runtime, **_told(incompatibility(bundle, record, runtime, machine))}
            for runtime in _runtimes(bundle, record)
        ],
    }


def _runtimes(bundle: Bundle, record: FileRecord) -> list[str]:
    """Return the runtimes that would execute a file."""
    kind, _, runtime = record.role.partition(":")
    if kind == "gradient-engine" and runtime in LIBRARIES:
        return [runtime]
    if record.role == "gradient":
        return [name for name in PREFERENCE if name not in LIBRARIES]
    return [name for name in PREFERENCE if record in files_for(bundle, name, record.precision)]


def _told(problem: CcnDeployError | None) -> dict[str, Any]:
    if problem is None:
        return {"runs": True, "problem": "", "fix": ""}
    return {"runs": False, "problem": problem.what, "fix": problem.hint}


def _evidence(bundle: Bundle) -> Iterable[dict[str, Any]]:
    """Return the cached measurements, which the manifest does not cover."""
    directory = bundle.evidence
    if directory.is_dir():
        for file in sorted(directory.rglob("*")):
            if file.is_file() and not file.is_symlink():
                path = file.relative_to(bundle.path).as_posix()
                yield {"path": path, "bytes": file.stat().st_size}
