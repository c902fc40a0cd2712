"""The images that a bundle is measured on."""

from __future__ import annotations

from pathlib import Path

from ccn_deploy.bundle import Bundle
from ccn_deploy.data import Dataset, load_dataset
from ccn_deploy.errors import UsageError


def evaluation_data(
    bundle: Bundle, name: str | None = None, directory: Path | None = None
) -> Dataset:
    """Return the test split that a bundle is measured on.

    Args:
        bundle: What is measured.
        name: Of the data set; by default the one it was trained on.
        directory: Where the files of the data set are.

    Raises:
        UsageError: No such data set, or the bundle does not say what it was trained on.
        DatasetNotFoundError: Its files are not there.
    """
    name = name or bundle.card.training.get("dataset")
    if not name:
        raise UsageError(
            "The bundle does not say what data it was trained on.", "Name the data set."
        )
    return load_dataset(str(name), "test", directory)


def check_fits(bundle: Bundle, dataset: Dataset) -> None:
    """Refuse data that a bundle's network was not made for.

    Raises:
        UsageError: Images of another shape, or another number of classes.
    """
    card = bundle.card
    if dataset.input_shape != card.input_shape:
        raise UsageError(
            f"Images of {dataset.name} have shape {list(dataset.input_shape)}; the network takes "
            f"{list(card.input_shape)}.",
            "Choose the data set that the network was trained on.",
        )
    if len(dataset.class_names) != card.classes:
        raise UsageError(
            f"{dataset.name} has {len(dataset.class_names)} classes; the network tells "
            f"{card.classes} apart.",
            "Choose the data set that the network was trained on.",
        )
