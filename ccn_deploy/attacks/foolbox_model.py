"""A Foolbox model over any runtime: its logits forward, true gradients backward.

Every Foolbox attack on such a model sees the deployed program's own logits. Where the gradient
comes from is one object, a :class:`GradientSource`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from foolbox.models.pytorch import PyTorchModel
from torch import Tensor, nn

from ccn_deploy.attacks.passes import NativePass
from ccn_deploy.attacks.source import Gradient, no_gradients
from ccn_deploy.errors import RuntimeUnavailableError
from ccn_deploy.runtimes.base import Runtime

BOUNDS = (0.0, 1.0)


class Tape(Protocol):
    """What one forward pass leaves behind for backward passes through it."""

    def vjp(self, cotangent: Tensor) -> Tensor:
        """Return the input gradient [N, C, H, W] of ``sum(cotangent * logits)``."""
        ...


class GradientSource(Protocol):
    """Where the gradients of an attack come from."""

    def record(self, images: Tensor) -> Tape:
        """Prepare backward passes at ``images`` [N, C, H, W]."""
        ...


class ReferenceGradient:
    """Gradients of the PyTorch network that the runtime's graph was lowered from.

    Args:
        reference: The network, in evaluation mode with frozen parameters.
    """

    def __init__(self, reference: nn.Module) -> None:
        self.reference = frozen(reference)

    def record(self, images: Tensor) -> Tape:
        """Run the reference once; any number of backward passes follow."""
        with torch.enable_grad():
            inputs = images.detach().requires_grad_()
            return _ReferenceTape(inputs, self.reference(inputs))


class _ReferenceTape:
    def __init__(self, inputs: Tensor, logits: Tensor) -> None:
        self.inputs = inputs
        self.logits = logits

    def vjp(self, cotangent: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(
            self.logits, self.inputs, cotangent.to(self.logits.dtype), retain_graph=True
        )
        return gradient


class NativeGradient:
    """Gradients computed by the runtime itself.

    Args:
        runtime: A differentiable runtime.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def record(self, images: Tensor) -> Tape:
        """Keep the images; the runtime computes forward and backward together."""
        return _NativeTape(NativePass(self.runtime, images), len(images))


class _NativeTape:
    def __init__(self, native: NativePass, images: int) -> None:
        self.native = native
        self.images = images

    def vjp(self, cotangent: Tensor) -> Tensor:
        return self.native.gradients(torch.arange(self.images), cotangent[:, None])[:, 0]


class NativeModel(PyTorchModel):
    """A Foolbox model of a runtime with gradients of its own.

    Any Foolbox attack runs on it by autograd; those that use
    :func:`ccn_deploy.attacks.passes.forward` need none.

    Args:
        runtime: A differentiable runtime.
    """

    def __init__(self, runtime: Runtime) -> None:
        module = _RuntimeModule(runtime, NativeGradient(runtime)).eval()
        super().__init__(module, bounds=BOUNDS, device=torch.device("cpu"))
        self.runtime = runtime

    def forward_pass(self, images: Tensor, labels: Tensor | None = None) -> NativePass:
        """Begin a pass on the runtime."""
        return NativePass(self.runtime, images, labels)


def foolbox_model(
    runtime: Runtime, reference: nn.Module | None, *, gradient: Gradient = "reference"
) -> PyTorchModel:
    """Return a Foolbox model whose every logit comes from ``runtime``.

    A gradient attack on a model without gradients does not fail by itself: Foolbox's C&W has
    been seen to report all-black images as success. So there is no such model: either a true
    source of gradients is there, or this raises.

    Args:
        runtime: What is attacked.
        reference: The PyTorch network it was lowered from, or None if there is none.
        gradient: ``"reference"``, or ``"native"`` for the runtime's own. ``"transfer"`` needs no
            model: what it attacks is :func:`reference_model`.

    Raises:
        RuntimeUnavailableError: The source asked for is not there.
        ValueError: ``"transfer"``.
    """
    if gradient == "transfer":
        raise ValueError("images to transfer are crafted on reference_model(reference)")
    if gradient == "native":
        if not runtime.differentiable:
            raise no_gradients(runtime.spec.target)
        return NativeModel(runtime)
    if reference is None:
        raise RuntimeUnavailableError(
            f"{runtime.spec.target} cannot be attacked by gradient: no reference was given.",
            "Give the network it was lowered from, as load_reference(bundle) returns it.",
        )
    module = _RuntimeModule(runtime, ReferenceGradient(reference)).eval()
    # The device is said, always: left out, Foolbox takes cuda:0 where there is one.
    return PyTorchModel(module, bounds=BOUNDS, device=next(reference.parameters()).device)


def reference_model(reference: nn.Module) -> PyTorchModel:
    """Return a Foolbox model of a PyTorch network itself, on the device where it is."""
    return PyTorchModel(
        frozen(reference), bounds=BOUNDS, device=next(reference.parameters()).device
    )


def frozen(network: nn.Module) -> nn.Module:
    """Check that a network is fit to be attacked: no dropout, no gradients of weights.

    Raises:
        ValueError: It is in training mode or has parameters that ask for gradients, which would
            make attacks random or a quarter slower.
    """
    if network.training or any(p.requires_grad for p in network.parameters()):
        raise ValueError("attack a network after .eval() and .requires_grad_(False)")
    return network


class _RuntimeModule(nn.Module):
    """The runtime as a differentiable torch function."""

    def __init__(self, runtime: Runtime, source: GradientSource) -> None:
        super().__init__()
        self.runtime = runtime
        self.source = source

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = _RuntimeLogits.apply(  # type: ignore[no-untyped-call]
            images, self.runtime, self.source
        )
        return logits


class _RuntimeLogits(torch.autograd.Function):
    """Forward: the runtime. Backward: the gradient source, at the same images."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, runtime: Runtime, source: GradientSource) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.tape = source.record(images)
        logits = runtime.logits(images.detach().contiguous().cpu().numpy())
        return torch.from_numpy(logits).to(images)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        return ctx.tape.vjp(cotangents[0]), None, None
