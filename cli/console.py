"""Where output goes: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ccn_deploy.cli.text import plain
from ccn_deploy.errors import CcnDeployError

out = Console(highlight=False)
"""Results."""

err = Console(stderr=True, highlight=False)
"""Progress, hints and errors."""


def print_error(error: CcnDeployError) -> None:
    """Print what happened, why, and what to do next, in one or two lines."""
    what, hint = ("\n".join(map(plain, text.splitlines())) for text in (error.what, error.hint))
    err.print(f"[bold red]error:[/] {what}", soft_wrap=True)
    if hint:
        err.print(hint, soft_wrap=True)


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document to stdout, and nothing else."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def progress() -> Progress:
    """Return a progress display on stderr: what, how far, time taken, time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=err,
    )
