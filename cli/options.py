"""Options that several commands share, so that they are spelled and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ccn_deploy.targets import DEPLOYED_PRECISIONS, RUNTIMES

if TYPE_CHECKING:
    from ccn_deploy.data import DataOptions, Dataset

BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Directory written by `ccn-deploy export`.")
]
RuntimeOption = Annotated[
    str,
    typer.Option(
        "--runtime",
        help=f"What runs the model: {', '.join(RUNTIMES)}.",
    ),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        "--precision",
        help=f"Precision of the deployed graph or engine: {', '.join(DEPLOYED_PRECISIONS)}.",
    ),
]
_DATA = "Data"
"""Heading of the options below in --help."""

DatasetOption = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        metavar="NAME|DIR|FILE.npz",
        help="Data set to use: a name, a directory of class folders, or an .npz file.",
        show_default="the one it was trained on",
        rich_help_panel=_DATA,
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Directory with the files of a data set that has a name.",
        rich_help_panel=_DATA,
    ),
]
ResizeOption = Annotated[
    str | None,
    typer.Option(
        "--resize",
        metavar="MODE",
        help="Of images in folders: shortest (aspect kept, as small as covers the network's "
        "size), shortest:256 (of the shorter side), stretch, none.",
        show_default="shortest",
        rich_help_panel=_DATA,
    ),
]
CropOption = Annotated[
    str | None,
    typer.Option(
        "--crop",
        metavar="MODE",
        help="After resizing: center, none.",
        show_default="center",
        rich_help_panel=_DATA,
    ),
]
InterpolationOption = Annotated[
    str | None,
    typer.Option(
        "--interpolation",
        metavar="NAME",
        help="Of resizing: nearest, bilinear, bicubic, lanczos, box.",
        show_default="bilinear",
        rich_help_panel=_DATA,
    ),
]
LayoutOption = Annotated[
    str | None,
    typer.Option(
        "--layout",
        metavar="NAME",
        help="Of images in an .npz file: nchw, nhwc.",
        show_default="told by the number of channels",
        rich_help_panel=_DATA,
    ),
]
NpzImagesOption = Annotated[
    str | None,
    typer.Option(
        "--npz-images",
        metavar="KEY",
        help="The array of images in an .npz file that has several.",
        rich_help_panel=_DATA,
    ),
]
NpzLabelsOption = Annotated[
    str | None,
    typer.Option("--npz-labels", metavar="KEY", help="Likewise, of labels.", rich_help_panel=_DATA),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads.", show_default="the runtime's choice"),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of everything that is random.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
]


def data_options(
    *,
    resize: str | None,
    crop: str | None,
    interpolation: str | None,
    layout: str | None,
    npz_images: str | None,
    npz_labels: str | None,
) -> DataOptions:
    """Return what the options of a command say of data.

    Raises:
        UsageError: One of them means nothing.
    """
    from ccn_deploy.data import DataOptions

    return DataOptions(
        resize=resize,
        crop=crop,
        interpolation=interpolation,
        layout=layout,
        images_key=npz_images,
        labels_key=npz_labels,
    )


def tell_notes(*datasets: Dataset) -> None:
    """Print to stderr, each once, what a user should know of the data."""
    from ccn_deploy.cli.console import err

    for note in dict.fromkeys(note for dataset in datasets for note in dataset.notes):
        err.print(note, soft_wrap=True, markup=False)
