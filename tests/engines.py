"""Bundles that hold real TensorRT-RTX engines, and manifests that say something else of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ccn_deploy.bundle import Bundle, NewFile, write_bundle
from ccn_deploy.exporters.tensorrt.build import Batches, BuiltEngine, build_engine
from ccn_deploy.targets import Role

RTX = "tensorrt-rtx"


def build_rtx(bundle: Bundle, batch: Batches) -> BuiltEngine:
    """Build an engine of a bundle's float32 graph, for the GPUs that the library takes itself."""
    return build_engine(bundle.read(bundle.file(Role.FORWARD, "fp32")), library=RTX, batch=batch)


def engine_file(
    built: BuiltEngine,
    plan: bytes | None = None,
    *,
    precision: str = "fp32",
    role: str = "engine",
    **changed: Any,
) -> NewFile:
    """Return an engine for a bundle, with other bytes or other details than were built."""
    details = {**built.details, **changed}
    library = details["library"]
    path = f"engines/{role}-{library}-{precision}.engine"
    data = built.plan if plan is None else plan
    return NewFile(path, data, Role(role), precision, library, details=details)


def with_files(bundle: Bundle, path: Path, *files: NewFile) -> Bundle:
    """Return a copy of a bundle with more files, and a manifest that vouches for them."""
    kept = [NewFile.copy(bundle, record) for record in bundle.manifest.files]
    return write_bundle(path, card=bundle.card, files=[*kept, *files])
