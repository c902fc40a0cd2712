"""``mnist`` and ``fashion-mnist``: pairs of idx files, plain or gzip.

An idx file is a magic number (two zero bytes, the element type, the number of dimensions), each
dimension as a big-endian 32-bit count, and the elements; here always unsigned bytes.
"""

from __future__ import annotations

import gzip
import io
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.data.arrays import dataset_from_arrays
from ccn_deploy.data.dataset import Dataset, Split
from ccn_deploy.data.download import RemoteFile
from ccn_deploy.data.locate import default_directory, not_found
from ccn_deploy.errors import InputError

UNSIGNED_BYTE = 0x08
SIDE = 28
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
        if images.shape[1:] != (SIDE, SIDE):
            raise InputError(
                f"{image_file} holds images of {images.shape[1]}x{images.shape[2]} pixels, "
                f"expected {SIDE}x{SIDE}.",
                f"Check that the file belongs to {self.name}.",
            )
        if len(images) != len(labels):
            raise InputError(
                f"{image_file} holds {len(images)} images and {label_file} {len(labels)} labels.",
                "Give two files that belong together.",
            )
        return dataset_from_arrays(
            self.name, images[:, np.newaxis], labels, self.class_names, split=split
        )

    def _find(self, stem: str, split: Split, directory: Path | None, download: bool) -> Path:
        home = directory or default_directory(self.name)
        places = [home, *(home / inside for inside in self.inside)]
        if directory is None and self.installed is not None:
            places.append(self.installed)
        for place in places:
            for name in (stem, f"{stem}.gz", stem.replace("-idx", ".idx")):
                if (place / name).is_file():
                    return place / name
        if download:
            path = home / f"{stem}.gz"
            RemoteFile(f"{self.base_url}{stem}.gz", *self.published[stem]).save(path)
            return path
        looked_in = [home] if directory else [home, *filter(None, [self.installed])]
        raise not_found(self.name, looked_in, [f"{each}[.gz]" for each in STEMS[split]])


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Read an idx file of unsigned bytes, plain or gzip by its name.

    Raises:
        InputError: Not such a file, another number of dimensions, or more or fewer elements
            than its header says.
    """
    wanted = f"an idx file of unsigned bytes with {dimensions} dimension{'s'[: dimensions - 1]}"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dimensions)
            if header[:4] != bytes((0, 0, UNSIGNED_BYTE, dimensions)):
                raise _damaged(path, f"starts with {header[:4].hex(' ') or 'nothing'}", wanted)
            if len(header) < 4 + 4 * dimensions:
                raise _damaged(path, "ends inside its header", wanted)
            shape = struct.unpack(f">{dimensions}I", header[4:])
            expected = math.prod(shape)
            data = _read_up_to(file, expected + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, f"is no whole gzip file ({error})", wanted) from error
    if len(data) != expected:
        amount = f"{len(data)}" if len(data) < expected else "more"
        raise _damaged(path, f"holds {amount} bytes after its header", f"{expected}")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _read_up_to(file: io.BufferedIOBase, size: int) -> bytes:
    """Read in pieces, so that a header that lies cannot ask for all the memory at once."""
    data = bytearray()
    while piece := file.read(min(1 << 20, size - len(data))):
        data += piece
    return bytes(data)


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

FASHION_MNIST = IdxSet(
    name="fashion-mnist",
    class_names=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
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
