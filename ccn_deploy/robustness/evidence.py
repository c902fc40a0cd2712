"""What an attack did to every single image, in a file that shows when it was changed.

A file of JSON lines, one attack on one target::

    {"schema": "ccn-deploy/robustness-evidence/2", "attack": {...}, "target": {...}, ...}
    {"index": 17, "label": 3, "clean": {"runtime": 3, "reference": 3}, "status": "fooled", ...}
    ...
    {"sealed": 100, "seconds": 4.2, "sha256": "..."}
    {"index": 402, ...}

The first line says everything that the numbers depend on. A seal follows every batch: how many
images are above it, how long they took, and the SHA-256 of that and of every byte above. So a
changed byte is found, and what a killed process left after the last seal is dropped and computed
again.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.errors import IntegrityError, StorageError
from ccn_deploy.storage import canonical_json, sha256

SCHEMA = "ccn-deploy/robustness-evidence/2"

Status = Literal["already-wrong", "fooled", "held", "invalid"]
"""What became of an image: wrong before the attack; label lost; label kept; or the attack
returned something that is no legal adversarial image, which shows nothing."""

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

NO_LABEL = -1
"""In columns, for a label that is not there: not attacked, or logits that are not finite."""


@dataclass(frozen=True, slots=True)
class Sample:
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
        image: The attacked image as uint8 [C, H, W], kept for a few.
    """

    index: int
    label: int
    clean: tuple[int | None, int | None]
    adversarial: tuple[int | None, int | None]
    status: Status
    linf: float | None = None
    l2: float | None = None
    rho: float | None = None
    queries: tuple[int, int] = (0, 0)
    image: NDArray[np.uint8] | None = None

    def to_document(self) -> dict[str, Any]:
        """Return the JSON line of this sample."""
        document: dict[str, Any] = {
            "index": self.index,
            "label": self.label,
            "clean": {"runtime": self.clean[0], "reference": self.clean[1]},
            "adversarial": {"runtime": self.adversarial[0], "reference": self.adversarial[1]},
            "status": self.status,
            "linf": self.linf,
            "l2": self.l2,
            "rho": self.rho,
            "queries": {"forward": self.queries[0], "backward": self.queries[1]},
        }
        if self.image is not None:
            document["image"] = {
                "shape": list(self.image.shape),
                "uint8": base64.b64encode(self.image.tobytes()).decode("ascii"),
            }
        return document

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Sample:
        """Read a JSON line; raises KeyError, TypeError or ValueError if it is none of ours."""
        image = document.get("image")
        clean, adversarial = document["clean"], document["adversarial"]
        queries = document["queries"]
        return cls(
            index=document["index"],
            label=document["label"],
            clean=(clean["runtime"], clean["reference"]),
            adversarial=(adversarial["runtime"], adversarial["reference"]),
            status=document["status"],
            linf=document["linf"],
            l2=document["l2"],
            rho=document["rho"],
            queries=(queries["forward"], queries["backward"]),
            image=None
            if image is None
            else np.frombuffer(base64.b64decode(image["uint8"]), np.uint8).reshape(image["shape"]),
        )


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
            images={at: s.image for at, s in enumerate(samples) if s.image is not None},
            seconds=seconds,
            path=path,
        )


def evidence_path(directory: Path, header: Mapping[str, Any], label: str) -> Path:
    """Return where the evidence with this header is kept, below ``BUNDLE/evidence``."""
    target = f"{header['target']['runtime']}-{header['target']['precision']}"
    key = sha256(canonical_json(header))[:16]
    return directory / "robustness" / target / f"{label}-{key}.jsonl"


def read_evidence(path: Path, header: Mapping[str, Any] | None = None, limit: int = -1) -> Evidence:
    """Read the sealed part of a file; none of it if there is no file.

    Args:
        path: The file.
        header: What its first line must be, if that is known.
        limit: Read so many samples at most; all if negative.

    Raises:
        IntegrityError: The file was changed after it was written.
    """
    data = path.read_bytes() if path.is_file() else b""
    content = _verified(data, path, header)
    samples = content.samples if limit < 0 else content.samples[:limit]
    share = len(samples) / len(content.samples) if content.samples else 0.0
    return Evidence.of(samples, content.header or header, content.seconds * share, path)


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
        documents = [s.to_document() for s in samples]
        lines = [self._header, *documents] if self._size == 0 else documents
        data = b"".join(_line(line) for line in lines)
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
        file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+")
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

    header: Mapping[str, Any] | None = None
    samples: list[Sample] = field(default_factory=list)
    seconds: float = 0.0
    sealed: int = 0  # bytes
    digest: Any = field(default_factory=hashlib.sha256)  # of those bytes


def _verified(data: bytes, path: Path, expected: Mapping[str, Any] | None) -> _Content:
    """Read everything up to the last seal, checking every seal on the way.

    A process that is killed leaves a beginning of what it meant to write: whole lines, then at
    most a part of one without its newline. Anything else was changed.
    """
    content = _Content()
    header: Mapping[str, Any] | None = None
    pending: list[Sample] = []
    digest = hashlib.sha256()
    offset = 0
    *lines, rest = data.split(b"\n")
    for line in lines:
        try:
            document = json.loads(line)
            if offset == 0:
                header = document
                if document["schema"] != SCHEMA:
                    raise _of_another_version(path, document["schema"])
            elif "sha256" in document:
                count = len(content.samples) + len(pending)
                if line + b"\n" != _seal(count, document["seconds"], digest):
                    raise ValueError("a seal does not match what is above it")
                content.samples += pending
                content.seconds += document["seconds"]
                pending = []
            else:
                pending.append(Sample.from_document(document))
        except (ValueError, KeyError, TypeError) as error:
            raise _changed(path, error) from error
        offset += len(line) + 1
        digest.update(line + b"\n")
        if content.samples and not pending:
            content.header, content.sealed, content.digest = header, offset, digest.copy()
    if _is_whole_object(rest):
        raise _changed(path, ValueError("its last line does not end"))
    if header is not None and expected is not None and header != json.loads(_line(expected)):
        raise _changed(path, ValueError("its header is not the one its name stands for"))
    return content


def _is_whole_object(rest: bytes) -> bool:
    """Whether what follows the last newline is a whole line whose newline became something else."""
    try:
        _, end = json.JSONDecoder().raw_decode(rest.decode("latin-1"))
    except ValueError:
        return False
    return end < len(rest)


def _seal(count: int, seconds: float, above: Any) -> bytes:
    """Return the line that vouches for itself and, by their digest, for all bytes above it."""
    said = {"sealed": count, "seconds": seconds}
    digest = above.copy()
    digest.update(_line(said))
    return _line({**said, "sha256": digest.hexdigest()})


def _line(document: Mapping[str, Any]) -> bytes:
    text = json.dumps(document, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


def _changed(path: Path, error: Exception) -> IntegrityError:
    return IntegrityError(
        f"The evidence {path.name} was changed after it was written: {error}.",
        f"Delete {path} and measure again.",
    )


def _of_another_version(path: Path, schema: object) -> IntegrityError:
    return IntegrityError(
        f"The evidence {path.name} has schema {schema!r}; this version reads {SCHEMA!r}.",
        f"Delete {path} and measure again, or read it with the version that wrote it.",
    )


def _storage_error(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"Could not write evidence to {path}: {error.strerror or error}.",
        "Free space, or copy the bundle to where it can be written; what was measured before "
        "is kept.",
    )
