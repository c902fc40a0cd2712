"""The figures of the paper: which networks and attacks each needs, and how it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ccn_deploy.bundle import Bundle
from ccn_deploy.robustness import Evidence
from ccn_deploy.runtimes.layer_outputs import open_layer_outputs
from ccn_deploy.studies.paper import attack_spec
from ccn_deploy.studies.study import Attacked, Column, Study, System
from ccn_deploy.studies.work import OPTIONS, Setting, attacked, data, deployed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TSNE_IMAGES = 400
"""Images of the two classes of figure 5 at most: t-SNE takes the square of their number."""


@dataclass(frozen=True)
class PaperFigure:
    """One figure.

    Attributes:
        study: Its networks and the attacks on them; never shown as a table.
        draw: From a setting in which all of that is done.
    """

    study: Study
    draw: Callable[[Setting, Study], Figure]

    @property
    def name(self) -> str:
        """What the user types."""
        return self.study.name

    def write(self, setting: Setting, directory: Path) -> None:
        """Draw it into a directory as SVG and PNG.

        Raises:
            MissingExtraError: matplotlib or scikit-learn is not installed.
            StorageError: The directory cannot be written to.
        """
        from ccn_deploy.studies.figures import save

        save(self.draw(setting, self.study), directory / self.name)


def figures() -> dict[str, PaperFigure]:
    """Return the figures by name; all are of networks for MNIST's images."""
    three = {"SM": System("sm"), "L2SM": System("l2sm"), "CCN": System("ccn")}
    narrow = {
        "Softmax": System("sm", architecture="mnist-cnn-2d"),
        "L2-softmax": System("l2sm", architecture="mnist-cnn-2d"),
    }
    pair = {"SM": three["SM"], "CCN": three["CCN"]}
    deepfool = Column("DeepFool", Attacked(attack_spec("deepfool"), d=0.1))
    fgsm = Column("FGSM 0.3", Attacked(attack_spec("fgsm", "0.3")))
    made = (
        PaperFigure(
            Study("figure1", "DeepFool's images of SM and of CCN", pair, (deepfool,)), _images
        ),
        PaperFigure(Study("figure2", "Two features of every image", narrow, ()), _last_features),
        PaperFigure(Study("figure3", "A toy example of compact convolution", {}, ()), _toy),
        PaperFigure(
            Study("figure5", "t-SNE of features of images under FGSM 0.3", three, (fgsm,)),
            _separability,
        ),
        PaperFigure(Study("figure6", "Singular values of the weights", three, ()), _spectra),
    )
    return {figure.name: figure for figure in made}


def _bundles(setting: Setting, study: Study) -> Mapping[str, Bundle]:
    return {title: deployed(setting, system, 0) for title, system in study.rows.items()}


def _evidence(setting: Setting, study: Study) -> Mapping[str, Evidence]:
    """Return what the figure's attack did to each deployed network."""
    (column,) = study.columns
    assert isinstance(column.measure, Attacked)
    spec = column.measure.spec
    return {
        title: attacked(setting, system, 0, (spec,)).measurement.pairs[0].runtime
        for title, system in study.rows.items()
    }


def _images(setting: Setting, study: Study) -> Figure:
    from ccn_deploy.studies.figures import compare_evidence, draw_adversarial_images

    return draw_adversarial_images(
        compare_evidence(_evidence(setting, study), data(setting, "test"))
    )


def _last_features(setting: Setting, study: Study) -> Figure:
    from ccn_deploy.studies.figures import (
        alpha_of,
        draw_last_features,
        last_features,
        layer_features,
    )

    test = data(setting, "test")
    chosen = test.order()[: setting.samples("fgsm")]
    panels = []
    for title, bundle in _bundles(setting, study).items():
        outputs = open_layer_outputs(bundle, setting.runtime, setting.precision, OPTIONS)
        features = layer_features(outputs, test.images(chosen), ["fc3"])["fc3"]
        alpha = alpha_of(bundle, "fc4") if study.rows[title].defense == "l2sm" else None
        labels = test.labels[chosen]
        panels.append(last_features(title, features, labels, test.class_names, alpha=alpha))
    return draw_last_features(panels)


def _toy(setting: Setting, study: Study) -> Figure:
    from ccn_deploy.studies.figures import draw_toy_convolution, toy_convolution

    return draw_toy_convolution(toy_convolution())


def _separability(setting: Setting, study: Study) -> Figure:
    from ccn_deploy.studies.figures import draw_separability, layer_features, separability
    from ccn_deploy.studies.figures.separability import LAYERS

    evidence = _evidence(setting, study)
    first = next(iter(evidence.values()))
    test = data(setting, "test")
    both = np.random.default_rng(0).choice(len(test.class_names), 2, replace=False)
    # An image that a network got wrong was not attacked on it, and has no row here.
    attacked_on_all = np.all([np.isfinite(found.l2) for found in evidence.values()], axis=0)
    rows = np.flatnonzero(np.isin(first.label, both) & attacked_on_all)[:TSNE_IMAGES]
    features = {}
    for title, bundle in _bundles(setting, study).items():
        outputs = open_layer_outputs(bundle, setting.runtime, setting.precision, OPTIONS)
        found = layer_features(outputs, evidence[title].adversarial(rows), list(LAYERS))
        features[title] = {LAYERS[layer]: values for layer, values in found.items()}
    return draw_separability(separability(features, first.label[rows], test.class_names))


def _spectra(setting: Setting, study: Study) -> Figure:
    from ccn_deploy.studies.figures import draw_spectra, layer_weights, spectra

    weights = {title: layer_weights(b) for title, b in _bundles(setting, study).items()}
    return draw_spectra(spectra(weights))
