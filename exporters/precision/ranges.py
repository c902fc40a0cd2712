"""What the norm branch meets on real images, and what fp16 would have made of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ccn_deploy.exporters.precision.norms import Norm, find_norms
from ccn_deploy.extras import require
from ccn_deploy.graph.signature import INPUT

FP16_LARGEST = 65504.0
FP16_SMALLEST = 2.0**-24
"""The smallest subnormal; half of it and less become 0."""

BATCH = 16


@dataclass(frozen=True)
class LayerRange:
    """What a compact layer met.

    Attributes:
        layer: Its name.
        largest_sum: Largest sum of squares of a patch.
        smallest_sum: Smallest that is not 0; 0 if all are.
        headroom: fp16's largest number over ``largest_sum``: below 1 it would overflow.
        floor_room: ``smallest_sum`` over fp16's smallest number: below 1 it would become 0.
        smallest_divisor: Smallest norm + delta.
        largest_product: Largest absolute value that is divided, which fp16 does compute.
    """

    layer: str
    largest_sum: float
    smallest_sum: float
    headroom: float
    floor_room: float
    smallest_divisor: float
    largest_product: float

    def warnings(self) -> list[str]:
        """Say what fp16 could not hold, one sentence each."""
        found = []
        if self.headroom < 1:
            found.append(
                f"{self.layer}: sums of squares up to {self.largest_sum:.3g} overflow fp16 "
                f"({FP16_LARGEST:g}); its norm branch stays float32."
            )
        if 0 < self.floor_room < 1:
            found.append(
                f"{self.layer}: sums of squares down to {self.smallest_sum:.1e} are 0 in fp16 "
                f"(its smallest is {FP16_SMALLEST:.1e}); its norm branch stays float32."
            )
        if self.largest_product > FP16_LARGEST:
            found.append(
                f"{self.layer}: products up to {self.largest_product:.3g} overflow fp16, where "
                "they are computed: do not deploy this network in fp16; bf16 holds them."
            )
        return found


@dataclass(frozen=True)
class NumericReport:
    """What every compact layer met.

    Attributes:
        images: Images run.
        layers: In order of execution; none in a network without compact layers.
    """

    images: int
    layers: tuple[LayerRange, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Where fp16 without a protected norm branch would over- or underflow, and worse."""
        return tuple(warning for layer in self.layers for warning in layer.warnings())

    def document(self) -> dict[str, Any]:
        """Return the form that stands in the manifest."""
        return {
            "images": self.images,
            "layers": [asdict(layer) for layer in self.layers],
            "warnings": list(self.warnings),
        }


def numeric_report(graph: onnx.ModelProto, images: NDArray[np.float32]) -> NumericReport:
    """Run a float32 forward graph and report what its norm branches met.

    Args:
        graph: Of :func:`~ccn_deploy.exporters.lowering.lower`.
        images: float32 [N, C, H, W] in [0, 1].

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
    """
    norms = find_norms(graph)
    if not norms:
        return NumericReport(len(images), ())
    ort = require("onnxruntime", "cpu", "for the numeric report")
    watched = onnx.ModelProto()
    watched.CopyFrom(graph)
    tensors = [name for norm in norms for name in (norm.summed, norm.divisor, norm.product)]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    session = ort.InferenceSession(watched.SerializeToString(), providers=["CPUExecutionProvider"])
    extremes = np.array([[0.0, np.inf, np.inf, 0.0]] * len(norms))
    for at in range(0, len(images), BATCH):
        found = session.run(tensors, {INPUT: images[at : at + BATCH]})
        for row, (summed, divisor, product) in enumerate(zip(*[iter(found)] * 3, strict=True)):
            extremes[row] = (
                max(extremes[row, 0], summed.max()),
                min(extremes[row, 1], summed[summed > 0].min(initial=np.inf)),
                min(extremes[row, 2], divisor.min()),
                max(extremes[row, 3], np.abs(product).max()),
            )
    return NumericReport(
        len(images),
        tuple(_range(norm, *row) for norm, row in zip(norms, extremes.tolist(), strict=True)),
    )


def _range(
    norm: Norm, largest: float, smallest: float, divisor: float, product: float
) -> LayerRange:
    smallest = 0.0 if np.isinf(smallest) else smallest
    return LayerRange(
        layer=norm.layer,
        largest_sum=largest,
        smallest_sum=smallest,
        headroom=FP16_LARGEST / largest if largest else FP16_LARGEST,
        floor_room=smallest / FP16_SMALLEST,
        smallest_divisor=divisor,
        largest_product=product,
    )
