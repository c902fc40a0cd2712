"""Deployments that look robust and are not, and data that say nothing, with digests that match.

Unlike :mod:`tests.faults`, what these compute without an attack may be right: only an attack on
them, or the data, misleads.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import helper, numpy_helper

from ccn_deploy.bundle import Bundle, NewFile, write_bundle
from ccn_deploy.data import Dataset, dataset_from_arrays, load_dataset
from ccn_deploy.exporters import export_bundle
from ccn_deploy.exporters.bundle_graphs import gradient_file
from ccn_deploy.targets import Role
from tests.faults import GRADIENTS, LOGITS, edited
from tests.networks import as_run, random_network

Edit = Callable[[onnx.GraphProto], None]


# Gradients of their own


def zero_far_from(bundle: Bundle, output: Path, images: np.ndarray, radius: float = 0.3) -> Bundle:
    """Give true gradients near some images (in L2), and zero elsewhere."""
    points = images.reshape(len(images), -1)
    size = (points.astype(np.float64) ** 2).sum(axis=1)

    def edit(graph: onnx.GraphProto) -> None:
        constants = {
            "points": points.T.astype(np.float32),
            "sizes": size[None].astype(np.float32),
            "flat": np.array([0, -1]),
            "axes": np.array([1]),
            "two": np.float32(2),
            "radius": np.float32(radius**2),
        }
        nodes = [
            ("Reshape", ["images", "flat"], "x"),
            ("MatMul", ["x", "points"], "dot"),
            ("Mul", ["dot", "two"], "twice"),
            ("Mul", ["x", "x"], "squares"),
            ("ReduceSum", ["squares", "axes"], "own"),
            ("Sub", ["own", "twice"], "part"),
            ("Add", ["part", "sizes"], "distances"),
            ("ReduceMin", ["distances", "axes"], "nearest"),
            ("LessOrEqual", ["nearest", "radius"], "near"),
        ]
        _gate(graph, constants, nodes, "near")

    return edited(bundle, output, edit, role=Role.GRADIENT)


def zero_in_band(bundle: Bundle, output: Path, low: float = 0.305, high: float = 0.405) -> Bundle:
    """Give no gradient where the corner, dark in every digit, is as light as an attack makes it."""

    def edit(graph: onnx.GraphProto) -> None:
        constants = {
            "starts": np.array([0, 0]),
            "ends": np.array([1, 28]),
            "axes": np.array([2, 3]),
            "all": np.array([1, 2, 3]),
            "low": np.float32(low),
            "high": np.float32(high),
            "shape": np.array([-1, 1]),
        }
        nodes = [
            ("Slice", ["images", "starts", "ends", "axes"], "border"),
            ("ReduceMax", ["border", "all"], "light"),
            ("Reshape", ["light", "shape"], "column"),
            ("Less", ["column", "low"], "below"),
            ("Greater", ["column", "high"], "above"),
            ("Or", ["below", "above"], "outside"),
        ]
        _gate(graph, constants, nodes, "outside")

    return edited(bundle, output, edit, role=Role.GRADIENT)


def times(bundle: Bundle, output: Path, factor: np.ndarray | float) -> Bundle:
    """Multiply every gradient by a constant: NaN, zero, signs of its own for every pixel."""

    def edit(graph: onnx.GraphProto) -> None:
        _before(graph, GRADIENTS)
        graph.initializer.append(
            numpy_helper.from_array(np.asarray(factor, np.float32), "fake.factor")
        )
        graph.node.append(
            helper.make_node("Mul", ["fake.true", "fake.factor"], [GRADIENTS], name="fake.mul")
        )

    return edited(bundle, output, edit, role=Role.GRADIENT)


def random_signs(bundle: Bundle, output: Path) -> Bundle:
    """Turn the sign of every other pixel of the gradients, always the same ones."""
    signs = np.random.default_rng(0).choice([-1.0, 1.0], bundle.card.input_shape)
    return times(bundle, output, signs)


# Answers of their own


def noisy(bundle: Bundle, output: Path, amount: float = 0.1) -> Bundle:
    """Add seeded noise to the logits, new in every call."""

    def edit(graph: onnx.GraphProto) -> None:
        _before(graph, LOGITS)
        graph.node.append(
            helper.make_node(
                "RandomNormalLike", ["fake.true"], ["fake.noise"], scale=amount, seed=1.0
            )
        )
        graph.node.append(
            helper.make_node("Add", ["fake.true", "fake.noise"], [LOGITS], name="fake.add")
        )

    return edited(bundle, output, edit)


def scaled(bundle: Bundle, output: Path, factor: float) -> Bundle:
    """Multiply the logits in the network itself; its gradient graph is derived from that."""

    def edit(graph: onnx.GraphProto) -> None:
        _before(graph, LOGITS)
        graph.initializer.append(numpy_helper.from_array(np.float32(factor), "fake.factor"))
        graph.node.append(
            helper.make_node("Mul", ["fake.true", "fake.factor"], [LOGITS], name="fake.scale")
        )

    return _derived(bundle, output, edit)


def in_steps(bundle: Bundle, output: Path, levels: int = 16) -> Bundle:
    """Round the image inside the network: its slope is zero, and no gradient graph is made."""

    def edit(graph: onnx.GraphProto) -> None:
        for node in graph.node:
            for at, name in enumerate(node.input):
                if name == "images":
                    node.input[at] = "fake.image"
        for name, value in {"levels": levels, "part": 1 / levels}.items():
            graph.initializer.append(numpy_helper.from_array(np.float32(value), f"fake.{name}"))
        for at, (op, inputs, result) in enumerate(
            [
                ("Mul", ["images", "fake.levels"], "fake.grid"),
                ("Round", ["fake.grid"], "fake.rounded"),
                ("Mul", ["fake.rounded", "fake.part"], "fake.image"),
            ]
        ):
            graph.node.insert(at, helper.make_node(op, inputs, [result], name=f"{result}.node"))

    return _derived(bundle, output, edit, gradient=False)


def untrained(output: Path, defense: str = "sm", accuracy: float = 0.98) -> Bundle:
    """Write random weights under a card that says how good they are."""
    bundle = export_bundle(as_run(random_network("mnist-cnn", defense)), output.with_suffix(".raw"))
    return recarded(bundle, output, test_accuracy=accuracy)


def recarded(bundle: Bundle, output: Path, **training: object) -> Bundle:
    """Say other things of the training."""
    card = msgspec.structs.replace(bundle.card, training={**bundle.card.training, **training})
    files = [NewFile.copy(bundle, record) for record in bundle.manifest.files]
    return write_bundle(output, card=card, files=files)


# Data


def digits(change: str = "", count: int = 300) -> Dataset:
    """Return test digits of which something is not right.

    Args:
        change: ``"shifted"`` labels, ``"inverted"`` colours, ``"transposed"``, ``"repeated"``: one
            image alone, ``"trained"``: images of the training under another name.
        count: How many.
    """
    source = load_dataset("mnist5k", "train" if change == "trained" else "test")
    chosen = source.order(0)[:count]
    images, labels = source.images(chosen), source.labels[chosen]
    if change == "shifted":
        labels = (labels + 1) % 10
    elif change == "inverted":
        images = 1 - images
    elif change == "transposed":
        images = images.swapaxes(2, 3)
    elif change == "repeated":
        images, labels = images[[0] * count], labels[[0] * count]
    pixels = np.rint(images * 255).astype(np.uint8)
    return dataset_from_arrays(change or "digits", pixels, labels, source.class_names, split="test")


def _gate(
    graph: onnx.GraphProto,
    constants: dict[str, np.ndarray],
    nodes: list[tuple[str, list[str], str]],
    condition: str,
) -> None:
    """Let gradients through where a condition [N, 1] of the images holds."""
    _before(graph, GRADIENTS)
    constants = {**constants, "wide": np.array([-1, 1, 1, 1, 1])}
    for name, value in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"fake.{name}"))
    keep = {"images"}
    for op, inputs, result in nodes:
        names = [name if name in keep else f"fake.{name}" for name in inputs]
        axes = {"keepdims": 1} if op.startswith("Reduce") else {}
        graph.node.append(
            helper.make_node(op, names, [f"fake.{result}"], name=f"fake.{result}", **axes)
        )
    graph.node.extend(
        [
            helper.make_node("Cast", [f"fake.{condition}"], ["fake.number"], to=1, name="fake.c"),
            helper.make_node("Reshape", ["fake.number", "fake.wide"], ["fake.gate"], name="fake.g"),
            helper.make_node("Mul", ["fake.true", "fake.gate"], [GRADIENTS], name="fake.m"),
        ]
    )


def _before(graph: onnx.GraphProto, output: str) -> None:
    """Call what computes an output ``fake.true``, for other nodes to make the output of."""
    for node in graph.node:
        for names in (node.input, node.output):
            for at, name in enumerate(names):
                if name == output:
                    names[at] = "fake.true"


def _derived(bundle: Bundle, output: Path, edit: Edit, *, gradient: bool = True) -> Bundle:
    """Edit the network itself, and derive its gradient graph from that."""
    record = bundle.file(Role.FORWARD, "fp32")
    model = onnx.load_model_from_string(bundle.read(record))
    edit(model.graph)
    data = model.SerializeToString(deterministic=True)
    forward = NewFile(record.path, data, Role.FORWARD, "fp32")
    files = [forward, gradient_file(forward)] if gradient else [forward]
    return write_bundle(output, card=bundle.card, files=files)
