"""The adversarial images of one evidence file, kept beside it: a block a batch, compressed.

A block is the zlib stream of the float32 images [n, C, H, W] of one batch, NaN where there is none.
Where each block ends, and the SHA-256 of the file up to there, is said by the seals of the evidence
(:mod:`ccn_deploy.robustness.evidence`), so the file needs no form of its own.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.errors import IntegrityError
from ccn_deploy.storage import not_regular

Pixels = NDArray[np.float32]

SUFFIX = ".images"


def images_path(path: Path) -> Path:
    """Return where the images of an evidence file are."""
    return path.with_name(path.name.removesuffix(".jsonl") + SUFFIX)


def compress(images: Pixels) -> bytes:
    """Return a block of images [n, C, H, W]."""
    # The lowest level: the highest takes twice as long to save a twentieth of PGD's images.
    return zlib.compress(np.ascontiguousarray(images, dtype="<f4").tobytes(), 1)


def open_images(path: Path, flags: int) -> FileIO:
    """Open a file of images, which is no link and no pipe.

    Raises:
        IntegrityError: It is one, or a directory.
        OSError: It is not there, or cannot be opened.
    """
    if path.is_symlink():
        raise not_regular(path)
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        file = FileIO(os.open(path, flags, 0o666), "r+" if flags & os.O_RDWR else "r")
    except IsADirectoryError as error:
        raise not_regular(path) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise not_regular(path)
    return file


@dataclass(frozen=True)
class Block:
    """One batch.

    Attributes:
        rows: How many images are in the file up to its end.
        bytes: How long the file is up to there.
        sha256: Of all of these bytes.
    """

    rows: int
    bytes: int
    sha256: str


@dataclass
class KeptImages:
    """Reads the images of some rows, checking the digest of all that it reads on the way.

    Args:
        path: The file.
        shape: (channels, height, width).
        blocks: As the seals have them.
        hint: What to do about a damaged file.
    """

    path: Path
    shape: tuple[int, int, int]
    blocks: Sequence[Block]
    hint: str
    # Where the last reading ended: what goes through the file forwards hashes every byte once.
    _next: int = 0
    _digest: Any = field(default_factory=hashlib.sha256)

    def check_size(self) -> None:
        """Refuse a file that is missing or shorter than its seals say, without reading it.

        What is longer was written by a process that was killed before it sealed it.

        Raises:
            IntegrityError: As above.
        """
        if not self.blocks:
            return
        try:
            with open_images(self.path, os.O_RDONLY) as file:
                if os.fstat(file.fileno()).st_size >= self.blocks[-1].bytes:
                    return
        except OSError as error:
            raise self._damaged(f"it cannot be opened ({error.strerror or error})") from error
        raise self._damaged("it is too short")

    def digest(self) -> Any:
        """Return the running SHA-256 of all blocks, to go on from.

        Raises:
            IntegrityError: The file is not what was written.
        """
        if self.blocks:
            self.read(np.array([self.blocks[-1].rows - 1]))
        return self._digest.copy()

    def read(self, rows: NDArray[np.int64]) -> Pixels:
        """Return the images float32 [n, C, H, W] of rows int64 [n].

        Raises:
            IntegrityError: The file is not what was written.
        """
        found = np.full((len(rows), *self.shape), np.nan, dtype=np.float32)
        if not len(rows):
            return found
        ends = np.array([block.rows for block in self.blocks])
        places = np.searchsorted(ends, rows, side="right")
        for at, data in self._compressed(set(places.tolist())).items():
            first = self.blocks[at - 1].rows if at else 0
            here = places == at
            found[here] = self._decompressed(data, int(ends[at]) - first)[rows[here] - first]
        return found

    def _compressed(self, wanted: set[int]) -> dict[int, bytes]:
        """Return blocks by their place, verified."""
        if min(wanted) < self._next:
            self._next, self._digest = 0, hashlib.sha256()
        digest, data = self._digest.copy(), {}
        last = max(wanted)
        try:
            with open_images(self.path, os.O_RDONLY) as file:
                start = self.blocks[self._next - 1].bytes if self._next else 0
                file.seek(start)
                for at in range(self._next, last + 1):
                    block = self._piece(file, self.blocks[at].bytes - start, at)
                    digest.update(block)
                    start = self.blocks[at].bytes
                    if at in wanted:
                        data[at] = block
        except OSError as error:
            raise self._damaged(f"it cannot be read ({error.strerror or error})") from error
        if digest.hexdigest() != self.blocks[last].sha256:
            raise self._damaged("its digest is not the sealed one")
        self._next, self._digest = last + 1, digest
        return data

    def _piece(self, file: FileIO, size: int, at: int) -> bytes:
        rows = self.blocks[at].rows - (self.blocks[at - 1].rows if at else 0)
        raw = rows * math.prod(self.shape) * 4
        if not 0 <= size <= raw + raw // 1000 + 1024:  # more than zlib adds to what it cannot pack
            raise self._damaged(f"block {at} has {size:,} bytes for {rows} images")
        pieces, left = [], size
        while left and (piece := file.read(left)):
            pieces.append(piece)
            left -= len(piece)
        if left:
            raise self._damaged("it is too short")
        return b"".join(pieces)

    def _decompressed(self, data: bytes, rows: int) -> Pixels:
        size = rows * math.prod(self.shape) * 4
        stream = zlib.decompressobj()
        try:
            raw = stream.decompress(data, size + 1)
        except zlib.error as error:
            raise self._damaged(str(error)) from error
        if len(raw) != size or not stream.eof or stream.unused_data:
            raise self._damaged(f"a block does not hold {rows} images")
        return np.frombuffer(raw, dtype="<f4").reshape(rows, *self.shape)

    def _damaged(self, why: str) -> IntegrityError:
        return IntegrityError(
            f"The images {self.path.name} are not those of their evidence: {why}.", self.hint
        )
