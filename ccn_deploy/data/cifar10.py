"""``cifar10``: the binary version, never the Python one, whose pickles run code when read.

Each of six files holds 10,000 records of 3,073 bytes: the label, then 32x32 red, green and blue
pixels.
"""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.data.arrays import dataset_from_arrays
from ccn_deploy.data.dataset import Dataset, Split
from ccn_deploy.data.download import RemoteFile
from ccn_deploy.data.locate import default_directory, not_found
from ccn_deploy.errors import InputError
from ccn_deploy.storage import write_atomic

SHAPE = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32
RECORDS = 10_000
FILES: dict[Split, tuple[str, ...]] = {
    "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    "test": ("test_batch.bin",),
}
CLASS_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
INSIDE = "cifar-10-batches-bin"
PICKLED = "cifar-10-batches-py"


@dataclass(frozen=True)
class Cifar10:
    """CIFAR-10 and where its archive is published."""

    archive: RemoteFile

    def load(self, split: Split, directory: Path | None, download: bool) -> Dataset:
        """Load one split.

        Args:
            split: Which.
            directory: Where its files are, or ``cifar-10-batches-bin`` below it; the default
                place if None.
            download: Fetch and unpack the archive (162 MiB) into ``directory`` if files are
                missing.

        Raises:
            DatasetNotFoundError: A file is missing and ``download`` is false.
            InputError: A file of another size, or a label beyond 9.
            EnvironmentUnfitError: Downloading failed.
            IntegrityError: Something else was downloaded.
        """
        home = directory or default_directory("cifar10")
        place = _place(home, split)
        if place is None and download:
            place = home / INSIDE
            self._unpack(place)
        if place is None:
            raise not_found("cifar10", [home], FILES[split], note=_note(home))
        records = np.concatenate([_read(place / name) for name in FILES[split]])
        pixels = records[:, 1:].reshape(-1, *SHAPE)
        return dataset_from_arrays("cifar10", pixels, records[:, 0], CLASS_NAMES, split=split)

    def _unpack(self, place: Path) -> None:
        """Download the archive and write the six files in it; no path of its own is used."""
        with tarfile.open(fileobj=io.BytesIO(self.archive.read()), mode="r:gz") as archive:
            for name in (*FILES["train"], *FILES["test"]):
                member = archive.extractfile(f"{INSIDE}/{name}")
                assert member is not None  # the checksum says what is inside
                write_atomic(place / name, member.read())


def _place(home: Path, split: Split) -> Path | None:
    """Return the directory that has every file of the split."""
    for place in (home, home / INSIDE):
        if all((place / name).is_file() for name in FILES[split]):
            return place
    return None


def _note(home: Path) -> str:
    """Say so if the Python version is what lies there."""
    if any((place / "data_batch_1").is_file() for place in (home, home / PICKLED)):
        return (
            "The Python version is there; it is made of pickles, which run code when read: "
            "use the binary version, cifar-10-binary.tar.gz."
        )
    return ""


def _read(path: Path) -> NDArray[np.uint8]:
    """Return the records of one file: uint8 [10000, 3073]."""
    data = np.fromfile(path, dtype=np.uint8)
    if data.size != RECORDS * RECORD:
        raise InputError(
            f"{path} has {data.size} bytes; expected {RECORDS * RECORD} "
            f"({RECORDS} records of {RECORD}).",
            "The file is truncated or another one: get cifar-10-binary.tar.gz again.",
        )
    return data.reshape(RECORDS, RECORD)


CIFAR10 = Cifar10(
    RemoteFile(
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        170_052_171,
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    )
)
