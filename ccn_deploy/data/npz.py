"""An .npz file of images and labels: a user's own data in one file.

Headers are read first: dtype, shape and size of each array are known, and checked, before any of
it is decompressed. Objects, which NumPy stores as pickles that run code when read, are refused.
"""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.data.arrays import check_pixel_type, dataset_from_arrays
from ccn_deploy.data.dataset import Dataset, Split
from ccn_deploy.data.files import listed, open_regular, printable
from ccn_deploy.data.options import DEFAULT, FOLDER_OPTIONS, DataOptions, ModelInput
from ccn_deploy.errors import InputError, UsageError, one_line

MAX_MEMBERS = 256
"""Arrays in one file."""

MAX_BYTES = 8 << 30
"""Of one array, decompressed; half of the machine's memory if that is less."""

MAX_CLASSES = 1 << 20
"""Classes that labels or names may count."""

CLASS_NAMES = "class_names"

_IMAGES = ("images", "x", "data", "imgs")
_LABELS = ("labels", "y", "targets", "target", "label")
_SPLITS: Mapping[Split, tuple[str, ...]] = {"train": ("train",), "test": ("test", "val", "valid")}


@dataclass(frozen=True)
class Header:
    """What an array says of itself.

    Attributes:
        key: Its name in the file.
        shape: As stored.
        dtype: As stored.
    """

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __str__(self) -> str:
        return f"{self.key} ({self.dtype} {list(self.shape)})"


@dataclass(frozen=True)
class Keys:
    """Which arrays are a split.

    Attributes:
        images: Key of its images.
        labels: Key of its labels.
        all_labels: Keys of the labels of both splits, by which numbered classes are counted.
        whole: Whether the file is not divided into splits.
    """

    images: str
    labels: str
    all_labels: tuple[str, ...]
    whole: bool


def load_npz(
    path: Path,
    split: Split,
    options: DataOptions = DEFAULT,
    like: ModelInput | None = None,
) -> Dataset:
    """Load an .npz file, as ``numpy.savez(path, images=..., labels=..., class_names=...)`` writes.

    Images are uint8, or floats in [0, 1]: [N, C, H, W], [N, H, W, C], or [N, H, W] for grey. Labels
    are integers [N] or [N, 1]. ``class_names``, strings, is optional: without it labels are the
    network's numbers, and ``numbered`` is true. A file may have both splits: ``x_train``,
    ``y_train``, ``x_test``, ``y_test``, or ``train_images`` and so on, ``val`` standing in for
    ``test``.

    Args:
        path: Of the file.
        split: Which; in a file that is not divided, every image is in both, and ``whole`` is true.
        options: Layout and keys, where they cannot be told.
        like: What the network takes, by which the layout is told.

    Raises:
        InputError: The file is no .npz file, damaged, too large when decompressed, holds objects in
            an array that is needed, or images or labels are not as above.
        UsageError: Which arrays are meant, or their layout, cannot be told; or an option that
            means nothing for an .npz file.
    """
    name = path.name
    options.refuse(FOLDER_OPTIONS, name, "folders of images")
    with open_regular(path) as file, _archive(file, path) as archive:
        headers = _headers(archive, path)
        keys = _keys(headers, split, options, path)
        image_header, label_header = headers[keys.images], headers[keys.labels]
        _check_headers(image_header, label_header, path)
        layout = _layout(image_header, options, like, path)
        names = _class_names(archive, headers, path)
        counted = [_labels(_read(archive, headers[key], path)) for key in keys.all_labels]
        labels = counted[keys.all_labels.index(keys.labels)]
        images = _read(archive, image_header, path)
    numbered = names is None
    if names is None:
        names = _numbers(counted, path)
    dataset = dataset_from_arrays(name, _as_nchw(images, layout), labels, names, split=split)
    notes = dataset.notes
    described = {"classes": "numbered"} if numbered else {}
    if keys.whole:
        described["images"] = "the same for both splits"
        notes += (f"{name}: Not divided into train and test: both splits are all of its images.",)
    if numbered:
        notes += (f"{name}: No {CLASS_NAMES}: labels are taken as the network's numbers.",)
    return replace(dataset, described=described, notes=notes, whole=keys.whole, numbered=numbered)


@contextlib.contextmanager
def _archive(file: BinaryIO, path: Path) -> Iterator[zipfile.ZipFile]:
    """Open the archive; what its parser raises becomes an error that names the file."""
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except UsageError:
        raise
    except MemoryError as error:
        raise InputError(
            f"{printable(path)} does not fit into memory.", "Give fewer images."
        ) from error
    except Exception as error:  # zipfile, zlib and NumPy raise many kinds for a damaged file
        raise InputError(
            f"{printable(path)} is no whole .npz file ({one_line(error)}).",
            "Write it with numpy.savez or numpy.savez_compressed.",
        ) from error


def _headers(archive: zipfile.ZipFile, path: Path) -> dict[str, Header]:
    """Read the header of each array, and none of its data."""
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise InputError(
            f"{printable(path)} holds {len(members):,} arrays; {MAX_MEMBERS} are the most.",
            "Put all images into one array: numpy.stack(images)",
        )
    headers: dict[str, Header] = {}
    for member in members:
        key = member.filename.removesuffix(".npy")
        if key in headers:
            raise InputError(f"{printable(path)} has two arrays named {key!r}.", "Write it again.")
        if member.filename.endswith(".npy"):
            headers[key] = _header(archive, member, key)
    return headers


def _header(archive: zipfile.ZipFile, member: zipfile.ZipInfo, key: str) -> Header:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        else:  # 3.0 has field names beyond Latin-1, which no array of images has
            raise ValueError(f"{key} is written in version {version[0]}.{version[1]} of NPY")
        stored = member.file_size - file.tell()
    expected = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and (min(shape, default=0) < 0 or stored != expected):
        raise ValueError(f"{key} has {stored:,} bytes, its header says {expected:,}")
    return Header(key, shape, dtype)


def _read(archive: zipfile.ZipFile, header: Header, path: Path) -> NDArray[Any]:
    """Decompress one array that is not too large."""
    if header.dtype.hasobject:
        raise InputError(
            f"{printable(path)}: {header.key} is an array of objects, which is never read because "
            "reading it may run code.",
            "Save numbers, or strings: numpy.array(values, dtype=str)",
        )
    size, most = math.prod(header.shape) * header.dtype.itemsize, _most()
    if size > most:
        raise InputError(
            f"{printable(path)}: {header.key} has {size / 1e9:.1f} GB when decompressed; "
            f"{most / 1e9:.1f} are the most here.",
            "Give fewer images, uint8 instead of float32, or a directory of class folders.",
        )
    with archive.open(f"{header.key}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _most() -> int:
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not everywhere
        return MAX_BYTES
    return min(MAX_BYTES, memory // 2)


def _keys(headers: Mapping[str, Header], split: Split, options: DataOptions, path: Path) -> Keys:
    """Find the arrays of a split: by the options, by usual names, or as the only ones there."""
    images = _named(headers, options.images_key, "--npz-images", path)
    labels = _named(headers, options.labels_key, "--npz-labels", path)
    found: dict[Split, tuple[str | None, str | None]] = {
        which: (_of_split(headers, _IMAGES, words), _of_split(headers, _LABELS, words))
        for which, words in _SPLITS.items()
    }
    divided = images is None and any(pair[0] for pair in found.values())
    if divided:
        images, labels = found[split][0], labels or found[split][1]
        if images is None:
            raise UsageError(
                f"{printable(path)} has no images for the {split} split, among "
                f"{_shown(headers.values())}.",
                f"Add x_{split} and y_{split}, or name the arrays with --npz-images KEY "
                "--npz-labels KEY.",
            )
    images = images or _only(headers, _IMAGES, lambda header: len(header.shape) in (3, 4))
    count = headers[images].shape[:1] if images else None
    labels = labels or _only(
        headers,
        _LABELS,
        lambda header: header.shape == count and header.dtype.kind in "iu",
    )
    if images is None or labels is None:
        option = "--npz-images KEY" if images is None else "--npz-labels KEY"
        what = "images" if images is None else "labels"
        raise UsageError(
            f"{printable(path)} has no array that is plainly the {what}, among "
            f"{_shown(headers.values())}.",
            f"Name it: {option}",
        )
    both = [
        key
        for _, key in found.values()
        if divided and key and headers[key].dtype.kind in "iu" and math.prod(headers[key].shape)
    ]
    return Keys(images, labels, tuple(dict.fromkeys([labels, *both])), not divided)


def _named(headers: Mapping[str, Header], key: str | None, option: str, path: Path) -> str | None:
    if key is not None and key not in headers:
        raise UsageError(
            f"{printable(path)} has no array {key!r}.",
            f"Give one of these to {option}: {_shown(headers.values())}.",
        )
    return key


def _of_split(
    headers: Mapping[str, Header], kinds: tuple[str, ...], words: tuple[str, ...]
) -> str | None:
    """Return the key that names one of the kinds and one of the words of a split."""
    lower = {key.lower(): key for key in headers}
    for word in words:
        for kind in kinds:
            for key in (f"{kind}_{word}", f"{word}_{kind}"):
                if key in lower:
                    return lower[key]
    return None


def _only(headers: Mapping[str, Header], kinds: tuple[str, ...], fits: Any) -> str | None:
    """Return the one key of a usual name, else the one array that looks like it, else None."""
    usual = [key for key in headers if key.lower() in kinds]
    if usual:
        return usual[0] if len(usual) == 1 else None
    fitting = [key for key, header in headers.items() if fits(header)]
    return fitting[0] if len(fitting) == 1 else None


def _shown(headers: Iterable[Header]) -> str:
    texts = [str(header) for header in headers]
    return listed(texts, 8) or "nothing"


def _check_headers(images: Header, labels: Header, path: Path) -> None:
    """Refuse, before anything is decompressed, what cannot be images and labels."""
    for header in (images, labels):
        if header.dtype.hasobject:
            continue  # refused when it is read
        if not header.shape or header.shape[0] == 0:
            raise InputError(
                f"{printable(path)}: {header.key} is empty.", "Give at least one image."
            )
    if len(images.shape) not in (3, 4) and not images.dtype.hasobject:
        raise InputError(
            f"{printable(path)}: {images} are no images.",
            "Give [N, C, H, W], [N, H, W, C], or [N, H, W] for grey.",
        )
    if not images.dtype.hasobject:
        check_pixel_type(images.dtype, f"{printable(path)}: {images.key}")
    if images.shape[:1] != labels.shape[:1] and not labels.dtype.hasobject:
        raise InputError(
            f"{printable(path)}: {images} and {labels} do not belong together.",
            "Give one label per image, in the same order.",
        )
    one_hot = len(labels.shape) == 2 and labels.shape[1] > 1
    if one_hot or (labels.dtype.kind not in "iu" and not labels.dtype.hasobject):
        raise InputError(
            f"{printable(path)}: labels must be integers [N], not {labels}"
            f"{', which looks one-hot encoded' if one_hot else ''}.",
            "Give the index of the class: labels.argmax(axis=1)"
            if one_hot
            else "Give the index of the class, and names in class_names.",
        )


def _layout(header: Header, options: DataOptions, like: ModelInput | None, path: Path) -> str:
    """Return "nchw", "nhwc" or, for grey images without that axis, "nhw"."""
    if header.dtype.hasobject or len(header.shape) == 3:
        return "nhw"
    if options.layout is not None:
        return options.layout
    _, first, middle, last = header.shape
    fits = {"nchw": (first, middle, last), "nhwc": (last, first, middle)}
    if like is not None:
        found = [layout for layout, shape in fits.items() if shape == like.input_shape]
        if not found:
            found = [key for key, shape in fits.items() if shape[0] == like.input_shape[0]]
        if not found:
            raise InputError(
                f"{printable(path)}: no axis of {header} has the {like.input_shape[0]} channels "
                "of the network.",
                "Convert the images to as many channels as the network takes.",
            )
    else:
        found = [layout for layout, shape in fits.items() if shape[0] in (1, 3)]
    if len(found) != 1:
        raise UsageError(
            f"{printable(path)}: which axis of {header} has the channels cannot be told.",
            "Say so: --layout nchw or --layout nhwc",
        )
    return found[0]


def _as_nchw(images: NDArray[Any], layout: str) -> NDArray[Any]:
    if layout == "nhw":
        return images[:, np.newaxis]
    return images if layout == "nchw" else images.transpose(0, 3, 1, 2)


def _labels(values: NDArray[Any]) -> NDArray[Any]:
    return values.reshape(len(values)) if values.ndim == 2 and values.shape[1] == 1 else values


def _class_names(
    archive: zipfile.ZipFile, headers: Mapping[str, Header], path: Path
) -> list[str] | None:
    header = headers.get(CLASS_NAMES)
    if header is None:
        return None
    if header.dtype.kind != "U" and not header.dtype.hasobject:
        raise InputError(
            f"{printable(path)}: {header} must be strings.",
            "Save numpy.array(names, dtype=str), in order of label.",
        )
    if len(header.shape) != 1 and not header.dtype.hasobject:
        raise InputError(
            f"{printable(path)}: {header} must be [classes].", "Give one row of names."
        )
    if header.shape and header.shape[0] > MAX_CLASSES:
        raise InputError(
            f"{printable(path)}: {header} are more than {MAX_CLASSES:,} names.",
            "Give one name per class.",
        )
    return [str(name) for name in _read(archive, header, path)]


def _numbers(labels: Iterable[NDArray[Any]], path: Path) -> list[str]:
    """Return "0", "1"... to the highest label of both splits."""
    highest = max(int(each.max()) for each in labels)
    if highest >= MAX_CLASSES:
        raise InputError(
            f"{printable(path)}: the label {highest} is no number of a class.",
            f"Count classes from 0; {MAX_CLASSES:,} are the most.",
        )
    return [str(number) for number in range(highest + 1)]
