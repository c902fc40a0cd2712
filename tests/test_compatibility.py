"""Which engine runs where: every refusal told apart, before a deserializer sees a byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from ccn_deploy.bundle import Bundle, FileRecord, NewFile, write_bundle
from ccn_deploy.errors import (
    CcnDeployError,
    EngineUnfitError,
    ExitCode,
    IntegrityError,
    MissingExtraError,
    RuntimeUnavailableError,
)
from ccn_deploy.machine import NO_CUDA_PYTHON, NO_DRIVER, Gpu, Machine
from ccn_deploy.runtimes.compatibility import (
    candidates_for,
    check_engine,
    choose_engine,
)
from ccn_deploy.targets import Role, Target
from tests.cards import a_card

RTX = {
    "library": "tensorrt-rtx",
    "version": "1.7.1.116",
    "magic": "vtrt",
    "system": "linux",
    "machine": "x86_64",
    "compute_capabilities": ["8.6", "8.9"],
}
TRT = {**RTX, "library": "tensorrt", "version": "11.4.0.2", "magic": "ftrt"}
TRT["compute_capabilities"] = ["9.0"]

L4 = Gpu(0, "NVIDIA L4", "8.9", 24 << 30)
H100 = Gpu(0, "NVIDIA H100", "9.0", 80 << 30)
WITH_L4 = Machine(
    system="linux",
    architecture="x86_64",
    python="3.12.1",
    packages={
        "onnxruntime-gpu": "1.32.0",
        "tensorrt": "11.4.0.2",
        "tensorrt-rtx": "1.7.1.116",
        "cuda-python": "13.4.4",
    },
    driver="580.95.05 (CUDA 13.0)",
    no_gpu_reason="",
    gpus=(L4,),
)
FP32 = Target("tensorrt-rtx", "fp32")
NO_GPU = replace(WITH_L4, driver=None, no_gpu_reason=NO_DRIVER, gpus=())


def engine(
    details: Mapping[str, Any], precision: str = "fp32", name: str = "e", data: bytes = b""
) -> NewFile:
    library = details["library"]
    data = data or str(details["magic"]).encode() + b" and the plan " + name.encode()
    path = f"engines/{library}-{precision}-{name}.engine"
    return NewFile(path, data, Role.ENGINE, precision, library, details=details)


def graph(precision: str, role: Role = Role.FORWARD, runtime: str = "") -> NewFile:
    return NewFile(f"graphs/{role}-{precision}{runtime}.onnx", b"?", role, precision, runtime)


@pytest.fixture
def bundle_of(tmp_path: Path) -> Callable[..., Bundle]:
    def write(*files: NewFile) -> Bundle:
        return write_bundle(
            tmp_path / "bundle",
            card=a_card(),
            files=files,
            overwrite=True,
        )

    return write


def check(
    details: Mapping[str, Any], machine: Machine, head: bytes | None = None, **options: int
) -> None:
    file = engine(details)
    check_engine(file.record(), file.data[:4] if head is None else head, machine, **options)


def test_an_engine_for_this_machine_fits() -> None:
    check(RTX, WITH_L4)
    check(TRT, replace(WITH_L4, gpus=(H100,)))


@pytest.mark.parametrize(
    ("details", "machine", "error", "words"),
    [
        pytest.param(
            RTX,
            replace(WITH_L4, packages={"cuda-python": "13"}),
            MissingExtraError,
            ["'tensorrt-rtx'", "ccn-deploy[rtx]"],
            id="library",
        ),
        pytest.param(
            TRT,
            replace(WITH_L4, packages={"cuda-python": "13"}),
            MissingExtraError,
            ["'tensorrt'", "ccn-deploy[gpu]"],
            id="library of the other extra",
        ),
        pytest.param(
            {**RTX, "version": "1.6.9.200"},
            WITH_L4,
            EngineUnfitError,
            ["1.6.9.200", "1.7.1.116", "newer", "ccn-deploy export", "tensorrt-rtx==1.6.9.200"],
            id="older release",
        ),
        pytest.param(
            {**RTX, "version": "1.10.0.1"},
            WITH_L4,
            EngineUnfitError,
            ["1.10.0.1", "older", "Upgrade with: pip install 'tensorrt-rtx==1.10.0.1'"],
            id="future release",
        ),
        pytest.param(
            {**RTX, "system": "windows"},
            WITH_L4,
            EngineUnfitError,
            ["windows x86_64", "linux x86_64"],
            id="system",
        ),
        pytest.param(
            {**RTX, "machine": "aarch64"},
            WITH_L4,
            EngineUnfitError,
            ["linux aarch64"],
            id="architecture",
        ),
        pytest.param(RTX, NO_GPU, EngineUnfitError, ["no NVIDIA driver"], id="driver"),
        pytest.param(
            RTX,
            replace(NO_GPU, no_gpu_reason=NO_CUDA_PYTHON),
            MissingExtraError,
            ["cuda-python is not installed", "ccn-deploy[rtx]"],
            id="cuda-python",
        ),
        pytest.param(
            RTX,
            replace(WITH_L4, no_gpu_reason="no NVIDIA GPU", gpus=()),
            EngineUnfitError,
            ["no NVIDIA GPU"],
            id="no GPU",
        ),
        pytest.param(
            RTX,
            replace(WITH_L4, gpus=(H100,)),
            EngineUnfitError,
            ["8.6, 8.9", "NVIDIA H100", "9.0", "--compute-capability 9.0"],
            id="other GPU",
        ),
        pytest.param(
            TRT, WITH_L4, EngineUnfitError, ["9.0", "NVIDIA L4", "8.9", "on this machine"],
            id="other GPU, not portable",
        ),
    ],
)  # fmt: skip
def test_each_refusal_says_what_and_what_to_do(
    details: dict[str, Any], machine: Machine, error: type[CcnDeployError], words: list[str]
) -> None:
    with pytest.raises(error) as caught:
        check(details, machine)
    assert type(caught.value) is error
    assert caught.value.exit_code == ExitCode.ENVIRONMENT
    assert caught.value.hint
    for word in words:
        assert word in str(caught.value)


def test_the_gpu_is_the_one_asked_for() -> None:
    machine = replace(WITH_L4, gpus=(replace(H100, index=0), replace(L4, index=1)))
    check(RTX, machine, device=1)
    with pytest.raises(EngineUnfitError, match="NVIDIA H100"):
        check(RTX, machine, device=0)
    with pytest.raises(EngineUnfitError, match=r"no GPU 2.*has 2"):
        check(RTX, machine, device=2)


@pytest.mark.parametrize("head", [b"", b"vtr", b"ONNX", b"ftrt"])
def test_bytes_of_another_kind_are_an_integrity_error(head: bytes) -> None:
    """Even where nothing of TensorRT is installed: the file is bad, not the machine."""
    for machine in (WITH_L4, replace(NO_GPU, packages={})):
        with pytest.raises(IntegrityError, match="no TensorRT-RTX engine") as caught:
            check(RTX, machine, head=head)
    assert ("as those of TensorRT do" in str(caught.value)) == (head == b"ftrt")


@pytest.mark.parametrize(
    "change",
    [{key: None} for key in RTX]
    + [{"library": "tensorrt"}, {"version": "newest"}, {"version": "١.٢"}, {"magic": "ftrt"},
       {"compute_capabilities": "8.9"}, {"compute_capabilities": [8.9]}],
)  # fmt: skip
def test_a_manifest_that_does_not_say_is_an_integrity_error(change: dict[str, Any]) -> None:
    record = msgspec.structs.replace(engine(RTX).record(), details={**RTX, **change})
    with pytest.raises(IntegrityError):
        check_engine(record, b"vtrt", WITH_L4)
    for key in change:
        without = {name: value for name, value in RTX.items() if name != key}
        with pytest.raises(IntegrityError):
            check_engine(msgspec.structs.replace(record, details=without), b"vtrt", WITH_L4)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@settings(deadline=None, max_examples=150)
@given(
    changes=st.dictionaries(st.sampled_from([*RTX, "else"]), JSON, max_size=3),
    head=st.just(b"vtrt") | st.binary(max_size=6),
    runtime=st.sampled_from(["tensorrt-rtx", "tensorrt"]),
)
def test_no_manifest_passes_by_accident(changes: dict[str, Any], head: bytes, runtime: str) -> None:
    """Whatever it says, an engine is refused with an error of ours or it is the one that fits."""
    details = {**RTX, **changes}
    record = FileRecord("e", "0" * 64, 4, Role.ENGINE, "fp32", runtime, details=details)
    try:
        check_engine(record, head, WITH_L4)
    except (IntegrityError, EngineUnfitError, MissingExtraError):
        assert changes or head != b"vtrt" or runtime != "tensorrt-rtx"
    else:
        assert runtime == "tensorrt-rtx"
        assert head[:4] == b"vtrt"
        same = ("library", "system", "machine", "magic")
        assert [details[key] for key in same] == [RTX[key] for key in same]
        assert details["version"].startswith("1.7.1.116")
        assert "8.9" in details["compute_capabilities"]


VERSIONS = st.lists(st.integers(0, 12), min_size=1, max_size=4).map(tuple)
ARCHITECTURES = st.tuples(
    st.sampled_from(["linux", "windows"]), st.sampled_from(["x86_64", "aarch64"])
)
CAPABILITIES = st.sampled_from(["7.5", "8.0", "8.6", "8.9", "9.0", "12.0"])


@settings(deadline=None, max_examples=150)
@given(
    version=VERSIONS,
    here=VERSIONS,
    built=ARCHITECTURES,
    runs=ARCHITECTURES,
    capabilities=st.lists(CAPABILITIES, max_size=3),
    gpu=st.none() | CAPABILITIES,
    library=st.booleans(),
)
def test_the_first_obstacle_is_the_one_that_is_told(
    version: tuple[int, ...],
    here: tuple[int, ...],
    built: tuple[str, str],
    runs: tuple[str, str],
    capabilities: list[str],
    gpu: str | None,
    library: bool,
) -> None:
    def dotted(numbers: tuple[int, ...]) -> str:
        return ".".join(map(str, numbers))

    details = {
        **RTX,
        "version": dotted(version),
        "system": built[0],
        "machine": built[1],
        "compute_capabilities": capabilities,
    }
    machine = replace(
        WITH_L4 if gpu else NO_GPU,
        system=runs[0],
        architecture=runs[1],
        packages={"tensorrt-rtx": dotted(here)} if library else {},
        gpus=(replace(L4, compute_capability=gpu),) if gpu else (),
    )
    obstacles = [
        (not library, "is not installed"),
        (Version(dotted(version)) > Version(dotted(here)), "which is older"),
        (Version(dotted(version)) < Version(dotted(here)), "which is newer"),
        (built != runs, f"was built for {built[0]} {built[1]}"),
        (gpu is None, NO_DRIVER),
        (gpu not in capabilities, "compute capability"),
    ]
    expected = next((words for there, words in obstacles if there), None)
    if expected is None:
        check(details, machine)
    else:
        with pytest.raises(CcnDeployError) as caught:
            check(details, machine)
        assert expected in caught.value.what


class TestChoosing:
    def test_the_first_that_fits(self, bundle_of: Callable[..., Bundle]) -> None:
        bundle = bundle_of(
            engine(RTX, name="old", data=b"vtrt"),
            engine({**RTX, "version": "1.6.0.1"}, name="a"),
            engine({**RTX, "compute_capabilities": ["9.0"]}, name="b"),
            engine(RTX, name="c", precision="fp16"),
            engine(RTX, name="d"),
        )
        assert [r.path[-8:] for r in bundle.programs(Target("tensorrt-rtx", "fp16"))] == [
            "c.engine"
        ]
        chosen = choose_engine(bundle, FP32, WITH_L4)
        assert chosen.path.endswith("old.engine")
        on_h100 = choose_engine(bundle, FP32, replace(WITH_L4, gpus=(H100,)))
        assert on_h100.path.endswith("b.engine")

    def test_otherwise_the_one_that_came_nearest(self, bundle_of: Callable[..., Bundle]) -> None:
        foreign = engine({**RTX, "system": "windows"}, name="a")
        other_gpu = engine({**RTX, "compute_capabilities": ["7.5"]}, name="b")
        older = engine({**RTX, "version": "1.6.0.1"}, name="c")
        with pytest.raises(EngineUnfitError, match=r"capability 7\.5"):
            choose_engine(bundle_of(older, foreign, other_gpu), FP32, WITH_L4)
        with pytest.raises(EngineUnfitError, match="windows"):
            choose_engine(bundle_of(older, foreign), FP32, WITH_L4)

    def test_a_mistyped_one_is_told_above_all(self, bundle_of: Callable[..., Bundle]) -> None:
        other_gpu = engine({**RTX, "compute_capabilities": ["7.5"]}, name="b")
        for files in ([other_gpu], []):
            with pytest.raises(IntegrityError):
                choose_engine(
                    bundle_of(engine(RTX, data=b"no engine"), *files),
                    FP32,
                    WITH_L4,
                )

    def test_none_at_all(self, bundle_of: Callable[..., Bundle]) -> None:
        bundle = bundle_of(engine(RTX, precision="fp16"))
        with pytest.raises(RuntimeUnavailableError, match=r"in int8; it has fp16"):
            choose_engine(bundle, Target("tensorrt-rtx", "int8"), WITH_L4)
        with pytest.raises(RuntimeUnavailableError, match="--format tensorrt --precision fp16"):
            choose_engine(bundle, Target("tensorrt", "fp16"), WITH_L4)

    def test_gradient_engines_are_others(self, bundle_of: Callable[..., Bundle]) -> None:
        gradient = replace(engine(RTX, name="g"), role=Role.GRADIENT_ENGINE)
        bundle = bundle_of(engine(RTX), gradient)
        for role, path in ((Role.ENGINE, "-e.engine"), (Role.GRADIENT_ENGINE, "-g.engine")):
            chosen = choose_engine(bundle, FP32, WITH_L4, role=role)
            assert chosen.path.endswith(path)


class TestFits:
    def test_in_order_of_preference(self, bundle_of: Callable[..., Bundle]) -> None:
        bundle = bundle_of(
            graph("int8"),
            graph("fp32"),
            graph("fp32", runtime="onnxruntime-cpu"),
            graph("fp32", Role.GRADIENT),
            engine(RTX, precision="fp16"),
            engine(RTX),
            engine(TRT),
            NewFile("weights.safetensors", b"", Role.WEIGHTS),
        )
        found = candidates_for(bundle, WITH_L4)
        assert [(f.target.runtime, f.target.precision, f.problem is None) for f in found] == [
            ("tensorrt", "fp32", False),
            ("tensorrt-rtx", "fp32", True),
            ("tensorrt-rtx", "fp16", True),
            ("onnxruntime-cuda", "fp32", True),
            ("onnxruntime-cuda", "int8", True),
            ("onnxruntime-cpu", "fp32", True),
            ("onnxruntime-cpu", "int8", True),
        ]
        for fit in found:  # the graph is the one that the runtime opens
            if fit.target.family == "onnxruntime":
                assert fit.record == bundle.program(fit.target)

    def test_without_a_gpu_only_the_cpu_is_left(self, bundle_of: Callable[..., Bundle]) -> None:
        bundle = bundle_of(graph("fp32"), graph("bf16"), engine(RTX))
        found = candidates_for(bundle, NO_GPU)
        assert [f.target for f in found if f.problem is None] == [Target("onnxruntime-cpu")]
        assert all(NO_DRIVER in str(f.problem) for f in found if f.target.on_gpu)

    @pytest.mark.parametrize(
        ("packages", "cpu", "cuda"),
        [
            ({}, "ccn-deploy[cpu]", "ccn-deploy[gpu]"),
            ({"onnxruntime": "1"}, None, "pip uninstall onnxruntime; pip install"),
            ({"onnxruntime-gpu": "1"}, None, None),
            ({"onnxruntime-gpu": "1", "onnxruntime": "1"}, None, "both"),
        ],
    )
    def test_onnxruntime(
        self,
        bundle_of: Callable[..., Bundle],
        packages: dict[str, str],
        cpu: str | None,
        cuda: str | None,
    ) -> None:
        found = candidates_for(bundle_of(graph("fp32")), replace(WITH_L4, packages=packages))
        for fit, words in zip(found, (cuda, cpu), strict=True):
            if words is None:
                assert fit.problem is None
            else:
                assert words in str(fit.problem)
                assert fit.problem is not None
                assert fit.problem.exit_code == ExitCode.ENVIRONMENT

    def test_garbage_is_a_problem_and_no_crash(self, bundle_of: Callable[..., Bundle]) -> None:
        (fit,) = candidates_for(bundle_of(engine(RTX, data=b"x")), WITH_L4)
        assert isinstance(fit.problem, IntegrityError)


def test_a_machine_is_json() -> None:
    document = json.loads(json.dumps(WITH_L4.document()))
    assert document["gpus"][0]["compute_capability"] == "8.9"
    assert document["packages"]["tensorrt"] == "11.4.0.2"
