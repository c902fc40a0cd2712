"""The paper's layers. Everything else a network is made of is torch's own."""

from ccn_deploy.layers.activations import MEAN, BoundedReLU, SubtractMean
from ccn_deploy.layers.compact import (
    DELTA,
    SQUARE_FLOOR,
    CompactConv2d,
    CompactLinear,
    guarded_sqrt,
)

__all__ = [
    "DELTA",
    "MEAN",
    "SQUARE_FLOOR",
    "BoundedReLU",
    "CompactConv2d",
    "CompactLinear",
    "SubtractMean",
    "guarded_sqrt",
]
