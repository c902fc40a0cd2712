"""Local response normalisation by equation 10 of the paper, for tests to compare with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun


def equation_10(
    a: NDArray[Any], *, n: int = 5, k: float = 2.0, alpha: float = 1e-4, beta: float = 0.75
) -> NDArray[Any]:
    """Normalise [N, C, H, W] channel by channel; the sum is not divided by n."""
    channels, b = a.shape[1], np.empty_like(a)
    for i in range(channels):
        near = range(max(0, i - n // 2), min(channels - 1, i + n // 2) + 1)
        b[:, i] = a[:, i] / (k + alpha * sum(a[:, j] ** 2 for j in near)) ** beta
    return b


class LRN(OpRun):
    """The operator for ``onnx.reference``, whose own loops over the batch instead of channels."""

    op_domain = ""

    def _run(
        self, x: NDArray[Any], alpha: float, beta: float, bias: float, size: int
    ) -> tuple[NDArray[Any]]:
        found = equation_10(x, n=size, k=bias, alpha=alpha / size, beta=beta)
        return (found.astype(x.dtype),)
