"""Engines, built by the real TensorRT-RTX, which needs no GPU for it."""

from __future__ import annotations

import importlib.util
import json
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.errors import (
    DatasetNotFoundError,
    EngineBuildError,
    ExitCode,
    MissingExtraError,
    UsageError,
)
from ccn_deploy.exporters import CalibrationRequest, export_bundle
from ccn_deploy.exporters.calibration import load_calibration
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.exporters.precision import PRECISIONS, Calibration, convert
from ccn_deploy.exporters.tensorrt import build as engines
from ccn_deploy.exporters.tensorrt.build import Batches, build_engine, known_targets
from ccn_deploy.exporters.tensorrt.log import read_log, worth_keeping
from ccn_deploy.exporters.vjp import gradient_graph
from ccn_deploy.graph.builder import to_bytes
from ccn_deploy.graph.graph import Graph
from ccn_deploy.runs import TrainedRun
from ccn_deploy.runtimes.tensorrt.library import LIBRARIES, capture, load_library, logger
from ccn_deploy.storage import sha256
from ccn_deploy.targets import Role
from tests.networks import DEFENSES, as_run, random_network, write_run
from tests.test_cli import assert_clear_error, ccn_deploy

RTX = "tensorrt-rtx"
SMALL = Batches(1, 4, 8)

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="TensorRT-RTX is not installed: pip install 'ccn-deploy[rtx]'",
)
pytestmark = needs_rtx


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build once where the test is not about two builds being equal."""
    monkeypatch.setattr(engines, "ATTEMPTS", 1)


def graph(architecture: str = "mnist-cnn", defense: str = "ccn", classes: int = 10) -> bytes:
    return to_bytes(lower(random_network(architecture, defense, classes=classes)))


def run_of(defense: str, path: Path = Path("nowhere"), **training: Any) -> TrainedRun:
    run = as_run(random_network("mnist-cnn", defense), path)
    card = msgspec.structs.replace(run.card, training={"dataset": "mnist5k", "seed": 3, **training})
    return replace(run, card=card)


def targets_in(plan: bytes) -> set[str]:
    """Read from the compiled program inside a plan which GPUs it is for."""
    lists = re.findall(rb"accelerators=\{([^}]*)\}", plan)
    names = re.findall(r"\bsm(\d+)(\d)\b", b" ".join(lists).decode())
    return {f"{major}.{minor}" for major, minor in names}


# Every network


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("defense", DEFENSES)
def test_every_defense(defense: str) -> None:
    built = build_engine(graph(defense=defense), library=RTX, batch=Batches(2, 4, 8))

    assert built.plan[:4] == b"vtrt"
    assert built.details["profiles"] == [
        {"images": {"min": [2, 1, 28, 28], "opt": [4, 1, 28, 28], "max": [8, 1, 28, 28]}}
    ]


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("defense", ["sm", "ccn"])
@pytest.mark.parametrize("architecture", ["vgg11-cifar10", "vgg11-imagenet"])
def test_large_networks(architecture: str, defense: str) -> None:
    classes = 1000 if architecture == "vgg11-imagenet" else 10
    onnx_file = graph(architecture, defense, classes)

    built = build_engine(onnx_file, library=RTX, batch=Batches())

    assert len(built.plan) > 0.99 * len(onnx_file)  # the weights are in it, in float32


EVERY_LOW = [
    (architecture, defense, precision)
    for architecture, defenses in (("mnist-cnn", DEFENSES), ("vgg11-cifar10", ("sm", "ccn")))
    for defense in defenses
    for precision in ("fp16", "bf16", "int8")
]


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize(("architecture", "defense", "precision"), EVERY_LOW)
def test_every_low_precision(architecture: str, defense: str, precision: str) -> None:
    model = random_network(architecture, defense)
    images = np.random.default_rng(0).random((4, *model.architecture.input_shape), np.float32)
    low = convert(Graph(lower(model)), precision, Calibration(images)).graph

    built = build_engine(to_bytes(low), library=RTX, batch=SMALL)

    part = {"fp16": 0.5, "bf16": 0.5, "int8": 0.25}[precision]
    whole = len(graph(architecture, defense))
    assert part * 0.8 * whole < len(built.plan)  # the weights are in it, and not in float32
    assert len(built.plan) < (part + 0.1) * whole + 3_000_000


@pytest.mark.usefixtures("once")
def test_gradient_graph() -> None:
    model = random_network("mnist-cnn", "ccn")
    built = build_engine(
        to_bytes(gradient_graph(Graph(lower(model)))),
        library=RTX,
        batch=SMALL,
        candidates=Batches(1, 10, 10),
    )
    (profile,) = built.details["profiles"]
    assert profile["images"]["max"] == [8, 1, 28, 28]
    assert profile["cotangents"] == {"min": [1, 1, 10], "opt": [4, 10, 10], "max": [8, 10, 10]}


# Bytes and what is said of them


def test_two_builds_are_byte_equal_whatever_is_around_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    onnx_file = graph()
    first = build_engine(onnx_file, library=RTX, batch=SMALL)
    if not first.details["reproducible"]:
        pytest.skip("addresses cannot be fixed here, as in some containers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/nowhere/" + 100 * "x")
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    second = build_engine(onnx_file, library=RTX, batch=SMALL)

    assert sha256(first.plan) == sha256(second.plan)
    assert first.details == second.details


@pytest.mark.usefixtures("once")
@pytest.mark.parametrize("asked", [("8.6", "8.6"), ("12.0", "8.0")])
def test_engine_is_for_the_gpus_that_the_manifest_names(asked: tuple[str, ...]) -> None:
    built = build_engine(graph(), library=RTX, batch=SMALL, compute_capabilities=asked)

    assert set(built.details["compute_capabilities"]) == set(asked)
    assert targets_in(built.plan) == set(asked)


@pytest.mark.usefixtures("once")
def test_default_gpus_are_named_and_turing_is_none_of_them() -> None:
    trt = load_library(RTX, "to test")
    built = build_engine(graph(), library=RTX, batch=SMALL)

    assert built.details["compute_capabilities"] == [t for t in known_targets(trt) if t != "7.5"]
    assert {"8.0", "8.6", "8.9", "12.0"} <= set(built.details["compute_capabilities"])
    assert built.details["version"] == trt.__version__


@pytest.mark.usefixtures("once")
def test_tf32_is_off_unless_asked_for() -> None:
    onnx_file = graph("vgg11-cifar10", "sm")
    off = build_engine(onnx_file, library=RTX, batch=SMALL)
    on = build_engine(onnx_file, library=RTX, batch=SMALL, tf32=True)

    assert (off.details["tf32"], on.details["tf32"]) == (False, True)
    assert off.plan != on.plan


# Refusals


def test_parser_names_the_node_that_it_refuses() -> None:
    model = lower(random_network("mnist-cnn", "ccn"))
    pool = next(node for node in model.graph.node if node.name == "pool1")
    pool.output.append("positions")

    with pytest.raises(EngineBuildError, match=r"'pool1' \(MaxPool\): .*outputs"):
        build_engine(model.SerializeToString(), library=RTX, batch=SMALL)


def test_parser_names_the_node_whose_shapes_do_not_fit() -> None:
    model = lower(random_network("mnist-cnn", "sm"))
    weight = next(c for c in model.graph.initializer if c.name == "fc1.weight")
    weight.CopyFrom(numpy_helper.from_array(np.zeros((3, 5), np.float32), "fc1.weight"))

    with pytest.raises(EngineBuildError, match=r"'fc1' \(Gemm\): .*1024") as caught:
        build_engine(model.SerializeToString(), library=RTX, batch=SMALL)
    assert "driver" not in str(caught.value)  # the library complains of that as well


def test_what_is_no_graph() -> None:
    with pytest.raises(EngineBuildError, match="refuses the graph"):
        build_engine(b"no graph", library=RTX, batch=SMALL)


def test_operation_that_a_gpu_lacks_is_named_with_the_cause() -> None:
    with pytest.raises(EngineBuildError, match="fc1") as caught:
        build_engine(graph(), library=RTX, batch=SMALL, compute_capabilities=("7.5",))
    assert "Turing" in caught.value.what and "fp16" in caught.value.hint
    assert "/_src" not in str(caught.value)


def test_unknown_gpu_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"9\.9") as caught:
        build_engine(b"", library=RTX, batch=SMALL, compute_capabilities=("8.6", "9.9"))
    assert "8.6, 8.9, 12.0" in caught.value.hint


def test_missing_sizes_of_candidates() -> None:
    backward = to_bytes(gradient_graph(Graph(lower(random_network("mnist-cnn", "sm")))))
    with pytest.raises(EngineBuildError, match="cotangents"):
        build_engine(backward, library=RTX, batch=SMALL)


def test_no_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The real builder, in a process that may have enough memory to start and not to parse."""
    onnx_file, megabytes = graph("vgg11-cifar10", "sm"), 350
    worker = tmp_path / "limited.py"
    worker.write_text(
        "import resource, runpy\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({megabytes << 20}, {megabytes << 20}))\n"
        f"runpy.run_path({str(engines.WORKER)!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr(engines, "WORKER", worker)
    with pytest.raises(EngineBuildError, match="memory ran out"):
        build_engine(onnx_file, library=RTX, batch=SMALL)


def test_a_builder_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    worker = tmp_path / "hanging.py"
    worker.write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setattr(engines, "WORKER", worker)
    monkeypatch.setattr(engines, "PATIENCE", 1)
    with pytest.raises(EngineBuildError, match="was stopped"):
        build_engine(b"graph", library=RTX, batch=SMALL)


def test_a_worker_that_is_killed_or_crashes_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for number, said in ((9, "memory"), (11, "crashed")):
        worker = tmp_path / f"{number}.py"
        worker.write_text(f"import os\nos.kill(os.getpid(), {number})\n")
        monkeypatch.setattr(engines, "WORKER", worker)
        with pytest.raises(EngineBuildError, match=said):
            build_engine(b"graph", library=RTX, batch=SMALL)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="it is installed")
def test_tensorrt_that_is_not_installed() -> None:
    with pytest.raises(MissingExtraError, match="tensorrt") as caught:
        build_engine(b"", library="tensorrt", batch=SMALL)
    assert "ccn-deploy[gpu]" in caught.value.hint


# Sizes


@given(st.lists(st.integers(-2, 12), min_size=3, max_size=3))
@settings(deadline=None, max_examples=50)
def test_batches_are_in_order(sizes: list[int]) -> None:
    text = ",".join(map(str, sizes))
    if 1 <= sizes[0] <= sizes[1] <= sizes[2]:
        assert Batches.parse(text).sizes() == sizes
    else:
        with pytest.raises(UsageError, match="--batch"):
            Batches.parse(text)


@pytest.mark.parametrize("text", ["", "1", "1,2", "1,2,3,4", "1,two,3", "1;2;3", "1.0,2,3"])
def test_what_is_no_batch(text: str) -> None:
    with pytest.raises(UsageError, match="three whole numbers"):
        Batches.parse(text)


# The library's log


def test_log_is_split_into_messages_and_keeps_nothing_that_varies() -> None:
    printed = (
        "[11/22/2026-19:22:57] [TRT] [W] slow path at 0x7fff12 took 0.31 ms in /home/me/x.cpp\n"
        "[11/22/2026-19:22:58] [TRT-RTX] [E] In function f:\n[8] no such thing\n"
        "[11/22/2026-19:22:58] [TRT] [I] chatter\n"
        "[11/22/2026-19:22:59] [TRT] [W] slow path at 0x6fff33 took 12 ms in /home/you/x.cpp\n"
    )
    log = read_log(printed)
    assert [line.severity for line in log] == ["W", "E", "I", "W"]
    assert worth_keeping(log) == [
        "slow path at 0x took (some) in x.cpp",
        "In function f: [8] no such thing",
    ]


def test_capture_belongs_to_a_thread_and_nests() -> None:
    trt = load_library(RTX, "to test")
    log = logger(trt)
    assert logger(trt) is log
    with capture() as outer:
        log.log(trt.ILogger.Severity.WARNING, "outer")
        with capture() as inner:
            log.log(trt.ILogger.Severity.ERROR, "inner")
        log.log(trt.ILogger.Severity.INFO, "chatter")
    assert outer.at_least("VERBOSE") == ["outer", "chatter"]
    assert outer.at_least("WARNING") == ["outer"]
    assert inner.lines == [("ERROR", "inner")]


def test_library_has_what_both_have() -> None:
    """The calls that :mod:`ccn_deploy.exporters.tensorrt.worker` makes, by name."""
    worker = runpy.run_path(str(engines.WORKER))
    assert "Build" in worker
    trt = load_library(RTX, "to test")
    for path in (
        "Logger.WARNING", "Builder.create_network", "Builder.create_builder_config",
        "Builder.create_optimization_profile", "Builder.build_serialized_network",
        "OnnxParser.parse", "OnnxParser.num_errors", "OnnxParser.get_error",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED", "BuilderFlag.TF32",
        "IBuilderConfig.set_flag", "IBuilderConfig.clear_flag",
        "IBuilderConfig.add_optimization_profile", "IOptimizationProfile.set_shape",
        "INetworkDefinition.num_inputs", "INetworkDefinition.get_input",
    ):  # fmt: skip
        owner, name = path.split(".")
        assert hasattr(getattr(trt, owner), name), path


# Bundles


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with everything, of a network with random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "ATTEMPTS", 1)
        return export_bundle(
            run_of("ccn"),
            tmp_path_factory.mktemp("whole") / "bundle",
            formats=("onnx", RTX),
            precisions=("fp32", *PRECISIONS),
            batch=(1, 4, 8),
            calibration=CalibrationRequest(samples=16),
        )


def test_bundle_has_an_engine_of_every_graph(whole: Bundle) -> None:
    files = {(r.role, r.precision): r for r in whole.manifest.files}
    for precision in ("fp32", *PRECISIONS):
        assert files["forward", precision].path == f"graphs/forward-{precision}.onnx"
        engine = files["engine", precision]
        assert engine.runtime == RTX
        assert engine.path == f"engines/tensorrt-rtx-{precision}.engine"
        has_gradient = precision in ("fp32", "fp16", "bf16")
        assert (("gradient", precision) in files) is has_gradient
        assert (("gradient-engine", precision) in files) is has_gradient


def test_manifest_of_engines_is_true(whole: Bundle) -> None:
    by_path = {record.path: record for record in whole.manifest.files}
    found = [r for r in whole.manifest.files if r.role.is_engine]
    assert len(found) == 8
    for record in found:
        details = record.details
        plan = (whole.path / record.path).read_bytes()
        assert record.lineage is not None and record.lineage.step == "build"
        (path,) = record.lineage.sources
        source = by_path[path]
        assert record.role is source.role.engine
        assert plan[:4] == details["magic"].encode() == LIBRARIES[RTX].magic
        assert (source.precision, record.precision) == (record.precision, source.precision)
        assert details["layers"] == source.details.get("layers", {})
        assert details["tf32"] is False
        assert record.made_by["tensorrt-rtx"] == details["version"]
        assert not re.search(r"/|\d\d:\d\d", " ".join(details["log"]))


def test_engine_keeps_what_the_graph_computes_in(whole: Bundle) -> None:
    """Weights are the bulk of a plan: half of them in half precision, a quarter in int8."""
    size = {r.precision: r.bytes for r in whole.manifest.files if r.role is Role.ENGINE}
    assert size["fp16"] < size["fp32"] and size["bf16"] < size["fp32"]
    assert size["int8"] < size["fp16"]


def test_gpus_that_lack_a_precision_are_not_named(whole: Bundle) -> None:
    for record in whole.manifest.files:
        if record.role.is_engine:
            oldest = "8.9" if record.precision == "fp8" else "8.0"
            assert record.details["compute_capabilities"][0] == oldest, record.path
    onnx_file = (whole.path / "graphs/forward-fp8.onnx").read_bytes()
    with pytest.raises(EngineBuildError, match=r"not supported .* on these GPUs"):
        build_engine(onnx_file, library=RTX, batch=SMALL, compute_capabilities=("8.6",))


@pytest.mark.usefixtures("once")
def test_turing_runs_half_precision_and_no_other(tmp_path: Path) -> None:
    bundle = export_bundle(
        run_of("ccn"), tmp_path / "b", formats=(RTX,), precisions=("fp16",), gradient=False,
        batch=(1, 4, 8), compute_capabilities=("7.5",),
    )  # fmt: skip
    assert [r.path for r in bundle.manifest.files if r.role.is_engine] == [
        "engines/tensorrt-rtx-fp16-sm75.engine"
    ]
    assert targets_in((bundle.path / "engines/tensorrt-rtx-fp16-sm75.engine").read_bytes()) == {
        "7.5"
    }


def test_calibration_uses_the_training_split_and_says_so(whole: Bundle) -> None:
    train, test = load_dataset("mnist5k", "train"), load_dataset("mnist5k", "test")
    said = whole.file(Role.FORWARD, "int8").details["calibration"]
    assert said["dataset"] == "mnist5k" and said["samples"] == 16 and said["seed"] == 0
    assert said["digest"] == train.digest != test.digest

    model = random_network("mnist-cnn", "ccn")
    loaded = load_calibration(
        CalibrationRequest(samples=16, seed=4),
        msgspec.structs.replace(as_run(model).card, training={"dataset": "mnist5k"}),
    )
    assert np.array_equal(loaded.images, train.images(train.order(4)[:16]))


@pytest.mark.usefixtures("once")
def test_engines_are_added_to_a_bundle(whole: Bundle, tmp_path: Path) -> None:
    more = export_bundle(
        whole, tmp_path / "more", formats=(RTX,), batch=(1, 4, 8), compute_capabilities=("8.9",)
    )
    before = {record.path: record for record in whole.manifest.files}
    after = {record.path: record for record in more.manifest.files}
    assert {path: after[path] for path in before} == before
    assert set(after) - set(before) == {
        "engines/tensorrt-rtx-fp32-sm89.engine",
        "engines/gradient-tensorrt-rtx-fp32-sm89.engine",
    }
    for path in before:
        assert (more.path / path).read_bytes() == (whole.path / path).read_bytes()

    with pytest.raises(UsageError, match="nothing to add"):
        export_bundle(
            more, tmp_path / "again", formats=(RTX,), batch=(1, 4, 8), compute_capabilities=("8.9",)
        )
    assert not (tmp_path / "again").exists()


@pytest.mark.usefixtures("once")
def test_other_batches_get_an_engine_of_their_own(tmp_path: Path) -> None:
    first = export_bundle(
        run_of("sm"), tmp_path / "a", formats=(RTX,), gradient=False, batch=(1, 4, 8)
    )
    second = export_bundle(first, tmp_path / "b", formats=(RTX,), batch=(1, 1, 1))
    assert [r.path for r in second.manifest.files if r.role.is_engine] == [
        "engines/tensorrt-rtx-fp32.engine",
        "engines/tensorrt-rtx-fp32-2.engine",
    ]
    assert not [r for r in second.manifest.files if r.role.has_gradients]


def test_triton_repository_stands_beside_the_bundle(whole: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tritonclient", reason="pip install 'ccn-deploy[triton]'")
    notes: list[str] = []
    bundle = export_bundle(whole, tmp_path / "b", formats=("triton",), note=notes.append)

    assert bundle.manifest == whole.manifest
    assert list((bundle.path / "triton").glob("*/config.pbtxt"))
    assert any("TensorRT-RTX" in note for note in notes)


def test_export_without_images_says_nothing_of_numbers_or_refuses(tmp_path: Path) -> None:
    run = run_of("ccn")
    run = replace(run, card=msgspec.structs.replace(run.card, training={"dataset": "mnist"}))
    nowhere = CalibrationRequest(directory=tmp_path)
    half = export_bundle(run, tmp_path / "half", precisions=("fp16",), gradient=False)
    assert "numeric" not in half.file(Role.FORWARD, "fp16").details
    for precision in ("int8", "fp16"):  # of which one needs images and the other was given some
        with pytest.raises(DatasetNotFoundError):
            export_bundle(run, tmp_path / "none", precisions=(precision,), calibration=nowhere)
    assert not (tmp_path / "none").exists()


def test_names_are_checked_before_any_work(tmp_path: Path) -> None:
    run = replace(run_of("sm"), weights=b"never read")
    for wrong, word in (
        ({"formats": ("tensorrt-rx",)}, "tensorrt-rtx"),
        ({"precisions": ("fp61",)}, "fp16"),
        ({"batch": (4, 2, 8)}, "--batch"),
        ({"formats": (RTX,), "compute_capabilities": ("9.0",)}, "12.0"),
        ({"compute_capabilities": ("8.6",)}, "--format tensorrt-rtx"),
        ({"optimize": "onnxruntime"}, "onnxruntime-cpu"),
    ):
        with pytest.raises(UsageError) as caught:
            export_bundle(run, tmp_path / "bundle", **wrong)  # type: ignore[arg-type]
        assert word in str(caught.value)


# The command line


def test_command_line_builds_adds_and_refuses(tmp_path: Path) -> None:
    run = write_run(run_of("sm", tmp_path / "run"))
    options = ("--format", RTX, "--no-gradient", "--batch", "1,4,8", "--json")
    made = ccn_deploy("export", run, "--output", tmp_path / "a", "--precision", "fp16", *options)
    assert made.returncode == 0, made.stderr
    document = json.loads(made.stdout)
    assert [f["path"] for f in document["files"] if f["role"] == "engine"] == [
        "engines/tensorrt-rtx-fp16.engine",
    ]
    options = (*options, "--precision", "fp16")
    again = ccn_deploy("export", tmp_path / "a", "--output", tmp_path / "b", *options)
    assert_clear_error(again, ExitCode.USAGE, "nothing to add")
    turing = ccn_deploy(
        "export", run, "--output", tmp_path / "c", "--format", RTX, "--compute-capability", "7.5"
    )
    assert_clear_error(turing, ExitCode.ENVIRONMENT, "Turing")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "run"]  # and nothing half-written
    assert open_bundle(tmp_path / "a").manifest.digest == document["digest"]


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="it is installed")
def test_command_line_without_tensorrt(tmp_path: Path) -> None:
    run = write_run(run_of("sm", tmp_path / "run"))
    result = ccn_deploy("export", run, "--output", tmp_path / "a", "--format", "tensorrt")
    assert_clear_error(result, ExitCode.ENVIRONMENT, "tensorrt", "ccn-deploy[gpu]")
