"""Which class each validation image of ImageNet has, where ``val`` is one folder as published.

Two files say so: that of the challenge on Kaggle names the class (WordNet ID) of each image;
that of the ILSVRC2012 development kit numbers the classes as its ``meta.mat`` does.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from ccn_deploy.data.files import open_regular, printable
from ccn_deploy.errors import InputError
from ccn_deploy.extras import require

SOLUTION = "LOC_val_solution.csv"
"""Kaggle's: ``ImageId,PredictionString``, the string being class and boxes."""

TRUTH = "ILSVRC2012_validation_ground_truth.txt"
"""The kit's: the number of a class a line, the first for ``ILSVRC2012_val_00000001.JPEG``."""

META = "meta.mat"
"""The kit's, beside it: which class has which number."""

INSIDE = ("", "data", "ILSVRC2012_devkit_t12/data")
"""Where these are looked for, below a directory."""

MAX_BYTES = 1 << 23
"""Of one of these files; the largest published one has 2 MB."""


def classes_of_images(home: Path) -> dict[str, str] | None:
    """Return the class of each validation image by its name without ending.

    Args:
        home: The data set's directory.

    Returns:
        None if no file says it.

    Raises:
        InputError: A file that is not what its name says.
        MissingExtraError: SciPy, which reads ``meta.mat``, is not installed.
    """
    for inside in INSIDE:
        place = home / inside
        if (place / SOLUTION).is_file():
            return _solution(place / SOLUTION)
        if (place / TRUTH).is_file() and (place / META).is_file():
            return _numbered(place / TRUTH, _numbers(place / META))
    return None


def _solution(path: Path) -> dict[str, str]:
    found = {}
    rows = csv.reader(io.StringIO(_text(path)))
    if next(rows, []) != ["ImageId", "PredictionString"]:
        raise _damaged(path, "ImageId,PredictionString in its first line")
    for image, *prediction in rows:
        wnid = " ".join(prediction).split(" ")[0]
        if not re.fullmatch(r"n\d{8}", wnid):
            raise _damaged(path, f"a class such as n01440764 for {printable(image)}")
        found[image] = wnid
    return found


def _numbered(path: Path, wnids: dict[int, str]) -> dict[str, str]:
    found = {}
    for number, line in enumerate(_text(path).split(), start=1):
        if not (line.isascii() and line.isdigit() and int(line) in wnids):
            raise _damaged(path, f"the number of a class of {META} in line {number}")
        found[f"ILSVRC2012_val_{number:08d}"] = wnids[int(line)]
    return found


def _numbers(path: Path) -> dict[int, str]:
    """Return the class of each number."""
    require("scipy.io", "train", "to read the development kit of ImageNet")
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(_bytes(path)), squeeze_me=True)["synsets"]
        pairs = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        return {int(number): str(wnid) for number, wnid in pairs}
    except Exception as error:  # its parser raises whatever a damaged file makes of it
        raise _damaged(path, "synsets with ILSVRC2012_ID and WNID") from error


def _text(path: Path) -> str:
    return _bytes(path).decode("utf-8", "replace")


def _bytes(path: Path) -> bytes:
    with open_regular(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise _damaged(path, f"{MAX_BYTES:,} bytes at most")
    return data


def _damaged(path: Path, expected: str) -> InputError:
    return InputError(
        f"{printable(path)} is not the file that was published: expected {expected}.",
        "Get the file again, or sort the images of val into a folder per class.",
    )
