"""The errors a user can meet, each with an exit code.

Every error says what happened, why, and what to do next. The command line prints the
message in one or two lines, without a traceback, and exits with :attr:`CcnDeployError.exit_code`:

====  ==========================================================================
code  meaning
====  ==========================================================================
0     pass
1     a gate failed (parity, robustness, a check of an export, a diverged training)
2     usage or configuration
3     environment: a runtime, device, driver, package or disk that is missing or unfit
4     inconclusive: the evidence is too thin to pass or to fail
5     integrity: a digest does not match what was written
====  ==========================================================================

``CcnDeployError``
    * ``UsageError`` (2)
        * ``InputError`` -- images or labels outside their contract
            * ``UnreadableImageError`` -- an image file that is damaged, none, or too large
        * ``DatasetNotFoundError``
        * ``NotABundleError``, ``NotARunError``
        * ``NoGradientError`` -- a network with an op that no gradient graph can be made of
        * ``GraphError`` -- an ONNX graph that this package does not take or cannot compute
    * ``EnvironmentUnfitError`` (3)
        * ``MissingExtraError`` -- an optional dependency is not installed
        * ``RuntimeUnavailableError`` -- the runtime, device or precision asked for is not here
        * ``EngineUnfitError`` -- an engine built for another library, version, system or GPU
        * ``EngineBuildError`` -- TensorRT refused a graph or could not build it
        * ``StorageError`` -- a disk that is full or not writable
    * ``GateError`` (1)
        * ``LoweringError`` -- an exported graph is not what it must be
        * ``TrainingDivergedError``
    * ``IntegrityError`` (5)
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import TypeVar

T = TypeVar("T")


class ExitCode(IntEnum):
    """Exit codes of every command."""

    PASS = 0
    GATE_FAILED = 1
    USAGE = 2
    ENVIRONMENT = 3
    INCONCLUSIVE = 4
    INTEGRITY = 5


class CcnDeployError(Exception):
    """Base of every error this package raises on purpose.

    Args:
        what: What happened and why, one sentence.
        hint: What to do next, one sentence; printed on a line of its own.
    """

    exit_code: ExitCode = ExitCode.GATE_FAILED

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what, hint)
        self.what = _one_line(what)
        self.hint = _one_line(hint)

    def __str__(self) -> str:
        return f"{self.what}\n{self.hint}" if self.hint else self.what


def _one_line(text: str) -> str:
    """Return text with line breaks and controls escaped: names in it are other people's."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class UsageError(CcnDeployError):
    """A wrong argument, option or configuration."""

    exit_code = ExitCode.USAGE


class InputError(UsageError):
    """Images or labels that break their contract (shape, dtype, range, finiteness)."""


class UnreadableImageError(InputError):
    """An image file that is damaged, no image, or too large to decode: the bytes are to blame."""


class DatasetNotFoundError(UsageError):
    """A data set whose files are not where they were looked for."""


class NotABundleError(UsageError):
    """A path that holds no bundle."""


class NotARunError(UsageError):
    """A path that holds no training run, or an unfinished one."""


class NoGradientError(UsageError):
    """A network of which no gradient graph can be made; the message names the op and its node."""


class GraphError(UsageError):
    """An ONNX graph that this package does not take; names the node where there is one."""


class EnvironmentUnfitError(CcnDeployError):
    """This machine lacks something that the command needs."""

    exit_code = ExitCode.ENVIRONMENT


class MissingExtraError(EnvironmentUnfitError):
    """An optional dependency is not installed; the hint names the extra."""


class RuntimeUnavailableError(EnvironmentUnfitError):
    """The runtime, device or precision asked for cannot be had here. Nothing falls back."""


class EngineUnfitError(RuntimeUnavailableError):
    """An engine that this machine cannot run: another library, version, system or GPU."""


class EngineBuildError(EnvironmentUnfitError):
    """TensorRT refused a graph or could not build an engine; the message has its log."""


class StorageError(EnvironmentUnfitError):
    """A file could not be written; nothing half-written was left."""


class GateError(CcnDeployError):
    """A check failed."""

    exit_code = ExitCode.GATE_FAILED


class LoweringError(GateError):
    """An exported graph is not the graph it must be."""


class TrainingDivergedError(GateError):
    """The training loss stopped being a number."""


class IntegrityError(CcnDeployError):
    """A file is not the file whose digest was recorded."""

    exit_code = ExitCode.INTEGRITY


def unknown(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """Build the error for a name that is not among ``choices``, suggesting the nearest."""
    known = sorted(choices)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    return UsageError(f"Unknown {kind} {name!r}.", f"{guess}Known: {', '.join(known)}.")


def named(kind: str, name: str, choices: Mapping[str, T]) -> T:
    """Return what has a name.

    Raises:
        UsageError: Nothing has it; the hint suggests the nearest.
    """
    if name not in choices:
        raise unknown(kind, name, choices)
    return choices[name]


def one_line(error: BaseException) -> str:
    """Return 300 characters of a library's message on one line; if it has none, its kind."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the kind of an error that somebody else's code raised, and its text's first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."
