"""What every layer returns, in a runtime and in the reference, under the same names."""

from __future__ import annotations

import os
from collections.abc import Callable

from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.errors import RuntimeUnavailableError
from ccn_deploy.extras import require
from ccn_deploy.graph.signature import INPUT
from ccn_deploy.runtimes.base import Array, RuntimeOptions, check_images
from ccn_deploy.targets import Target

LayerOutputs = Callable[[Array], dict[str, Array]]
"""Maps images [N, C, H, W] to the output of every layer by its name, in order of execution.

The last entry is the logits. Layers that a deployed graph does not have by that tensor, such as
those that a pass merged into others, are left out. Batches are not split."""


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
        name: A name in :data:`ccn_deploy.targets.RUNTIMES`.
        precision: As for :func:`ccn_deploy.runtimes.open_runtime`.
        options: As for :func:`ccn_deploy.runtimes.open_runtime`.

    Raises:
        CcnDeployError: As :func:`ccn_deploy.runtimes.open_runtime` does.
        RuntimeUnavailableError: An engine was asked for; its layers are fused.
        MissingExtraError: The package onnx or torch is not installed.
    """
    target = Target(name, precision)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    options = options or RuntimeOptions()
    if target.family == "torch":
        require("torch", "train", f"for the runtime {name}")
        from ccn_deploy.runtimes.torch_runtime import TorchRuntime

        runtime = TorchRuntime(opened, name=name, precision=precision, options=options)
        return runtime.activations
    if target.kind.runs_engines:
        raise RuntimeUnavailableError(
            f"The runtime {name} shows no single layers: an engine has fused them.",
            "Look at them with --runtime onnxruntime-cpu, which runs the graph it was built from.",
        )
    return _in_onnx_runtime(opened, target, options)


def _in_onnx_runtime(bundle: Bundle, target: Target, options: RuntimeOptions) -> LayerOutputs:
    onnx = require("onnx", "train", "to look at single layers")
    require("torch", "train", "to look at single layers")
    from ccn_deploy.graph.layers import layer_outputs
    from ccn_deploy.runtimes.onnx_runtime import load_library, make_session, make_spec
    from ccn_deploy.runtimes.torch_runtime import forward_graph

    record = bundle.program(target)
    model = onnx.load_model_from_string(bundle.read(record))
    made = {tensor for node in model.graph.node for tensor in node.output}
    layers = {
        layer: tensor
        for layer, tensor in layer_outputs(forward_graph(bundle)).items()
        if tensor in made
    }
    shown = {output.name for output in model.graph.output}
    for tensor in dict.fromkeys(layers.values()):
        if tensor not in shown:
            model.graph.output.append(onnx.ValueInfoProto(name=tensor))
    ort = load_library(target.runtime)
    session = make_session(ort, model.SerializeToString(), record.path, target.runtime, options)
    spec = make_spec(ort, bundle, target, options)

    def activations(images: Array) -> dict[str, Array]:
        check_images(images, spec, check_range=options.check_range)
        outputs = session.run(list(layers.values()), {INPUT: images})
        return dict(zip(layers, outputs, strict=True))

    return activations
