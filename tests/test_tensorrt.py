"""The TensorRT runtime up to the device: everything that can be run without a GPU is run."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.errors import (
    EngineUnfitError,
    ExitCode,
    IntegrityError,
    RuntimeUnavailableError,
    UsageError,
)
from ccn_deploy.exporters import export_run
from ccn_deploy.exporters.tensorrt.build import Batches, BuiltEngine
from ccn_deploy.machine import Gpu, Machine, this_machine
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.runtimes.compatibility import choose_engine
from ccn_deploy.runtimes.layer_outputs import open_layer_outputs
from ccn_deploy.runtimes.tensorrt import cuda as cuda_module
from ccn_deploy.runtimes.tensorrt import engine
from ccn_deploy.runtimes.tensorrt.cuda import CudaError, Device, floats_at
from ccn_deploy.runtimes.tensorrt.engine import Engine
from ccn_deploy.runtimes.tensorrt.kernel_cache import (
    cache_directory,
    kernel_path,
    load_kernels,
    store_kernels,
)
from ccn_deploy.runtimes.tensorrt.pool import Pool
from ccn_deploy.runtimes.tensorrt.runtime import kernels_file
from ccn_deploy.runtimes.tensorrt.shapes import (
    Range,
    Tensor,
    forward_signature,
    gradient_signature,
    pieces,
    read_limits,
)
from ccn_deploy.targets import Role, Target
from tests.engines import RTX, build_rtx, engine_file, with_files
from tests.networks import as_run, random_network

SHAPE = (1, 28, 28)
L4 = Gpu(0, "NVIDIA L4", "8.9", 24 << 30)
WITH_L4 = replace(this_machine(), driver="580.1 (CUDA 13.0)", no_gpu_reason="", gpus=(L4,))

no_gpu_here = pytest.mark.skipif(bool(this_machine().gpus), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("plain") / "ccn"
    return export_run(as_run(random_network("mnist-cnn", "ccn")), path)


@pytest.fixture(scope="module")
def built(plain: Bundle) -> BuiltEngine:
    return build_rtx(plain, Batches(1, 4, 8))


@pytest.fixture(scope="module")
def bundle(plain: Bundle, built: BuiltEngine, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return with_files(plain, tmp_path_factory.mktemp("engine") / "b", engine_file(built))


# Refusals: real engines, and a bundle that says what they are


@no_gpu_here
def test_without_a_driver_it_says_so(bundle: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(EngineUnfitError) as refused:
        open_runtime(bundle, RTX)
    assert refused.value.exit_code == ExitCode.ENVIRONMENT
    assert this_machine().no_gpu_reason in str(refused.value)
    assert "onnxruntime-cpu" in refused.value.hint
    assert capfd.readouterr() == ("", "")


@no_gpu_here
@pytest.mark.parametrize("damage", ["none", "after the magic"])
def test_nothing_of_an_engine_is_read_before_the_machine_is_known_to_fit(
    plain: Bundle, built: BuiltEngine, tmp_path: Path, damage: str
) -> None:
    data = built.plan if damage == "none" else built.plan[:4] + b"\xff" * 4096
    with_files(plain, tmp_path / "b", engine_file(built, data))
    program = """
import sys
from ccn_deploy.errors import EngineUnfitError
from ccn_deploy.runtimes import open_runtime
try:
    open_runtime(sys.argv[1], "tensorrt-rtx")
except EngineUnfitError as error:
    print(error.what)
for module in ("tensorrt_rtx", "tensorrt", "torch", "onnxruntime", "onnx"):
    assert module not in sys.modules, module
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "b")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert this_machine().no_gpu_reason in done.stdout


@pytest.mark.parametrize(
    ("changed", "machine", "words"),
    [
        ({"system": "windows"}, WITH_L4, "built for windows"),
        ({"machine": "aarch64"}, WITH_L4, "aarch64"),
        ({"version": "1.6.0.1"}, WITH_L4, "newer"),
        ({"version": "99.0.0.1"}, WITH_L4, "older"),
        ({"compute_capabilities": ["12.0"]}, WITH_L4, "8.9"),
        ({}, replace(WITH_L4, gpus=(replace(L4, name="NVIDIA H100", compute_capability="9.0"),)),
         "9.0"),
    ],
)  # fmt: skip
def test_a_real_engine_of_elsewhere_is_refused(
    plain: Bundle, built: BuiltEngine, tmp_path: Path, changed: dict[str, object], machine: Machine,
    words: str,
) -> None:  # fmt: skip
    foreign = with_files(plain, tmp_path / "b", engine_file(built, **changed))
    with pytest.raises(EngineUnfitError, match=words):
        choose_engine(foreign, Target(RTX, "fp32"), machine)


def test_the_manifest_of_a_real_engine_fits_its_machine(bundle: Bundle) -> None:
    assert choose_engine(bundle, Target(RTX, "fp32"), WITH_L4).runtime == "tensorrt-rtx"


def test_bytes_of_another_library_are_damage(
    plain: Bundle, built: BuiltEngine, tmp_path: Path
) -> None:
    other = with_files(plain, tmp_path / "b", engine_file(built, b"ftrt" + built.plan[4:]))
    with pytest.raises(IntegrityError, match="tensorrt") as refused:
        open_runtime(other, RTX)
    assert refused.value.exit_code == ExitCode.INTEGRITY


def test_a_changed_byte_is_damage(plain: Bundle, built: BuiltEngine, tmp_path: Path) -> None:
    damaged = with_files(plain, tmp_path / "b", engine_file(built))
    record = damaged.file(Role.ENGINE, "fp32", "tensorrt-rtx")
    file = damaged.path / record.path
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match="SHA-256"):
        open_runtime(damaged.path, RTX)


def test_what_the_bundle_does_not_have_is_said(plain: Bundle, bundle: Bundle) -> None:
    with pytest.raises(RuntimeUnavailableError, match=r"for tensorrt-rtx in fp8.*fp32"):
        open_runtime(bundle, RTX, "fp8")
    with pytest.raises(RuntimeUnavailableError, match="none at all") as refused:
        open_runtime(plain, "tensorrt")
    assert "--format tensorrt" in refused.value.hint
    with pytest.raises(RuntimeUnavailableError, match="fp64"):
        open_runtime(bundle, RTX, "fp64")


def test_options_and_views_that_an_engine_does_not_have(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="memory limit"):
        open_runtime(bundle, RTX, options=RuntimeOptions(memory_limit=1 << 30))
    with pytest.raises(RuntimeUnavailableError, match="no single layers"):
        open_layer_outputs(bundle, RTX)


@no_gpu_here
def test_a_machine_whose_gpu_vanished_is_a_cuda_error(bundle: Bundle, built: BuiltEngine) -> None:
    """As if the check had passed: the first CUDA call fails, before the plan is deserialized."""
    record = bundle.file(Role.ENGINE, "fp32", "tensorrt-rtx")
    with pytest.raises(CudaError, match="cudaSetDevice") as refused:
        Engine(
            b"vtrt and no plan", record, RTX, Device(0, "rtx"), forward_signature(SHAPE, 10),
            cuda_graphs=True, kernels=None,
        )  # fmt: skip
    assert "doctor" in refused.value.hint


# What an engine takes and gives


FORWARD = forward_signature(SHAPE, 10)
GRADIENT = gradient_signature(SHAPE, 10)


def tensors(low: int = 1, high: int = 8, candidates: tuple[int, int] = (1, 9)) -> dict[str, Tensor]:
    few, many = candidates
    largest = (high, many, 10)
    return {
        "images": Tensor(
            "INPUT", "FLOAT", "DEVICE", (-1, *SHAPE), [(n, *SHAPE) for n in (low, low, high)]
        ),
        "cotangents": Tensor(
            "INPUT", "FLOAT", "DEVICE", (-1, -1, 10), [(low, few, 10), (low, few, 10), largest]
        ),
        "logits": Tensor("OUTPUT", "FLOAT", "DEVICE", (-1, 10)),
        "gradients": Tensor("OUTPUT", "FLOAT", "DEVICE", (-1, -1, *SHAPE)),
    }  # fmt: skip


def test_limits_are_those_of_the_profile() -> None:
    found = tensors(2, 64, (3, 9))
    assert read_limits(GRADIENT, found, "e") == {"batch": Range(2, 64), "candidates": Range(3, 9)}
    forward = {name: found[name] for name in ("images", "logits")}
    assert read_limits(FORWARD, forward, "e") == {"batch": Range(2, 64)}
    assert GRADIENT.shapes({"batch": 5, "candidates": 3}) == {
        "images": (5, *SHAPE),
        "cotangents": (5, 3, 10),
        "logits": (5, 10),
        "gradients": (5, 3, *SHAPE),
    }


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("images", {"dtype": "HALF"}),
        ("images", {"kind": "OUTPUT"}),
        ("images", {"location": "HOST"}),
        ("images", {"shape": (-1, 3, 32, 32)}),
        ("images", {"profile": [(0, *SHAPE), (1, *SHAPE), (8, *SHAPE)]}),
        ("images", {"profile": [(9, *SHAPE), (9, *SHAPE), (8, *SHAPE)]}),
        ("images", {"profile": []}),
        ("cotangents", {"profile": [(1, 1, 10), (1, 1, 10), (9, 9, 10)]}),  # not the images' batch
        ("cotangents", {"profile": [(1, 10), (1, 10), (8, 10)]}),
        ("logits", {"shape": (-1, 12)}),
        ("logits", {"dtype": "HALF"}),
        ("gradients", {"shape": (-1, *SHAPE)}),
    ],
)
def test_an_engine_of_another_network_is_refused(name: str, changed: dict[str, object]) -> None:
    found = tensors()
    found[name] = replace(found[name], **changed)  # type: ignore[arg-type]
    with pytest.raises(IntegrityError, match="no engine of this bundle's network"):
        read_limits(GRADIENT, found, "e")
    with pytest.raises(IntegrityError):
        read_limits(FORWARD, tensors(), "e")  # a gradient engine in the place of the forward one


@settings(deadline=None, max_examples=60)
@given(count=st.integers(0, 70), low=st.integers(1, 9), more=st.integers(0, 20))
def test_pieces_cover_every_row_once_and_fit_the_profile(count: int, low: int, more: int) -> None:
    limit = Range(low, low + more)
    cut = list(pieces(count, limit))
    rows = [row for piece in cut for row in range(count)[piece.rows]]
    assert rows == list(range(count))
    for piece in cut:
        assert limit.low <= piece.size <= limit.high
        assert piece.rows.stop - piece.rows.start <= piece.size
    padded = [p for p in cut if p.rows.stop - p.rows.start < p.size]
    assert len(padded) <= 1  # only the last, and only to reach the least size
    assert all(p.size == low for p in padded)


# Kernels on disk


def test_kernels_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "e.kernels"
    assert load_kernels(path) is None
    assert store_kernels(path, b"first")
    assert store_kernels(path, b"second \x00\n\xff")
    assert load_kernels(path) == b"second \x00\n\xff"
    assert [file.name for file in path.parent.iterdir()] == ["e.kernels"]


def test_damaged_kernels_are_dropped_wherever_the_damage_is(tmp_path: Path) -> None:
    path = tmp_path / "e.kernels"
    store_kernels(path, bytes(range(40)))
    whole = path.read_bytes()
    for at in [*range(64), *range(65, len(whole))]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert load_kernels(path) is None, at
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert load_kernels(path) is None, length
    path.unlink()
    path.mkdir()
    assert load_kernels(path) is None


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert not store_kernels(tmp_path / "file" / "e.kernels", b"x")
    assert (tmp_path / "file").read_text() == "in the way"


def test_kernels_are_kept_apart_by_all_they_depend_on(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"version": "1.7.1", "gpu": L4, "driver": "580.1 (CUDA 13.0)"}
    others = [
        {**base, "version": "1.7.2"},
        {**base, "gpu": replace(L4, name="NVIDIA L40")},
        {**base, "gpu": replace(L4, compute_capability="9.0")},
        {**base, "driver": "590.1 (CUDA 13.0)"},
        {**base, "driver": None},
    ]
    paths = [kernel_path(tmp_path, "ab" * 32, **some) for some in (base, *others)]  # type: ignore[arg-type]
    paths.append(kernel_path(tmp_path, "cd" * 32, **base))  # type: ignore[arg-type]
    assert len(set(paths)) == len(paths)
    for path in paths:
        assert re.fullmatch(r"[\w./-]+", str(path.relative_to(tmp_path)))
    nasty = kernel_path(tmp_path, "ab" * 32, **{**base, "gpu": replace(L4, name="../../etc")})  # type: ignore[arg-type]
    assert ".." not in nasty.parts

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "ccn-deploy"
    record = bundle.file(Role.ENGINE, "fp32", "tensorrt-rtx")
    kept = kernels_file(record, RTX, WITH_L4, 0)
    assert kept is not None
    assert kept.is_relative_to(tmp_path)
    assert record.sha256 in kept.name
    assert kernels_file(record, "tensorrt", WITH_L4, 0) is None


# The pool of executions


class Thing:
    """Something that counts who uses it."""

    def __init__(self) -> None:
        self.users = 0
        self.released = 0


class Things:
    def __init__(self) -> None:
        self.made: list[Thing] = []
        self.ended = 0
        self.pool = Pool("test", self.make, self.release, self.end)

    def make(self) -> Thing:
        self.made.append(Thing())
        return self.made[-1]

    def release(self, thing: Thing) -> None:
        assert not self.ended
        thing.released += 1

    def end(self) -> None:
        self.ended += 1


def test_one_thread_always_has_the_same_item() -> None:
    things = Things()
    for _ in range(5):
        with things.pool.borrow() as thing:
            assert thing is things.made[0]
    things.pool.close()
    things.pool.close()
    assert [t.released for t in things.made] == [1]
    assert things.ended == 1
    with pytest.raises(UsageError, match="closed"), things.pool.borrow():
        pass


def test_threads_never_share_an_item_and_ended_threads_leave_none() -> None:
    things = Things()
    together = threading.Barrier(4)
    faults = []

    def work() -> None:
        together.wait()
        for _ in range(200):
            with things.pool.borrow() as thing:
                thing.users += 1
                if thing.users != 1:
                    faults.append(thing)
                thing.users -= 1

    for _ in range(3):  # twelve threads in all
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not faults
    assert len(things.made) <= 4
    things.pool.close()
    assert all(t.released == 1 for t in things.made)


def test_closing_waits_for_what_is_lent() -> None:
    things = Things()
    with things.pool.borrow() as outer:
        with things.pool.borrow():
            pass
        things.pool.close()
        assert [t.released for t in things.made] == [0, 1]
        assert (outer.released, things.ended) == (0, 0)
    assert (outer.released, things.ended) == (1, 1)


def test_an_item_that_failed_is_not_lent_again() -> None:
    things = Things()
    with pytest.raises(KeyError), things.pool.borrow():
        raise KeyError
    with things.pool.borrow() as thing:
        assert thing is things.made[1]
    assert [t.released for t in things.made] == [1, 0]
    things.pool.close()
    assert ([t.released for t in things.made], things.ended) == ([1, 1], 1)


def test_an_item_that_cannot_be_made_or_released_hides_nothing() -> None:
    ended = []

    def fail(*_: object) -> None:
        raise OSError("no memory")

    broken = Pool("test", fail, fail, lambda: ended.append(1))
    with pytest.raises(OSError, match="no memory"), broken.borrow():
        pass
    broken.close()
    assert ended == [1]

    brittle = Pool("test", Thing, fail, lambda: ended.append(2))
    with pytest.raises(ZeroDivisionError), brittle.borrow():
        raise ZeroDivisionError
    with brittle.borrow():
        pass
    with pytest.raises(OSError, match="no memory"):
        brittle.close()
    assert ended == [1, 2]


# CUDA: what it answers without a GPU, and the names that are used


CALLS: dict[str, Callable[[Device], object]] = {
    "cudaSetDevice": lambda d: d.use(),
    "cudaMemGetInfo": lambda d: d.memory(),
    "cudaStreamCreateWithFlags": lambda d: d.create_stream(),
    "cudaStreamDestroy": lambda d: d.destroy_stream(1),
    "cudaStreamSynchronize": lambda d: d.synchronize(1),
    "cudaMalloc": lambda d: d.allocate(16),
    "cudaFree": lambda d: d.free(16),
    "cudaHostAlloc": lambda d: d.allocate_pinned(16),
    "cudaFreeHost": lambda d: d.free_pinned(16),
    "cudaStreamBeginCapture": lambda d: d.record(1, lambda: None),
}


@no_gpu_here
@pytest.mark.parametrize("call", CALLS)
def test_every_cuda_error_is_raised_with_its_name_its_text_and_what_to_do(call: str) -> None:
    with pytest.raises(CudaError) as refused:
        CALLS[call](Device(0, "rtx"))
    error = refused.value
    assert error.name in {"cudaErrorInsufficientDriver", "cudaErrorNoDevice"}
    assert error.what.startswith(f"{call} failed: {error.name}, ")
    assert "CUDA" in error.what.removeprefix(call)
    assert "doctor" in error.hint
    assert error.exit_code == ExitCode.ENVIRONMENT


def test_errors_whose_names_are_known_to_us_exist() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    known = {error.name for error in runtime.cudaError_t}
    assert known >= cuda_module._NO_GPU | cuda_module._NO_SUCH_GPU | {"cudaErrorMemoryAllocation"}
    assert any(name.startswith("cudaErrorStreamCapture") for name in known)
    advice = {cuda_module._advice(name) for name in known}
    assert len(advice) == 5


def test_floats_at_an_address_are_that_memory() -> None:
    memory = np.arange(6, dtype=np.float32)
    view = floats_at(memory.ctypes.data, 6)
    assert view.dtype == np.float32
    view[2] = 7
    assert memory.tolist() == [0, 1, 7, 3, 4, 5]


def attributes(source: object, receivers: dict[str, str]) -> dict[str, set[str]]:
    """Return the attributes that a piece of source uses, by what they are used on."""
    found: dict[str, set[str]] = {kind: set() for kind in receivers.values()}
    tree = ast.parse(inspect.getsource(source))  # type: ignore[arg-type]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in receivers:
            found[receivers[ast.unparse(node.value)]].add(node.attr)
    return found


def test_every_cuda_name_in_the_source_exists() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    used = attributes(cuda_module, {"self._api": "api", "api": "api"})["api"]
    calls = set(re.findall(r'_call\(\s*"(\w+)"', inspect.getsource(cuda_module)))
    assert {"cudaGraphLaunch", "cudaMemcpyAsync", *CALLS} <= calls
    assert {"cudaError_t", "cudaMemcpyKind", "cudaGetLastError"} <= used
    for name in used | calls:
        assert hasattr(runtime, name), name
    for kind in ("cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost"):
        assert hasattr(runtime.cudaMemcpyKind, kind)
    assert hasattr(runtime.cudaStreamCaptureMode, "cudaStreamCaptureModeThreadLocal")


ANSWERS = {  # what is tested for in the source, as the library's own documentation has it
    "IExecutionContext.set_input_shape": "-> bool",
    "IExecutionContext.set_tensor_address": "-> bool",
    "IExecutionContext.execute_async_v3": "stream_handle: typing.SupportsInt) -> bool",
    "IExecutionContext.infer_shapes": "-> list[str]",
    "IExecutionContext.set_device_memory": "memory: typing.SupportsInt, size: typing.SupportsInt",
    "ICudaEngine.get_tensor_profile_shape": "name: str, profile_index: typing.SupportsInt) -> list",
    "ICudaEngine.create_execution_context": "strategy: ",
    "Runtime.deserialize_cuda_engine": "or None if it could not be deserialized",
}
RTX_ANSWERS = {
    "ICudaEngine.create_execution_context": "runtime_config: ",
    "IRuntimeConfig.set_runtime_cache": "-> bool",
    "IRuntimeCache.deserialize": "-> bool",
    "IRuntimeCache.serialize": "IHostMemory",
}


@pytest.mark.parametrize("module", ["tensorrt_rtx", "tensorrt"])
def test_every_name_of_the_library_in_the_source_exists(module: str) -> None:
    """Read from the source, so that no name can be used and not be checked here."""
    trt = pytest.importorskip(module)
    used = attributes(
        Engine,
        {
            "self._trt": "module",
            "trt": "module",
            "self._trt.ExecutionContextAllocationStrategy": "ExecutionContextAllocationStrategy",
            "trt.DynamicShapesKernelSpecializationStrategy": (
                "DynamicShapesKernelSpecializationStrategy"
            ),
            "graphs": "CudaGraphStrategy",
            "self._runtime": "Runtime",
            "self._engine": "ICudaEngine",
            "engine": "ICudaEngine",
            "config": "IRuntimeConfig",
            "self._cache": "IRuntimeCache",
        },
    )
    context = attributes(engine.Execution, {"context": "IExecutionContext"})
    settings = set(re.findall(r'"(\w+_strategy)"', inspect.getsource(Engine)))
    assert len(settings) == 2
    used["IRuntimeConfig"] |= settings
    assert {"execute_async_v3", "infer_shapes", "set_device_memory"} <= context["IExecutionContext"]
    assert {"deserialize_cuda_engine"} <= used["Runtime"]
    assert {"device_memory_size_v2", "num_io_tensors"} <= used["ICudaEngine"]
    only_rtx = {
        "CudaGraphStrategy", "DynamicShapesKernelSpecializationStrategy", "IRuntimeCache",
        "IRuntimeConfig",
    }  # fmt: skip
    rtx = module == "tensorrt_rtx"
    for kind, names in {**used, **context}.items():
        if kind in only_rtx and not rtx:
            continue
        owner = trt if kind == "module" else getattr(trt, kind)
        for name in names - (set() if rtx else only_rtx):
            assert hasattr(owner, name), f"{kind}.{name}"
    for place, words in {**ANSWERS, **(RTX_ANSWERS if rtx else {})}.items():
        kind, name = place.split(".")
        assert words in getattr(getattr(trt, kind), name).__doc__, place
    assert trt.TensorIOMode.INPUT.name == "INPUT"
    assert trt.TensorIOMode.OUTPUT.name == "OUTPUT"
    assert trt.TensorLocation.DEVICE.name == "DEVICE"
    assert trt.DataType.FLOAT.name == "FLOAT"


def test_the_library_without_a_driver_refuses_by_none_and_a_log(built: BuiltEngine) -> None:
    """What the runtime relies on: no exception, no crash, and the reason in the log."""
    if this_machine().gpus:
        pytest.skip("this machine has a GPU")
    from ccn_deploy.runtimes.tensorrt.library import capture, load_library, logger

    trt = load_library(RTX, "for a test")
    with capture() as log:
        assert trt.Runtime(logger(trt)).deserialize_cuda_engine(built.plan) is None
    assert "CUDA driver" in engine._lines(log)


def test_a_bundle_with_engines_opens_and_runs_elsewhere(bundle: Bundle) -> None:
    """The engine is no hindrance to the runtimes that this machine has."""
    with open_runtime(open_bundle(bundle.path)) as runtime:
        assert runtime.logits(np.zeros((1, *SHAPE), np.float32)).shape == (1, 10)
