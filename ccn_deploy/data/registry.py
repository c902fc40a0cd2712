"""The data sets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ccn_deploy.data import imagenet, mnist5k
from ccn_deploy.data.cifar10 import CIFAR10
from ccn_deploy.data.dataset import Dataset, Split
from ccn_deploy.data.idx import FASHION_MNIST, MNIST
from ccn_deploy.errors import UsageError, unknown


@dataclass(frozen=True)
class DatasetEntry:
    """A data set that can be loaded by name.

    Attributes:
        name: What users type.
        title: A line for people.
        architecture: The network it is trained on unless told otherwise; a name in
            :data:`ccn_deploy.architectures.ARCHITECTURES`.
        load: Maps split, directory (or None) and whether to download to the data.
    """

    name: str
    title: str
    architecture: str
    load: Callable[[Split, Path | None, bool], Dataset]


def _load_mnist5k(split: Split, directory: Path | None, download: bool) -> Dataset:
    if directory is not None:
        raise UsageError(
            f"mnist5k is embedded and takes no directory, got {directory}.",
            "For the whole of MNIST in that directory use --dataset mnist.",
        )
    return mnist5k.load(split)


DATASETS: dict[str, DatasetEntry] = {
    entry.name: entry
    for entry in (
        DatasetEntry(
            "mnist5k", "5,000 MNIST digits, embedded: 4,000/1,000", "mnist-cnn", _load_mnist5k
        ),
        DatasetEntry("mnist", "MNIST digits: 60,000/10,000", "mnist-cnn", MNIST.load),
        DatasetEntry(
            "fashion-mnist", "Fashion-MNIST: 60,000/10,000", "mnist-cnn", FASHION_MNIST.load
        ),
        DatasetEntry(
            "cifar10", "CIFAR-10, binary version: 50,000/10,000", "vgg11-cifar10", CIFAR10.load
        ),
        DatasetEntry(
            "imagenet", "ImageNet or any tree of class folders", "vgg11-imagenet", imagenet.load
        ),
    )
}


def load_dataset(
    name: str, split: Split, directory: Path | None = None, *, download: bool = False
) -> Dataset:
    """Load one split of a data set.

    Args:
        name: A name in :data:`DATASETS`, case ignored.
        split: ``"train"`` or ``"test"``.
        directory: Where its files are. If None, ``$CCN_DEPLOY_DATA/NAME`` or
            ``~/.cache/ccn-deploy/NAME``, and for ``fashion-mnist`` where Debian's package
            dataset-fashion-mnist puts it.
        download: Fetch missing files into that directory, checksums verified.

    Raises:
        UsageError: No such data set or split; the hint suggests the nearest.
        DatasetNotFoundError: Its files are not there.
        InputError: A file is truncated or not what it should be.
        MissingExtraError: A package it needs is not installed.
        EnvironmentUnfitError: Downloading failed.
        IntegrityError: A file is not the one that was published.
    """
    entry = DATASETS.get(name.lower())
    if entry is None:
        raise unknown("data set", name, DATASETS)
    if split not in get_args(Split):
        raise unknown("split", split, get_args(Split))
    return entry.load(split, Path(directory) if directory is not None else None, download)
