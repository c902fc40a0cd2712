"""Kernels that TensorRT-RTX compiled for this GPU, kept on disk for the next process.

TensorRT-RTX compiles an engine's kernels when it first runs. It can hand them out as one blob and
take them back later; it checks by itself that the blob is of this GPU, driver and release. The
blob is machine code, as trustworthy as the user's own cache directory.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ccn_deploy.errors import StorageError
from ccn_deploy.machine import Gpu
from ccn_deploy.storage import sha256, write_atomic

_DIGEST = 64
"""Characters of a SHA-256 in hex; a file is that of the blob, a newline, and the blob."""


def cache_directory() -> Path | None:
    """Return ``$XDG_CACHE_HOME/ccn-deploy`` or ``~/.cache/ccn-deploy``; None without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "ccn-deploy"
    try:
        return Path.home() / ".cache" / "ccn-deploy"
    except RuntimeError:  # a user id without a name, as in some containers
        return None


def kernel_path(
    directory: Path, engine: str, *, version: str, gpu: Gpu, driver: str | None
) -> Path:
    """Return where the kernels of an engine are kept: one file for everything they depend on.

    Args:
        directory: From :func:`cache_directory`.
        engine: SHA-256 of the engine.
        version: Of TensorRT-RTX.
        gpu: That they were compiled for.
        driver: Of NVIDIA.
    """
    cache_key = f"{version} {gpu.name} {gpu.compute_capability} {driver or 'unknown'}"
    place = re.sub(r"[^A-Za-z0-9.]+", "-", cache_key).strip("-.")
    return directory / "tensorrt-rtx" / place / f"{engine}.kernels"


def load_kernels(path: Path) -> bytes | None:
    """Return the blob at ``path``; None if there is none, or only a damaged or unreadable one."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, blob = data[:_DIGEST], data[_DIGEST + 1 :]
    return blob if blob and digest == sha256(blob).encode() else None


def store_kernels(path: Path, blob: bytes) -> bool:
    """Keep a blob; return false where the disk is full or not writable: only time is lost."""
    try:
        write_atomic(path, sha256(blob).encode() + b"\n" + blob)
    except StorageError:
        return False
    return True
