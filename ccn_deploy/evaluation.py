"""The images that a bundle is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ccn_deploy.bundle import MANIFEST, Bundle
from ccn_deploy.data import DATASETS, DataOptions, Dataset, ModelInput, load_dataset
from ccn_deploy.data.matching import ANOTHER_ORDER, fitted
from ccn_deploy.data.options import DEFAULT
from ccn_deploy.errors import IntegrityError, UsageError


def evaluation_data(
    bundle: Bundle,
    name: str | Path | None = None,
    directory: Path | None = None,
    options: DataOptions = DEFAULT,
) -> Dataset:
    """Return the test split that a bundle is measured on, labels numbered as its classes.

    Args:
        bundle: What is measured.
        name: Name of the data set, or path of a directory of class folders or an .npz file; by
            default the data set that it was trained on.
        directory: Where the files of a named data set are.
        options: How images are made of a directory's or an .npz file's.

    Raises:
        UsageError: No such data set, images or classes that do not fit the bundle, or it does not
            say what it was trained on, or that was data of one's own.
        DatasetNotFoundError: Its files are not there.
        InputError: Files that cannot be read.
        IntegrityError: The bundle numbers the classes of the data set that it was trained on
            otherwise than these data do.
    """
    given = name or trained_on(bundle.card.training)
    data = load_dataset(given, "test", directory, options=options, like=_like(bundle))
    if not name and data.described.get("classes") == ANOTHER_ORDER:
        raise IntegrityError(
            f"{MANIFEST} names the classes in another order than {data.name}, on which it says "
            "that the network was trained.",
            "Do not use this bundle: export the network again, or find out who changed it.",
        )
    return data


def trained_on(training: Mapping[str, Any]) -> str:
    """Return the name of the data set that a network was trained on.

    Args:
        training: What a run or a bundle says of its training.

    Raises:
        UsageError: It says nothing, or the data have no name by which they could be loaded.
    """
    name = str(training.get("dataset") or "")
    if not name:
        raise UsageError(
            "Nothing says what data the network was trained on.",
            "Give data to use: --dataset NAME, DIR or FILE.npz",
        )
    if name.lower() not in DATASETS:
        raise UsageError(
            f"The network was trained on {name!r}, which is no data set that has a name here.",
            "Give the data: --dataset DIR or --dataset FILE.npz",
        )
    return name


def check_fits(bundle: Bundle, dataset: Dataset) -> None:
    """Refuse data that a bundle's network was not made for, or whose labels mean other classes.

    Raises:
        UsageError: Images of another shape, or classes that differ from the network's.
    """
    names = bundle.card.class_names
    matched = fitted(dataset, _like(bundle))
    if not dataset.numbered and matched.class_names != dataset.class_names:
        raise UsageError(
            f"The classes of {dataset.name} are {len(dataset.class_names)}, numbered otherwise "
            f"than the network's {len(names)}.",
            "Renumber them: ccn_deploy.data.match_classes(dataset, class_names)",
        )


def _like(bundle: Bundle) -> ModelInput:
    return ModelInput(bundle.card.input_shape, bundle.card.class_names)
