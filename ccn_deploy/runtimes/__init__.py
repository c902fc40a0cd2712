"""Runtimes: programs that map images to logits. One protocol, several libraries."""

from __future__ import annotations

import os

from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.errors import RuntimeUnavailableError, UsageError
from ccn_deploy.runtimes.base import Runtime, RuntimeOptions, RuntimeSpec
from ccn_deploy.targets import PRECISIONS, Target

__all__ = ["Runtime", "RuntimeOptions", "RuntimeSpec", "open_runtime"]


def open_runtime(
    bundle: Bundle | str | os.PathLike[str],
    name: str = "onnxruntime-cpu",
    precision: str = "fp32",
    options: RuntimeOptions | None = None,
) -> Runtime:
    """Open a bundle's model in a runtime. Nothing falls back to another device or precision.

    Args:
        bundle: An open bundle, or the path of one.
        name: A name in :data:`ccn_deploy.targets.RUNTIMES`.
        precision: Of the deployed graph or engine; the torch runtimes take ``"fp32"`` and
            ``"fp64"``.
        options: Threads, memory, device and batch limit; defaults if not given.

    Raises:
        UsageError: An unknown runtime or precision (the hint suggests the nearest), or an option
            that the runtime does not have.
        NotABundleError: No bundle at the path.
        IntegrityError: A file of the bundle is not what its manifest says.
        RuntimeUnavailableError: The device or precision cannot be had here.
        EngineUnfitError: The bundle's engines are for another GPU, system or library release.
        MissingExtraError: The library is not installed.
    """
    target = Target(name, precision)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    options = options or RuntimeOptions()
    if options.memory_limit is not None and not (target.family == "onnxruntime" and target.on_gpu):
        raise UsageError(
            f"The runtime {name} takes no memory limit.",
            "Leave it out; on the CPU, arena=False and a smaller max_batch lower the memory, and "
            "an engine takes what the largest batch of its export (--batch) needs.",
        )
    if target.family == "torch":
        from ccn_deploy.extras import require

        require("torch", "train", f"for the runtime {name}")
        from ccn_deploy.runtimes.torch_runtime import TorchRuntime

        return TorchRuntime(opened, name=name, precision=precision, options=options)
    if not PRECISIONS[precision].deployed:
        raise RuntimeUnavailableError(
            f"The runtime {name} does not compute in {precision}.",
            "Use --runtime torch for float64, or --precision fp32.",
        )
    if target.family == "tensorrt":
        from ccn_deploy.runtimes.tensorrt.runtime import TensorRtRuntime

        return TensorRtRuntime(opened, target, options)
    from ccn_deploy.runtimes.onnx_runtime import OnnxRuntime

    return OnnxRuntime(opened, target, options)
