"""What an evaluation attacks: runtimes and models, opened when first needed, closed together."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.attacks.source import Gradient
from ccn_deploy.bundle import Bundle
from ccn_deploy.data.dataset import Dataset
from ccn_deploy.runtimes import open_runtime
from ccn_deploy.runtimes.base import Array, Runtime, RuntimeOptions
from ccn_deploy.targets import Target

if TYPE_CHECKING:
    from foolbox.models.pytorch import PyTorchModel

    from ccn_deploy.graph.evaluate import GraphModule

REFERENCE = Target("torch")
"""The target that deployed ones are compared with: the reference, attacked itself."""


class AttackSession:
    """The runtimes of a bundle, and the models of them that attacks take.

    Args:
        bundle: An open bundle.
        options: Threads and memory of the runtimes.
        read_programs: Whether to read what a runtime executes before it is opened, which needs
            torch; false only where nothing is measured.
    """

    def __init__(
        self, bundle: Bundle, options: RuntimeOptions, *, read_programs: bool = True
    ) -> None:
        self.bundle = bundle
        self._options = options
        self._read_programs = read_programs
        self._open: dict[tuple[Target, bool], Runtime] = {}
        self._models: dict[tuple[Target, bool, Gradient], PyTorchModel] = {}
        self._clean: dict[tuple[Target, str], dict[int, int]] = {}
        self._reference: GraphModule | None = None
        self._stack = ExitStack()

    def __enter__(self) -> AttackSession:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def runtime(self, target: Target, clip: bool = True) -> Runtime:
        """Return a runtime; for an attack that leaves the box, one that takes such images."""
        if (target, clip) not in self._open:
            if self._read_programs:
                from ccn_deploy.runtimes.torch_runtime import check_programs

                check_programs(self.bundle, target)
            options = replace(self._options, check_range=clip)
            runtime = open_runtime(self.bundle, target.runtime, target.precision, options)
            self._open[target, clip] = self._stack.enter_context(runtime)
        return self._open[target, clip]

    def clean_labels(
        self, target: Target, dataset: Dataset, indices: Array, images: Array
    ) -> NDArray[np.int64]:
        """Return a target's labels of clean images; each image is asked for once a session.

        Args:
            target: Runtime and precision.
            dataset: Has the images.
            indices: int64 [N] in it.
            images: They themselves, float32 [N, C, H, W].

        Returns:
            int64 [N], -1 where the logits are not finite.
        """
        known = self._clean.setdefault((target, dataset.digest), {})
        new = [at for at, index in enumerate(indices.tolist()) if index not in known]
        if new:
            labels = labels_of(self.runtime(target), images[new])
            known.update(zip(indices[new].tolist(), labels.tolist(), strict=True))
        return np.array([known[index] for index in indices.tolist()], dtype=np.int64)

    def model(self, target: Target, clip: bool, gradient: Gradient) -> PyTorchModel:
        """Return what Foolbox attacks: the reference itself, or a runtime with gradients.

        The reference is attacked itself, and so is every target whose images are to be crafted
        on the reference.

        Raises:
            RuntimeUnavailableError: The runtime has no gradients of its own and is asked for them.
        """
        from ccn_deploy.attacks.foolbox_model import foolbox_model, reference_model
        from ccn_deploy.runtimes.torch_runtime import load_reference, torch_threads

        if self._reference is None:
            self._stack.enter_context(torch_threads(self._options.threads))
            self._reference = load_reference(self.bundle)
        key = target, clip, gradient
        if key not in self._models:
            self._models[key] = (
                reference_model(self._reference)
                if target == REFERENCE or gradient == "transfer"
                else foolbox_model(self.runtime(target, clip), self._reference, gradient=gradient)
            )
        return self._models[key]


def labels_of(runtime: Runtime, images: Array) -> NDArray[np.int64]:
    """Return the labels [N] that a runtime gives, -1 where its logits are not finite."""
    logits = runtime.logits(np.ascontiguousarray(images))
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), -1)
