"""Forward and input gradients together: ONNX Runtime against PyTorch with frozen parameters."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.handwritten_gradient import lower_gradient
from benchmarks.subjects import DEFENSES, ONE_THREAD, Subjects
from benchmarks.tables import Row, ratios
from benchmarks.timing import Work, compare
from ccn_deploy.exporters.sources.run import network_from
from ccn_deploy.graph.builder import to_bytes
from ccn_deploy.graph.signature import COTANGENTS, INPUT
from ccn_deploy.runtimes import open_runtime
from ccn_deploy.runtimes.onnx_runtime import load_library, make_session
from ccn_deploy.runtimes.torch_runtime import load_reference
from ccn_deploy.targets import Role

FORMATS = {"PyTorch": torch.contiguous_format, "PyTorch, channels last": torch.channels_last}


def gradients(subjects: Subjects, rounds: int) -> Iterator[str]:
    """One gradient an image as FGSM asks, batch 256, and nine as DeepFool does, batch 64."""
    return ratios(_rows(subjects, rounds))


def _rows(subjects: Subjects, rounds: int) -> Iterator[Row]:
    random = np.random.default_rng(0)
    for count, batch in ((1, 256), (9, 64)):
        images = subjects.images[:batch]
        cotangents = random.standard_normal((batch, count, 10)).astype(np.float32)
        for defense in DEFENSES:
            bundle = subjects.bundles[defense]
            runtime = open_runtime(bundle, "onnxruntime-cpu", options=ONE_THREAD)

            def native(  # the loop's own
                runtime=runtime, images=images, cotangents=cotangents
            ) -> object:
                return runtime.vjp(images, cotangents)

            for title, memory_format in FORMATS.items():
                reference = load_reference(bundle).to(memory_format=memory_format)
                ratio = compare(autograd(reference, images, cotangents), native, rounds=rounds)
                what = f"forward and {count} gradient{'s'[: count - 1]}, batch {batch}"
                yield what, defense.upper(), title, "ONNX Runtime", ratio


def rules(subjects: Subjects, rounds: int) -> Iterator[str]:
    """The gradient graph, derived by one rule an op, against one written by hand; batch 32."""
    return ratios(_by_rules(subjects, rounds))


def _by_rules(subjects: Subjects, rounds: int) -> Iterator[Row]:
    random = np.random.default_rng(0)
    images = subjects.images[:32]
    for defense in DEFENSES:
        bundle = subjects.bundles[defense]
        network = network_from(bundle.card, bundle.read(bundle.file(Role.WEIGHTS)))
        derived = _session(bundle.read(bundle.file(Role.GRADIENT, "fp32")))
        by_hand = _session(to_bytes(lower_gradient(network)))
        for count in (1, 9):
            cotangents = random.standard_normal((len(images), count, 10)).astype(np.float32)
            fed = {INPUT: images, COTANGENTS: cotangents}
            ratio = compare(
                partial(derived.run, None, fed), partial(by_hand.run, None, fed), rounds=rounds
            )
            what = f"forward and {count} gradient{'s'[: count - 1]}"
            yield what, defense.upper(), "by rules", "by hand", ratio


def _session(graph: bytes) -> Any:
    name = "onnxruntime-cpu"
    return make_session(load_library(name), graph, "the gradient graph", name, ONE_THREAD)


def autograd(network: nn.Module, images: np.ndarray, cotangents: np.ndarray) -> Work:
    """Return PyTorch's own way to a network's logits and its gradients, one a cotangent."""
    x = torch.from_numpy(images)
    columns = torch.from_numpy(cotangents).unbind(dim=1)

    def run() -> None:
        inputs = x.detach().requires_grad_()
        logits = network(inputs)
        for column in columns:
            torch.autograd.grad(logits, inputs, column, retain_graph=True)

    return run
