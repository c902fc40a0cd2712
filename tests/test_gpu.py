"""What only a GPU can show. Run by `make test-gpu`; docs/gpu.md says what has been seen so far.

The truth is ONNX Runtime on the CPU in float32, or float64 PyTorch, of the same bundle.
"""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.errors import EngineUnfitError, IntegrityError
from ccn_deploy.exporters.tensorrt.build import BuiltEngine
from ccn_deploy.machine import this_machine
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.runtimes.compatibility import choose_engine
from ccn_deploy.runtimes.tensorrt.cuda import CudaError, Device
from ccn_deploy.runtimes.tensorrt.library import LIBRARIES, load_library
from ccn_deploy.runtimes.tensorrt.runtime import kernels_file
from ccn_deploy.targets import Role, Target
from tests.engines import engine_file, with_files

pytestmark = pytest.mark.gpu

LOW, BEST, HIGH = 2, 8, 32
"""The profile of the engines; batches below and above it are tested."""

# Largest difference to float32 on the CPU, as a part of the largest logit. The formats' own
# rounding, with room for other kernels; verify-parity has the derived bounds.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1, "int8": 2e-1, "fp8": 5e-1}
PRECISIONS = list(TOLERANCE)


@pytest.fixture(scope="module", params=list(LIBRARIES))
def library(request: pytest.FixtureRequest) -> str:
    """Each library that is installed and can be asked to build for this GPU."""
    name = str(request.param)
    if importlib.util.find_spec(LIBRARIES[name].module) is None:
        pytest.skip(f"{name} is not installed")
    gpu = this_machine().gpus[0]
    if LIBRARIES[name].portable:
        targets = load_library(name, "for a test").ComputeCapability.__members__
        if f"SM{gpu.compute_capability.replace('.', '')}" not in targets:
            pytest.skip(f"{name} cannot be asked to build for {gpu.compute_capability}: {gpu.name}")
    return name


@pytest.fixture(scope="module")
def bundle(
    library: str, trained_run: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Bundle:
    """A trained CCN with engines of every precision, exported by the command."""
    output = tmp_path_factory.mktemp(library) / "bundle"
    capability = this_machine().gpus[0].compute_capability
    target = ["--compute-capability", capability] if LIBRARIES[library].portable else []
    command = [
        sys.executable, "-m", "ccn_deploy.cli.main", "export", str(trained_run("ccn")),
        "--output", str(output), "--format", library, "--batch", f"{LOW},{BEST},{HIGH}",
        "--calibration-samples", "256", *target,
        *(word for precision in PRECISIONS for word in ("--precision", precision)),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return open_bundle(output)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def digits(count: int) -> np.ndarray:
    dataset = load_dataset("mnist5k", "test")
    return dataset.images(np.arange(count))


def close_to(found: np.ndarray, wanted: np.ndarray, part: float) -> None:
    largest = np.abs(wanted).max()
    off = np.abs(found - wanted).max() / largest
    assert off <= part, f"off by {off:.2e} of the largest logit, allowed {part:.0e}"
    print(f"off by {off:.2e} of the largest logit, allowed {part:.0e}")


def on_the_cpu(bundle: Bundle, images: np.ndarray) -> np.ndarray:
    with open_runtime(bundle, "onnxruntime-cpu") as runtime:
        return runtime.logits(images)


# Answers


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_agrees_with_the_cpu(bundle: Bundle, library: str, precision: str) -> None:
    if not bundle.files(Role.ENGINE, precision, library):
        pytest.skip(f"the export made no engine in {precision}")
    x = digits(HIGH)
    wanted = on_the_cpu(bundle, x)
    with open_runtime(bundle, library, precision) as runtime:
        found = runtime.logits(x)
        assert (runtime.spec.max_batch, runtime.spec.device) == (HIGH, "cuda:0")
    close_to(found, wanted, TOLERANCE[precision])
    assert (found.argmax(1) == wanted.argmax(1)).mean() >= 0.9


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("count", [0, 1, LOW, 5, HIGH, HIGH + 1, 3 * HIGH - 1])
def test_batches_outside_the_profile_are_answered_row_by_row(
    bundle: Bundle, library: str, count: int, cuda_graphs: bool
) -> None:
    x = digits(count)
    with open_runtime(bundle, library, options=RuntimeOptions(cuda_graphs=cuda_graphs)) as runtime:
        for _ in range(4):  # plain, captured, replayed, replayed
            found = runtime.logits(x)
            assert found.shape == (count, 10)
            if count:
                close_to(found, on_the_cpu(bundle, x), TOLERANCE["fp32"])


def test_graphs_change_no_bit_and_sizes_may_alternate(bundle: Bundle, library: str) -> None:
    x = digits(HIGH)
    answers: dict[bool, list[np.ndarray]] = {}
    for cuda_graphs in (True, False):
        options = RuntimeOptions(cuda_graphs=cuda_graphs)
        with open_runtime(bundle, library, options=options) as runtime:
            answers[cuda_graphs] = [
                runtime.logits(x[:count]) for _ in range(4) for count in (3, 17, HIGH, 8)
            ]
    for first, second in zip(answers[True], answers[False], strict=True):
        assert np.array_equal(first, second)
    for turn in range(4, 16):  # and the same question has the same answer every time
        assert np.array_equal(answers[True][turn], answers[True][turn - 4])


@pytest.mark.parametrize("candidates", [1, 9, 11])
def test_gradients_agree_with_float64(bundle: Bundle, library: str, candidates: int) -> None:
    x = digits(HIGH + 3)
    rng = np.random.default_rng(0)
    c = rng.standard_normal((len(x), candidates, 10)).astype(np.float32)
    with open_runtime(bundle, library) as runtime:
        assert runtime.differentiable
        for _ in range(3):
            logits, gradients = runtime.vjp(x, c)
    with open_runtime(bundle, "torch", "fp64") as reference:
        wanted, slopes = reference.vjp(x, c)
    close_to(logits, wanted, 1e-4)
    close_to(gradients, slopes, 1e-3)


def test_memory_layout_does_not_matter(bundle: Bundle, library: str) -> None:
    x = digits(5)
    with open_runtime(bundle, library) as runtime:
        wanted = runtime.logits(x)
        for same in (np.asfortranarray(x), np.repeat(x, 2, axis=0)[::2]):
            assert np.array_equal(runtime.logits(same), wanted)


# Threads and memory


def test_eight_threads_get_what_one_gets(bundle: Bundle, library: str) -> None:
    x = digits(HIGH)
    sizes = [1, 3, 8, HIGH]
    with open_runtime(bundle, library) as runtime:
        wanted = {count: runtime.logits(x[:count]) for count in sizes}
        faults: list[BaseException] = []

        def ask(seed: int) -> None:
            try:
                for turn in range(100):
                    count = sizes[(seed + turn) % len(sizes)]
                    assert np.array_equal(runtime.logits(x[:count]), wanted[count])
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not faults, faults[0]


def test_closing_gives_the_memory_back(bundle: Bundle, library: str) -> None:
    device = Device(0, LIBRARIES[library].extra)
    device.use()
    x = digits(HIGH)

    def once() -> None:
        with open_runtime(bundle, library) as runtime:
            for _ in range(3):
                runtime.logits(x)
            runtime.vjp(x, np.ones((HIGH, 9, 10), np.float32))
        gc.collect()

    once()  # what the libraries load once for the process
    before = device.memory()[0]
    for _ in range(5):
        once()
    lost = before - device.memory()[0]
    print(f"{lost / 2**20:.1f} MiB less free after five more runtimes")
    assert lost < 8 << 20


def test_memory_that_is_not_there_is_a_typed_error(bundle: Bundle, library: str) -> None:
    device = Device(0, LIBRARIES[library].extra)
    device.use()
    with pytest.raises(CudaError, match="cudaErrorMemoryAllocation"):
        device.allocate(1 << 50)
    with open_runtime(bundle, library) as runtime:  # and the error does not stick
        assert np.isfinite(runtime.logits(digits(3))).all()


# Kernels on disk, and engines that do not fit


def test_kernels_are_kept_for_the_next_process(bundle: Bundle, library: str) -> None:
    if not LIBRARIES[library].portable:
        pytest.skip(f"{library} compiles nothing when it runs")
    record = choose_engine(bundle, Target(library, "fp32"), this_machine())
    kept = kernels_file(record, library, this_machine(), 0)
    assert kept is not None
    x = digits(8)
    with open_runtime(bundle, library) as runtime:
        first = runtime.logits(x)
        assert kept.is_file()
    size = kept.stat().st_size
    with open_runtime(bundle, library) as runtime:
        assert np.array_equal(runtime.logits(x), first)
    kept.write_bytes(kept.read_bytes()[: size // 2])
    with open_runtime(bundle, library) as runtime:
        assert np.array_equal(runtime.logits(x), first)
    assert kept.stat().st_size > size // 2
    print(f"{size:,} bytes of kernels at {kept.name}")


def test_another_gpu_and_another_release_are_refused(bundle: Bundle, library: str) -> None:
    here = this_machine()
    other = replace(here.gpus[0], compute_capability="5.0")
    with pytest.raises(EngineUnfitError, match=r"5\.0"):
        choose_engine(bundle, Target(library, "fp32"), replace(here, gpus=(other,)))
    with pytest.raises(EngineUnfitError, match="older"):
        older = {**here.packages, LIBRARIES[library].distribution: "0.1.0"}
        choose_engine(bundle, Target(library, "fp32"), replace(here, packages=older))


def test_a_plan_that_is_none_is_refused_with_the_log(
    bundle: Bundle, library: str, tmp_path: Path
) -> None:
    record = choose_engine(bundle, Target(library, "fp32"), this_machine())
    built = BuiltEngine(bundle.read(record), dict(record.details))
    half = built.plan[: len(built.plan) // 2]
    spoilt = with_files(bundle, tmp_path / "b", engine_file(built, half, precision="spoilt"))
    with pytest.raises((EngineUnfitError, IntegrityError)) as refused:
        open_runtime(spoilt, library, "spoilt")
    print(refused.value)


# Whether TensorRT-RTX runs on a GPU that it cannot be asked to build for, such as an H100


def test_what_rtx_does_with_its_default_engine_here(
    trained_run: Callable[[str], Path], tmp_path: Path
) -> None:
    """In a process of its own; reports, and fails only if an engine that was accepted is wrong."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("tensorrt-rtx is not installed")
    from ccn_deploy.exporters import export_bundle
    from ccn_deploy.runs import open_run

    plain = export_bundle(open_run(trained_run("ccn")), tmp_path / "plain", gradient=False)
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(plain.path), str(tmp_path / "probe")],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    gpu = this_machine().gpus[0]
    print(f"{gpu.name}, compute capability {gpu.compute_capability}")
    print(f"exit status {done.returncode}")
    print(done.stdout)
    print(done.stderr[-2000:])
    assert "WRONG" not in done.stdout


PROBE = """
import sys
from pathlib import Path
import numpy as np
from ccn_deploy.bundle import open_bundle
from ccn_deploy.machine import this_machine
from ccn_deploy.runtimes import open_runtime
from ccn_deploy.runtimes.tensorrt.library import capture, load_library, logger
from ccn_deploy.exporters.tensorrt.build import Batches
from tests.engines import build_rtx, engine_file, with_files

bundle = open_bundle(sys.argv[1])
built = build_rtx(bundle, Batches(1, 4, 8))
trt = load_library("tensorrt-rtx", "to probe")
with capture() as log:
    validity = trt.Runtime(logger(trt)).get_engine_validity(built.plan)
print("validity of the default engine:", validity)
print("log:", log.at_least("WARNING"))
here = this_machine().gpus[0].compute_capability
forced = with_files(bundle, Path(sys.argv[2]), engine_file(built, compute_capabilities=[here]))
try:
    with open_runtime(forced, "tensorrt-rtx") as runtime:
        x = np.random.default_rng(0).random((4, 1, 28, 28), dtype=np.float32)
        found = runtime.logits(x)
except Exception as error:
    print("refused:", type(error).__name__, error)
else:
    with open_runtime(bundle, "onnxruntime-cpu") as cpu:
        wanted = cpu.logits(x)
    off = np.abs(found - wanted).max() / np.abs(wanted).max()
    print("runs here:", "right" if off < 1e-3 else "WRONG", f"off by {off:.2e}")
"""


# The other runtimes on a GPU


def test_onnxruntime_on_cuda_agrees_with_the_cpu(exported: Callable[[str], Path]) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no CUDA provider")
    bundle = open_bundle(exported("ccn"))
    x = digits(70)
    c = np.random.default_rng(0).standard_normal((70, 9, 10)).astype(np.float32)
    with open_runtime(bundle, "onnxruntime-cuda") as runtime:
        found = runtime.logits(x)
        logits, gradients = runtime.vjp(x, c)
    with open_runtime(bundle, "onnxruntime-cpu") as reference:
        wanted, slopes = reference.vjp(x, c)
    close_to(found, wanted, 1e-4)
    close_to(logits, wanted, 1e-4)
    close_to(gradients, slopes, 1e-3)


def test_torch_on_cuda_agrees_with_float64(exported: Callable[[str], Path]) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"PyTorch {torch.__version__} has no CUDA here")
    bundle = open_bundle(exported("ccn"))
    x = digits(70)
    c = np.random.default_rng(0).standard_normal((70, 9, 10)).astype(np.float32)
    with open_runtime(bundle, "torch-cuda") as runtime:
        logits, gradients = runtime.vjp(x, c)
    with open_runtime(bundle, "torch", "fp64") as reference:
        wanted, slopes = reference.vjp(x, c)
    close_to(logits, wanted, 1e-4)
    close_to(gradients, slopes, 1e-3)
