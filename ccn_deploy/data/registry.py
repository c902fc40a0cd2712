"""Data sets by name or path."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ccn_deploy.data import imagenet, mnist5k
from ccn_deploy.data.cifar10 import CIFAR10
from ccn_deploy.data.dataset import Dataset, Split
from ccn_deploy.data.files import printable
from ccn_deploy.data.folders import load_folders
from ccn_deploy.data.idx import FASHION_MNIST, MNIST
from ccn_deploy.data.matching import fitted
from ccn_deploy.data.npz import load_npz
from ccn_deploy.data.options import DEFAULT, FOLDER_OPTIONS, NPZ_OPTIONS, DataOptions, ModelInput
from ccn_deploy.errors import DatasetNotFoundError, InputError, UsageError, unknown


@dataclass(frozen=True)
class DatasetEntry:
    """A data set that can be loaded by name.

    Attributes:
        name: What users type.
        title: A line for people.
        architecture: The network it is trained on unless told otherwise; a name in
            :data:`ccn_deploy.architectures.ARCHITECTURES`.
        load: Maps split, directory (or None) and whether to download to the data.
        folders: Whether it is a directory of class folders, whose images have any size.
    """

    name: str
    title: str
    architecture: str
    load: Callable[[Split, Path | None, bool], Dataset]
    folders: bool = False


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
            "imagenet", "ImageNet: train and val", "vgg11-imagenet", imagenet.load, folders=True
        ),
    )
}


def load_dataset(
    name: str | Path,
    split: Split,
    directory: Path | None = None,
    *,
    download: bool = False,
    options: DataOptions = DEFAULT,
    like: ModelInput | None = None,
) -> Dataset:
    """Load one split of a data set.

    Args:
        name: A name in :data:`DATASETS`, case ignored; or the path of a directory of class
            folders or of an .npz file, which for one that has the name of a data set is written
            ``./NAME``.
        split: ``"train"`` or ``"test"``.
        directory: Where the files of a named data set are. If None, ``$CCN_DEPLOY_DATA/NAME`` or
            ``~/.cache/ccn-deploy/NAME``, and for ``fashion-mnist`` where Debian's package
            dataset-fashion-mnist puts it.
        download: Fetch missing files into that directory, checksums verified.
        options: How images are made of a directory's or an .npz file's.
        like: What the network takes: the size and channels that images of a directory get, the
            channels by which the layout of an .npz file is told, and, whatever the data, the shape
            they must have and, if it has class names, the classes they are matched with.

    Raises:
        UsageError: No such data set or split; the hint suggests the nearest. An option that means
            nothing for the data, or images or classes that do not fit ``like``.
        DatasetNotFoundError: Its files are not there.
        InputError: A file is truncated or not what it should be.
        MissingExtraError: A package it needs is not installed.
        EnvironmentUnfitError: Downloading failed.
        IntegrityError: A file is not the one that was published.
    """
    if split not in get_args(Split):
        raise unknown("split", split, get_args(Split))
    entry = DATASETS.get(str(name).lower()) if isinstance(name, str) else None
    if entry is None:
        if directory is not None or download:
            _refuse_place(name, "--download" if directory is None else "--data-dir")
        dataset = _from_path(name, split, options, like)
    else:
        home = Path(directory) if directory is not None else None
        if entry.folders:
            dataset = imagenet.load(split, home, download, options, like)
        else:
            options.refuse((*FOLDER_OPTIONS, *NPZ_OPTIONS), entry.name, "data of your own")
            dataset = entry.load(split, home, download)
    return dataset if like is None else fitted(dataset, like)


def _from_path(
    name: str | Path, split: Split, options: DataOptions, like: ModelInput | None
) -> Dataset:
    path = _path(name)
    load = load_folders if path.is_dir() else load_npz
    return load(path, split, options, like)


def _refuse_place(name: str | Path, option: str) -> None:
    path = _path(name)  # or the error that a misspelt name is
    raise UsageError(
        f"{option} is for data sets that have a name, and {printable(path)} is a path.",
        f"Leave out {option}.",
    )


def _path(name: str | Path) -> Path:
    """Return the directory or .npz file that a name is.

    Raises:
        UsageError: It is neither, nor looks as if it were meant to be.
        DatasetNotFoundError: It is not there.
    """
    if name == "":  # which would be the working directory
        raise unknown("data set", name, DATASETS)
    path = Path(name)
    try:
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # too long, a loop of links, or a NUL
        why = (isinstance(error, OSError) and error.strerror) or str(error)
        raise InputError(
            f"{printable(path)[:200]} cannot be opened: {why}.", "Check the path."
        ) from error
    if is_directory or (exists and path.suffix.lower() == ".npz"):
        return path
    if exists:
        raise UsageError(
            f"{printable(path)} is neither a directory nor an .npz file.",
            "Give a directory of class folders, or a file that numpy.savez writes.",
        )
    if isinstance(name, Path) or path.suffix.lower() == ".npz" or os.sep in name or "/" in name:
        raise DatasetNotFoundError(
            f"There is no {printable(path)}.",
            "Give a directory of class folders, an .npz file, or the name of a data set: "
            f"{', '.join(sorted(DATASETS))}.",
        )
    guess = unknown("data set", name, DATASETS)
    raise UsageError(guess.what, f"{guess.hint} Or give a directory or an .npz file.")
