"""A Foolbox model over any runtime: its logits forward, true gradients backward.

Every Foolbox attack on such a model sees the deployed program's own logits. Gradients come from a
:class:`~ccn_deploy.attacks.passes.Pass` begun at the same images: the runtime's own, or autograd
through the reference network.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch
from foolbox.models.pytorch import PyTorchModel
from torch import Tensor, nn

from ccn_deploy.attacks.passes import AutogradPass, NativePass, Pass
from ccn_deploy.attacks.source import Gradient, no_gradients
from ccn_deploy.errors import RuntimeUnavailableError
from ccn_deploy.runtimes.base import Runtime

BOUNDS = (0.0, 1.0)


class NativeModel(PyTorchModel):
    """A Foolbox model of a runtime with gradients of its own.

    Any Foolbox attack runs on it by autograd; those that use
    :func:`ccn_deploy.attacks.passes.forward` need none.

    Args:
        runtime: A differentiable runtime.
    """

    def __init__(self, runtime: Runtime) -> None:
        module = _RuntimeModule(runtime, partial(NativePass, runtime)).eval()
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
        reference: The network in PyTorch that it is compared with, or None if there is none.
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
            "Give the network in PyTorch, as load_reference(bundle) returns it.",
        )
    begin = partial(AutogradPass, frozen(reference))
    module = _RuntimeModule(runtime, begin).eval()
    # The device is said, always: left out, Foolbox takes cuda:0 where there is one.
    return PyTorchModel(module, bounds=BOUNDS, device=device_of(reference))


def reference_model(reference: nn.Module) -> PyTorchModel:
    """Return a Foolbox model of the network in PyTorch itself, on the device where it is."""
    return PyTorchModel(frozen(reference), bounds=BOUNDS, device=device_of(reference))


def device_of(network: nn.Module) -> torch.device:
    """Return where a network is: the device of its first parameter or constant."""
    return next(chain(network.parameters(), network.buffers())).device


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
    """The runtime as a differentiable torch function.

    Args:
        runtime: Gives the logits.
        begin: Begins the pass at the same images that the gradients are asked of.
    """

    def __init__(self, runtime: Runtime, begin: Callable[[Tensor], Pass]) -> None:
        super().__init__()
        self.runtime = runtime
        self.begin = begin

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = _RuntimeLogits.apply(  # type: ignore[no-untyped-call]
            images, self.runtime, self.begin
        )
        return logits


class _RuntimeLogits(torch.autograd.Function):
    """Forward: the runtime. Backward: a pass at the same images."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, runtime: Runtime, begin: Callable[[Tensor], Pass]
    ) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.begun, ctx.images = begin(images), len(images)
        logits = runtime.logits(images.detach().contiguous().cpu().numpy())
        return torch.from_numpy(logits).to(images)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None]:
        rows = torch.arange(ctx.images, device=cotangents[0].device)
        return ctx.begun.gradients(rows, cotangents[0][:, None])[:, 0], None, None
