"""The proof that a forward graph is the foreign network: both are run on the same images."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import nn

from ccn_deploy.errors import LoweringError, UsageError, first_line
from ccn_deploy.exporters.checks import HINT
from ccn_deploy.exporters.sources.original import Original, run, session
from ccn_deploy.graph.builder import to_bytes
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.signature import INPUT, OUTPUT

TOLERANCE = 1e-4
"""Allowed difference of an output, relative to the largest one (at least 1). Rounding of float32
stays one or two orders below it; another mean or channel order is orders above."""

HALF_TOLERANCE = 2e-2
"""The same where the file computes in half precision, which the reference does not."""

GRID_TOLERANCE = 5e-2
"""The same where the file rounds to a grid: what lies between two steps goes to either of them."""

_HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Agreement:
    """How far a file and the forward graph made of it differ.

    Attributes:
        images: That both were run on.
        same_labels: Of them, the images with equal labels; on others two outputs of the file lie
            closer together than the tolerance.
        outputs: Largest difference of an output of the file, from the forward graph's logits
            after what was removed; in ONNX Runtime and in float64, the larger one.
        logits_onnxruntime: Largest difference of a logit in ONNX Runtime, all images in one batch,
            relative to the largest logit.
        logits_float64: The same with the forward graph in float64.
        spread: How far apart the images' logits lie, relative to the largest logit. Where this is
            no larger than the differences, the comparison shows nothing.
    """

    images: int
    same_labels: int
    outputs: float
    logits_onnxruntime: float
    logits_float64: float
    spread: float

    def figures(self) -> dict[str, float]:
        """Return the figures by name, for the model card."""
        return {name: float(value) for name, value in asdict(self).items()}


def check_agreement(graph: Graph, original: Original, images: NDArray[np.float32]) -> Agreement:
    """Run the file, and its forward graph in ONNX Runtime and in float64, on the same images.

    What the file returns is compared with the logits after what was removed from it. Behind a
    softmax that is sure of itself any logits look alike, so the tensor under it is compared too.

    Args:
        graph: Forward.
        original: The file, fed in its own format.
        images: float32 [N, C, H, W] in [0, 1].

    Raises:
        LoweringError: They differ by more than rounding, or an output is not finite.
        UsageError: The file fails on the images.
    """
    outputs = _flat(original.outputs(images), "The file")
    logits = _flat(original.raw_logits(images), "The file")
    tolerance = _tolerance(graph, original)
    scale = float(np.abs(logits).max()) or 1.0
    least = tolerance * max(1.0, float(np.abs(outputs).max()))
    opened = session(to_bytes(graph.model), "The forward graph")
    module = GraphModule(graph, torch.float64)
    with torch.inference_mode():
        exact = module(torch.from_numpy(images).double()).numpy()
    same = np.ones(len(images), bool)
    of_outputs, of_logits = [], []
    for where, made in (
        ("in ONNX Runtime", run(opened, OUTPUT, {INPUT: images})),
        ("in float64", exact),
    ):
        got = _flat(made, f"The forward graph {where}")
        normalised = original.normalised(got)
        errors = np.abs(got - logits).max(axis=1)
        _check_close(errors, np.full(len(images), tolerance * scale), "a logit", where)
        of_logits.append(float(errors.max()) / scale)
        # A softmax moves by at most half, its logarithm by at most twice as much as its logits.
        allowed = least + 2 * errors
        errors = np.abs(normalised - outputs).max(axis=1)
        _check_close(errors, allowed, "an output", where)
        of_outputs.append(float(errors.max()))
        same &= normalised.argmax(axis=1) == outputs.argmax(axis=1)
    return Agreement(
        images=len(images),
        same_labels=int(same.sum()),
        outputs=max(of_outputs),
        logits_onnxruntime=of_logits[0],
        logits_float64=of_logits[1],
        spread=float(np.ptp(logits, axis=0).max()) / scale,
    )


def _flat(outputs: NDArray[Any], what: str) -> NDArray[np.float64]:
    """Return outputs as float64 [N, classes], all of them finite."""
    flat = outputs.reshape(len(outputs), -1).astype(np.float64)
    if not np.isfinite(flat).all():
        worst = int(np.flatnonzero(~np.isfinite(flat).all(axis=1))[0])
        raise LoweringError(
            f"{what} gives outputs that are not finite on image {worst}.",
            "Check --input-range, --mean and --std.",
        )
    return flat


def _check_close(
    errors: NDArray[np.float64], allowed: NDArray[np.float64], what: str, where: str
) -> None:
    """Refuse errors, one per image, that are larger than allowed."""
    worst = int((errors / allowed).argmax())
    if errors[worst] > allowed[worst]:
        raise LoweringError(
            f"The forward graph {where} is not the file: on image {worst} of {len(errors)} {what} "
            f"differs by {errors[worst]:.2e}, and {allowed[worst]:.1e} is allowed.",
            "Nothing was written. Please report it, with the file if you can.",
        )


def probe_images(shape: tuple[int, int, int], seed: int = 0) -> NDArray[np.float32]:
    """Return images to compare on where there are none of the user's.

    Args:
        shape: (C, H, W).
        seed: Of the random ones.

    Returns:
        float32 [8, C, H, W] in [0, 1]: two of noise, three smooth ones, three of one colour. In
        the last ones channels differ, so that their order matters.
    """
    rng = np.random.default_rng(seed)
    noise = rng.random((2, *shape))
    smooth = np.stack([_smooth(shape, rng) for _ in range(3)])
    colours = rng.random((3, shape[0], 1, 1)) * np.ones((1, *shape))
    return np.concatenate([noise, smooth, colours]).astype(np.float32)


def _smooth(shape: tuple[int, int, int], rng: np.random.Generator) -> NDArray[np.float64]:
    """Return an image of a few waves across it, as photographs have most of their energy there."""
    channels, height, width = shape
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    image = np.zeros(shape)
    for _ in range(6):
        fy, fx = rng.uniform(-4.0, 4.0, 2)
        phase = rng.uniform(0.0, 2 * np.pi)
        image += rng.uniform(0.2, 1.0, (channels, 1, 1)) * np.sin(
            2 * np.pi * (fy * y + fx * x) + phase
        )
    low, high = image.min(), image.max()
    return np.asarray((image - low) / max(high - low, 1e-9))


def _tolerance(graph: Graph, original: Original) -> float:
    """Return the tolerance for the coarsest arithmetic that a file asks for."""
    if any(node.op == "QuantizeLinear" for node in graph.nodes):
        return GRID_TOLERANCE
    types = {constant.data_type for constant in graph.model.graph.initializer}
    casts = {n.attributes.get("to") for n in graph.nodes if n.op == "Cast"}
    halves = {original.input_type, *types, *casts}.intersection(_HALVES)
    return HALF_TOLERANCE if halves else TOLERANCE


MODULE_TOLERANCE = 1e-5
"""Allowed difference of logits in float64, relative to the largest. Folding a factor into float32
weights rounds each of them once, which moves logits by about 1e-6."""


def module_agreement(module: nn.Module, graph: Graph) -> dict[str, float]:
    """Show in float64 that a module and its forward graph are the same function.

    Args:
        module: In evaluation mode; it is not changed.
        graph: Forward.

    Returns:
        ``"images"``, noise, smooth and constant ones; ``"module"``, the largest difference of a
        logit; ``"scale"``, the largest logit.

    Raises:
        LoweringError: They differ by more than the rounding of folded weights.
        UsageError: The module does not run in float64.
    """
    images = torch.from_numpy(probe_images(graph.input_shape)).double()
    exact = copy.deepcopy(module).double().eval()
    with torch.inference_mode():
        try:
            wanted = exact(images).double()
        except RuntimeError as raised:
            raise UsageError(
                f"The module does not run in float64: {first_line(raised)}",
                "Let it follow the type of its input (x.dtype) where it makes tensors of its own.",
            ) from raised
        found = GraphModule(graph, torch.float64)(images)
    scale = float(wanted.abs().max())
    error = float((found - wanted).abs().max())
    if not math.isfinite(scale):
        raise LoweringError(
            "The network itself gives logits that are not finite.", "Look for NaN in its weights."
        )
    if not error <= MODULE_TOLERANCE * max(scale, 1e-30):
        raise LoweringError(
            f"The graph is off by {error / max(scale, 1e-30):.1e} of the largest logit from the "
            "network it was made from.",
            HINT,
        )
    return {"images": float(len(images)), "module": error, "scale": scale}
