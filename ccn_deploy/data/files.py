"""Files that others wrote: opened only if they are regular, and never read without a bound."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ccn_deploy.errors import InputError, UnreadableImageError


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; links are followed.

    Raises:
        InputError: It is not there, cannot be read, or is a pipe, device, socket or directory.
    """
    try:
        # A pipe without a writer would otherwise block for ever.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _BINARY)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise InputError(
            f"{printable(path)} cannot be opened: {reason}.", "Check the file and who may read it."
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(
            f"{printable(path)} is no regular file.", "Remove it, or put a file in its place."
        )
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | Path, limit: int) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: Of the file.
        limit: Bytes it may have.

    Raises:
        InputError: As for :func:`open_regular`, or the disk fails.
        UnreadableImageError: It is longer.
    """
    with open_regular(path) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise InputError(
                f"{printable(path)} cannot be read: {error.strerror}.", "Get the file again."
            ) from error
    if len(data) > limit:
        raise UnreadableImageError(
            f"{printable(path)} has more than {limit:,} bytes, too many for one image.",
            "Make the image smaller, or remove it.",
        )
    return data


def printable(path: str | Path) -> str:
    """Return a path as it can be printed: bytes that are no UTF-8 are escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def listed(names: Sequence[str], most: int) -> str:
    """Return the first names, for a sentence, and whether there are more."""
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])])


_BINARY = getattr(os, "O_BINARY", 0)  # Windows would translate line ends
