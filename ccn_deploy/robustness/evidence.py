"""What an attack did to every single image, in a file that shows when it was changed.

A file of JSON lines, one attack on one target::

    {"attack": {...}, "schema": "ccn-deploy/robustness-evidence/3", "target": {...}, ...}
    {"adversarial": [5, 3], "clean": [3, 3], "index": 17, "label": 3, "status": "fooled", ...}
    ...
    {"sealed": 100, "seconds": 4.2, "sha256": "..."}
    {"adversarial": [1, 1], "index": 402, ...}

The first line says everything that the numbers depend on. A seal follows every batch: how many
images are above it, how long they took, and the SHA-256 of that and of every byte above. So a
changed byte is found, and what a killed process left after the last seal is dropped and computed
again.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from ccn_deploy.bundle import Bundle
from ccn_deploy.errors import IntegrityError, StorageError
from ccn_deploy.records import (
    Count,
    Digest,
    Record,
    decode_line,
    encode_line,
    json_line,
    plain_object,
)
from ccn_deploy.storage import canonical_json, not_regular, read_regular, sha256
from ccn_deploy.targets import Target

SCHEMA = "ccn-deploy/robustness-evidence/3"

LONGEST = 8 << 20
"""Bytes of the longest line that is parsed; a kept image is in one."""

Status = Literal["already-wrong", "fooled", "held", "invalid"]
"""What became of an image: wrong before the attack; label lost; label kept; or the attack
returned something that is no legal adversarial image, which shows nothing."""

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

NO_LABEL = -1
"""In columns, for a label that is not there: not attacked, or logits that are not finite."""


Label = Annotated[int, msgspec.Meta(ge=0, lt=2**31)] | None
Length = Annotated[float, msgspec.Meta(ge=0)] | None


class Picture(Record, frozen=True):
    """An attacked image that is kept for people to look at.

    Attributes:
        shape: (channels, height, width).
        uint8: Its pixels.
    """

    shape: tuple[Count, Count, Count]
    uint8: bytes

    def __post_init__(self) -> None:
        if len(self.uint8) != math.prod(self.shape):
            raise ValueError(f"{len(self.uint8)} pixels are no image of shape {self.shape}")

    @classmethod
    def of(cls, pixels: NDArray[np.uint8]) -> Picture:
        """Keep pixels [C, H, W]."""
        channels, height, width = pixels.shape
        return cls((channels, height, width), pixels.tobytes())

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [C, H, W]."""
        return np.frombuffer(self.uint8, np.uint8).reshape(self.shape)


class Sample(Record, frozen=True):
    """One image under one attack.

    Attributes:
        index: Of the image in its data set.
        label: The true one.
        clean: Labels of the clean image from (target, reference).
        adversarial: Labels of the attacked image from (target, reference); None where there is
            no attacked image, or no finite logits.
        status: See :data:`Status`.
        linf: Largest pixel of the perturbation, or None without one.
        l2: Euclidean norm of the perturbation, or None.
        rho: ``l2`` over the norm of the clean image (paper, equation 9); None where no
            adversarial image was found, which stands for infinity.
        queries: How often the attack asked for this image's logits, and for an input gradient of
            it. What only decides the status, before and after the attack, is not counted.
        image: The attacked image, kept for a few.
    """

    index: Count
    label: Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
    clean: tuple[Label, Label]
    adversarial: tuple[Label, Label]
    status: Status
    linf: Length = None
    l2: Length = None
    rho: Length = None
    queries: tuple[Count, Count] = (0, 0)
    image: Picture | None = None


@dataclass(frozen=True)
class Evidence:
    """One attack on one target, in columns of length n.

    Attributes:
        header: Everything the numbers depend on.
        index: Of the images in their data set.
        label: True labels.
        clean_runtime: The target's labels of the clean images; :data:`NO_LABEL` where it gave
            none. The other three columns of labels likewise.
        clean_reference: The reference's.
        adversarial_runtime: The target's labels of the attacked images.
        adversarial_reference: The reference's.
        status: A :data:`Status` each.
        linf: NaN where there is no perturbation; ``l2`` likewise.
        l2: Of the perturbation.
        rho: ``l2`` over the norm of the clean image; NaN where nothing was found.
        forward: Queries of the attack for logits.
        backward: Queries of the attack for an input gradient.
        images: The first attacked images, by position; uint8 [C, H, W].
        seconds: What computing them took.
        path: The file, if there is one.
    """

    header: Mapping[str, Any]
    index: Integers
    label: Integers
    clean_runtime: Integers
    clean_reference: Integers
    adversarial_runtime: Integers
    adversarial_reference: Integers
    status: NDArray[np.str_]
    linf: Floats
    l2: Floats
    rho: Floats
    forward: Integers
    backward: Integers
    images: Mapping[int, NDArray[np.uint8]] = field(default_factory=dict)
    seconds: float = 0.0
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.index)

    @classmethod
    def of(
        cls,
        samples: Sequence[Sample],
        header: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
        path: Path | None = None,
    ) -> Evidence:
        """Put samples into columns."""

        def labels(values: list[int | None]) -> Integers:
            return integers([NO_LABEL if v is None else v for v in values])

        def integers(values: list[int]) -> Integers:
            return np.array(values, dtype=np.int64)

        def floats(values: list[float | None]) -> Floats:
            return np.array([np.nan if v is None else v for v in values], dtype=np.float64)

        return cls(
            header=header or {},
            index=integers([s.index for s in samples]),
            label=integers([s.label for s in samples]),
            clean_runtime=labels([s.clean[0] for s in samples]),
            clean_reference=labels([s.clean[1] for s in samples]),
            adversarial_runtime=labels([s.adversarial[0] for s in samples]),
            adversarial_reference=labels([s.adversarial[1] for s in samples]),
            status=np.array([s.status for s in samples], dtype="<U13"),
            linf=floats([s.linf for s in samples]),
            l2=floats([s.l2 for s in samples]),
            rho=floats([s.rho for s in samples]),
            forward=integers([s.queries[0] for s in samples]),
            backward=integers([s.queries[1] for s in samples]),
            images={at: s.image.pixels for at, s in enumerate(samples) if s.image is not None},
            seconds=seconds,
            path=path,
        )


def evidence_path(bundle: Bundle, header: Mapping[str, Any], label: str) -> Path:
    """Return where the evidence with this header is kept, below ``BUNDLE/evidence``.

    Raises:
        IntegrityError: There is a link on the way.
    """
    target = Target(**header["target"])
    key = sha256(canonical_json(header))[:16]
    return bundle.evidence_file("robustness", str(target), f"{label}-{key}.jsonl")


def read_evidence(path: Path, header: Mapping[str, Any], limit: int = -1) -> Evidence:
    """Read the sealed part of a file; none of it if there is no file.

    Args:
        path: The file.
        header: What its first line must be.
        limit: Read so many samples at most; all if negative.

    Raises:
        IntegrityError: The file was changed after it was written, or is no regular file.
        EnvironmentUnfitError: It cannot be read.
    """
    data = read_regular(path) or b""
    content = _verified(data, path, header)
    samples = content.samples if limit < 0 else content.samples[:limit]
    share = len(samples) / len(content.samples) if content.samples else 0.0
    return Evidence.of(samples, header, content.seconds * share, path)


class EvidenceWriter:
    """Appends whole batches to a file; made by :func:`writing`.

    Attributes:
        count: Samples in the file, all sealed.
    """

    def __init__(self, file: FileIO, path: Path, header: Mapping[str, Any]) -> None:
        content = _verified(file.read(), path, header)
        self.count = len(content.samples)
        self._file = file
        self._path = path
        self._size = content.sealed
        self._digest = content.digest
        self._header = header
        file.truncate(self._size)
        file.seek(self._size)

    def append(self, samples: Sequence[Sample], seconds: float) -> None:
        """Write a batch and its seal, and wait until they are on the disk.

        Raises:
            StorageError: The disk is full; the file is as it was before.
        """
        data = json_line(self._header) if self._size == 0 else b""
        data += b"".join(map(encode_line, samples))
        digest = self._digest.copy()
        digest.update(data)
        seal = _seal(self.count + len(samples), round(seconds, 3), digest)
        try:
            rest = memoryview(data + seal)
            while rest:  # a disk that is nearly full takes a part, and says so at the next part
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), self._size)
            raise _storage_error(self._path, error) from error
        digest.update(seal)
        self._digest = digest
        self._size += len(data) + len(seal)
        self.count += len(samples)


@contextlib.contextmanager
def writing(path: Path, header: Mapping[str, Any]) -> Iterator[EvidenceWriter]:
    """Open a file for this process alone; a second process waits, then finds the work done.

    Raises:
        IntegrityError: The file was changed after it was written.
        StorageError: The directory is not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _open_locked(path)
    except OSError as error:
        raise _storage_error(path, error) from error
    try:
        yield EvidenceWriter(file, path, header)
    finally:
        with contextlib.suppress(OSError):
            if os.fstat(file.fileno()).st_size == 0:
                path.unlink()
        file.close()


def _open_locked(path: Path) -> FileIO:
    """Open a file, made if need be, with an exclusive lock that lasts until it is closed."""
    while True:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        file = FileIO(os.open(path, flags, 0o666), "r+")
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.close()
            raise not_regular(path)
        try:
            import fcntl
        except ImportError:  # Windows: two evaluations of one bundle at a time are not guarded
            return file
        fcntl.flock(file, fcntl.LOCK_EX)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # another process removed the empty file it had locked


@dataclass
class _Content:
    """The sealed part of a file."""

    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0
    sealed: int = 0  # bytes
    digest: Any = field(default_factory=hashlib.sha256)  # of those bytes


class _Seal(Record, frozen=True):
    """The line that vouches for itself and, by their digest, for all bytes above it."""

    sealed: Count
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    sha256: Digest


def _seal(count: int, seconds: float, above: Any) -> bytes:
    digest = above.copy()
    digest.update(json_line({"sealed": count, "seconds": seconds}))
    return encode_line(_Seal(count, seconds, digest.hexdigest()))


def _verified(data: bytes, path: Path, header: Mapping[str, Any]) -> _Content:
    """Read everything up to the last seal, checking every seal on the way.

    A process that is killed leaves a beginning of what it meant to write: whole lines, then at
    most a part of one without its newline. Anything else was changed.
    """
    content = _Content()
    pending: list[Sample] = []
    digest = hashlib.sha256()
    offset = 0
    what, hint = f"A line of {path.name}", _hint(path)
    *lines, rest = data.split(b"\n")
    for text in lines:
        whole = text + b"\n"
        if offset == 0:
            _check_header(whole, path, header)
        elif text.startswith(_SEAL):
            seal = decode_line(whole, _Seal, what, hint)
            if whole != _seal(len(content.samples) + len(pending), seal.seconds, digest):
                raise _changed(path, "a seal does not match what is above it")
            content.samples += pending
            content.seconds += seal.seconds
            pending = []
        else:
            pending.append(decode_line(whole, Sample, what, hint, limit=LONGEST))
        offset += len(whole)
        digest.update(whole)
        if content.samples and not pending:
            content.sealed, content.digest = offset, digest.copy()
    if _is_whole_object(rest[:-1]):
        raise _changed(path, "its last line does not end")
    return content


_SEAL = b'{"sealed": '


def _check_header(text: bytes, path: Path, header: Mapping[str, Any]) -> None:
    if text == json_line(header):
        return
    schema = plain_object(text, f"The header of {path.name}", _hint(path)).get("schema")
    if schema != SCHEMA:
        raise IntegrityError(
            f"The evidence {path.name} has schema {schema!r}; this version reads {SCHEMA!r}.",
            f"Delete {path} and measure again, or read it with the version that wrote it.",
        )
    raise _changed(path, "its header is not the one its name stands for")


def _is_whole_object(text: bytes) -> bool:
    """Whether what follows the last newline was a line whose newline became something else."""
    try:
        plain_object(text, "", "")
    except IntegrityError:
        return False
    return True


def _changed(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"The evidence {path.name} was changed after it was written: {why}.", _hint(path)
    )


def _hint(path: Path) -> str:
    return f"Delete {path} and measure again."


def _storage_error(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"Could not write evidence to {path}: {error.strerror or error}.",
        "Free space, or copy the bundle to where it can be written; what was measured before "
        "is kept.",
    )
