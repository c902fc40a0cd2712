from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ccn_deploy.bundle import Bundle, NewFile, write_bundle
from ccn_deploy.errors import (
    ExitCode,
    InputError,
    IntegrityError,
    NotABundleError,
    RuntimeUnavailableError,
    UsageError,
)
from ccn_deploy.exporters import export_bundle
from ccn_deploy.exporters.sources.run import network_from
from ccn_deploy.runtimes import RuntimeOptions, RuntimeSpec, open_runtime
from ccn_deploy.runtimes.base import check_images
from ccn_deploy.runtimes.layer_outputs import open_layer_outputs
from ccn_deploy.runtimes.torch_runtime import load_reference
from ccn_deploy.targets import RUNTIMES, Role
from tests.cards import a_card
from tests.networks import as_lowered, as_run, difficult_images, random_network

HERE = ["onnxruntime-cpu", "torch"]
"""Runtimes that every machine has."""

ENGINES = ["tensorrt", "tensorrt-rtx"]
"""Runtimes that run what this bundle does not have; see test_tensorrt."""

SHAPE = (1, 28, 28)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("b") / "ccn"
    return export_bundle(as_run(random_network("mnist-cnn", "ccn")), path, gradient=False)


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, *SHAPE), dtype=np.float32)


def with_graph(bundle: Bundle, path: Path, graph: bytes) -> Bundle:
    """Return a bundle whose digests are right and whose graph is something else."""
    return write_bundle(
        path,
        card=bundle.card,
        files=[
            NewFile("weights.safetensors", bundle.read(bundle.file(Role.WEIGHTS)), Role.WEIGHTS),
            NewFile("graphs/forward-fp32.onnx", graph, Role.FORWARD, "fp32"),
        ],
    )


# Answers


def test_spec_says_what_runs(bundle: Bundle) -> None:
    with open_runtime(bundle, options=RuntimeOptions(max_batch=9)) as runtime:
        spec = runtime.spec
    assert spec.target == "onnxruntime-cpu-fp32"
    assert (spec.device, spec.max_batch, spec.input_shape, spec.classes) == ("cpu", 9, SHAPE, 10)
    assert spec.versions == {"onnxruntime": onnxruntime.__version__}


def test_a_path_opens_as_a_bundle_does(bundle: Bundle, tmp_path: Path) -> None:
    with open_runtime(bundle.path) as by_path, open_runtime(bundle) as by_bundle:
        assert np.array_equal(by_path.logits(images(2)), by_bundle.logits(images(2)))
    with pytest.raises(NotABundleError):
        open_runtime(tmp_path / "nothing")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", np.float32), ("fp64", np.float64)])
def test_torch_answers_in_the_precision_asked_for(
    bundle: Bundle, precision: str, dtype: type
) -> None:
    x = difficult_images(SHAPE)
    model = as_lowered(random_network("mnist-cnn", "ccn"))
    truth = model(torch.from_numpy(x).double()).numpy()
    with open_runtime(bundle, "torch", precision) as runtime:
        logits = runtime.logits(x)
    assert logits.dtype == dtype
    tolerance = 1e-5 if precision == "fp32" else 1e-13
    assert logits == pytest.approx(truth, abs=tolerance * np.abs(truth).max(), rel=0)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("count", [0, 1, 3, 4, 7])
def test_batches_beyond_the_limit_are_split_and_joined(
    bundle: Bundle, name: str, count: int
) -> None:
    x = images(count)
    with open_runtime(bundle, name, options=RuntimeOptions(max_batch=3)) as runtime:
        logits = runtime.logits(x)
        singly = [runtime.logits(x[i : i + 1])[0] for i in range(count)]
    assert logits.shape == (count, 10)
    assert logits.dtype == np.float32
    assert logits == pytest.approx(np.array(singly).reshape(count, 10), abs=1e-5)


@pytest.mark.parametrize(("threads", "largest"), [(1, 16), (3, 48), (99, 256)])
def test_pieces_fit_the_caches_of_the_threads(bundle: Bundle, threads: int, largest: int) -> None:
    x = images(40)
    with open_runtime(bundle, options=RuntimeOptions(threads=threads)) as runtime:
        assert runtime.spec.max_batch == largest
    with open_runtime(bundle, options=RuntimeOptions(threads=1)) as runtime:
        pieces = [runtime.logits(x[at : at + 16]) for at in (0, 16, 32)]
        assert np.array_equal(runtime.logits(x), np.concatenate(pieces))
    with open_runtime(bundle, "torch", options=RuntimeOptions(threads=threads)) as reference:
        assert reference.spec.max_batch == 256


@pytest.mark.parametrize("name", HERE)
def test_any_memory_layout_gives_the_same_answer(bundle: Bundle, name: str) -> None:
    x = images(4)
    strided = np.repeat(x, 2, axis=0)[::2]
    fixed = x.copy()
    fixed.flags.writeable = False
    transposed = np.ascontiguousarray(x.transpose(3, 2, 1, 0)).transpose(3, 2, 1, 0)
    with open_runtime(bundle, name) as runtime:
        wanted = runtime.logits(x)
        for same in (strided, fixed, transposed, np.asfortranarray(x)):
            assert np.array_equal(runtime.logits(same), wanted)


def test_threads_and_arena_change_no_label(bundle: Bundle) -> None:
    x = images(8)
    with open_runtime(bundle) as plain:
        wanted = plain.logits(x)
    with open_runtime(bundle, options=RuntimeOptions(threads=2, arena=False)) as runtime:
        assert runtime.logits(x) == pytest.approx(wanted, abs=1e-5)


def test_torch_threads_are_put_back(bundle: Bundle) -> None:
    before = torch.get_num_threads()
    seen = []
    with open_runtime(bundle, "torch", options=RuntimeOptions(threads=before + 1)) as runtime:
        model = runtime._model  # type: ignore[attr-defined]
        model.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
        runtime.logits(images(1))
        runtime.vjp(images(1), np.ones((1, 1, 10), dtype=np.float32))
    assert seen == [before + 1] * 2
    assert torch.get_num_threads() == before


# Gradients


def test_vjp_is_the_slope_of_the_logits(bundle: Bundle) -> None:
    x = images(2)
    generator = np.random.default_rng(1)
    cotangents = generator.normal(size=(2, 3, 10)).astype(np.float32)
    directions = generator.normal(size=(5, *SHAPE))
    model = as_lowered(random_network("mnist-cnn", "ccn"))

    def logits(x: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(x)).numpy()

    with open_runtime(bundle, "torch", "fp64") as runtime:
        assert runtime.differentiable
        found, gradients = runtime.vjp(x, cotangents)
    assert found == pytest.approx(logits(x.astype(np.float64)), rel=1e-12)
    assert gradients.shape == (2, 3, *SHAPE)
    step = 1e-6
    for direction in directions:
        slope = (logits(x + step * direction) - logits(x - step * direction)) / (2 * step)
        wanted = np.einsum("nkj,nj->nk", cotangents, slope)
        got = np.einsum("nkchw,chw->nk", gradients, direction)
        assert got == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_vjp_splits_batches_and_takes_none(bundle: Bundle) -> None:
    x = images(5)
    cotangents = np.eye(10, dtype=np.float32)[None, :3].repeat(5, axis=0)
    with open_runtime(bundle, "torch") as whole:
        logits, gradients = whole.vjp(x, cotangents)
        empty, none = whole.vjp(x[:0], cotangents[:0])
        assert whole.vjp(x, cotangents[:, :0])[1].shape == (5, 0, *SHAPE)
        with pytest.raises(InputError, match="Cotangents"):
            whole.vjp(x, cotangents[:, :, :4])
    assert (empty.shape, none.shape) == ((0, 10), (0, 3, *SHAPE))
    with open_runtime(bundle, "torch", options=RuntimeOptions(max_batch=2)) as split:
        pieces = split.vjp(x, cotangents)
    assert pieces[0] == pytest.approx(logits, abs=1e-5)
    assert pieces[1] == pytest.approx(gradients, abs=1e-5)


def test_a_forward_graph_has_no_gradients(bundle: Bundle) -> None:
    with open_runtime(bundle) as runtime:
        assert not runtime.differentiable
        with pytest.raises(RuntimeUnavailableError, match="gradient"):
            runtime.vjp(images(1), np.ones((1, 1, 10), dtype=np.float32))


# Layers


def test_every_layer_is_shown_under_one_name_and_agrees(bundle: Bundle) -> None:
    x = difficult_images(SHAPE)
    deployed = open_layer_outputs(bundle)(x)
    reference = open_layer_outputs(bundle, "torch", "fp64")(x)
    assert list(deployed) == list(reference)
    names = [name for name, _ in random_network("mnist-cnn", "ccn").named_layers()]
    assert list(reference) == [name for name in names if name != "flatten"]
    assert np.array_equal(reference["mean"], x.astype(np.float64) - 0.5)
    assert np.array_equal(reference["act1"], np.maximum(reference["conv1"], 0))
    for name, layer in reference.items():
        assert deployed[name].shape == layer.shape
        assert np.abs(deployed[name] - layer).max() <= 1e-5 * np.abs(layer).max()
    with open_runtime(bundle, "torch", "fp64") as runtime:
        assert np.array_equal(reference["fc3"], runtime.logits(x))


def test_layers_check_their_images_too(bundle: Bundle) -> None:
    for name in HERE:
        with pytest.raises(InputError):
            open_layer_outputs(bundle, name)(images(1) + 1)
    with pytest.raises(UsageError, match="Did you mean"):
        open_layer_outputs(bundle, "torhc")


# Refusals


def _nan(x: np.ndarray) -> np.ndarray:
    x[1, 0, 3, 3] = np.nan
    return x


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_nan, "Image 1 has NaN"),
        (lambda x: x * 255, r"outside \[0, 1\]"),
        (lambda x: x - 0.6, r"outside \[0, 1\]"),
        (lambda x: x[0], "shape"),
        (lambda x: x.transpose(0, 2, 3, 1), "shape"),
        (lambda x: x[:, :, :27], "shape"),
        (lambda x: x.astype(np.float64), "float32, got float64"),
        (lambda x: (x * 255).astype(np.uint8), "uint8"),
        (lambda x: x.tolist(), "list"),
        (torch.from_numpy, "Tensor"),
    ],
)
def test_images_outside_their_contract_are_refused(
    bundle: Bundle, name: str, spoil: object, says: str
) -> None:
    with open_runtime(bundle, name) as runtime, pytest.raises(InputError, match=says):
        runtime.logits(spoil(images(3)))  # type: ignore[operator]


SPEC = RuntimeSpec("any", "fp32", (1, 2, 2), 2, 8, "cpu", {}, True)
FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True) | st.sampled_from(
    [0.0, -0.0, 1.0, 1.0000001192092896, -1e-45, 1e-45]
)


@settings(deadline=None, max_examples=200)
@given(x=hnp.arrays(np.float32, (2, 1, 2, 2), elements=FLOATS))
@example(x=np.full((2, 1, 2, 2), -0.0, dtype=np.float32))
@example(x=np.ones((2, 1, 2, 2), dtype=np.float32))
def test_exactly_the_finite_floats_from_0_to_1_are_accepted(x: np.ndarray) -> None:
    finite = all(np.isfinite(v) for v in x.flat)
    inside = all(0.0 <= v <= 1.0 for v in x.flat)
    for check_range, wanted in ((True, inside), (False, finite)):
        for layout in (x, np.asfortranarray(x)):
            try:
                check_images(layout, SPEC, check_range=check_range)
                accepted = True
            except InputError:
                accepted = False
            assert accepted == wanted


@pytest.mark.parametrize("name", HERE)
def test_an_attack_may_leave_the_box_when_it_says_so(bundle: Bundle, name: str) -> None:
    with open_runtime(bundle, name, options=RuntimeOptions(check_range=False)) as runtime:
        assert np.isfinite(runtime.logits(images(1) * 3 - 1)).all()
        with pytest.raises(InputError, match="NaN"):
            runtime.logits(_nan(images(2)))


@pytest.mark.parametrize("name", HERE)
def test_a_closed_runtime_says_so(bundle: Bundle, name: str) -> None:
    with open_runtime(bundle, name) as runtime:
        pass
    runtime.close()
    with pytest.raises(UsageError, match="closed"):
        runtime.logits(images(1))


def test_unknown_names_and_precisions_are_refused(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="Did you mean 'onnxruntime-cpu'"):
        open_runtime(bundle, "onnxruntime-cqu")
    for name in HERE:
        with pytest.raises(RuntimeUnavailableError, match="int8"):
            open_runtime(bundle, name, "int8")
    with pytest.raises(RuntimeUnavailableError, match="fp64"):
        open_runtime(bundle, "onnxruntime-cpu", "fp64")


@pytest.mark.parametrize("name", sorted(set(RUNTIMES) - {*HERE, *ENGINES}))
def test_a_device_that_is_not_there_is_an_error_and_never_the_cpu(
    bundle: Bundle, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if (
        torch.cuda.is_available()
        or "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    ):
        pytest.skip("this machine may have the device")
    with pytest.raises(RuntimeUnavailableError) as refused:
        open_runtime(bundle, name)
    assert refused.value.exit_code == ExitCode.ENVIRONMENT
    assert "GPU" in str(refused.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "wrong", [{"threads": 0}, {"max_batch": 0}, {"memory_limit": 0}, {"device": -1}]
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at least"):
        RuntimeOptions(**wrong)  # type: ignore[arg-type]


def test_an_option_that_would_be_ignored_is_refused(bundle: Bundle) -> None:
    for name in HERE:
        with pytest.raises(UsageError, match="memory limit"):
            open_runtime(bundle, name, options=RuntimeOptions(memory_limit=2**30))


@pytest.mark.parametrize("spoil", ["empty", "truncated", "garbage", "other classes", "external"])
def test_a_graph_of_the_right_digest_that_is_no_such_graph_is_refused_quietly(
    bundle: Bundle, spoil: str, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    graph = bundle.read(bundle.file(Role.FORWARD, "fp32"))
    if spoil == "empty":
        graph = b""
    elif spoil == "truncated":
        graph = graph[: len(graph) // 2]
    elif spoil == "garbage":
        graph = b"\x00\xff not a graph" * 50
    elif spoil == "other classes":
        model = random_network("mnist-cnn", "ccn", classes=4)
        other = export_bundle(as_run(model), tmp_path / "other")
        graph = other.read(other.file(Role.FORWARD, "fp32"))
    else:  # weights from a file that no digest covers
        model = onnx.load_from_string(graph)
        monkeypatch.chdir(tmp_path)
        onnx.save(model, "m.onnx", save_as_external_data=True, location="outside.bin")
        graph = Path("m.onnx").read_bytes()
    with pytest.raises(IntegrityError) as refused:
        open_runtime(with_graph(bundle, tmp_path / "spoilt", graph))
    assert "\n" not in refused.value.what
    assert capfd.readouterr() == ("", "")


def test_weights_of_another_network_are_refused() -> None:
    weights = as_run(random_network("mnist-cnn", "sm")).weights
    with pytest.raises(IntegrityError, match=r"conv1\.alpha"):
        network_from(a_card(), weights)


def test_a_forward_graph_that_no_exporter_writes_is_damage(bundle: Bundle, tmp_path: Path) -> None:
    model = onnx.load_model_from_string(bundle.read(bundle.file(Role.FORWARD, "fp32")))
    model.graph.node[-1].domain = "com.example"
    with pytest.raises(IntegrityError, match=r"forward-fp32|com\.example"):
        load_reference(with_graph(bundle, tmp_path / "spoilt", model.SerializeToString()))


def test_the_reference_is_frozen_and_in_eval_mode(bundle: Bundle) -> None:
    reference = load_reference(bundle, torch.float64)
    assert not reference.training
    assert not list(reference.parameters())
    assert not reference.state_dict()
    assert {b.dtype for b in reference.buffers()} == {torch.float64}
