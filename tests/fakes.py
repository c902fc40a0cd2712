"""Deployments that look robust and are not, and data that say nothing, with digests that match.

Unlike :mod:`tests.faults`, what these compute without an attack may be right: only an attack on
them, or the data, misleads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from ccn_deploy.bundle import Bundle, NewFile, Source, write_bundle
from ccn_deploy.data import Dataset, dataset_from_arrays, load_dataset
from ccn_deploy.exporters import export_bundle
from ccn_deploy.exporters.bundle_graphs import GraphFile, gradient_file
from ccn_deploy.exporters.sources.module import export_module
from ccn_deploy.exporters.sources.opening import NetworkSource
from ccn_deploy.graph.graph import Graph
from ccn_deploy.targets import Role
from tests.cards import a_card
from tests.faults import GRADIENTS, LOGITS, edited
from tests.networks import as_run, random_network

Edit = Callable[[onnx.GraphProto], None]


# Networks of somebody else: what they compute is all that there is to know of them


def trained(network: nn.Module, *, epochs: int = 2, epsilon: float = 0.0) -> nn.Module:
    """Train a network on digits for a moment, against FGSM if an epsilon is given."""
    data = load_dataset("mnist5k", "train")
    images = torch.from_numpy(data.images(np.arange(len(data))))
    labels = torch.from_numpy(data.labels)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    loss = nn.CrossEntropyLoss()
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(64):
            x = images[rows]
            if epsilon:
                # From a random point: without one the network learns to hide its slopes.
                x = (x + epsilon * (2 * torch.rand(x.shape, generator=generator) - 1)).clip(0, 1)
                x.requires_grad_(True)
                (slope,) = torch.autograd.grad(loss(network(x), labels[rows]), x)
                x = (x + epsilon * slope.sign()).clip(0, 1).detach()
            optimizer.zero_grad()
            loss(network(x), labels[rows]).backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


def small(seed: int = 0, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Return a network of 9,000 weights, whose attacks cost next to nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 5, 2), activation(), nn.Conv2d(8, 16, 3, 2), activation(),
            nn.Flatten(), nn.Linear(400, 10),
        )  # fmt: skip


class Around(nn.Module):
    """A network with something done to its image, or to its logits [N, 10] in view of its image."""

    def __init__(
        self,
        inner: nn.Module,
        after: Callable[[Tensor, Tensor], Tensor] = lambda logits, x: logits,
        before: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        super().__init__()
        self.inner, self.after, self.before = inner, after, before

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        return self.after(self.inner(self.before(x)), x)


def foreign(network: nn.Module, output: Path, **more: Any) -> Bundle:
    """Export a network on digits of which the bundle has the forward graph alone."""
    data = load_dataset("mnist5k", "test")
    images = torch.from_numpy(data.images(np.arange(500)))
    right = network(images).argmax(dim=1).numpy() == data.labels[:500]
    card = a_card(
        name="theirs",
        architecture="",
        defense="",
        source=Source(kind="module", name="theirs", sha256="0" * 64),
        training={"dataset": "mnist5k", "test_accuracy": float(right.mean())},
    )
    forward = Graph(export_module(network, (1, 28, 28)))
    return export_bundle(NetworkSource(card, forward), output, **more)


# Gradients of their own


def with_gradients_of(bundle: Bundle, output: Path, other: Bundle) -> Bundle:
    """Give the gradients of another network."""
    theirs = other.read(other.file(Role.GRADIENT, "fp32"))
    files = [NewFile.copy(bundle, record) for record in bundle.manifest.files]
    lying = [replace(file, data=theirs) if file.role is Role.GRADIENT else file for file in files]
    return write_bundle(output, card=bundle.card, files=lying)


def in_batches_only(bundle: Bundle, output: Path, size: int) -> Bundle:
    """Give true gradients in batches of a size and more, and always the same ones in others."""

    def edit(graph: onnx.GraphProto) -> None:
        constants = {"first": np.array([0]), "size": np.array([size]), "column": np.array([-1, 1])}
        nodes = [
            ("Shape", ["images"], "shape"),
            ("Gather", ["shape", "first"], "batch"),
            ("GreaterOrEqual", ["batch", "size"], "many"),
            ("Reshape", ["many", "column"], "large"),
        ]
        _gate(graph, constants, nodes, "large", otherwise=True)

    return edited(bundle, output, edit, role=Role.GRADIENT)


def zero_far_from(
    bundle: Bundle,
    output: Path,
    images: np.ndarray,
    radius: float = 0.3,
    *,
    otherwise: bool = False,
) -> Bundle:
    """Give true gradients near some images (in L2), and elsewhere zero, or always the same ones."""
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
        _gate(graph, constants, nodes, "near", otherwise=otherwise)

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


def of_the_image_before(bundle: Bundle, output: Path) -> Bundle:
    """Give every image the gradients of the one before it in the batch."""

    def edit(graph: onnx.GraphProto) -> None:
        _before(graph, GRADIENTS)
        _rolled(graph, GRADIENTS)

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


def rows_moved(bundle: Bundle, output: Path, size: int) -> Bundle:
    """Give every image of a batch of one size the answer of its neighbour, and no other batch."""

    def edit(graph: onnx.GraphProto) -> None:
        _before(graph, LOGITS)
        _rolled(graph, "fake.moved")
        for name, value in {"zero": 0, "size": size}.items():
            graph.initializer.append(numpy_helper.from_array(np.array([value]), f"fake.{name}"))
        for op, inputs, result in [
            ("Shape", ["images"], "fake.shape"),
            ("Gather", ["fake.shape", "fake.zero"], "fake.batch"),
            ("Equal", ["fake.batch", "fake.size"], "fake.now"),
            ("Where", ["fake.now", "fake.moved", "fake.true"], LOGITS),
        ]:
            graph.node.append(helper.make_node(op, inputs, [result], name=f"{result}.node"))

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
        change: ``"shifted"`` or ``"shuffled"`` labels, ``"inverted"`` colours, ``"transposed"``,
            ``"dark"``: 0 and 1 where 0 and 255 are meant, ``"repeated"``: one image alone,
            ``"trained"``: images of the training under another name.
        count: How many.
    """
    source = load_dataset("mnist5k", "train" if change == "trained" else "test")
    chosen = source.order(0)[:count]
    images, labels = source.images(chosen), source.labels[chosen]
    if change == "shifted":
        labels = (labels + 1) % 10
    elif change == "shuffled":
        labels = np.random.default_rng(0).permutation(labels)
    elif change == "dark":
        images = images / 255
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
    *,
    otherwise: bool = False,
) -> None:
    """Let gradients through where a condition [N, 1] of the images holds.

    Elsewhere they are zero, or a pattern that knows nothing of the image.
    """
    _before(graph, GRADIENTS)
    pattern = 0.1 * np.random.default_rng(0).standard_normal((1, 28, 28)) * otherwise
    constants = {
        **constants,
        "wide": np.array([-1, 1, 1, 1, 1]),
        "one": np.float32(1),
        "pattern": pattern.astype(np.float32),
    }
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
            helper.make_node("Mul", ["fake.true", "fake.gate"], ["fake.let"], name="fake.m"),
            helper.make_node("Sub", ["fake.one", "fake.gate"], ["fake.shut"], name="fake.s"),
            helper.make_node("Mul", ["fake.shut", "fake.pattern"], ["fake.else"], name="fake.e"),
            helper.make_node("Add", ["fake.let", "fake.else"], [GRADIENTS], name="fake.a"),
        ]
    )


def _rolled(graph: onnx.GraphProto, output: str) -> None:
    """Move the rows of ``fake.true`` by one, the last to the front."""
    ends = {"axis": 0, "start": 0, "last": -1, "end": np.iinfo(np.int64).max}
    for name, value in ends.items():
        graph.initializer.append(numpy_helper.from_array(np.array([value]), f"fake.roll.{name}"))
    for result, first, stop in (("tail", "last", "end"), ("head", "start", "last")):
        names = ["fake.true", *(f"fake.roll.{name}" for name in (first, stop, "axis"))]
        graph.node.append(
            helper.make_node("Slice", names, [f"fake.{result}"], name=f"fake.{result}")
        )
    graph.node.append(
        helper.make_node("Concat", ["fake.tail", "fake.head"], [output], axis=0, name="fake.rolled")
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
    files = [forward, gradient_file(GraphFile(forward))] if gradient else [forward]
    return write_bundle(output, card=bundle.card, files=files)
