"""Files: digests, canonical JSON, and writes that happen whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ccn_deploy.errors import EnvironmentUnfitError, IntegrityError, StorageError, UsageError

_STORAGE_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
    errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


def sha256(data: bytes) -> str:
    """Return the SHA-256 of ``data`` in lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file in lower-case hex, without loading it whole."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_regular(path: Path, limit: int = -1) -> bytes | None:
    """Return the bytes of a file; None if there is none.

    Args:
        path: The file.
        limit: Read so many bytes at most; all if negative.

    Raises:
        IntegrityError: There is something else: a link, a directory, a pipe.
        EnvironmentUnfitError: It cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            if not path.is_symlink() and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read(limit)
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_symlink():
            return None
    except IsADirectoryError:
        pass
    except OSError as error:
        raise EnvironmentUnfitError(
            f"Could not read {path}: {error.strerror or error}.", "Check its permissions."
        ) from error
    raise not_regular(path)


def not_regular(path: Path) -> IntegrityError:
    """Build the error for something else than a file where a file is to be."""
    return IntegrityError(
        f"{path} is no regular file.", "Remove it; a bundle holds its files itself."
    )


def canonical_json(document: Any) -> bytes:
    """Serialise to the one JSON form that digests are taken of.

    Keys sorted, ASCII, two spaces of indentation, a final newline; NaN and infinity are refused.
    """
    return (json.dumps(document, sort_keys=True, indent=2, allow_nan=False) + "\n").encode("ascii")


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one, never a part.

    Raises:
        StorageError: The disk is full or the directory is not writable; ``path`` is unchanged.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        raise _storage_error(path, error) from error
    finally:  # after a signal that raises, too
        if temporary is not None:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()


@contextlib.contextmanager
def atomic_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty sibling directory that becomes ``path`` when the block ends without error.

    Every file is flushed to disk before the rename. On any error, or on a signal that raises,
    the sibling is removed and ``path`` is as it was.

    Raises:
        UsageError: ``path`` exists and ``overwrite`` is false.
        StorageError: The disk is full or not writable.
    """
    path = path.absolute()
    if os.path.lexists(path) and not overwrite:
        raise UsageError(
            f"{path} exists already.", "Choose another --output, or add --overwrite to replace it."
        )
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                _sync_file(file)
        _sync_directory(temporary)
        _replace_directory(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        if error.errno not in _STORAGE_ERRNOS:  # not about this disk: a bug, or another file
            raise
        raise _storage_error(path, error) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _replace_directory(new: Path, path: Path) -> None:
    """Put ``new`` at ``path``; a directory cannot be renamed over a non-empty one in one step."""
    if not os.path.lexists(path):
        new.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    old = aside / path.name
    try:
        path.rename(old)
        new.rename(path)
    except BaseException:  # a signal that raises, too: the old directory must not be lost
        if os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)
        raise
    finally:
        if os.path.lexists(path):
            shutil.rmtree(aside, ignore_errors=True)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    if os.name != "posix":  # Windows cannot open a directory for syncing
        return
    _sync_file(path)


def _storage_error(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"Could not write {path}: {error.strerror or error}.",
        "Free space or choose a writable --output; nothing half-written was left behind.",
    )
