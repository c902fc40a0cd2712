"""What TensorRT's log says: which lines to keep, and what it means when no engine came out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ccn_deploy.errors import EngineBuildError
from ccn_deploy.runtimes.tensorrt.library import Library

LINES = 4
"""Lines of the log that an error shows."""


class Line(NamedTuple):
    """One message, which may have several lines.

    Attributes:
        severity: ``F``, ``E``, ``W``, ``I`` or ``V``, from internal errors to chatter.
        text: The message.
    """

    severity: str
    text: str


_HEAD = re.compile(r"^\[[^\]]+\] \[TRT[^\]]*\] \[([FEWIV])\] ", re.MULTILINE)


def read_log(text: str) -> list[Line]:
    """Split what the libraries' own logger printed into messages."""
    _, *parts = _HEAD.split(text)
    return [Line(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]


def worth_keeping(log: Sequence[Line]) -> list[str]:
    """Return warnings and errors, each once, without what differs from build to build."""
    return _telling(log, "FEW")


def refusal(kind: Library, answer: Mapping[str, Any], log: Sequence[Line]) -> EngineBuildError:
    """Return the error for an answer without an engine: the node or the cause, and what to do.

    Args:
        kind: Which library it was.
        answer: Of the worker; see :data:`ccn_deploy.exporters.tensorrt.worker.Answer`.
        log: What the library said.
    """
    lines = _telling(log, "FE")[:LINES]
    shown = f" ({' | '.join(lines)})" if lines else ""
    text = " ".join([answer["problem"], *(line.text for line in log)])
    if _NO_MEMORY.search(text):
        return EngineBuildError(
            f"{kind.title} built no engine: memory ran out{shown}.",
            "Free memory, choose a smaller largest --batch, or use a larger machine.",
        )
    if answer["stage"] in ("import", "start"):
        return EngineBuildError(
            f"{kind.title} cannot start: {_clean(answer['problem'])}{shown}.",
            "It needs a driver that fits its release; see: ccn-deploy doctor",
        )
    if answer["nodes"]:
        return EngineBuildError(
            f"{kind.title} refuses {'; '.join(map(_node, answer['nodes']))}",
            "Choose another precision or release of it; the graph still runs on ONNX Runtime.",
        )
    for pattern, cause, hint in _CAUSES:
        if re.search(pattern, text, re.IGNORECASE):
            return EngineBuildError(f"{kind.title} built no engine: {cause}{shown}.", hint)
    return EngineBuildError(
        f"{kind.title} built no engine: {_clean(answer['problem'])}{shown}.",
        "Try another precision or release of it; the graph still runs on ONNX Runtime.",
    )


_NO_MEMORY = re.compile(
    r"out ?of ?memory|bad_alloc|MemoryError|(failed|cannot|unable) to (allocate|map)", re.IGNORECASE
)

_CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"for Turing|check_turing",
        "Turing GPUs (7.5) lack an operation of this graph in its precision",
        "Leave 7.5 out, or build for it in fp16 by itself: --precision fp16 "
        "--compute-capability 7.5",
    ),
    (
        r"MIN<=OPT<=MAX|optimization profile|Dimension mismatch",
        "the graph does not take these sizes of batch",
        "Choose another --batch.",
    ),
    (
        r"not supported|unsupported|cannot compile for target|could not find any implementation",
        "an operation is not supported in this precision or on these GPUs",
        "Choose another --precision, or other GPUs.",
    ),
)
"""Pattern in the log, what it means, what to do."""


def _node(node: Mapping[str, str]) -> str:
    where = f"the node {node['name']!r} ({node['op']})" if node["op"] else "the graph"
    lines = [line for line in node["description"].splitlines() if not _is_noise(line)]
    return f"{where}: {_clean(' '.join(lines))} [{node['code']}]"


def _telling(log: Sequence[Line], severities: str) -> list[str]:
    kept = [line.text for line in log if line.severity in severities]
    return list(dict.fromkeys(_clean(text) for text in kept if not _is_noise(text)))


def _is_noise(text: str) -> bool:
    """Say whether a message tells only that there is no driver, or how much memory was used."""
    return "catchCudaError" in text or "[MemUsage" in text


_VARYING = (
    (re.compile(r"\s+"), " "),
    (re.compile(r" ?\b[Ii]n \w+ at /\S+(?=\))"), ""),  # in which line of whose source
    (re.compile(r"^\S+\.(?:cpp|hpp|cc|h):\d+: "), ""),
    (re.compile(r"(?<![\w.])/(?:[^\s/:]+/)+"), ""),
    (re.compile(r"0x[0-9a-fA-F]+"), "0x"),
    (re.compile(r"\b\d+(?:\.\d+)? ?(?:ms|us|seconds?|s|bytes|[KMG]i?B)\b"), "(some)"),
)


def _clean(text: str) -> str:
    """Return a message on one line, without paths, addresses, times and sizes of memory."""
    for pattern, instead in _VARYING:
        text = pattern.sub(instead, text)
    return text.strip()
