"""Classes of a data set and of a network, matched by name: :func:`match_classes`."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ccn_deploy.data.dataset import Dataset, Labels, check_labels
from ccn_deploy.data.files import listed
from ccn_deploy.data.options import ModelInput
from ccn_deploy.errors import UsageError

ANOTHER_ORDER = "by name, another order"
"""What a data set's description says where it had all classes of a network, numbered otherwise."""

SHOWN = 3
"""Unknown names that an error lists."""


def fitted(dataset: Dataset, like: ModelInput) -> Dataset:
    """Return a data set as a network needs it.

    Args:
        dataset: Any.
        like: The network's input and classes; classes are matched if it has names.

    Raises:
        UsageError: Images of another shape, or classes that :func:`match_classes` refuses.
    """
    if dataset.input_shape != like.input_shape:
        raise UsageError(
            f"Images of {dataset.name} have shape {list(dataset.input_shape)}; the network takes "
            f"{list(like.input_shape)}.",
            "Choose data like those that the network was trained on, or resize them.",
        )
    return match_classes(dataset, like.class_names) if like.class_names else dataset


def match_classes(dataset: Dataset, class_names: Sequence[str]) -> Dataset:
    """Return a data set whose labels are numbered as a network numbers its classes.

    Classes are matched by name: the same names in another order, and a subset of them, are
    renumbered, and ``described`` says so. Labels that are bare numbers keep them, which is said
    in ``described`` as well.

    Args:
        dataset: Any.
        class_names: Of the network, one per logit, in order.

    Returns:
        The data set itself if its classes are these already; else one with another digest, the
        same images and, as ``class_names``, those of the network.

    Raises:
        UsageError: A class that the network does not have, one whose name it has twice, or a bare
            number beyond its last.
    """
    names = tuple(class_names)
    if dataset.numbered:
        return _numbered(dataset, names)
    if dataset.class_names == names:
        return dataset
    theirs, ours = ([_normal(name) for name in each] for each in (names, dataset.class_names))
    _check_known(dataset, ours, theirs)
    _check_unique(dataset, ours, theirs)
    at = {name: number for number, name in enumerate(theirs)}
    number = np.array([at[name] for name in ours], dtype=np.int64)
    whole = len(ours) == len(theirs)
    how = ANOTHER_ORDER if whole else f"by name, {len(ours)} of {len(theirs)}"
    if ours == theirs:
        how = "by name"
    return _renumbered(dataset, names, number[dataset.labels], how)


def _numbered(dataset: Dataset, names: tuple[str, ...]) -> Dataset:
    highest = int(dataset.labels.max(initial=-1))
    if highest >= len(names):
        raise UsageError(
            f"{dataset.name} has the label {highest}; the network tells {len(names)} classes "
            f"apart, 0 to {len(names) - 1}.",
            "Check that labels count from 0, and that the data are the network's.",
        )
    if dataset.class_names == names:
        return dataset
    return dataclasses.replace(dataset, class_names=names)


def _check_known(dataset: Dataset, ours: list[str], theirs: list[str]) -> None:
    known = set(theirs)
    unknown = [name for name in ours if name not in known]
    if not unknown:
        return
    some = ", ".join(repr(name) for name in unknown[:SHOWN])
    more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
    near = difflib.get_close_matches(unknown[0], theirs, n=1, cutoff=0.5)
    if theirs == [str(number) for number in range(len(theirs))]:
        hint = (
            "The network's classes are only numbered: export it with their names, or name "
            "the classes of the data 0, 1, 2..."
        )
    elif near:
        hint = f"Did you mean {near[0]!r}? Name the classes as the network does."
    else:
        hint = f"The network's {len(theirs)} classes: {listed(theirs, 2 * SHOWN)}."
    raise UsageError(
        f"{dataset.name} has {len(unknown)} of {len(ours)} classes that the network does not "
        f"have: {some}{more}.",
        hint,
    )


def _check_unique(dataset: Dataset, ours: list[str], theirs: list[str]) -> None:
    """Refuse a name that is there twice: nothing says which is which."""
    for whose, names in ((dataset.name, ours), ("the network", theirs)):
        counts = Counter(names)
        twice = next((name for name in ours if counts[name] > 1), None)
        if twice is not None:
            raise UsageError(
                f"Two classes of {whose} are named {twice!r}, so that classes cannot be matched "
                "by name.",
                "Give each class a name of its own.",
            )


def _renumbered(dataset: Dataset, names: tuple[str, ...], labels: Labels, how: str) -> Dataset:
    """Return the data set with other labels, and a digest that tells it from the first."""
    digest = hashlib.sha256(f"{dataset.digest}\n".encode())
    digest.update(labels.astype("<i8").tobytes())
    return dataclasses.replace(
        dataset,
        class_names=names,
        labels=check_labels(labels, len(names), dataset.name),
        digest=digest.hexdigest(),
        described={**dataset.described, "classes": how},
    )


def _normal(name: str) -> str:
    """Return a name with accents composed: macOS writes them apart."""
    return unicodedata.normalize("NFC", name)
