"""``mnist`` and ``fashion-mnist``: pairs of idx files, plain or gzip.

An idx file is a magic number (two zero bytes, the element type, the number of dimensions), each
dimension as a big-endian 32-bit count, and the elements; here always unsigned bytes.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.data.arrays import dataset_from_arrays
from ccn_deploy.data.dataset import Dataset, Split
from ccn_deploy.data.download import RemoteFile
from ccn_deploy.data.files import open_regular
from ccn_deploy.data.locate import default_directory, not_found
from ccn_deploy.errors import DatasetNotFoundError, InputError

UNSIGNED_BYTE = 0x08
SIDE = 28
MOST = 300_000
"""Items in one file: five times as many as were published, 235 MB of images."""

STEMS: dict[Split, tuple[str, str]] = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


@dataclass(frozen=True)
class IdxSet:
    """A data set of 28x28 grey images published as four idx files.

    Attributes:
        name: Of the data set.
        class_names: One per class, in order of label.
        base_url: Where the gzip files are published, with a final slash.
        published: Size and SHA-256 of each gzip file, by name without ``.gz``.
        inside: Directories below the given one that may hold the files, as other tools lay
            them out.
        installed: A directory that a system package puts them in.
    """

    name: str
    class_names: tuple[str, ...]
    base_url: str
    published: Mapping[str, tuple[int, str]]
    inside: tuple[str, ...] = ()
    installed: Path | None = None

    def load(self, split: Split, directory: Path | None, download: bool) -> Dataset:
        """Load one split.

        Args:
            split: Which.
            directory: Where its files are; the default places if None.
            download: Fetch files that are missing into ``directory``.

        Raises:
            DatasetNotFoundError: A file is missing and ``download`` is false.
            InputError: A file that is truncated or not what its name says.
            EnvironmentUnfitError: Downloading failed.
            IntegrityError: Something else was downloaded.
        """
        image_file, label_file = (
            self._find(stem, split, directory, download) for stem in STEMS[split]
        )
        images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
        if len(images) != len(labels):
            raise InputError(
                f"{image_file} holds {len(images)} images and {label_file} {len(labels)} labels.",
                "Give two files that belong together.",
            )
        return dataset_from_arrays(
            self.name, images[:, np.newaxis], labels, self.class_names, split=split
        )

    def _find(self, stem: str, split: Split, directory: Path | None, download: bool) -> Path:
        home, others = self._places(directory)
        dotted = stem.replace("-idx", ".idx")
        names = (stem, f"{stem}.gz", dotted, f"{dotted}.gz", f"{stem}/{stem}", f"{dotted}/{dotted}")
        for place in (home, *(home / inside for inside in self.inside), *others):
            for name in names:
                if (place / name).is_file():
                    return place / name
        if download:
            path = home / f"{stem}.gz"
            RemoteFile(f"{self.base_url}{stem}.gz", *self.published[stem]).save(path)
            return path
        looked_in = [home, *others]
        raise not_found(self.name, looked_in, [f"{each}[.gz]" for each in STEMS[split]])

    def _places(self, directory: Path | None) -> tuple[Path, tuple[Path, ...]]:
        """Return where files should be put, and where else they may be."""
        if directory is not None:
            return directory, ()
        if self.installed is None:
            return default_directory(self.name), ()
        try:
            return default_directory(self.name), (self.installed,)
        except DatasetNotFoundError:  # a user without home still has what the system installed
            if not self.installed.is_dir():
                raise
            return self.installed, ()


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes, plain or gzip, whatever its name says.

    Args:
        path: Of the file.
        dimensions: 3 for images of 28x28, 1 for labels.

    Raises:
        InputError: Not such a file, another number or size of dimensions, no item or more than
            :data:`MOST`, or more or fewer elements than its header says.
    """
    wanted = f"an idx file of unsigned bytes with {dimensions} dimension{'s'[: dimensions - 1]}"
    try:
        with open_regular(path) as raw, _unzipped(raw) as file:
            header = file.read(4 + 4 * dimensions)
            if header[:4] != bytes((0, 0, UNSIGNED_BYTE, dimensions)):
                raise _damaged(path, f"starts with {header[:4].hex(' ') or 'nothing'}", wanted)
            if len(header) < 4 + 4 * dimensions:
                raise _damaged(path, "ends inside its header", wanted)
            shape = struct.unpack(f">{dimensions}I", header[4:])
            _check_shape(path, shape)  # before as much as it says is read
            expected = math.prod(shape)
            data = _read_up_to(file, expected + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, f"is no whole gzip file ({error})", wanted) from error
    if len(data) != expected:
        amount = f"{len(data)}" if len(data) < expected else "more"
        raise _damaged(path, f"holds {amount} bytes after its header", f"{expected}")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _unzipped(file: BinaryIO) -> BinaryIO | gzip.GzipFile:
    zipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    return gzip.GzipFile(fileobj=file) if zipped else file


def _check_shape(path: Path, shape: tuple[int, ...]) -> None:
    count, *sides = shape
    if any(side != SIDE for side in sides):
        raise InputError(
            f"{path} holds images of {sides[0]}x{sides[1]} pixels, expected {SIDE}x{SIDE}.",
            "Check that the file belongs to this data set.",
        )
    if not 1 <= count <= MOST:
        raise _damaged(path, f"says that it holds {count:,} items", f"1 to {MOST:,}")


def _read_up_to(file: BinaryIO | gzip.GzipFile, size: int) -> bytearray:
    """Read in pieces, so that a header that lies cannot ask for all the memory at once."""
    data = bytearray()
    while piece := file.read(min(1 << 20, size - len(data))):
        data += piece
    return data


def _damaged(path: Path, what: str, expected: str) -> InputError:
    return InputError(
        f"{path} {what}; expected {expected}.",
        "The file is truncated or another one: get it again, or delete it and download.",
    )


MNIST = IdxSet(
    name="mnist",
    class_names=tuple(str(digit) for digit in range(10)),
    base_url="https://ossci-datasets.s3.amazonaws.com/mnist/",
    published={
        "train-images-idx3-ubyte": (
            9_912_422,
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        "train-labels-idx1-ubyte": (
            28_881,
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        "t10k-images-idx3-ubyte": (
            1_648_877,
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        "t10k-labels-idx1-ubyte": (
            4_542,
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    },
    inside=("raw", "MNIST/raw"),
)

_GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag",
    "Ankle boot",
)  # fmt: skip

FASHION_MNIST = IdxSet(
    name="fashion-mnist",
    class_names=_GARMENTS,
    base_url="https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    published={
        "train-images-idx3-ubyte": (
            26_421_880,
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        ),
        "train-labels-idx1-ubyte": (
            29_515,
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        ),
        "t10k-images-idx3-ubyte": (
            4_422_102,
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        ),
        "t10k-labels-idx1-ubyte": (
            5_148,
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    },
    inside=("raw", "FashionMNIST/raw"),
    installed=Path("/usr/share/datasets/fashion-mnist"),  # Debian: dataset-fashion-mnist
)
