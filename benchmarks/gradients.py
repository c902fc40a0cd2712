"""Forward and input gradients together: ONNX Runtime against PyTorch with frozen parameters."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from benchmarks.subjects import DEFENSES, ONE_THREAD, Subjects
from benchmarks.tables import Row, ratios
from benchmarks.timing import Work, compare
from ccn_deploy.runtimes import open_runtime
from ccn_deploy.runtimes.torch_runtime import load_reference

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
