"""Options that several commands share, so that they are spelled and explained once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

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


def _dataset(default: str) -> Any:
    return typer.Option(
        "--dataset",
        metavar="NAME|DIR|FILE.npz",
        help="Data set to use: a name, a directory of class folders, or an .npz file.",
        show_default=default,
        rich_help_panel=_DATA,
    )


DatasetOption = Annotated[str | None, _dataset("the one it was trained on")]
DatasetOrNoiseOption = Annotated[str | None, _dataset("noise")]
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
MaxDropOption = Annotated[
    str,
    typer.Option(
        "--max-drop",
        metavar="SHARE",
        help="By how much accuracy may be below the reference's, in every row: 1% or 0.01.",
    ),
]
MAX_DROP = "1%"
"""What it is if it is not given."""
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
]


@dataclass(frozen=True)
class OptionGroup:
    """Options of text that make one parameter of a command.

    Attributes:
        heading: Above them in ``--help``.
        options: By name: what stands for the value, the default that is shown, and the help.
        aliases: By name, another spelling.
    """

    heading: str
    options: Mapping[str, tuple[str | None, str | bool, str]]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def parameters(self) -> list[inspect.Parameter]:
        """Return them as typer reads them; what is not given is None."""
        return [self._parameter(name) for name in self.options]

    def _parameter(self, name: str) -> inspect.Parameter:
        metavar, default, explained = self.options[name]
        spellings = [f"--{name.replace('_', '-')}"]
        if name in self.aliases:
            spellings.append(self.aliases[name])
        option = typer.Option(
            *spellings,
            metavar=metavar,
            help=explained,
            show_default=default,
            rich_help_panel=self.heading,
        )
        annotation = Annotated[str | None, option]
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, kind, default=None, annotation=annotation)


DATA = OptionGroup(
    _DATA,
    {
        "resize": ("MODE", "shortest", "Of images in folders: shortest (aspect kept, as small as "
            "covers the network's size), shortest:256 (of the shorter side), stretch, none."),
        "crop": ("MODE", "center", "After resizing: center, none."),
        "interpolation": ("NAME", "bilinear", "Of resizing: nearest, bilinear, bicubic, lanczos, "
            "box."),
        "layout": ("NAME", "told by the number of channels", "Of images in an .npz file: nchw, "
            "nhwc."),
        "npz_images": ("KEY", True, "The array of images in an .npz file that has several."),
        "npz_labels": ("KEY", True, "The array of labels in one that has several."),
    },
)  # fmt: skip
"""How images are made."""


def takes_data_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command with a parameter ``data: DataOptions`` take the options that make it up."""

    def data_options(**given: Any) -> DataOptions:
        from ccn_deploy.data import DataOptions

        names = {"npz_images": "images_key", "npz_labels": "labels_key"}
        return DataOptions(**{names.get(name, name): value for name, value in given.items()})

    return takes("data", DATA, data_options)(command)


def takes(
    target: str, group: OptionGroup, make: Callable[..., Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a command take options in place of one parameter.

    Args:
        target: Name of the parameter.
        group: The options.
        make: Makes the parameter's value of theirs, by name.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**given: Any) -> None:
            made = make(**{name: given.pop(name) for name in group.options})
            command(**{target: made}, **given)

        signature = inspect.signature(command)
        unknown = {"DataOptions": object, "SourceOptions": object}
        hints = get_type_hints(command, localns=unknown, include_extras=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            if parameter.name == target:
                parameters += group.parameters()
            else:
                annotation = hints.get(parameter.name, parameter.annotation)
                parameters.append(parameter.replace(annotation=annotation))
        # What typer reads of a command.
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def tell_notes(*datasets: Dataset) -> None:
    """Print to stderr, each once, what a user should know of the data."""
    from ccn_deploy.cli.console import err

    for note in dict.fromkeys(note for dataset in datasets for note in dataset.notes):
        err.print(note, soft_wrap=True, markup=False)
