"""What is inside a bundle, told from its manifest alone.

Nothing here parses a graph or deserializes an engine: of every file only the digest was computed
and, of an engine, the first bytes are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from ccn_deploy.bundle import Bundle, FileRecord
from ccn_deploy.errors import CcnDeployError
from ccn_deploy.machine import Machine
from ccn_deploy.runtimes.compatibility import incompatibility
from ccn_deploy.targets import DEPLOYED_RUNTIMES, Target

SCHEMA = "ccn-deploy/inspect/1"


def inventory(bundle: Bundle, machine: Machine) -> dict[str, Any]:
    """Return everything a bundle says of itself, and what of it a machine can run.

    Args:
        bundle: An open bundle.
        machine: For which to say what runs.
    """
    manifest, card = bundle.manifest, msgspec.to_builtins(bundle.card)
    return {
        "schema": SCHEMA,
        "bundle": str(bundle.path),
        "digest": manifest.digest,
        "name": card["name"],
        "title": bundle.card.title,
        "architecture": card["architecture"],
        "defense": card["defense"],
        "input": {
            "shape": list(card["input_shape"]),
            "dtype": "float32",
            "layout": "NCHW",
            "range": [0.0, 1.0],
        },
        "class_names": list(card["class_names"]),
        "training": card["training"],
        "evaluation": card["evaluation"],
        "source": bundle.card.source.told(),
        "preprocessing": card["source"]["preprocessing"],
        "files": [_file(bundle, record, machine) for record in manifest.files],
        "evidence": list(_evidence(bundle)),
    }


def _file(bundle: Bundle, record: FileRecord, machine: Machine) -> dict[str, Any]:
    return {
        **msgspec.to_builtins(record),
        "here": [
            {"runtime": target.runtime, **_told(incompatibility(bundle, record, target, machine))}
            for target in _targets(bundle, record)
        ],
    }


def _targets(bundle: Bundle, record: FileRecord) -> list[Target]:
    """Return the targets that would execute a file."""
    if not record.precision:
        return []
    targets = [Target(name, record.precision) for name in DEPLOYED_RUNTIMES]
    if record.role.has_gradients:
        return [
            target
            for target in targets
            if target.kind.runs_engines == record.role.is_engine
            and record.runtime in ("", target.runtime)
        ]
    return [target for target in targets if record in bundle.programs(target)]


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
