"""What an attack did to every single image, in files that show when they were changed.

A file of JSON lines, one attack on one target::

    {"attack": {...}, "schema": "ccn-deploy/robustness-evidence/4", "target": {...}, ...}
    {"adversarial": [5, 3], "clean": [3, 3], "index": 17, "label": 3, "status": "fooled", ...}
    ...
    {"images": 61609, "images_sha256": "...", "sealed": 100, "seconds": 4.2, "sha256": "..."}
    {"adversarial": [1, 1], "index": 402, ...}

and beside it one with the adversarial images, see :mod:`ccn_deploy.robustness.kept_images`.

The first line says everything that the numbers depend on. A seal follows every batch: how many
images are above it, how long they took, the length and the SHA-256 of the file of images, and the
SHA-256 of that and of every byte above. So a changed byte is found, and what a killed process left
after the last seal, in either file, is dropped and computed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    Text,
    decode_line,
    encode_line,
    json_line,
    plain_object,
)
from ccn_deploy.robustness.kept_images import (
    Block,
    KeptImages,
    Pixels,
    compress,
    images_path,
    open_images,
)
from ccn_deploy.robustness.non_inferiority import Mask
from ccn_deploy.storage import canonical_json, not_regular, read_regular, sha256
from ccn_deploy.targets import Target

SCHEMA = "ccn-deploy/robustness-evidence/4"

Status = Literal["already-wrong", "fooled", "held", "invalid"]
"""What became of an image: wrong before the attack; label lost; label kept; or the attack
returned something that is no legal adversarial image, which shows nothing."""

Origin = Literal["measured", "read"]

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

NO_LABEL = -1
"""In columns, for a label that is not there: not attacked, or logits that are not finite."""


Label = Annotated[int, msgspec.Meta(ge=0, lt=2**31)] | None
Length = Annotated[float, msgspec.Meta(ge=0)] | None


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
        stage: Of an attack in stages: the one whose image fooled it; else None.
        stages: Of an attack in stages: ``queries`` by stage, in their order.
        transferred: The target's label of the image that the same attack made on the reference;
            None where there is none or it is not legal, and for the reference itself.
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
    stage: Text | None = None
    stages: tuple[tuple[Count, Count], ...] = ()
    transferred: Label = None


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
        stage: The stage whose image fooled it, empty for none.
        stage_queries: Queries by stage, int64 [n, S, 2]: for logits, then for gradients; -1 where a
            row has fewer stages than others.
        transferred: The target's labels of the images that were made on the reference.
        seconds: What computing them took.
        path: The file, if there is one.
        origin: Whether all of it was measured by the call that returned it, or some was read.
        fetch: Maps rows int64 [m] to their adversarial images.
        policies: Commitments that stood before every batch of it was measured, see
            :mod:`ccn_deploy.certificates.commitment`.
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
    stage: NDArray[np.str_]
    stage_queries: Integers
    transferred: Integers
    seconds: float = 0.0
    path: Path | None = None
    origin: Origin = "read"
    fetch: Callable[[Integers], Pixels] | None = None
    policies: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.index)

    def adversarial(self, rows: Integers | Mask) -> Pixels:
        """Return the attacked images of some rows.

        Args:
            rows: int64 [m], or a mask of all.

        Returns:
            float32 [m, C, H, W], NaN where the attack returned no finite image or was not run.

        Raises:
            IntegrityError: The images are not those that were kept.
        """
        if self.fetch is None:
            raise ValueError("these samples were put together without images")
        return self.fetch(np.arange(len(self))[rows])

    @classmethod
    def of(
        cls,
        samples: Sequence[Sample],
        header: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
        path: Path | None = None,
        *,
        fetch: Callable[[Integers], Pixels] | None = None,
        policies: frozenset[str] = frozenset(),
    ) -> Evidence:
        """Put samples into columns."""
        stages = np.full((len(samples), max((len(s.stages) for s in samples), default=0), 2), -1)
        for row, sample in enumerate(samples):
            stages[row, : len(sample.stages)] = np.reshape(sample.stages, (-1, 2))

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
            stage=np.array([s.stage or "" for s in samples], dtype=np.str_),
            stage_queries=stages,
            transferred=labels([s.transferred for s in samples]),
            seconds=seconds,
            path=path,
            fetch=fetch,
            policies=policies,
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

    Images are read when :meth:`Evidence.adversarial` asks for them, and checked then.

    Args:
        path: The file.
        header: What its first line must be.
        limit: Read so many samples at most; all if negative.

    Raises:
        IntegrityError: The file was changed after it was written, or is no regular file; or the
            file of images is missing or too short.
        EnvironmentUnfitError: It cannot be read.
    """
    data = read_regular(path) or b""
    content = _verified(data, path, header)
    images = _images(path, header, content)
    images.check_size()
    samples = content.samples if limit < 0 else content.samples[:limit]
    share = len(samples) / len(content.samples) if content.samples else 0.0
    return Evidence.of(
        samples,
        header,
        content.seconds * share,
        path,
        fetch=images.read,
        policies=content.policies or frozenset(),
    )


class EvidenceWriter:
    """Appends whole batches to both files; made by :func:`writing`.

    Attributes:
        count: Samples in the file, all sealed.
    """

    def __init__(
        self,
        rows: FileIO,
        images: FileIO,
        path: Path,
        header: Mapping[str, Any],
        policies: tuple[str, ...],
    ) -> None:
        content = _verified(rows.read(), path, header)
        self.count = len(content.samples)
        self._rows = _Growing(rows, content.sealed, content.digest)
        kept = _images(path, header, content)
        kept.check_size()
        end = content.blocks[-1].bytes if content.blocks else 0
        self._images = _Growing(images, end, kept.digest())
        self._path = path
        self._header = header
        self._policies = policies or msgspec.UNSET

    def append(self, samples: Sequence[Sample], images: Pixels, seconds: float) -> None:
        """Write a batch and its seal, and wait until they are on the disk.

        Args:
            samples: Of n images.
            images: What the attack made of them, float32 [n, C, H, W]; NaN where nothing.
            seconds: What computing them took.

        Raises:
            StorageError: The disk is full; the files are as they were before.
        """
        if images.shape != (len(samples), *self._header["shape"]):
            raise ValueError(f"{len(samples)} samples with images of shape {images.shape}")
        block = compress(images)
        image_digest = self._images.with_more(block)
        data = json_line(self._header) if self._rows.size == 0 else b""
        data += b"".join(map(encode_line, samples))
        seal = _seal(
            _Seal(
                sealed=self.count + len(samples),
                seconds=round(seconds, 3),
                images=self._images.size + len(block),
                images_sha256=image_digest.hexdigest(),
                policies=self._policies,
            ),
            self._rows.with_more(data),
        )
        try:
            # Images first: what no seal speaks of is dropped.
            self._images.write(block)
            self._rows.write(data + seal)
        except OSError as error:
            for file in (self._images, self._rows):
                file.take_back()
            raise _storage_error(self._path, error) from error
        for file, written in ((self._images, block), (self._rows, data + seal)):
            file.keep(written)
        self.count += len(samples)


class _Growing:
    """A file that only grows, by whole pieces; what is in it beyond ``size`` is cut off."""

    def __init__(self, file: FileIO, size: int, digest: Any) -> None:
        self.size = size
        self._file = file
        self._digest = digest
        file.truncate(size)
        file.seek(size)

    def with_more(self, data: bytes) -> Any:
        """Return the digest of the file with more at its end."""
        digest = self._digest.copy()
        digest.update(data)
        return digest

    def write(self, data: bytes) -> None:
        """Write at the end, and wait until it is on the disk; :meth:`keep` makes it stay."""
        rest = memoryview(data)
        while rest:  # a disk that is nearly full takes a part, and says so at the next part
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())

    def keep(self, data: bytes) -> None:
        self.size += len(data)
        self._digest.update(data)

    def take_back(self) -> None:
        with contextlib.suppress(OSError):
            self._file.truncate(self.size)
            self._file.seek(self.size)


@contextlib.contextmanager
def writing(
    path: Path, header: Mapping[str, Any], policies: tuple[str, ...] = ()
) -> Iterator[EvidenceWriter]:
    """Open both files for this process alone; a second process waits, then finds the work done.

    Args:
        path: Of the rows.
        header: Their first line.
        policies: Commitments that stand, for the seals of what is written.

    Raises:
        IntegrityError: A file was changed after it was written.
        StorageError: The directory is not writable.
    """
    beside = images_path(path)
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = stack.enter_context(_open_locked(path))
            stack.callback(_remove_empty, rows, path, beside)
            images = stack.enter_context(open_images(beside, os.O_RDWR | os.O_CREAT))
        except OSError as error:
            raise _storage_error(path, error) from error
        yield EvidenceWriter(rows, images, path, header, policies)


def _remove_empty(rows: FileIO, path: Path, beside: Path) -> None:
    """Leave nothing behind where nothing was sealed."""
    with contextlib.suppress(OSError):
        if os.fstat(rows.fileno()).st_size == 0:
            path.unlink()
            beside.unlink()


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
    blocks: list[Block] = field(default_factory=list)
    policies: frozenset[str] | None = None  # of every batch; None before the first


class _Seal(Record, frozen=True):
    """The line that vouches for itself and, by their digest, for all bytes above it.

    ``policies`` are the commitments that stood when the batch was measured, if any did.
    """

    sealed: Count
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    images: Count
    images_sha256: Digest
    sha256: Digest = "0" * 64
    policies: tuple[Digest, ...] | msgspec.UnsetType = msgspec.UNSET


def _seal(seal: _Seal, above: Any) -> bytes:
    """Return the line of a seal, its own digest computed from its fields and all bytes above."""
    digest = above.copy()
    digest.update(encode_line(msgspec.structs.replace(seal, sha256="0" * 64)))
    return encode_line(msgspec.structs.replace(seal, sha256=digest.hexdigest()))


def _images(path: Path, header: Mapping[str, Any], content: _Content) -> KeptImages:
    return KeptImages(images_path(path), tuple(header["shape"]), content.blocks, _hint(path))


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
            count = len(content.samples) + len(pending)
            if seal.sealed != count or whole != _seal(seal, digest):
                raise _changed(path, "a seal does not match what is above it")
            content.samples += pending
            content.blocks.append(Block(count, seal.images, seal.images_sha256))
            content.seconds += seal.seconds
            stood = frozenset(() if seal.policies is msgspec.UNSET else seal.policies)
            content.policies = stood if content.policies is None else content.policies & stood
            pending = []
        else:
            pending.append(decode_line(whole, Sample, what, hint))
        offset += len(whole)
        digest.update(whole)
        if content.samples and not pending:
            content.sealed, content.digest = offset, digest.copy()
    if _is_whole_object(rest[:-1]):
        raise _changed(path, "its last line does not end")
    return content


_SEAL = b'{"images": '


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
