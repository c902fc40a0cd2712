"""The paper's figures: for each, one function that computes its numbers and one that draws them.

What is computed are plain arrays, so that a number in a picture is one that can be tested.
:mod:`~ccn_deploy.studies.figures.measure` reads features and weights out of bundles.
"""

from ccn_deploy.studies.figures.adversarial_images import (
    AdversarialImages,
    Attacked,
    compare_attacked,
    compare_evidence,
    draw_adversarial_images,
)
from ccn_deploy.studies.figures.last_features import (
    LastFeatures,
    draw_last_features,
    last_features,
)
from ccn_deploy.studies.figures.measure import alpha_of, layer_features, layer_weights
from ccn_deploy.studies.figures.separability import (
    Separability,
    draw_separability,
    separability,
)
from ccn_deploy.studies.figures.spectra import Spectrum, draw_spectra, spectra
from ccn_deploy.studies.figures.style import save
from ccn_deploy.studies.figures.toy_convolution import (
    ToyConvolution,
    draw_toy_convolution,
    toy_convolution,
)

__all__ = [
    "AdversarialImages",
    "Attacked",
    "LastFeatures",
    "Separability",
    "Spectrum",
    "ToyConvolution",
    "alpha_of",
    "compare_attacked",
    "compare_evidence",
    "draw_adversarial_images",
    "draw_last_features",
    "draw_separability",
    "draw_spectra",
    "draw_toy_convolution",
    "last_features",
    "layer_features",
    "layer_weights",
    "save",
    "separability",
    "spectra",
    "toy_convolution",
]
