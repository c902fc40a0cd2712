"""What the figures are of: features that a deployed network has for images, and its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.bundle import Bundle
from ccn_deploy.errors import RuntimeUnavailableError, named
from ccn_deploy.extras import require
from ccn_deploy.runtimes.layer_outputs import LayerOutputs
from ccn_deploy.targets import Role


def layer_features(
    outputs: LayerOutputs, images: NDArray[np.float32], layers: Sequence[str], batch: int = 128
) -> dict[str, NDArray[Any]]:
    """Return what layers make of images, one row an image.

    Args:
        outputs: Of a bundle on a runtime, from
            :func:`ccn_deploy.runtimes.layer_outputs.open_layer_outputs`.
        images: float32 [N, C, H, W] in [0, 1], at least one.
        layers: Names of layers. In a network of the paper ``"conv1"`` is in front of the
            activation and ``"act1"`` behind it.
        batch: Images at once; it bounds the memory.

    Returns:
        By layer: [N, D], what it returns flattened, in the runtime's precision.

    Raises:
        UsageError: No such layer; the hint suggests the nearest.
        InputError: Images outside their contract.
    """
    pieces: dict[str, list[NDArray[Any]]] = {layer: [] for layer in layers}
    for start in range(0, len(images), batch):
        found = outputs(images[start : start + batch])
        for layer, kept in pieces.items():
            values = named("layer", layer, found)
            kept.append(values.reshape(len(values), -1))
    return {layer: np.concatenate(kept) for layer, kept in pieces.items()}


def layer_weights(bundle: Bundle) -> dict[str, NDArray[np.float32]]:
    """Return the weights of the convolutions and linear layers that a bundle deploys.

    They are those of its float32 forward graph: a compact layer's are multiplied by its alpha.

    Returns:
        By layer, in order of execution: float32 [outputs, inputs], where the inputs of a
        convolution are its channels times its kernel's height and width.

    Raises:
        IntegrityError: The graph is damaged.
    """
    from ccn_deploy.graph.layers import layer_of, layer_outputs
    from ccn_deploy.graph.structure import PRODUCTS, find_norms
    from ccn_deploy.runtimes.torch_runtime import forward_graph

    graph = forward_graph(bundle)
    layers = layer_outputs(graph)
    # The ones that add up squares are a kernel, too, but no weights.
    inner = {name for norm in find_norms(graph) for name in norm.nodes}
    found: dict[str, NDArray[np.float32]] = {}
    for node in graph.nodes:
        weight = graph.constants.get(node.inputs[1]) if node.op in PRODUCTS else None
        if weight is None or node.name in inner:  # None: a product of two activations, too
            continue
        inputs_first = node.op == "MatMul" or (
            node.op == "Gemm" and not node.attributes.get("transB", 0)
        )
        matrix = weight.T if inputs_first else weight.reshape(len(weight), -1)
        found[layer_of(node.name, layers)] = np.asarray(matrix, dtype=np.float32)
    return found


def alpha_of(bundle: Bundle, layer: str) -> float:
    """Return the learned radius of a compact layer of a bundle that was made of a run.

    Raises:
        RuntimeUnavailableError: The bundle holds no weights, or the layer is not compact.
    """
    safetensors = require("safetensors.numpy", "train", "to read weights")
    weights = safetensors.load(bundle.read(bundle.file(Role.WEIGHTS)))
    if f"{layer}.alpha" not in weights:
        raise RuntimeUnavailableError(
            f"The layer {layer!r} of {bundle.card.name} has no alpha: it is not compact.",
            "Name a compact layer; the last one is compact in l2sm, ccn and ccn+ls.",
        )
    return float(weights[f"{layer}.alpha"])
