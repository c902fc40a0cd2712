"""The program that builds one engine, in a process of its own; ``engines.py`` starts it.

It has a process of its own for three reasons. TensorRT that crashes or is killed for want of
memory takes nothing else with it. Its memory, several times the weights', is given back. And two
builds give equal bytes: the compiler walks over sets that are ordered by the addresses of their
members, so what it writes depends on every allocation before it. Therefore addresses are not
random here; the build has a thread of its own, whose first allocation begins a fresh region; there
is no other thread, no NumPy that would start some, and no Python in the log, whose lines hold times
and so are not always of one length.

The argument is JSON (:data:`Request`), stdin the bytes of an ONNX file. On stdout: one line of
JSON (:data:`Answer`) and the bytes of the plan, if there is one. On stderr: the library's log.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Request = dict[str, Any]
"""``path``: where the library lies; ``module``: its name; ``size``: of the graph in bytes;
``batch`` and ``candidates``: smallest, usual and largest number of images, and of cotangents an
image; ``compute_capabilities``: names of members of ``ComputeCapability``; ``tf32``."""

Answer = dict[str, Any]
"""``stage``: what was being done, ``"done"`` at the end; ``problem``: what went wrong in it;
``nodes``: those that the parser refuses; ``profiles``; ``fixed_addresses``."""

_ADDR_NO_RANDOMIZE = 0x0040000
_ASK = 0xFFFFFFFF
_PR_SET_PDEATHSIG = 1
_SIGKILL = 9


def fix_addresses() -> bool:
    """Run this program again without random addresses; return whether it runs so now.

    Some containers forbid it, and only Linux has it. Then engines work as well, but two builds
    may name the compiler's temporaries differently.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL)  # no builder outlives the export that asked for it
    personality = libc.personality(_ASK)
    if personality < 0:
        return False
    if not personality & _ADDR_NO_RANDOMIZE:
        if libc.personality(personality | _ADDR_NO_RANDOMIZE) < 0:
            return False
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return True


class RefusalError(Exception):
    """What the library refuses, or why it cannot start."""


class Build:
    """One build: :attr:`answer` says how far it came, :attr:`plan` is the engine."""

    def __init__(self, request: Request, graph: bytearray) -> None:
        self.answer: Answer = {"stage": "import", "problem": "", "nodes": [], "profiles": []}
        self.plan = b""
        self._request = request
        self._graph = graph

    def run(self) -> None:
        """Do it all; what goes wrong stands in the answer."""
        try:
            trt = importlib.import_module(self._request["module"])
            # What came before, such as the search of directories, differs between installations.
            self._in_fresh_thread(lambda: self._build(trt))
        except Exception as error:
            self.answer["problem"] = str(error) or type(error).__name__

    def _in_fresh_thread(self, work: Callable[[], None]) -> None:
        """Work where nothing has been allocated yet."""
        with ThreadPoolExecutor(1) as thread:
            thread.submit(work).result()

    def _build(self, trt: Any) -> None:
        self._enter("start")
        logger = trt.Logger(trt.Logger.WARNING)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        config = builder.create_builder_config()
        self._enter("parse")
        self._parse(trt.OnnxParser(network, logger))
        self._enter("configure")
        self._configure(trt, config)
        self._enter("profile")
        self._add_profile(builder, network, config)
        self._enter("build")
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RefusalError("no engine came out")
        self.plan = bytes(plan)
        self._enter("done")

    def _enter(self, stage: str) -> None:
        self.answer["stage"] = stage

    def _parse(self, parser: Any) -> None:
        if parser.parse(self._graph):
            return
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            self.answer["nodes"].append(
                {
                    "name": error.node_name(),
                    "op": error.node_operator(),
                    "code": error.code().name,
                    "description": error.desc(),
                }
            )
        raise RefusalError("the parser refuses the graph")

    def _configure(self, trt: Any, config: Any) -> None:
        if self._request["tf32"]:
            config.set_flag(trt.BuilderFlag.TF32)
        else:
            config.clear_flag(trt.BuilderFlag.TF32)
        targets = self._request["compute_capabilities"]
        if not targets:
            return
        config.num_compute_capabilities = len(targets)
        for index, name in enumerate(targets):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, name), index):
                raise RefusalError(f"the compute capability {name} is refused")

    def _add_profile(self, builder: Any, network: Any, config: Any) -> None:
        """Let the first dimension of every input range over the batch, the second if it is free."""
        profile = builder.create_optimization_profile()
        ranges = [self._request["batch"], self._request["candidates"]]
        shapes = {}
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            dims = list(tensor.shape)
            free = [axis for axis, size in enumerate(dims) if size < 0]
            if free not in ([0], [0, 1]) or (free == [0, 1] and ranges[1] is None):
                raise RefusalError(
                    f"the input {tensor.name} has shape {dims}; nothing says which sizes"
                )
            shape = {}
            for at, end in enumerate(("min", "opt", "max")):
                shape[end] = [
                    ranges[axis][at] if axis in free else n for axis, n in enumerate(dims)
                ]
            profile.set_shape(tensor.name, shape["min"], shape["opt"], shape["max"])
            shapes[tensor.name] = shape
        if config.add_optimization_profile(profile) < 0:
            raise RefusalError(f"the sizes {shapes} are refused")
        self.answer["profiles"] = [shapes]


def read_exactly(size: int) -> bytearray:
    """Return stdin, into one block: how a pipe is cut into pieces must not show in the heap."""
    data = bytearray(size)
    at = 0
    with open(0, "rb", buffering=0, closefd=False) as stdin, memoryview(data) as view:
        while at < size:
            read = stdin.readinto(view[at:])
            if not read:
                raise SystemExit("the graph was cut short")
            at += read
    return data


def main() -> None:
    """Read the request, build, and answer."""
    fixed = fix_addresses()
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)  # whatever a library prints is no part of the answer
        request = json.loads(sys.argv[1])
        sys.path[:] = [*sys.path[1:], request["path"]]  # ours is not for imports
        build = Build(request, read_exactly(request["size"]))
        build.run()
        answer = {**build.answer, "fixed_addresses": fixed}
        out.write(json.dumps(answer).encode() + b"\n")
        out.write(build.plan)
    os._exit(0)  # a library's destructors may log into a Python that is gone


if __name__ == "__main__":
    main()
