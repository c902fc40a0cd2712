"""Options that several commands share, so that they are spelled and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ccn_deploy.targets import DEPLOYED_PRECISIONS, RUNTIMES

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
DatasetOption = Annotated[
    str | None,
    typer.Option(
        "--dataset", help="Data set to measure on.", show_default="the one it was trained on"
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Directory with the files of the data set."),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="CPU threads.", show_default="the runtime's choice"),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of everything that is random.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")
]
