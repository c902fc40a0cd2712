"""Building TensorRT and TensorRT-RTX engines from ONNX graphs; ``docs/engines.md`` is for users.

Both libraries are driven by the same calls; :mod:`ccn_deploy.runtimes.tensorrt.library` has
what differs. A
network is strongly typed: its precision is that of the graph, and no flag changes it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccn_deploy.errors import EngineBuildError, UsageError
from ccn_deploy.exporters.tensorrt.log import Line, read_log, refusal, worth_keeping
from ccn_deploy.machine import this_machine
from ccn_deploy.runtimes.tensorrt.library import LIBRARIES, Library, load_library
from ccn_deploy.storage import sha256

WORKER = Path(__file__).with_name("worker.py")

NOT_BY_DEFAULT = ("7.5",)
"""Compute capabilities that TensorRT-RTX builds for only if they are asked for by name."""

ENVIRONMENT = (
    "PATH", "LD_LIBRARY_PATH", "TMPDIR", "HOME", "CUDA_", "NVIDIA_", "SYSTEMROOT", "TEMP",
)  # fmt: skip
"""Beginnings of the environment variables that a builder may look at; it gets no others."""

ATTEMPTS = 5
"""Builds at most, to find two that agree."""

PATIENCE = 3600
"""Seconds that a build may take; the largest network here takes a few."""

KILLED = (-9, 137)
"""Exit statuses of a process that the system killed, as it does when memory runs out."""


@dataclass(frozen=True)
class Batches:
    """A range of sizes that an engine takes: of batches, or of cotangents an image.

    Attributes:
        min: The smallest size.
        opt: The size that kernels are chosen for.
        max: The largest size.

    Raises:
        UsageError: Not 1 <= min <= opt <= max.
    """

    min: int = 1
    opt: int = 32
    max: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise UsageError(
                f"Sizes from {self.min} over {self.opt} to {self.max} are no range.",
                "Give the smallest, the usual and the largest one: --batch 1,32,256",
            )

    @classmethod
    def parse(cls, text: str) -> Batches:
        """Read ``"1,32,256"``.

        Raises:
            UsageError: Not three numbers, or not in order.
        """
        parts = text.split(",")
        if len(parts) != 3 or not all(re.fullmatch(r"\s*[0-9]{1,9}\s*", part) for part in parts):
            raise UsageError(
                f"{text!r} are not three whole numbers.",
                "Give the smallest, the usual and the largest batch: --batch 1,32,256",
            )
        return cls(*map(int, parts))

    def at_most(self, limit: int) -> Batches:
        """Return the range cut at ``limit``, or at 1 if that is less."""
        most = max(1, limit)
        return Batches(min(self.min, most), min(self.opt, most), min(self.max, most))

    def sizes(self) -> list[int]:
        """Return min, opt and max."""
        return [self.min, self.opt, self.max]


@dataclass(frozen=True)
class BuiltEngine:
    """An engine.

    Attributes:
        plan: Its bytes, as trtexec and Triton take them.
        details: What the manifest says of it; see ``docs/engines.md``.
    """

    plan: bytes
    details: dict[str, Any]


def build_engine(
    graph: bytes,
    *,
    library: str,
    batch: Batches,
    candidates: Batches | None = None,
    compute_capabilities: Sequence[str] = (),
    tf32: bool = False,
) -> BuiltEngine:
    """Build an engine in a process of its own.

    Args:
        graph: The bytes of an ONNX file.
        library: A name in :data:`~ccn_deploy.runtimes.tensorrt.library.LIBRARIES`.
        batch: Sizes of the first dimension of every input.
        candidates: Sizes of the second dimension of cotangents; of a gradient graph only.
        compute_capabilities: GPUs to build for, such as ``"8.6"``; by default those that the
            library chooses. TensorRT builds for the GPU that is here and for no other.
        tf32: Whether float32 products may round their factors to ten bits.

    Raises:
        UsageError: No such library, or a compute capability that it does not build for.
        MissingExtraError: The library is not installed.
        EngineBuildError: It refuses the graph, cannot build it, cannot start, or died.
    """
    module = load_library(library, "to build an engine")
    kind = LIBRARIES[library]
    targets = find_targets(library, compute_capabilities)
    request = {
        "path": str(Path(str(module.__file__)).absolute().parent.parent),
        "size": len(graph),
        "module": kind.module,
        "batch": batch.sizes(),
        "candidates": candidates and candidates.sizes(),
        "compute_capabilities": [_member(target) for target in targets]
        if kind.portable and compute_capabilities
        else [],
        "tf32": tf32,
    }
    plan, answer, log, repeated = _build(kind, request, graph)
    machine = this_machine()
    return BuiltEngine(
        plan,
        {
            "library": library,
            "version": module.__version__,
            "magic": plan[:4].decode("ascii", "replace"),
            "system": machine.system,
            "machine": machine.architecture,
            "compute_capabilities": list(targets if compute_capabilities else _able(plan, targets)),
            "profiles": answer["profiles"],
            "tf32": tf32,
            "reproducible": repeated,
            "log": worth_keeping(log),
        },
    )


def known_targets(module: Any) -> tuple[str, ...]:
    """Return the compute capabilities that a portable library builds for, in order."""
    members = module.ComputeCapability.__members__
    numbers = sorted(int(name[2:]) for name in members if re.fullmatch(r"SM\d+", name))
    return tuple(f"{number // 10}.{number % 10}" for number in numbers)


def _member(target: str) -> str:
    return "SM" + target.replace(".", "")


def _able(plan: bytes, targets: Sequence[str]) -> Sequence[str]:
    """Return those of the default targets that a plan runs on.

    Where nobody names GPUs, TensorRT-RTX compiles for the oldest with what the graph needs (fp8
    came with 8.9) and for all after it; which that is stands only in the compiled program.
    """
    lists = b" ".join(re.findall(rb"accelerators=\{([^}]*)\}", plan)).decode("ascii", "replace")
    found = [int(number) for number in re.findall(r"\bsm(\d+)\b", lists)]
    oldest = min(found, default=0)
    return [target for target in targets if int(target.replace(".", "")) >= oldest]


def find_targets(library: str, wanted: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the compute capabilities that an engine would be for.

    Args:
        library: A name in :data:`~ccn_deploy.runtimes.tensorrt.library.LIBRARIES`.
        wanted: Those asked for, if any.

    Raises:
        UsageError: One is not known, or not that of the GPU that the engine is built on.
        MissingExtraError: The library is not installed.
        EngineBuildError: The library builds on a GPU and there is none.
    """
    module, kind = load_library(library, "to build an engine"), LIBRARIES[library]
    if kind.portable:
        known = known_targets(module)
        for target in wanted:
            if target not in known:
                raise UsageError(
                    f"{kind.title} {module.__version__} does not build for the compute capability "
                    f"{target!r}.",
                    f"It builds for: {', '.join(known)}.",
                )
        chosen = set(wanted) or set(known).difference(NOT_BY_DEFAULT)
        return tuple(target for target in known if target in chosen)
    machine = this_machine()
    if not machine.gpus:
        raise EngineBuildError(
            f"{kind.title} builds an engine on the GPU that it is for, and this machine has none: "
            f"{machine.no_gpu_reason}.",
            f"Add the engine where the GPU is: ccn-deploy export BUNDLE --output NEW --format "
            f"{kind.name}. Without a GPU: --format tensorrt-rtx",
        )
    here = machine.gpus[0]
    if wanted and set(wanted) != {here.compute_capability}:
        raise UsageError(
            f"{kind.title} builds for the GPU that is here, {here.name} with compute capability "
            f"{here.compute_capability}, not for {', '.join(wanted)}.",
            "Leave --compute-capability out, or export where that GPU is.",
        )
    return (here.compute_capability,)


def _build(
    kind: Library, request: dict[str, Any], graph: bytes
) -> tuple[bytes, dict[str, Any], list[Line], bool]:
    """Build until two builds agree, and return the plan, the answer, the log, and if they did.

    The compiler has threads whose races it does not undo: one build in fifty of a large graph, on
    a busy machine, names its temporaries in another order. A library that measures kernels on the
    GPU, or addresses that are random, would not agree at all; then one build is enough.

    Raises:
        EngineBuildError: There is no engine.
    """
    seen = set()
    for _ in range(ATTEMPTS):
        answer, plan, log = _run(kind, request, graph)
        if answer["stage"] != "done":
            raise refusal(kind, answer, log)
        if not kind.portable or not answer["fixed_addresses"]:
            return plan, answer, log, False
        digest = sha256(plan)
        if digest in seen:
            return plan, answer, log, True
        seen.add(digest)
    return plan, answer, log, False


def _run(
    kind: Library, request: dict[str, Any], graph: bytes
) -> tuple[dict[str, Any], bytes, list[Line]]:
    """Start the worker and return its answer, the plan and the library's log.

    Raises:
        EngineBuildError: It died without an answer.
    """
    environment = {
        name: value for name, value in os.environ.items() if name.upper().startswith(ENVIRONMENT)
    }
    try:
        worker = subprocess.run(
            [sys.executable, "-S", "-s", str(WORKER), json.dumps(request)],
            input=graph,
            capture_output=True,
            env=environment,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise EngineBuildError(
            f"{kind.title} built no engine in {PATIENCE // 60} minutes and was stopped.",
            "It waits for ever when memory is short; free some, or build on a larger machine.",
        ) from error
    said = worker.stderr.decode(errors="replace")
    line, _, plan = worker.stdout.partition(b"\n")
    if worker.returncode == 0 and line:
        return json.loads(line), plan, read_log(said)
    if worker.returncode in KILLED:
        raise EngineBuildError(
            f"The process in which {kind.title} built the engine was killed: most likely memory "
            "ran out.",
            "Building takes five to seven times the graph's size. Free memory, or use a larger "
            "machine.",
        )
    last = " ".join(said.split()[-40:])
    raise EngineBuildError(
        f"{kind.title} crashed while building the engine (exit status {worker.returncode})"
        f"{f': {last}' if last else '.'}",
        "If memory is short, free some; else try another release of it.",
    )
