"""``imagenet``: a tree of folders, one per class, read as images are asked for."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.data.arrays import as_float
from ccn_deploy.data.dataset import Dataset, Images, Split
from ccn_deploy.data.locate import default_directory, not_found
from ccn_deploy.errors import InputError, UsageError
from ccn_deploy.extras import require

RESIZED = 256
CROP = 224
SUFFIXES = {".jpeg", ".jpg", ".png"}
FOLDERS: dict[Split, str] = {"train": "train", "test": "val"}


def load(split: Split, directory: Path | None, download: bool) -> Dataset:
    """Load ``DIR/train`` or, as the test split, ``DIR/val``; a folder in it is a class.

    Labels number the folder names in sorted order, which for WordNet identifiers is the usual
    order of classes. An image is resized (bilinear) so that its shorter side has 256 pixels, and
    the middle 224x224 are kept.

    The digest covers names and sizes of the files, not their bytes: 140 GB would take too long.

    Raises:
        DatasetNotFoundError: No such folder, or no class folders with images in it.
        InputError: The classes of the two splits differ; later, a file that is no image.
        MissingExtraError: Pillow is not installed.
        UsageError: ``download`` is true; ImageNet must be fetched by hand.
    """
    if download:
        raise UsageError(
            "imagenet cannot be downloaded: its licence wants each user to agree.",
            "Get it from its home page, unpack it, and give --data-dir.",
        )
    require("PIL.Image", "train", "to read the images of imagenet")
    home = directory or default_directory("imagenet")
    root = home / FOLDERS[split]
    classes = _classes(root)
    files = [file for name in classes for file in _images(root / name)]
    if not files:
        raise not_found("imagenet", [home], [f"{FOLDERS[split]}/CLASS/*.JPEG"], note=_note(root))
    _check_same_classes(home)
    number = {name: label for label, name in enumerate(classes)}
    labels = np.array([number[file.parent.name] for file in files], dtype=np.int64)
    return Dataset(
        name="imagenet",
        split=split,
        class_names=tuple(classes),
        input_shape=(3, CROP, CROP),
        labels=labels,
        fetch=partial(_read, files),  # not a lambda: it is sent to other processes
        digest=_digest(root, files),
    )


def _classes(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _check_same_classes(home: Path) -> None:
    """Refuse two splits whose folders would be numbered differently."""
    train, test = (set(_classes(home / folder)) for folder in FOLDERS.values())
    if train and test and train != test:
        one = min(train ^ test)
        raise InputError(
            f"{home}: the class {one} is in {'train' if one in train else 'val'} only; "
            "labels would not mean the same in both.",
            "Unpack both splits completely, with the same folder for each class.",
        )


def _note(root: Path) -> str:
    if root.is_dir() and _images(root):
        return "Its images are not sorted into a folder per class."
    return ""


def _digest(root: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root).as_posix()} {file.stat().st_size}\n".encode())
    return digest.hexdigest()


def _read(files: list[Path], indices: NDArray[np.int64]) -> Images:
    batch = np.empty((len(indices), 3, CROP, CROP), dtype=np.uint8)
    for row, index in enumerate(indices):
        batch[row] = _crop(files[index])
    return as_float(batch)


def _crop(path: Path) -> NDArray[Any]:
    """Return one image: uint8 [3, 224, 224]."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path} cannot be read as an image: {error}.", "Get the file again, or remove it."
        ) from error
    scale = RESIZED / min(image.size)
    width, height = (max(RESIZED, round(side * scale)) for side in image.size)
    left, top = (width - CROP) // 2, (height - CROP) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + CROP, top + CROP))).transpose(2, 0, 1)
