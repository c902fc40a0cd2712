"""Files that somebody else wrote, opened within bounds."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ccn_deploy.errors import CcnDeployError, EnvironmentUnfitError, UsageError


@contextlib.contextmanager
def open_regular(
    path: Path, what: str, hint: str, *, refusal: type[CcnDeployError] = UsageError
) -> Iterator[BinaryIO]:
    """Open a regular file; a pipe or a device, which could be read for ever, is refused.

    Args:
        path: The file.
        what: Begins the error: ``"The certificate"``.
        hint: What to do where there is no such file.
        refusal: Kind of the error where there is none, or something else.

    Raises:
        CcnDeployError: ``refusal``.
        EnvironmentUnfitError: It cannot be read.
    """
    try:
        descriptor = os.open(
            path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        )
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise refusal(f"{what} {path} is no regular file.", hint)
            yield file
    except (FileNotFoundError, NotADirectoryError) as error:
        raise refusal(f"{what} {path} is not there.", hint) from error
    except IsADirectoryError as error:
        raise refusal(f"{what} {path} is a directory.", hint) from error
    except OSError as error:
        raise EnvironmentUnfitError(
            f"{what} {path} could not be read: {error.strerror or error}.", "Check its permissions."
        ) from error
