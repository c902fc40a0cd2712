"""``imagenet``: ``train`` and ``val``, each with a folder per class, cropped as is usual.

``val`` may also be the one folder that is published, with a file that says which class each image
has (:mod:`ccn_deploy.data.ground_truth`).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

from ccn_deploy.data.dataset import Dataset, Split
from ccn_deploy.data.folders import load_folders
from ccn_deploy.data.ground_truth import SOLUTION, TRUTH, classes_of_images
from ccn_deploy.data.locate import default_directory, not_found
from ccn_deploy.data.options import DEFAULT, DataOptions, ModelInput
from ccn_deploy.errors import DatasetNotFoundError, UsageError

RESIZED = 256
CROP = 224
FOLDERS: dict[Split, str] = {"train": "train", "test": "val"}
INSIDE = "ILSVRC/Data/CLS-LOC"
"""Where the archive that Kaggle distributes has them."""


def load(
    split: Split,
    directory: Path | None,
    download: bool,
    options: DataOptions = DEFAULT,
    like: ModelInput | None = None,
) -> Dataset:
    """Load ``DIR/train`` or, as the test split, ``DIR/val``; a folder in it is a class.

    Both may be in ``DIR/ILSVRC/Data/CLS-LOC``. If ``val`` has no folders, a file in ``DIR`` says
    which class its images have.

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
    root = home if (home / FOLDERS[split]).is_dir() else home / INSIDE
    classed = partial(classes_of_images, home)
    try:
        return load_folders(
            root if root.is_dir() else home,
            split,
            options,
            like,
            name="imagenet",
            folders=FOLDERS,
            sorted_by=classed if split == "test" else None,
        )
    except DatasetNotFoundError as error:
        expected = [f"{FOLDERS[split]}/CLASS/*.JPEG"]
        if split == "test":
            expected.append(f"or val/*.JPEG with {SOLUTION}, or {TRUTH} and meta.mat")
        raise not_found("imagenet", [home], expected, note=error.what) from error
