"""Trying one runtime for real: import it, build an engine where it has engines, run a network.

A library that is broken may crash its process, so ``ccn-deploy doctor`` runs each trial in a
process of its own: :func:`try_runtime` is the parent's side, :func:`main` the child's.
"""

from __future__ import annotations

import base64
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ccn_deploy.bundle import Bundle, ModelCard, NewFile, Source, write_bundle
from ccn_deploy.errors import CcnDeployError, EngineBuildError, GateError
from ccn_deploy.machine import Machine, this_machine
from ccn_deploy.runtimes.base import Array
from ccn_deploy.runtimes.compatibility import no_gpu
from ccn_deploy.runtimes.tensorrt.library import LIBRARIES, capture, load_library, logger
from ccn_deploy.storage import sha256
from ccn_deploy.targets import RUNTIMES, Family, Role

PATIENCE = 300
"""Seconds that a trial may take; reading a library of gigabytes from a slow disk takes minutes."""

GRAPH = base64.b64decode(
    "CAk6vgEKHgoGaW1hZ2VzCgZ3ZWlnaHQSBnNjb3JlcyIEQ29udgoZCgZzY29yZXMSBmxvZ2l0cyIHRmxhdHRlbhIFdHJp"
    "YWwqNAgCCAEIAggCEAFCBndlaWdodEogAACAPwAAAEAAAEBAAACAQAAAgEAAAEBAAAAAQAAAgD9aJQoGaW1hZ2VzEhsK"
    "GQgBEhUKBxIFYmF0Y2gKAggBCgIIAgoCCAJiHQoGbG9naXRzEhMKEQgBEg0KBxIFYmF0Y2gKAggCQgQKABAU"
)
"""An ONNX model: one convolution of :data:`WEIGHT`, flattened. The package onnx wrote it once; it
is not needed to try a runtime."""

SHAPE = (1, 2, 2)
WEIGHT = np.array([[1, 2, 3, 4], [4, 3, 2, 1]], np.float32).reshape(2, *SHAPE)
IMAGES = (np.arange(8, dtype=np.float32) / 8).reshape(2, *SHAPE)
LOGITS = np.einsum("nchw,kchw->nk", IMAGES, WEIGHT)
"""What the network answers to :data:`IMAGES`. Small integers over 8: every order of summation and
every precision of at least 8 bits gives exactly these."""


@dataclass(frozen=True)
class Trial:
    """How a runtime fared.

    Attributes:
        runtime: Its name.
        state: ``"works"``; ``"builds"`` if it builds engines and there is no GPU to run them;
            ``"absent"`` if it is not installed or has no GPU; ``"broken"`` if it is installed,
            has what it needs, and failed.
        did: What it managed to do, in order.
        problem: Why it does not work; empty if it does.
        fix: What to do about that.
    """

    runtime: str
    state: str
    did: tuple[str, ...] = ()
    problem: str = ""
    fix: str = ""

    def document(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def try_runtime(runtime: str, *, patience: float = PATIENCE) -> Trial:
    """Try an installed runtime in a process of its own, which has this one's import path.

    Args:
        runtime: A name in :data:`ccn_deploy.targets.RUNTIMES`.
        patience: Seconds after which it counts as broken.
    """
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; from ccn_deploy.smoke_test import main; main()"
    )
    with tempfile.TemporaryDirectory(prefix="ccn-deploy-trial-") as directory:
        report = Path(directory) / "report"
        ended = "it did not say how it ended"
        try:
            process = subprocess.run(
                [sys.executable, "-c", program, runtime, str(report)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=patience,
                check=False,
            )
            if process.returncode:
                ended = _ending(process.returncode, process.stderr.decode(errors="replace"))
        except subprocess.TimeoutExpired:
            ended = f"it did not end within {patience:g} s"
        except OSError as error:
            ended = f"no process could be started: {error.strerror}"
        lines = report.read_text().splitlines() if report.exists() else []
    return _judge(runtime, [json.loads(line) for line in lines], ended)


def _judge(runtime: str, said: list[dict[str, str]], ended: str) -> Trial:
    did = tuple(line["did"] for line in said if "did" in line)
    last = said[-1] if said else {}
    if "end" in last:  # what crashed after that did so while it was being unloaded
        return Trial(runtime, last["end"], did, last["problem"], last["fix"])
    after = f" after it did this: {', '.join(did)}" if did else ""
    return Trial(runtime, "broken", did, f"The trial failed{after}; {ended}.", _reinstall(runtime))


def _ending(code: int, stderr: str) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"it was ended by {signal.Signals(-code).name}"
    words = stderr.strip().splitlines()
    return f"it exited with {code}{': ' + words[-1][:200] if words else ''}"


def _reinstall(runtime: str) -> str:
    distribution = _distribution(runtime, this_machine())
    return f"Install it again: pip install --force-reinstall {distribution}"


def _distribution(runtime: str, machine: Machine) -> str:
    kind = RUNTIMES[runtime]
    if kind.family == "onnxruntime":
        return "onnxruntime-gpu" if "onnxruntime-gpu" in machine.packages else "onnxruntime"
    return kind.distribution


def main() -> None:
    """Try the runtime named on the command line and write what happened to the file named there.

    One JSON object a line: what it ``did``, and at last how it ``end``ed. Each is on disk before
    the next step, which may be a crash.
    """
    runtime, report = sys.argv[1:]
    state, problem, fix = "works", "", ""
    with Path(report).open("w", buffering=1, encoding="utf-8") as file:
        try:
            for did in _attempt(runtime):
                file.write(json.dumps({"did": did}) + "\n")
        except _NoGpuError as error:
            state, problem, fix = error.state, error.what, error.hint
        except CcnDeployError as error:
            state, problem, fix = "broken", error.what, error.hint
        except Exception as error:
            words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            state, problem, fix = "broken", words, _reinstall(runtime)
        file.write(json.dumps({"end": state, "problem": problem, "fix": fix}) + "\n")


class _NoGpuError(CcnDeployError):
    """Engines cannot run for want of a GPU, and nothing is broken."""

    def __init__(self, state: str, error: CcnDeployError) -> None:
        super().__init__(error.what, error.hint)
        self.state = state


def _attempt(runtime: str) -> Iterator[str]:
    """Do what the runtime is for, step by step; yield what was done.

    Raises:
        CcnDeployError: A step failed.
    """
    attempts: dict[Family, Callable[[str], Iterator[str]]] = {
        "torch": _torch,
        "onnxruntime": _onnxruntime,
        "tensorrt": _engine,
    }
    yield from attempts[RUNTIMES[runtime].family](runtime)


def _onnxruntime(runtime: str) -> Iterator[str]:
    from ccn_deploy.runtimes.onnx_runtime import load_library as load

    yield f"imported onnxruntime {load(runtime).__version__}"
    yield _run(runtime, NewFile("graph.onnx", GRAPH, Role.FORWARD, "fp32"))


def _torch(runtime: str) -> Iterator[str]:
    import torch

    yield f"imported torch {torch.__version__}"
    device = "cuda" if RUNTIMES[runtime].on_gpu else "cpu"
    images, weight = (torch.from_numpy(array).to(device) for array in (IMAGES, WEIGHT))
    _compare(torch.nn.functional.conv2d(images, weight).flatten(1).cpu().numpy())
    yield "ran a network"


def _engine(runtime: str) -> Iterator[str]:
    machine = this_machine()
    trt = load_library(runtime, f"for the runtime {runtime}")
    yield f"imported {LIBRARIES[runtime].module} {trt.__version__}"
    builds = LIBRARIES[runtime].portable or bool(machine.gpus)
    if builds:
        plan = build(trt, for_this_gpu=bool(machine.gpus))
        yield "built an engine"
    without = no_gpu(machine, 0, "Engines cannot run", LIBRARIES[runtime].extra)
    if without is not None:
        if machine.gpu_broken:
            raise without
        raise _NoGpuError("builds" if builds else "absent", without)
    yield _run(runtime, engine_file(runtime, trt.__version__, plan, machine))


def engine_file(runtime: str, version: str, plan: bytes, machine: Machine) -> NewFile:
    """Describe an engine of :func:`build` that is for the first GPU of a machine."""
    details = {
        "library": runtime,
        "version": version,
        "magic": LIBRARIES[runtime].magic.decode(),
        "system": machine.system,
        "machine": machine.architecture,
        "compute_capabilities": [machine.gpus[0].compute_capability],
        "profiles": [{"images": {"min": [1, *SHAPE], "opt": [2, *SHAPE], "max": [2, *SHAPE]}}],
    }
    return NewFile("plan.engine", plan, Role.ENGINE, "fp32", runtime, details=details)


def build(trt: Any, *, for_this_gpu: bool) -> bytes:
    """Build an engine of :data:`GRAPH` for batches of one or two.

    Args:
        trt: The module ``tensorrt`` or ``tensorrt_rtx``.
        for_this_gpu: Whether for the GPU that is here, not for those that the library supports.

    Raises:
        EngineBuildError: The library would not; the message has its log.
    """
    with capture() as log:
        builder = trt.Builder(logger(trt))
        network = builder.create_network(0)
        parser = trt.OnnxParser(network, logger(trt))
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        profile.set_shape("images", (1, *SHAPE), (2, *SHAPE), (2, *SHAPE))
        config.add_optimization_profile(profile)
        if for_this_gpu and hasattr(config, "num_compute_capabilities"):
            config.num_compute_capabilities = 1
            config.set_compute_capability(trt.ComputeCapability.CURRENT, 0)
        parsed = parser.parse(GRAPH)
        plan = builder.build_serialized_network(network, config) if parsed else None
    if plan is None:
        lines = " ".join(log.at_least("ERROR")) or "it logged no error"
        raise EngineBuildError(
            f"{trt.__name__} {trt.__version__} built no engine of one convolution: {lines[:300]}",
            f"Install it again: pip install --force-reinstall {trt.__name__.replace('_', '-')}",
        )
    return bytes(plan)


def _run(runtime: str, file: NewFile) -> str:
    """Run the network from a bundle, as everything else here does."""
    from ccn_deploy.runtimes import open_runtime

    with tempfile.TemporaryDirectory(prefix="ccn-deploy-trial-") as directory:
        bundle = _bundle(Path(directory) / "bundle", file)
        with open_runtime(bundle, runtime, "fp32") as opened:
            _compare(opened.logits(IMAGES))
    return "ran a network"


def _bundle(path: Path, file: NewFile) -> Bundle:
    source = Source(kind="onnx", sha256=sha256(GRAPH))
    card = ModelCard(
        name="trial", input_shape=SHAPE, class_names=("rising", "falling"), source=source
    )
    return write_bundle(path, card=card, files=[file])


def _compare(logits: Array) -> None:
    """Refuse anything but the right answer.

    Raises:
        GateError: It computed something else.
    """
    if logits.shape != LOGITS.shape or not np.array_equal(logits, LOGITS):
        raise GateError(
            f"It ran a network and answered {logits.tolist()}, not {LOGITS.tolist()}.",
            "Do not use this installation; install the library again, or update the driver.",
        )
