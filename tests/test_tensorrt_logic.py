"""The TensorRT runtime on a simulated GPU: staging, padding, graphs, threads, and every failure."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ccn_deploy.bundle import Bundle, NewFile, write_bundle
from ccn_deploy.errors import (
    EngineUnfitError,
    InputError,
    IntegrityError,
    RuntimeUnavailableError,
    UsageError,
)
from ccn_deploy.machine import Gpu as GpuFacts
from ccn_deploy.machine import Machine
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.runtimes.tensorrt import runtime as tensorrt
from ccn_deploy.runtimes.tensorrt.cuda import CudaError
from ccn_deploy.runtimes.tensorrt.engine import GRAPHS
from ccn_deploy.targets import Role
from tests.cards import a_card
from tests.simulated_gpu import Gpu, cuda_module, trt_module

IMAGE = (2, 3, 3)
CLASSES = 4
MACHINE = Machine(
    system="linux",
    architecture="x86_64",
    python="3.11.7",
    packages={"tensorrt": "11.4.0", "tensorrt-rtx": "1.7.1", "cuda-python": "13.4.4"},
    driver="580.1 (CUDA 13.0)",
    no_gpu_reason="",
    gpus=(GpuFacts(0, "NVIDIA Simulated", "8.9", 1 << 30),),
)


@dataclass
class World:
    gpu: Gpu
    trt: ModuleType
    rtx: ModuleType
    bundle: Callable[..., Bundle]

    def clean(self) -> None:
        assert not self.gpu.faults
        if any(self.gpu.held.values()):  # by the frames of an error that was caught
            gc.collect()
        assert not any(self.gpu.held.values()), self.gpu.held


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    weight = np.random.default_rng(0).standard_normal((18, CLASSES)).astype(np.float32)
    gpu = Gpu(weight)
    trt, rtx = trt_module(gpu), trt_module(gpu, eager=True)
    trt.image = rtx.image = IMAGE  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", rtx)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda_module(gpu))
    monkeypatch.setattr(tensorrt, "this_machine", lambda: MACHINE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def bundle(
        library: str = "tensorrt", forward: str = "1 4 8", gradient: str | None = "2 4 6 2 3 3"
    ) -> Bundle:
        magic = {"tensorrt": "ftrt", "tensorrt-rtx": "vtrt"}[library]
        details = {
            "library": library,
            "version": MACHINE.packages[library],
            "magic": magic,
            "system": "linux",
            "machine": "x86_64",
            "compute_capabilities": ["8.9"],
        }
        plans = {"engine": forward, **({"gradient-engine": gradient} if gradient else {})}
        files = [
            NewFile(f"{role}.engine", f"{magic} {plan}".encode(), Role(role), "fp32", library,
                    details=details)
            for role, plan in plans.items()
        ]  # fmt: skip
        return write_bundle(
            tmp_path / "bundle",
            card=a_card(input_shape=IMAGE, class_names=("a", "b", "c", "d")),
            files=files,
            overwrite=True,
        )

    yield World(gpu, trt, rtx, bundle)
    assert not gpu.faults


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, *IMAGE), dtype=np.float32)


def truth(world: World, x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), 18) @ world.gpu.weight


BOTH = pytest.mark.parametrize("library", ["tensorrt", "tensorrt-rtx"])
GRAPHS_ON_OFF = pytest.mark.parametrize("cuda_graphs", [True, False])


@BOTH
@GRAPHS_ON_OFF
def test_every_batch_size_is_answered_again_and_again(
    world: World, library: str, cuda_graphs: bool
) -> None:
    options = RuntimeOptions(cuda_graphs=cuda_graphs)
    with open_runtime(world.bundle(library, "3 4 8"), library, options=options) as runtime:
        assert runtime.spec.max_batch == 8
        for again in range(4):
            for count in (0, 1, 2, 3, 5, 8, 9, 20):
                x = images(count, seed=again)
                assert runtime.logits(x) == pytest.approx(truth(world, x), abs=1e-5)
        assert (world.gpu.launches > 0) is (cuda_graphs and library == "tensorrt")
    world.clean()


@GRAPHS_ON_OFF
def test_gradients_are_split_and_padded_in_both_directions(world: World, cuda_graphs: bool) -> None:
    options = RuntimeOptions(cuda_graphs=cuda_graphs)
    with open_runtime(world.bundle(), "tensorrt", options=options) as runtime:
        assert runtime.differentiable
        for _ in range(3):
            for count, k in [(0, 2), (1, 1), (2, 3), (6, 4), (7, 7), (13, 0)]:
                x = images(count, seed=k)
                c = np.random.default_rng(k).standard_normal((count, k, CLASSES)).astype(np.float32)
                logits, gradients = runtime.vjp(x, c)
                assert logits == pytest.approx(truth(world, x), abs=1e-5)
                wanted = (c @ world.gpu.weight.T).reshape(count, k, *IMAGE)
                assert gradients.shape == wanted.shape
                assert gradients == pytest.approx(wanted, abs=1e-5)
    world.clean()


def test_a_batch_below_the_profile_is_filled_up_with_zeros(world: World) -> None:
    with open_runtime(world.bundle("tensorrt", "5 8 8"), "tensorrt") as runtime:
        for count in (8, 2, 5, 3):
            x = images(count, seed=count)
            runtime.logits(x)
            assert np.array_equal(world.gpu.seen[:count], x)
            assert world.gpu.seen.shape == (max(count, 5), *IMAGE)
            assert not world.gpu.seen[count:].any()


def test_a_size_is_captured_when_it_comes_the_second_time(world: World) -> None:
    with open_runtime(world.bundle(), "tensorrt") as runtime:
        steps = []
        for _ in range(4):
            runtime.logits(images(5))
            steps.append((world.gpu.enqueued, world.gpu.launches))
        # run; run, capture and replay; replay; replay
        assert steps == [(1, 0), (3, 1), (3, 2), (3, 3)]
        runtime.logits(images(2))
        runtime.logits(images(5))  # the graph's own context has not moved
        assert (world.gpu.enqueued, world.gpu.launches) == (4, 4)
    world.clean()


def test_graphs_are_limited_in_number(world: World) -> None:
    with open_runtime(world.bundle("tensorrt", "1 10 20"), "tensorrt") as runtime:
        for _ in range(3):
            for count in range(1, GRAPHS + 4):
                x = images(count)
                assert runtime.logits(x) == pytest.approx(truth(world, x), abs=1e-5)
        assert len(world.gpu.executables) == GRAPHS
    world.clean()


def test_any_layout_and_no_array_of_the_caller_is_kept(world: World) -> None:
    with open_runtime(world.bundle(), "tensorrt") as runtime:
        x = images(4)
        wanted = truth(world, x)
        fixed = x.copy()
        fixed.flags.writeable = False
        for same in (x[::1], np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2], fixed):
            assert runtime.logits(same) == pytest.approx(wanted, abs=1e-5)
        first = runtime.logits(x)
        kept = first.copy()
        runtime.logits(images(4, seed=9))
        assert np.array_equal(first, kept)
    assert np.array_equal(first, kept)  # and its memory was not the one that is freed


def test_max_batch_makes_smaller_pieces(world: World) -> None:
    with open_runtime(world.bundle(), "tensorrt", options=RuntimeOptions(max_batch=3)) as runtime:
        assert runtime.spec.max_batch == 3
        x = images(8)
        assert runtime.logits(x) == pytest.approx(truth(world, x), abs=1e-5)
        assert world.gpu.enqueued == 4  # 3; 3, to run and to capture; 2
        assert world.gpu.launches == 1
    world.clean()


def test_threads_have_streams_of_their_own(world: World) -> None:
    runtime = open_runtime(world.bundle(), "tensorrt")
    faults: list[Any] = []

    def work(seed: int) -> None:
        try:
            for turn in range(20):
                x = images(1 + (seed + turn) % 8, seed)
                assert runtime.logits(x) == pytest.approx(truth(world, x), abs=1e-5)
                if turn % 5 == 0:
                    c = np.ones((len(x), 1, CLASSES), np.float32)
                    wanted = np.broadcast_to(world.gpu.weight.sum(1), (len(x), 18))
                    gradients = runtime.vjp(x, c)[1].reshape(len(x), 18)
                    assert gradients == pytest.approx(wanted, abs=1e-5)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert 2 <= len(world.gpu.streams) <= 12
    runtime.close()
    world.clean()


def test_close_is_final_and_collection_closes(world: World) -> None:
    runtime = open_runtime(world.bundle(), "tensorrt")
    runtime.logits(images(1))
    runtime.vjp(images(1), np.ones((1, 1, CLASSES), np.float32))
    runtime.close()
    runtime.close()
    with pytest.raises(UsageError, match="closed"):
        runtime.logits(images(1))
    with pytest.raises(UsageError, match="closed"):
        runtime.vjp(images(1), np.ones((1, 1, CLASSES), np.float32))
    world.clean()
    runtime = open_runtime(world.bundle(), "tensorrt")
    runtime.logits(images(1))
    del runtime
    world.clean()


def test_wrong_images_cost_nothing_and_spoil_nothing(world: World) -> None:
    with open_runtime(world.bundle(), "tensorrt") as runtime:
        runtime.logits(images(1))
        streams = set(world.gpu.streams)
        with pytest.raises(InputError):
            runtime.logits(images(1) + 2)
        with pytest.raises(InputError):
            runtime.vjp(images(2), np.ones((1, 1, CLASSES), np.float32))
        runtime.logits(images(1))
        assert set(world.gpu.streams) == streams


@BOTH
def test_whatever_call_fails_the_error_is_raised_and_nothing_is_left(
    world: World, library: str
) -> None:
    """Fail the first call, the second, ... of opening, running, capturing and differentiating."""
    bundle = world.bundle(library)
    x, c = images(5), np.ones((5, 1, CLASSES), np.float32)

    def everything() -> None:
        with open_runtime(bundle, library) as runtime:
            for _ in range(4):
                runtime.logits(x)
                runtime.logits(x[:2])
            for _ in range(3):
                runtime.vjp(x, c)

    everything()
    total, failures = world.gpu.calls, 0
    for at in range(total):
        world.gpu.fail_at = at
        try:
            everything()
        except (CudaError, RuntimeUnavailableError) as error:
            assert error.hint
            failures += 1
        world.gpu.fail_at = None
        world.clean()
    assert failures > 0.8 * total  # the rest fell while something was being released


def test_a_call_after_a_failure_works(world: World) -> None:
    with open_runtime(world.bundle(), "tensorrt") as runtime:
        x = images(5)
        runtime.logits(x)
        for at in range(12):
            world.gpu.fail_at = at
            with pytest.raises(RuntimeUnavailableError):
                for _ in range(3):
                    runtime.logits(x)
            world.gpu.fail_at = None
            assert runtime.logits(x) == pytest.approx(truth(world, x), abs=1e-5)
    world.clean()


def test_a_refused_plan_is_told_with_its_log(world: World) -> None:
    with pytest.raises(EngineUnfitError, match="simulated: no plan"):
        open_runtime(world.bundle(forward="nonsense"), "tensorrt")
    with pytest.raises(IntegrityError, match="no engine of this bundle's network"):
        open_runtime(world.bundle(forward="1 4 8 1 1 1"), "tensorrt")
    world.clean()


def test_without_a_gradient_engine_that_fits_there_are_no_gradients(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_runtime(world.bundle(gradient=None), "tensorrt") as runtime:
        assert not runtime.differentiable
        with pytest.raises(RuntimeUnavailableError, match="gradient engine"):
            runtime.vjp(images(1), np.ones((1, 1, CLASSES), np.float32))


def test_the_spec_says_what_shapes_the_numbers(world: World) -> None:
    with open_runtime(world.bundle(), "tensorrt") as runtime:
        spec = runtime.spec
    assert spec.target == "tensorrt-fp32"
    assert (spec.device, spec.graph, spec.thread_safe) == ("cuda:0", "engine.engine", True)
    assert spec.versions == {
        "tensorrt": "11.4.0",
        "driver": "580.1 (CUDA 13.0)",
        "gpu": "NVIDIA Simulated",
    }


# Kernels of TensorRT-RTX


def kernels(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.kernels"))


def test_kernels_are_kept_and_taken_back(world: World, tmp_path: Path) -> None:
    bundle = world.bundle("tensorrt-rtx")
    with open_runtime(bundle, "tensorrt-rtx") as runtime:
        assert world.rtx.taken == []
        runtime.logits(images(1))
        assert len(kernels(tmp_path)) == 1  # already: a killed process loses little
    with open_runtime(bundle, "tensorrt-rtx") as runtime:
        (blob,) = world.rtx.taken
        assert blob.startswith(b"kernels:+")
    kernels(tmp_path)[0].write_bytes(b"damaged")
    with open_runtime(bundle, "tensorrt-rtx") as runtime:
        assert len(world.rtx.taken) == 1  # the library never saw it
        assert runtime.logits(images(2)).shape == (2, CLASSES)
    world.clean()


def test_kernels_that_the_library_refuses_are_replaced(world: World, tmp_path: Path) -> None:
    from ccn_deploy.runtimes.tensorrt.kernel_cache import load_kernels, store_kernels

    bundle = world.bundle("tensorrt-rtx")
    with open_runtime(bundle, "tensorrt-rtx") as runtime:
        runtime.logits(images(1))
    (path,) = kernels(tmp_path)
    store_kernels(path, b"of another driver")
    with open_runtime(bundle, "tensorrt-rtx") as runtime:
        runtime.logits(images(1))
    assert (load_kernels(path) or b"").startswith(b"kernels:")


def test_kernels_are_written_ever_more_rarely(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ccn_deploy.runtimes.tensorrt import engine

    written = []
    monkeypatch.setattr(engine, "store_kernels", lambda path, blob: written.append(blob))
    with open_runtime(world.bundle("tensorrt-rtx", "1 8 16"), "tensorrt-rtx") as runtime:
        for count in [*range(1, 17), *range(1, 17)]:
            runtime.logits(images(count))
        assert len(written) == 5  # at the 1st, 2nd, 4th, 8th and 16th size
    assert len(written) == 6


def test_without_a_place_for_kernels_it_runs(world: World, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    with open_runtime(world.bundle("tensorrt-rtx"), "tensorrt-rtx") as runtime:
        assert runtime.logits(images(2)).shape == (2, CLASSES)
    world.clean()


def test_another_device_is_another_machine(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineUnfitError, match="GPU 1"):
        open_runtime(world.bundle(), "tensorrt", options=RuntimeOptions(device=1))
    two = replace(MACHINE, gpus=(MACHINE.gpus[0], replace(MACHINE.gpus[0], index=1)))
    monkeypatch.setattr(tensorrt, "this_machine", lambda: two)
    with open_runtime(world.bundle(), "tensorrt", options=RuntimeOptions(device=1)) as runtime:
        runtime.logits(images(1))
        assert world.gpu.chosen.device == 1
        assert runtime.spec.device == "cuda:1"
