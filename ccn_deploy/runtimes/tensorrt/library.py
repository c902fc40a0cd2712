"""TensorRT and TensorRT-RTX: what differs between the two libraries, and their log.

Both have the same Python API for all that this package does: ``Builder``, ``OnnxParser``,
``Runtime`` and what hangs on them. What is not the same stands here and nowhere else.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import MappingProxyType, ModuleType
from typing import Any

from ccn_deploy.errors import unknown
from ccn_deploy.extras import require
from ccn_deploy.targets import RUNTIMES

SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
"""Of a line of the log, worst first; the libraries' own names."""


@dataclass(frozen=True)
class Library:
    """One of the two libraries.

    Attributes:
        name: Of the runtime, and what the manifest calls it.
        title: What its maker calls it.
        module: To import.
        magic: First bytes of every engine that it writes.
        portable: Whether an engine is built for compute capabilities that one names, without a
            GPU. Otherwise it is built on, and for, the GPU that is here.
    """

    name: str
    title: str
    module: str
    magic: bytes
    portable: bool

    @property
    def distribution(self) -> str:
        """Name of the package that is installed."""
        return RUNTIMES[self.name].distribution

    @property
    def extra(self) -> str:
        """Of this package, which brings it."""
        return RUNTIMES[self.name].extra


LIBRARIES: Mapping[str, Library] = MappingProxyType(
    {
        library.name: library
        for library in (
            Library("tensorrt", "TensorRT", "tensorrt", b"ftrt", portable=False),
            Library("tensorrt-rtx", "TensorRT-RTX", "tensorrt_rtx", b"vtrt", portable=True),
        )
    }
)
"""By name, in order of preference."""


def load_library(name: str, purpose: str) -> ModuleType:
    """Import the module of a library.

    Args:
        name: A key of :data:`LIBRARIES`.
        purpose: What needs it, for the error: ``"to build an engine"``.

    Raises:
        UsageError: No such library.
        MissingExtraError: It is not installed.
    """
    if name not in LIBRARIES:
        raise unknown("TensorRT library", name, LIBRARIES)
    library = LIBRARIES[name]
    return require(library.module, library.extra, purpose)


@dataclass
class Log:
    """Lines that a library logged.

    Attributes:
        lines: (severity, text), oldest first; severities are those of :data:`SEVERITIES`.
    """

    lines: list[tuple[str, str]] = field(default_factory=list)

    def at_least(self, severity: str) -> list[str]:
        """Return the text of every line that is as bad as ``severity`` or worse."""
        bad = SEVERITIES[: SEVERITIES.index(severity) + 1]
        return [text for found, text in self.lines if found in bad]


@contextlib.contextmanager
def capture() -> Iterator[Log]:
    """Collect what the libraries log in this thread while the block runs; blocks may nest.

    A line of a thread that captures nothing goes to Python's logger ``ccn_deploy.tensorrt``.
    """
    log = Log()
    stack = _captures()
    stack.append(log)
    try:
        yield log
    finally:
        stack.pop()


@cache
def logger(trt: ModuleType) -> Any:
    """Return the one ``ILogger`` of this process for a library.

    A library keeps the logger that it was given first for as long as the process lives, so all
    users of it share this one, and :func:`capture` says who reads a line.

    Args:
        trt: The module, from :func:`load_library`.
    """

    class Logger(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the binding asks for exactly this call

        def log(self, severity: Any, msg: str) -> None:
            stack = _captures()
            if stack:
                stack[-1].lines.append((severity.name, msg))
            else:
                _PYTHON.log(_LEVELS[severity.name], msg)

    return Logger()


_PYTHON = logging.getLogger("ccn_deploy.tensorrt")
_PYTHON.addHandler(logging.NullHandler())
_LEVELS = dict(
    zip(
        SEVERITIES,
        (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG),
        strict=True,
    )
)
_THREAD = threading.local()


def _captures() -> list[Log]:
    if not hasattr(_THREAD, "captures"):
        _THREAD.captures = []
    return _THREAD.captures  # type: ignore[no-any-return]
