"""What every layer returns, in a runtime and in the reference, under the same names."""

from __future__ import annotations

import os
from collections.abc import Callable

from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.errors import RuntimeUnavailableError, unknown
from ccn_deploy.extras import require
from ccn_deploy.graph.signature import INPUT
from ccn_deploy.runtimes import RUNTIMES
from ccn_deploy.runtimes.base import Array, RuntimeOptions, check_images

LayerOutputs = Callable[[Array], dict[str, Array]]
"""Maps images [N, C, H, W] to the output of every layer by its name, in order of execution.

The last entry is the last linear layer's: the logits. Batches are not split."""


def open_layer_outputs(
    bundle: Bundle | str | os.PathLike[str],
    name: str = "onnxruntime-cpu",
    precision: str = "fp32",
    options: RuntimeOptions | None = None,
) -> LayerOutputs:
    """Open a bundle so that every layer's output can be seen; for the reference, torch in fp64.

    In ONNX Runtime the layers' tensors are added to the outputs of a copy of the graph. A tensor
    that must be shown cannot be fused away, so this program may be less fused than the deployed
    one and differ from it in the last bits. It tells where a departure starts, not how large it
    is in production.

    Args:
        bundle: An open bundle, or the path of one.
        name: A name in :data:`ccn_deploy.runtimes.RUNTIMES`.
        precision: As for :func:`ccn_deploy.runtimes.open_runtime`.
        options: As for :func:`ccn_deploy.runtimes.open_runtime`.

    Raises:
        CcnDeployError: As :func:`ccn_deploy.runtimes.open_runtime` does.
        RuntimeUnavailableError: An engine was asked for; its layers are fused.
        MissingExtraError: The package onnx or torch is not installed.
    """
    if name not in RUNTIMES:
        raise unknown("runtime", name, RUNTIMES)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    options = options or RuntimeOptions()
    if name.startswith("torch"):
        require("torch", "train", f"for the runtime {name}")
        from ccn_deploy.runtimes.torch_runtime import TorchRuntime

        runtime = TorchRuntime(opened, name=name, precision=precision, options=options)
        return runtime.activations
    if name.startswith("tensorrt"):
        raise RuntimeUnavailableError(
            f"The runtime {name} shows no single layers: an engine has fused them.",
            "Look at them with --runtime onnxruntime-cpu, which runs the graph it was built from.",
        )
    return _in_onnx_runtime(opened, name, precision, options)


def _in_onnx_runtime(
    bundle: Bundle, name: str, precision: str, options: RuntimeOptions
) -> LayerOutputs:
    from ccn_deploy.runtimes.onnx_runtime import load_library, make_session, make_spec

    onnx = require("onnx", "train", "to look at single layers")
    record = bundle.forward(name, precision)
    model = onnx.load_model_from_string(bundle.read(record))
    # The exporter names a node "<layer>" if it gives the layer's result, "<layer>.<part>" if not.
    layers = {node.name: node.output[0] for node in model.graph.node if "." not in node.name}
    shown = {output.name for output in model.graph.output}
    for tensor in layers.values():
        if tensor not in shown:
            model.graph.output.append(onnx.ValueInfoProto(name=tensor))
    ort = load_library(name)
    session = make_session(ort, model.SerializeToString(), record.path, name, options)
    spec = make_spec(ort, bundle, name, precision, options)

    def activations(images: Array) -> dict[str, Array]:
        check_images(images, spec, check_range=options.check_range)
        outputs = session.run(list(layers.values()), {INPUT: images})
        return dict(zip(layers, outputs, strict=True))

    return activations
