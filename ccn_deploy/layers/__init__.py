"""The paper's layers, and making any module of them. All else in a network is torch's own."""

from ccn_deploy.layers.activations import MEAN, BoundedReLU, SubtractMean
from ccn_deploy.layers.compact import (
    DELTA,
    DELTA_FLOOR,
    SQUARE_FLOOR,
    CompactConv2d,
    CompactLinear,
    guarded_sqrt,
)
from ccn_deploy.layers.compactify import compactify, left_plain

__all__ = [
    "DELTA",
    "DELTA_FLOOR",
    "MEAN",
    "SQUARE_FLOOR",
    "BoundedReLU",
    "CompactConv2d",
    "CompactLinear",
    "SubtractMean",
    "compactify",
    "guarded_sqrt",
    "left_plain",
]
