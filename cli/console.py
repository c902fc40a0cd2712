"""Where output goes: results to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
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
    err.print(f"[bold red]error:[/] {plain(error.what)}", soft_wrap=True)
    if error.hint:
        err.print(plain(error.hint), soft_wrap=True)


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document to stdout, and nothing else."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")


def progress() -> Progress:
    """Return a progress display on stderr: what, how far, time taken, time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=err,
    )


INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


@contextlib.contextmanager
def resumable(where: str) -> Iterator[None]:
    """Let Ctrl-C end a command, which says where the same command goes on.

    Raises:
        typer.Exit: It was pressed.
    """
    try:
        yield
    except KeyboardInterrupt:
        err.print(f"Interrupted. The same command goes on {where}.")
        raise typer.Exit(INTERRUPTED) from None


class Bar:
    """A bar on stderr that is fed a measurement's progress; none before something is measured."""

    def __init__(self) -> None:
        self._bar = progress()
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._bar.stop()

    @property
    def started(self) -> bool:
        """Whether anything was measured."""
        return self._task is not None

    def __call__(self, what: str, done: float, total: float) -> None:
        """Show what is being done, and how far all of it is."""
        if self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(what)
        self._bar.update(self._task, description=what, completed=done, total=total)

    def say(self, text: str) -> None:
        """Print a line that stays above the bar."""
        self._bar.console.print(text, soft_wrap=True)
