"""Directories of class folders: one reader for ``imagenet`` and for a user's own.

```
DIR/CLASS/IMAGE          the same images for both splits
DIR/train/CLASS/IMAGE    and DIR/test (or testing, val, validation, valid)
```

Files are listed and hashed when the data set is loaded, and decoded when their images are asked
for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from ccn_deploy.data.dataset import Dataset, Split
from ccn_deploy.data.decode import SUFFIXES, Geometry, shape_of, stack
from ccn_deploy.data.files import listed, open_regular, printable
from ccn_deploy.data.options import DEFAULT, NPZ_OPTIONS, DataOptions, ModelInput
from ccn_deploy.errors import DatasetNotFoundError, InputError
from ccn_deploy.extras import require

SPLITS: Mapping[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "test": ("test", "testing", "val", "validation", "valid"),
}
"""Names of the folders of a split, case ignored; the first that is there is taken."""

SYSTEM = frozenset(
    {"__macosx", "@eadir", "thumbs.db", "ehthumbs.db", "desktop.ini", "lost+found"}
    | {"$recycle.bin", "system volume information"}
)
"""Names, in lower case, that systems leave in directories; so are all that begin with a dot."""

_OTHER: Mapping[Split, Split] = {"train": "test", "test": "train"}


@dataclass
class Skipped:
    """What lies in the directory and is no image of a class."""

    system: Counter[str] = field(default_factory=Counter)
    endings: Counter[str] = field(default_factory=Counter)
    nested: int = 0
    loose: int = 0

    def notes(self) -> Iterator[str]:
        """Yield a sentence for each kind that was met."""
        if self.system:
            names = _listed(self.system)
            yield f"{self.system.total()} hidden or system entries were skipped: {names}."
        if self.endings:
            names = _listed(self.endings)
            yield f"{self.endings.total()} files that are no images were skipped: {names}."
        if self.nested:
            yield f"{self.nested} folders inside class folders were not entered."
        if self.loose:
            yield f"{self.loose} images that are in no class folder were skipped."


def load_folders(
    root: Path,
    split: Split,
    options: DataOptions = DEFAULT,
    like: ModelInput | None = None,
    *,
    name: str | None = None,
    folders: Mapping[Split, str] | None = None,
    sorted_by: Callable[[], Mapping[str, str] | None] | None = None,
) -> Dataset:
    """Load a directory of class folders.

    Labels number the folders in sorted order; folders that are all named by numbers, in order of
    these. Hidden and system entries, files with other endings than images have, and folders in
    class folders are skipped, and ``notes`` counts them. A class without images keeps its name in
    the test split, with a note; in the training split it is an error.

    Args:
        root: The directory.
        split: Taken from the folder of that name, if all folders of ``root`` are named as splits
            are; else every image is in both splits, and ``whole`` is true.
        options: How images are made.
        like: Shape of the images; without it the first image decides. If it has class names, with
            which the caller will match these, the two splits may have different ones.
        name: What results call it; that of ``root`` with a slash if None, which no data set has
            that is loaded by name.
        folders: Of the two splits, for data whose layout is known.
        sorted_by: Called if the split has no class folders: returns the class of each image by its
            name without ending, or None.

    Raises:
        DatasetNotFoundError: No such directory or split, or no image in it.
        InputError: A link that leads nowhere, a file or folder that cannot be read, a name that is
            no UTF-8, a training class without images, splits of different classes, an image
            that ``sorted_by`` does not name; later, a file that is no image or has not the size
            needed.
        UsageError: An option that means nothing for folders.
        MissingExtraError: Pillow is not installed.
    """
    require("PIL.Image", "train", "to read images")
    root = Path(os.path.normpath(root.absolute()))  # links keep their names
    name = name or f"{root.name}/"
    _check_name(root)
    options.refuse(NPZ_OPTIONS, name, "an .npz file")
    skipped = Skipped()
    place: Path
    other: Path | None
    notes: list[str]
    if folders:
        place, other, notes = root / folders[split], root / folders[_OTHER[split]], []
    else:
        place, other, notes = _place(root, split)
    classes = _classes(place, skipped)
    found = [_images(place / each, skipped) for each in classes]
    if not classes and sorted_by is not None and (classed := sorted_by()) is not None:
        skipped = Skipped()
        classes, found = _sorted(place, classed, skipped)
    files = [path for paths in found for path in paths]
    if not files:
        raise DatasetNotFoundError(*_nothing(place, skipped))
    empty = [each for each, paths in zip(classes, found, strict=True) if not paths]
    notes += [*_empty(empty, place, split), *skipped.notes()]
    if other is not None and not (like and like.class_names):
        _check_same_classes(place, classes, other)
    shape = like.input_shape if like else None
    if shape is None:
        shape = shape_of(files[0])
        notes.append(f"Images are made {_shown(shape, options)}, as the first one is.")
    geometry = Geometry.of(options, shape)
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in found])
    whole = place == root
    described = geometry.described() | ({"images": "the same for both splits"} if whole else {})
    return Dataset(
        name=name,
        split=split,
        class_names=tuple(classes),
        input_shape=geometry.shape,
        labels=labels.astype(np.int64),
        fetch=partial(stack, files, geometry),  # not a lambda: it is sent to other processes
        digest=_digest(found, classes, described),
        described=described,
        notes=tuple(f"{name}: {note}" for note in notes),
        whole=whole,
    )


def _check_same_classes(place: Path, classes: list[str], other: Path) -> None:
    """Refuse two splits whose folders would be numbered differently."""
    others = _classes(other, Skipped()) if other.is_dir() else []
    if others and classes != others:
        one = min(set(classes) ^ set(others))
        here, there = (place, other) if one in classes else (other, place)
        raise InputError(
            f"{printable(here.parent)}: the class {one} is in {here.name} and not in "
            f"{there.name}; labels would not mean the same in both.",
            "Unpack both splits completely, with the same folder for each class.",
        )


def _place(root: Path, split: Split) -> tuple[Path, Path | None, list[str]]:
    """Return the folder of a split, that of the other one, and notes."""
    folders = _classes(root, Skipped())
    by_split = {
        which: [f for known in names for f in folders if f.lower() == known]
        for which, names in SPLITS.items()
    }
    if not folders or sum(map(len, by_split.values())) < len(folders):
        return root, None, ["Not divided into train and test: both splits are all of its images."]
    if not by_split[split]:
        raise DatasetNotFoundError(
            f"{printable(root)} has {' and '.join(folders)} and no {SPLITS[split][0]} folder.",
            f"Add one, or give {printable(root / folders[0])} to use its images for both splits.",
        )
    chosen, *left = by_split[split]
    notes = [f"Images are from {chosen}; {' and '.join(left)} not used."] if left else []
    other = by_split[_OTHER[split]]
    return root / chosen, root / other[0] if other else None, notes


def _classes(place: Path, skipped: Skipped) -> list[str]:
    """Return the names of the class folders in order of their labels."""
    names = []
    for entry in _entries(place, skipped):
        if _is_folder(entry):
            if any(ord(c) < 32 or ord(c) == 127 for c in entry.name):
                raise InputError(
                    f"{entry.path!a}: the name of a class has control characters.",
                    "Rename the folder.",
                )
            names.append(entry.name)
        elif _is_image(entry):
            skipped.loose += 1
        else:
            skipped.endings[_ending(entry)] += 1
    numbers = all(name.isascii() and name.isdigit() and len(name) < 10 for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numbers else None)


def _images(place: Path, skipped: Skipped) -> list[str]:
    paths = []
    for entry in _entries(place, skipped):
        if _is_folder(entry):
            skipped.nested += 1
        elif _is_image(entry):
            paths.append(entry.path)
        else:
            skipped.endings[_ending(entry)] += 1
    return paths


def _sorted(
    place: Path, classed: Mapping[str, str], skipped: Skipped
) -> tuple[list[str], list[list[str]]]:
    """Return the classes in order, and the images of each, of a folder that has all of them."""
    found: dict[str, list[str]] = {name: [] for name in sorted(set(classed.values()))}
    for path in _images(place, skipped):
        name = classed.get(Path(path).stem)
        if name is None:
            raise InputError(
                f"{printable(path)} is in no class: the list of the images does not have it.",
                "Remove it, or sort the images into a folder per class.",
            )
        found[name].append(path)
    return list(found), list(found.values())


def _entries(place: Path, skipped: Skipped) -> Iterator[os.DirEntry[str]]:
    """Yield what is in a directory, sorted by name, without hidden and system entries."""
    try:
        with os.scandir(place) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
    except FileNotFoundError as error:
        raise DatasetNotFoundError(
            f"There is no directory {printable(place)}.",
            "Give a directory that has a folder of images for each class.",
        ) from error
    except OSError as error:
        raise InputError(
            f"{printable(place)} cannot be listed: {error.strerror}.",
            "Give a directory that you may read.",
        ) from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in SYSTEM:
            kind = "._*" if entry.name.startswith("._") else printable(entry.name)
            skipped.system[kind] += 1
            continue
        _check_name(entry.path)
        yield entry


def _check_name(path: str | Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{printable(path)}: the name is no UTF-8, so that it cannot be written down.",
            "Rename it.",
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        if entry.is_dir():
            return True
        broken = entry.is_symlink() and not Path(entry.path).exists()
    except OSError as error:
        raise InputError(
            f"{printable(entry.path)} cannot be followed: {error.strerror}.", "Remove the link."
        ) from error
    if broken:
        raise InputError(
            f"{printable(entry.path)} is a link that leads nowhere.",
            "Remove it, or restore what it leads to.",
        )
    return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Whether a file has an ending of images; what has one and is no file is an error."""
    if os.path.splitext(entry.name)[1].lower() not in SUFFIXES:  # noqa: PTH122 -- 3x faster
        return False
    if not entry.is_file():
        raise InputError(
            f"{printable(entry.path)} is no regular file.", "Remove it, or put an image there."
        )
    return True


def _ending(entry: os.DirEntry[str]) -> str:
    return Path(entry.name).suffix.lower() or "no ending"


def _empty(empty: list[str], place: Path, split: Split) -> Iterator[str]:
    if not empty:
        return
    if split == "train":
        raise InputError(
            f"{printable(place / empty[0])} has no images, so that nothing could be learned of "
            "its class.",
            "Put images in it, or remove the folder.",
        )
    have = "class has" if len(empty) == 1 else "classes have"
    yield f"{len(empty)} {have} no images: {listed(empty, 3)}."


def _nothing(place: Path, skipped: Skipped) -> tuple[str, str]:
    what = f"{printable(place)} has no image in a class folder"
    if skipped.loose:
        return (
            f"{what}: its images are not sorted into a folder per class.",
            "Make a folder for each class and move the images into them.",
        )
    seen = " ".join(skipped.notes())
    return f"{what}.{' ' + seen if seen else ''}", (
        f"Expected CLASS/IMAGE in it, an image ending in {', '.join(sorted(SUFFIXES))}."
    )


def _digest(found: list[list[str]], classes: list[str], described: dict[str, str]) -> str:
    """Return the SHA-256 of how images are made, and of class, name, size and content of each."""
    digest = hashlib.sha256(json.dumps([described, classes], sort_keys=True).encode())
    for each, paths in zip(classes, found, strict=True):
        for path in paths:  # not in threads: for small files they take longer
            size, content = _hashed(path)
            name = f"/{each}/{path.rpartition(os.sep)[2]}"
            digest.update(f"\n{json.dumps([name, size, content])}".encode())
    return digest.hexdigest()


def _hashed(path: str) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            size += len(block)
            digest.update(block)
    return size, digest.hexdigest()


def _shown(shape: tuple[int, int, int], options: DataOptions) -> str:
    channels, *size = shape
    height, width = options.size or size
    return f"{width}x{height}, {'grey' if channels == 1 else 'colour'}"


def _listed(counts: Counter[str]) -> str:
    """Return the commonest names with how often each occurs."""
    shown = [f"{name} ({count})" if count > 1 else name for name, count in counts.most_common()]
    return listed(shown, 6)
