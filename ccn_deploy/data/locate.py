"""Where the files of a data set are looked for, and what to say when they are not there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ccn_deploy.errors import DatasetNotFoundError

VARIABLE = "CCN_DEPLOY_DATA"
"""Environment variable: the directory that holds one directory per data set."""


def default_directory(name: str) -> Path:
    """Return where a data set lives when no directory is given.

    ``$CCN_DEPLOY_DATA/NAME``, or ``~/.cache/ccn-deploy/NAME`` if the variable is not set.

    Raises:
        DatasetNotFoundError: The variable is not set, and the user has no home directory.
    """
    base = os.environ.get(VARIABLE)
    if base:
        return Path(base) / name
    try:
        return Path.home() / ".cache" / "ccn-deploy" / name
    except RuntimeError as error:
        raise DatasetNotFoundError(
            f"The data set {name!r} has no place of its own: this user has no home directory.",
            f"Give the directory of its files with --data-dir, or set {VARIABLE}.",
        ) from error


def not_found(
    name: str, looked_in: Iterable[Path], expected: Iterable[str], *, note: str = ""
) -> DatasetNotFoundError:
    """Build the error for a data set that is not there.

    Args:
        name: Of the data set.
        looked_in: Directories, the first being where its files should be put.
        expected: File names that would have done.
        note: Anything else that was seen and explains it.
    """
    places = [str(path) for path in looked_in]
    return DatasetNotFoundError(
        f"The data set {name!r} is not in {' or '.join(places)}: expected "
        f"{', '.join(expected)}.{' ' + note if note else ''}",
        f"Put the files there, give their directory with --data-dir or set {VARIABLE}, "
        "or use --dataset mnist5k, which needs no files.",
    )
