"""Options that several commands share, so that they are spelled and explained once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ccn_deploy.targets import DEPLOYED_PRECISIONS, RUNTIMES

if TYPE_CHECKING:
    from ccn_deploy.data import Dataset

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
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads.", show_default="the runtime's choice"),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of everything that is random.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
]


_DATA_OPTIONS: dict[str, tuple[str, bool | str, str]] = {
    "resize": (
        "MODE",
        "shortest",
        "Of images in folders: shortest (aspect kept, as small as covers the network's size), "
        "shortest:256 (of the shorter side), stretch, none.",
    ),
    "crop": ("MODE", "center", "After resizing: center, none."),
    "interpolation": (
        "NAME",
        "bilinear",
        "Of resizing: nearest, bilinear, bicubic, lanczos, box.",
    ),
    "layout": (
        "NAME",
        "told by the number of channels",
        "Of images in an .npz file: nchw, nhwc.",
    ),
    "npz_images": ("KEY", True, "The array of images in an .npz file that has several."),
    "npz_labels": ("KEY", True, "Likewise, of labels."),
}
"""How images are made: by option, what stands for its value, its default and its help."""


def takes_data_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command with a parameter ``data: DataOptions`` take the options that make it up."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        from ccn_deploy.data import DataOptions

        names = {name: name for name in _DATA_OPTIONS}
        names |= {"npz_images": "images_key", "npz_labels": "labels_key"}
        data = DataOptions(**{field: given.pop(name) for name, field in names.items()})
        command(data=data, **given)

    hints = get_type_hints(command, localns={"DataOptions": object}, include_extras=True)
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name == "data":
            parameters += map(_data_parameter, _DATA_OPTIONS)
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
    # What typer reads of a command.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _data_parameter(name: str) -> inspect.Parameter:
    metavar, default, explained = _DATA_OPTIONS[name]
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        metavar=metavar,
        help=explained,
        show_default=default,
        rich_help_panel=_DATA,
    )
    annotation = Annotated[str | None, option]
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=annotation)


def tell_notes(*datasets: Dataset) -> None:
    """Print to stderr, each once, what a user should know of the data."""
    from ccn_deploy.cli.console import err

    for note in dict.fromkeys(note for dataset in datasets for note in dataset.notes):
        err.print(note, soft_wrap=True, markup=False)
