"""Runtimes: programs that map images to logits. One protocol, several libraries."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.errors import RuntimeUnavailableError, UsageError, unknown
from ccn_deploy.runtimes.base import Runtime, RuntimeOptions, RuntimeSpec

__all__ = ["RUNTIMES", "Runtime", "RuntimeOptions", "RuntimeSpec", "open_runtime"]

RUNTIMES: Mapping[str, str] = MappingProxyType(
    {
        "onnxruntime-cpu": "ONNX Runtime on the CPU",
        "onnxruntime-cuda": "ONNX Runtime on an NVIDIA GPU",
        "tensorrt": "a TensorRT engine on an NVIDIA GPU",
        "tensorrt-rtx": "a TensorRT-RTX engine on an NVIDIA RTX GPU",
        "torch": "the PyTorch network on the CPU; in fp64 the reference",
        "torch-cuda": "the PyTorch network on an NVIDIA GPU",
    }
)
"""Names of runtimes, each with a line for people."""

REFERENCE_ONLY = "fp64"
"""A precision that nothing is deployed in."""


def open_runtime(
    bundle: Bundle | str | os.PathLike[str],
    name: str = "onnxruntime-cpu",
    precision: str = "fp32",
    options: RuntimeOptions | None = None,
) -> Runtime:
    """Open a bundle's model in a runtime. Nothing falls back to another device or precision.

    Args:
        bundle: An open bundle, or the path of one.
        name: A name in :data:`RUNTIMES`.
        precision: Of the deployed graph or engine; the torch runtimes take ``"fp32"`` and
            ``"fp64"``.
        options: Threads, memory, device and batch limit; defaults if not given.

    Raises:
        UsageError: An unknown name (the hint suggests the nearest), or an option that the
            runtime does not have.
        NotABundleError: No bundle at the path.
        IntegrityError: A file of the bundle is not what its manifest says.
        RuntimeUnavailableError: The device or precision cannot be had here.
        EngineUnfitError: The bundle's engines are for another GPU, system or library release.
        MissingExtraError: The library is not installed.
    """
    if name not in RUNTIMES:
        raise unknown("runtime", name, RUNTIMES)
    opened = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
    options = options or RuntimeOptions()
    if options.memory_limit is not None and name != "onnxruntime-cuda":
        raise UsageError(
            f"The runtime {name} takes no memory limit.",
            "Leave it out; on the CPU, arena=False and a smaller max_batch lower the memory, and "
            "an engine takes what the largest batch of its export (--batch) needs.",
        )
    if name.startswith("torch"):
        from ccn_deploy.extras import require

        require("torch", "train", f"for the runtime {name}")
        from ccn_deploy.runtimes.torch_runtime import TorchRuntime

        return TorchRuntime(opened, name=name, precision=precision, options=options)
    if precision == REFERENCE_ONLY:
        raise RuntimeUnavailableError(
            f"The runtime {name} does not compute in {precision}.",
            "Use --runtime torch for float64, or --precision fp32.",
        )
    if name.startswith("tensorrt"):
        from ccn_deploy.runtimes.tensorrt.runtime import TensorRtRuntime

        return TensorRtRuntime(opened, name=name, precision=precision, options=options)
    from ccn_deploy.runtimes.onnx_runtime import OnnxRuntime

    return OnnxRuntime(opened, name=name, precision=precision, options=options)
