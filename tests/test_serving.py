"""`ccn_deploy.load`: what production embeds."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ccn_deploy
from ccn_deploy.bundle import Bundle, NewFile, open_bundle, write_bundle
from ccn_deploy.errors import (
    EngineUnfitError,
    GateError,
    InputError,
    IntegrityError,
    MissingExtraError,
    RuntimeUnavailableError,
    UsageError,
)
from ccn_deploy.exporters import export_bundle
from ccn_deploy.exporters.sources.intake import Intake
from ccn_deploy.exporters.sources.opening import SourceOptions, open_source
from ccn_deploy.exporters.tensorrt.build import Batches
from ccn_deploy.machine import this_machine
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.runtimes.compatibility import Candidate
from ccn_deploy.serving import first_usable
from ccn_deploy.targets import Role, Target
from tests.engines import build_rtx, engine_file, with_files
from tests.foreign_files import classifier
from tests.networks import as_run, random_network

ONE_THREAD = RuntimeOptions(threads=1)
HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = as_run(random_network("mnist-cnn", "ccn"))
    return export_bundle(run, tmp_path_factory.mktemp("b") / "ccn").path


def digits(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random((count, 1, 28, 28), dtype=np.float32)


def rewritten(bundle: Bundle, output: Path, files: list[NewFile]) -> Bundle:
    """Write a bundle of the same network with other files."""
    return write_bundle(
        output,
        card=bundle.card,
        files=files,
    )


def python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


class TestAnswers:
    def test_logits_are_those_of_the_graph_in_the_bundle(self, path: Path) -> None:
        images = digits(7)
        bare = onnxruntime.InferenceSession(path / "graphs/forward-fp32.onnx")
        with ccn_deploy.load(path) as model:
            assert model.spec.name == "onnxruntime-cpu"
            np.testing.assert_allclose(
                model.predict(images), bare.run(["logits"], {"images": images})[0], rtol=1e-5
            )

    def test_labels_are_those_of_float64(self, path: Path) -> None:
        images = digits(64)
        with open_runtime(path, "torch", "fp64") as reference:
            logits = reference.logits(images)
        with ccn_deploy.load(path) as model:
            labels = model.classify(images)
            assert labels.dtype == np.int64
            assert labels.tolist() == [int(np.argmax(row)) for row in logits]
            assert model.names(labels) == [model.class_names[label] for label in labels]

    def test_no_images_have_no_labels(self, path: Path) -> None:
        with ccn_deploy.load(path) as model:
            assert model.predict(digits(0)).shape == (0, 10)
            assert model.classify(digits(0)).shape == (0,)
            assert model.names(model.classify(digits(0))) == []

    @settings(max_examples=8, deadline=None)
    @given(count=st.integers(1, 40), limit=st.integers(1, 9))
    def test_a_batch_of_any_size_is_answered_image_by_image(
        self, path: Path, count: int, limit: int
    ) -> None:
        images = digits(count, seed=count)
        with ccn_deploy.load(path, options=RuntimeOptions(threads=1, max_batch=limit)) as model:
            assert model.max_batch == limit
            one_by_one = np.concatenate([model.predict(image[None]) for image in images])
            np.testing.assert_allclose(model.predict(images), one_by_one, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        ("images", "words"),
        [
            (digits(1)[0], "batch axis"),
            (digits(1).astype(np.float64), "float32"),
            (digits(1) * 255, "outside [0, 1]"),
            (np.full((1, 1, 28, 28), np.nan, np.float32), "NaN"),
            (digits(1).tolist(), "NumPy array"),
        ],
    )
    def test_anything_but_images_is_refused(self, path: Path, images: Any, words: str) -> None:
        with ccn_deploy.load(path) as model, pytest.raises(InputError) as error:
            model.classify(images)
        assert words in str(error.value)

    def test_a_logit_that_is_no_number_gives_no_label(self, path: Path, tmp_path: Path) -> None:
        bundle = open_bundle(path)
        graph = onnx.load(path / "graphs/forward-fp32.onnx")
        bias = next(tensor for tensor in graph.graph.initializer if list(tensor.dims) == [10])
        values = onnx.numpy_helper.to_array(bias).copy()
        values[3] = np.inf
        bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        spoiled = NewFile("forward.onnx", graph.SerializeToString(), Role.FORWARD, "fp32")
        with ccn_deploy.load(rewritten(bundle, tmp_path / "b", [spoiled])) as model:
            assert np.isinf(model.predict(digits(1))).any()
            with pytest.raises(GateError, match="not finite on onnxruntime-cpu-fp32"):
                model.classify(digits(2))


class TestLife:
    def test_closed_is_closed(self, path: Path) -> None:
        model = ccn_deploy.load(path)
        model.close()
        model.close()
        for call in (model.predict, model.classify):
            with pytest.raises(UsageError, match="closed"):
                call(digits(1))
        with pytest.raises(UsageError, match="closed"):
            model.warm_up()

    def test_warm_up_runs_what_it_is_told_to(self, path: Path) -> None:
        with ccn_deploy.load(path) as model:
            model.warm_up()
            model.warm_up([1, 3, model.max_batch + 1])
            with pytest.raises(UsageError, match="batch of 0"):
                model.warm_up([1, 0])

    def test_it_says_what_it_is(self, path: Path) -> None:
        bundle = open_bundle(path)
        with ccn_deploy.load(bundle) as model:
            assert model.digest == bundle.manifest.digest
            assert model.class_names == bundle.card.class_names
            assert model.spec.input_shape == (1, 28, 28)
            json.dumps(dataclasses.asdict(model.choice))  # for a health endpoint


class TestChoice:
    def test_a_runtime_that_was_named_is_the_one(self, path: Path) -> None:
        for name in ("onnxruntime-cpu", "torch"):
            with ccn_deploy.load(path, name) as model:
                assert (model.spec.name, model.choice.runtime) == (name, name)
                assert model.choice.passed_over == ()

    @pytest.mark.skipif(HAS_CUDA, reason="ONNX Runtime has a CUDA provider here")
    def test_nothing_falls_back_from_a_runtime_that_was_named(self, path: Path) -> None:
        with pytest.raises(RuntimeUnavailableError, match="onnxruntime-cuda"):
            ccn_deploy.load(path, "onnxruntime-cuda")

    def test_an_unknown_runtime_suggests_the_nearest(self, path: Path) -> None:
        with pytest.raises(UsageError, match="Did you mean 'onnxruntime-cpu'"):
            ccn_deploy.load(path, "onnxruntime_cpu")

    @pytest.mark.skipif(HAS_CUDA, reason="ONNX Runtime has a CUDA provider here")
    def test_auto_says_what_it_passed_over_and_why(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with ccn_deploy.load(path) as model:
            assert (model.choice.runtime, model.choice.precision) == ("onnxruntime-cpu", "fp32")
            passed = {p.runtime: p for p in model.choice.passed_over}
        assert "onnxruntime-gpu" in passed["onnxruntime-cuda"].why
        assert not passed["onnxruntime-cuda"].failed
        assert not caplog.records  # what does not fit is no news

    @pytest.mark.skipif(HAS_CUDA, reason="ONNX Runtime has a CUDA provider here")
    def test_auto_goes_on_after_a_runtime_that_should_have_worked_and_says_so(
        self, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        bundle = open_bundle(path)
        graph = bundle.file(Role.FORWARD, "fp32")
        candidates = [
            Candidate(Target(name), graph, None) for name in ("onnxruntime-cuda", "onnxruntime-cpu")
        ]
        with caplog.at_level(logging.WARNING, "ccn_deploy"):
            model = first_usable(bundle, candidates)
        assert model.choice.runtime == "onnxruntime-cpu"
        (passed,) = model.choice.passed_over
        assert passed.failed
        assert passed.runtime == "onnxruntime-cuda"
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "onnxruntime-cuda in fp32" in record.getMessage()

    @pytest.mark.skipif(bool(this_machine().gpus), reason="an engine may run on this GPU")
    @pytest.mark.skipif("tensorrt-rtx" not in this_machine().packages, reason="no tensorrt-rtx")
    def test_an_engine_needs_a_gpu_and_says_so(self, path: Path, tmp_path: Path) -> None:
        bundle = open_bundle(path)
        engine = engine_file(build_rtx(bundle, Batches(1, 2, 4)))
        with_engine = with_files(bundle, tmp_path / "b", engine)
        with ccn_deploy.load(with_engine) as model:
            assert model.choice.runtime == "onnxruntime-cpu"
            first = model.choice.passed_over[0]
        assert (first.runtime, first.precision, first.failed) == ("tensorrt-rtx", "fp32", False)
        assert this_machine().no_gpu_reason in first.why
        with pytest.raises(EngineUnfitError, match=this_machine().no_gpu_reason):
            ccn_deploy.load(with_engine, "tensorrt-rtx")

    def test_auto_serves_nothing_from_a_bundle_that_is_not_what_it_says(self, path: Path) -> None:
        bundle = open_bundle(path)
        graph = bundle.file(Role.FORWARD, "fp32")
        candidates = [
            Candidate(Target("tensorrt"), graph, IntegrityError("No engine.")),
            Candidate(Target("onnxruntime-cpu"), graph, None),
        ]
        with pytest.raises(IntegrityError, match="No engine"):
            first_usable(bundle, candidates)

    def test_an_engine_for_another_gpu_is_not_passed_over_if_there_is_one_for_this(
        self, path: Path
    ) -> None:
        bundle = open_bundle(path)
        graph = bundle.file(Role.FORWARD, "fp32")
        candidates = [
            Candidate(Target("onnxruntime-cpu"), graph, RuntimeUnavailableError("Another GPU.")),
            Candidate(Target("onnxruntime-cpu"), graph, None),
        ]
        assert first_usable(bundle, candidates).choice.passed_over == ()

    def test_without_any_the_error_has_every_reason(self, path: Path) -> None:
        bundle = open_bundle(path)
        graph = bundle.file(Role.FORWARD, "fp32")
        candidates = [
            Candidate(Target(name), graph, RuntimeUnavailableError(f"No {name}.", "Do something."))
            for name in ("tensorrt", "onnxruntime-cpu")
        ]
        with pytest.raises(RuntimeUnavailableError) as error:
            first_usable(bundle, candidates)
        assert "No tensorrt. " in error.value.what
        assert "No onnxruntime-cpu." in error.value.what
        assert "doctor" in error.value.hint

    def test_a_precision_that_is_not_there_is_refused(self, path: Path) -> None:
        for runtime in ("auto", "onnxruntime-cpu"):
            with pytest.raises(RuntimeUnavailableError, match="int8"):
                ccn_deploy.load(path, runtime, "int8")

    def test_without_a_precision_it_is_fp32_or_the_only_one(
        self, path: Path, tmp_path: Path
    ) -> None:
        bundle = open_bundle(path)
        graph = (path / "graphs/forward-fp32.onnx").read_bytes()

        def having(*precisions: str) -> Bundle:
            files = [NewFile(f"{p}.onnx", graph, Role.FORWARD, p) for p in precisions]
            return rewritten(bundle, tmp_path / "-".join(precisions), files)

        for held, wanted in (
            (having("fp16", "fp32"), "fp32"),
            (having("fp16"), "fp16"),
        ):
            for runtime in ("auto", "onnxruntime-cpu"):
                with ccn_deploy.load(held, runtime) as model:
                    assert model.choice.precision == wanted
        with pytest.raises(UsageError, match="fp16, int8"):
            ccn_deploy.load(having("fp16", "int8"), "onnxruntime-cpu")


SERVE = """
import sys
import numpy as np
import ccn_deploy

path, *runtime = sys.argv[1:]
with ccn_deploy.load(path, *runtime) as model:
    images = np.zeros((2, 1, 28, 28), dtype=np.float32)
    assert model.predict(images).shape == (2, 10)
    assert len(model.names(model.classify(images))) == 2
heavy = {"torch", "onnx", "scipy", "foolbox", "matplotlib", "safetensors", "rich", "typer"}
heavy |= {"tensorrt", "tensorrt_rtx", "tensorrt_bindings"}
if runtime:
    heavy |= {"cuda"}  # asks the driver which GPUs there are
print(sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize("runtime", [["auto"], ["onnxruntime-cpu"]])
def test_serving_a_bundle_loads_numpy_and_the_runtime_and_nothing_else(
    path: Path, runtime: list[str]
) -> None:
    done = python(SERVE, path, *(r for r in runtime if r != "auto"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


WITHOUT = """
import sys
sys.modules["onnxruntime"] = None  # what `import` finds where it is not installed
import ccn_deploy
from ccn_deploy.errors import CcnDeployError
try:
    ccn_deploy.load(*sys.argv[1:])
except CcnDeployError as error:
    print(type(error).__name__, int(error.exit_code), error)
"""


def test_a_missing_runtime_names_its_extra(path: Path) -> None:
    done = python(WITHOUT, path, "onnxruntime-cpu")
    assert done.stdout.startswith(f"{MissingExtraError.__name__} 3 The package 'onnxruntime' is")
    assert "ccn-deploy[cpu]" in done.stdout


def test_auto_without_any_runtime_says_what_each_lacks(path: Path) -> None:
    done = python(WITHOUT, path)
    assert done.stdout.startswith("RuntimeUnavailableError 3 ")
    assert "The package 'onnxruntime' is needed" in done.stdout
    assert "onnxruntime-cpu in fp32 fits this machine and failed" in done.stderr  # the log


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "torch"])
def test_eight_threads_get_the_answers_that_one_gets(path: Path, name: str) -> None:
    generator = np.random.default_rng(0)
    batches = [generator.random((1 + i % 5, 1, 28, 28), dtype=np.float32) for i in range(64)]
    with ccn_deploy.load(path, name, options=RuntimeOptions(max_batch=4)) as model:
        assert model.spec.thread_safe
        serial = [model.predict(batch) for batch in batches]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(model.predict, batches))
    for one, other in zip(serial, together, strict=True):
        assert np.array_equal(one, other)


def test_closing_lets_a_call_finish_that_has_begun(path: Path) -> None:
    images = np.random.default_rng(1).random((64, 1, 28, 28), dtype=np.float32)
    with ccn_deploy.load(path, options=RuntimeOptions(max_batch=8)) as model:
        wanted = model.predict(images)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(model.predict, images)
            model.close()
            try:
                assert np.array_equal(running.result(), wanted)
            except UsageError as error:  # closed before the call began
                assert "closed" in error.what


LOAD = """
import json, sys, threading, time
import numpy as np
import psutil
import ccn_deploy
from ccn_deploy.runtimes import RuntimeOptions

path, seconds, calls = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
generator = np.random.default_rng(0)
batches = [generator.random((1 + i % 5, 1, 28, 28), dtype=np.float32) for i in range(20)]
model = ccn_deploy.load(path, options=RuntimeOptions(threads=1))
serial = [model.predict(batch) for batch in batches]
done, wrong = [0] * 8, [0] * 8

def work(worker, until, least):
    made = 0
    while made < least or time.monotonic() < until:
        at = (made + worker) % len(batches)
        wrong[worker] += not np.array_equal(model.predict(batches[at]), serial[at])
        made += 1
    done[worker] = made

def together(seconds, calls):
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=work, args=(w, until, calls)) for w in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return psutil.Process().memory_info().rss

before = together(seconds / 10, 150)  # ONNX Runtime's arena grows to what eight calls take at once
after = together(seconds, calls)
print(json.dumps({"calls": sum(done), "wrong": sum(wrong), "growth": after - before}))
"""

LEAK = 4 << 20
"""Bytes that 8 threads may take once warm. Were the images of each call kept, it would be 15 MB."""


def assert_steady(path: Path, *, seconds: float, calls: int) -> None:
    done = python(LOAD, path, str(seconds), str(calls))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["wrong"] == 0
    assert found["calls"] >= 8 * calls
    assert found["growth"] < LEAK


def test_eight_threads_on_one_model_take_no_more_memory(path: Path) -> None:
    assert_steady(path, seconds=0, calls=200)


@pytest.mark.soak
def test_eight_threads_on_one_model_for_a_minute(path: Path) -> None:
    assert_steady(path, seconds=60, calls=1)


BARE = """
import sys
import numpy as np
import onnxruntime
import psutil

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
images = np.zeros([16, *map(int, sys.argv[2:])], np.float32)
for _ in range(5):
    session.run(["logits"], {"images": images})
print(psutil.Process().memory_info().rss)
"""

OURS = """
import sys
import numpy as np
import psutil
import ccn_deploy
from ccn_deploy.runtimes import RuntimeOptions

model = ccn_deploy.load(sys.argv[1], options=RuntimeOptions(threads=1))
images = np.zeros([16, *map(int, sys.argv[2:])], np.float32)
for _ in range(5):
    model.predict(images)
print(psutil.Process().memory_info().rss)
"""


@pytest.mark.parametrize("architecture", ["mnist-cnn", "vgg11-cifar10"])
def test_a_loaded_bundle_takes_little_more_memory_than_a_bare_session(
    architecture: str, tmp_path: Path
) -> None:
    run = as_run(random_network(architecture, "ccn"))
    bundle = export_bundle(run, tmp_path / "b", gradient=False)
    shape = [str(size) for size in bundle.card.input_shape]
    graph = bundle.path / bundle.file(Role.FORWARD, "fp32").path
    ours = int(python(OURS, bundle.path, *shape).stdout)
    bare = int(python(BARE, graph, *shape).stdout)
    print(f"{architecture}: {ours:,} bytes against {bare:,}: {ours / bare:.2f}")
    assert ours < 1.5 * bare


def test_the_source_s_own_format_is_taken(tmp_path: Path) -> None:
    """What the file answers for bytes in its own format, the bundle answers for the same bytes."""
    model = classifier(layout="nhwc")
    (tmp_path / "theirs.onnx").write_bytes(model.SerializeToString())
    intake = Intake(
        input_layout="nhwc", input_range=(0, 255), mean=(104, 117, 123), channel_order="bgr"
    )
    source = open_source(str(tmp_path / "theirs.onnx"), SourceOptions(intake))
    bundle = export_bundle(source, tmp_path / "b", gradient=False)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    fed = pixels[..., ::-1].astype(np.float32) - np.float32([104, 117, 123])
    theirs = onnxruntime.InferenceSession(tmp_path / "theirs.onnx")
    (probabilities,) = theirs.run(None, {"x": fed})

    with ccn_deploy.load(bundle, "onnxruntime-cpu") as served:
        logits = served.predict_source(fed)
        assert logits == pytest.approx(
            served.predict(pixels.transpose(0, 3, 1, 2) / np.float32(255)), abs=1e-4
        )
        with pytest.raises(InputError, match="outside"):
            served.predict_source(fed + 200)
    softmax = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert softmax / softmax.sum(axis=1, keepdims=True) == pytest.approx(probabilities, abs=1e-5)
