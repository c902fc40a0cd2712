"""``imagenet``: ``train`` and ``val``, each with a folder per class, cropped as is usual."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ccn_deploy.data.dataset import Dataset, Split
from ccn_deploy.data.folders import load_folders
from ccn_deploy.data.locate import default_directory, not_found
from ccn_deploy.data.options import DEFAULT, DataOptions, ModelInput
from ccn_deploy.errors import DatasetNotFoundError, UsageError

RESIZED = 256
CROP = 224
FOLDERS: dict[Split, str] = {"train": "train", "test": "val"}


def load(
    split: Split,
    directory: Path | None,
    download: bool,
    options: DataOptions = DEFAULT,
    like: ModelInput | None = None,
) -> Dataset:
    """Load ``DIR/train`` or, as the test split, ``DIR/val``; a folder in it is a class.

    Unless options say otherwise, an image is resized so that its shorter side has 256 pixels, and
    the middle 224x224 are kept; for a network that takes another size, both in proportion.

    Raises:
        DatasetNotFoundError: No such folder, or no class folders with images in it.
        InputError: As for :func:`ccn_deploy.data.folders.load_folders`.
        MissingExtraError: Pillow is not installed.
        UsageError: ``download`` is true; ImageNet must be fetched by hand.
    """
    if download:
        raise UsageError(
            "imagenet cannot be downloaded: its licence wants each user to agree.",
            "Get it from its home page, unpack it, and give --data-dir.",
        )
    home = directory or default_directory("imagenet")
    like = like or ModelInput((3, CROP, CROP))
    if options.resize is None:
        shorter = round(max(options.size or like.input_shape[1:]) * RESIZED / CROP)
        options = dataclasses.replace(options, resize=f"shortest:{shorter}")
    try:
        return load_folders(home, split, options, like, name="imagenet", folders=FOLDERS)
    except DatasetNotFoundError as error:
        expected = [f"{FOLDERS[split]}/CLASS/*.JPEG"]
        raise not_found("imagenet", [home], expected, note=error.what) from error
