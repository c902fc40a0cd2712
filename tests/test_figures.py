"""The paper's figures: their numbers by definition, and pictures that say what they show."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ccn_deploy.bundle import Bundle
from ccn_deploy.data import dataset_from_arrays
from ccn_deploy.errors import (
    InputError,
    MissingExtraError,
    RuntimeUnavailableError,
    StorageError,
    UsageError,
)
from ccn_deploy.exporters import export_bundle
from ccn_deploy.robustness import Evidence, Sample
from ccn_deploy.runtimes.layer_outputs import open_layer_outputs
from ccn_deploy.studies import figures
from ccn_deploy.studies.figures import Attacked
from tests.networks import as_run, random_network

DIGITS = tuple("abcdefghij")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# The pictures


def four_images() -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(2).random((4, 1, 5, 5), dtype=np.float32)
    return images, np.array([0, 0, 1, 2])


def adversarial() -> figures.AdversarialImages:
    images, labels = four_images()
    attacked = Attacked(labels, np.clip(images + np.float32(0.1), 0, 1), (labels + 1) % 3)
    names = ("cat", "dog", "fox")
    return figures.compare_attacked(images, labels, {"CNN": attacked, "CCN": attacked}, names, 3)


def blobs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two classes, alternating, that lie partly in each other."""
    labels = np.arange(40) % 2
    return random(40, 6, seed=seed) + 1.5 * labels[:, None], labels


def separable() -> figures.Separability:
    values, labels = blobs()
    features = {"SM": {"conv1": values, "fc2": 2 * values}, "CCN": {"conv1": values, "fc2": values}}
    return figures.separability(features, 3 + labels, DIGITS)


def two_panels() -> list[figures.LastFeatures]:
    features, labels = random(30, 2), np.arange(30) % 10
    return [
        figures.last_features("SM", features, labels, DIGITS),
        figures.last_features("L2SM", features, labels, DIGITS, alpha=4.0),
    ]


def some_spectra() -> tuple[figures.Spectrum, ...]:
    weights = {name: {"conv1": random(8, 2, 3, 3), "fc1": random(6, 9)} for name in ("SM", "CCN")}
    return figures.spectra(weights, ["conv1", "fc1"])


PICTURES: list[tuple[Callable[[], Figure], Sequence[str]]] = [
    (
        lambda: figures.draw_adversarial_images(adversarial()),
        ("clean", "for CNN", "for CCN", "cat", "dog", "fox"),
    ),
    (
        lambda: figures.draw_last_features(two_panels()),
        ("feature 1", "feature 2", "(a) SM: spread", "(b) L2SM: spread", *DIGITS),
    ),
    (
        lambda: figures.draw_toy_convolution(figures.toy_convolution()),
        ("Convolution", "Compact convolution (α = 1, δ = 0.01)", "=  7", "=  0.33", "kernel"),
    ),
    (
        lambda: figures.draw_separability(separable()),
        ("SM", "CCN", "t-SNE 1", "t-SNE 2", "conv1: 5-NN", "fc2: 5-NN", "silhouette", "d", "e"),
    ),
    (
        lambda: figures.draw_spectra(some_spectra()),
        ("conv1", "fc1", "singular value", "number, the largest first", "SM: ", "of 6"),
    ),
]


@pytest.mark.parametrize(("draw", "words"), PICTURES)
def test_a_picture_says_what_it_shows_in_equal_bytes(
    draw: Callable[[], Figure], words: Sequence[str], tmp_path: Path
) -> None:
    svg, png = figures.save(draw(), tmp_path / "deep" / "figure-1.1")
    assert (svg.name, png.name) == ("figure-1.1.svg", "figure-1.1.png")
    text = "\n".join(ElementTree.parse(svg).getroot().itertext())
    missing = [word for word in words if word not in text]
    assert not missing
    assert png.read_bytes().startswith(b"\x89PNG")
    # Whatever the settings of whoever draws it again.
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "lines.linewidth": 9}):
        again = figures.save(draw(), tmp_path / "again")
    assert [file.read_bytes() for file in again] == [svg.read_bytes(), png.read_bytes()]


@pytest.mark.parametrize("draw", [draw for draw, _ in PICTURES])
def test_nothing_is_cut_at_the_edge(draw: Callable[[], Figure]) -> None:
    figure = draw()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = figure.get_tightbbox(canvas.get_renderer())  # in inches
    width, height = figure.get_size_inches()
    assert drawn.x0 > -0.01 and drawn.y0 > -0.01
    assert drawn.x1 < width + 0.01 and drawn.y1 < height + 0.01


def test_a_class_is_told_by_its_marker_alone() -> None:
    from ccn_deploy.studies.figures.style import COLOURS, LINES, MARKERS

    assert len(set(MARKERS)) == len(set(COLOURS)) == 10
    lines = figures.draw_spectra(some_spectra()).axes[0].lines
    assert len({line.get_linestyle() for line in lines}) == len(lines) <= len(LINES)
    assert len({line.get_marker() for line in lines}) == len(lines)


def test_a_picture_that_cannot_be_written_is_not_half_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        figures.save(Figure(), tmp_path / "file" / "figure")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_package_loads_nothing_heavy_and_no_pyplot() -> None:
    heavy = ["torch", "onnx", "matplotlib", "sklearn", "scipy"]
    script = (
        f"import sys; from ccn_deploy.studies import figures as f; loaded = [m for m in {heavy} if "
        "m in sys.modules]; f.draw_toy_convolution(f.toy_convolution()); "
        "print(loaded, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] False"


# Figure 1


def test_columns_are_images_that_all_get_right_and_each_attack_fools() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2, 0, 1, 2])
    images = np.random.default_rng(0).random((9, 3, 4, 4), dtype=np.float32)
    first = Attacked(labels.copy(), images + np.float32(0.1), (labels + 1) % 3)
    second = Attacked(labels.copy(), images - np.float32(0.2), (labels + 2) % 3)
    first.clean[1] = 2  # wrong from the start
    second.predicted[3] = 1  # held
    second.images[5, 0, 1, 1] = np.nan  # the attack found nothing
    found = figures.compare_attacked(images, labels, {"A": first, "B": second}, "xyz", 5)
    # Left are rows 0, 2, 4, 6, 7, 8: the first of each class, then the second of each.
    rows = [0, 4, 8, 2, 7]
    assert found.labels.tolist() == [0, 1, 2, 0, 1]
    assert np.array_equal(found.clean, images[rows])
    assert np.array_equal(found.attacked[1], second.images[rows])
    assert found.predicted.tolist() == [[1, 2, 0, 1, 2], [2, 0, 1, 2, 0]]
    for row, of in enumerate((first, second)):
        for column, at in enumerate(rows):
            away = (of.images[at].astype(np.float64) - images[at]) ** 2
            expected = np.sqrt(away.sum() / (images[at].astype(np.float64) ** 2).sum())
            assert found.distances[row, column] == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UsageError, match=r"6 images .* shows 7"):
        figures.compare_attacked(images, labels, {"A": first, "B": second}, "xyz", 7)
    with pytest.raises(InputError, match="attack on A"):
        figures.compare_attacked(images[:8], labels[:8], {"A": first}, "xyz")


def test_kept_evidence_gives_the_same_columns_and_only_they_are_read() -> None:
    images, labels = four_images()
    index = [3, 0, 2, 1]  # as an attack came to them
    data = dataset_from_arrays("d", images, labels, ("cat", "dog", "fox"))
    kept = np.clip(images[index] + np.float32(0.1), 0, 1)
    read: list[int] = []

    def fetch(rows: np.ndarray) -> np.ndarray:
        read.extend(rows.tolist())
        return kept[rows]

    def sample(at: int, wrong: int) -> Sample:
        label = int(labels[at])
        held = at == 2
        return Sample(
            index=at,
            label=label,
            clean=(label, label),
            adversarial=(label if held else wrong, wrong),
            status="held" if held else "fooled",
            l2=1.0,
        )

    evidence = Evidence.of([sample(at, int(labels[at] + 1) % 3) for at in index], fetch=fetch)
    found = figures.compare_evidence({"CNN": evidence, "CCN": evidence}, data, 2)
    attacked = Attacked(labels, np.clip(images + np.float32(0.1), 0, 1), (labels + 1) % 3)
    by_arrays = figures.compare_attacked(
        images[[3, 0]],
        labels[[3, 0]],
        dict.fromkeys(
            ("CNN", "CCN"),
            Attacked(labels[[3, 0]], attacked.images[[3, 0]], attacked.predicted[[3, 0]]),
        ),
        ("cat", "dog", "fox"),
        2,
    )
    for field in ("networks", "class_names"):
        assert getattr(found, field) == getattr(by_arrays, field)
    for field in ("labels", "clean", "attacked", "predicted", "distances"):
        assert np.array_equal(getattr(found, field), getattr(by_arrays, field))
    assert set(read) == {0, 1}
    other = Evidence.of([sample(at, 2) for at in (0, 1, 2, 3)], fetch=fetch)
    with pytest.raises(UsageError, match="different images"):
        figures.compare_evidence({"CNN": evidence, "CCN": other}, data)


# Figure 2


def test_last_features_are_on_the_circle_of_equation_6_and_spread_is_by_definition() -> None:
    features, labels = random(24, 2, seed=3), np.arange(24) % 4
    panel = figures.last_features("L2SM", features, labels, DIGITS, alpha=5.0, delta=0.02)
    for x, point in zip(features, panel.points, strict=True):
        assert point == pytest.approx(5.0 * x / (np.hypot(*x) + 0.02), rel=1e-12)
    assert panel.radius == 5.0
    assert np.linalg.norm(panel.points, axis=1).max() < 5.0
    placed = list(zip(panel.points, labels, strict=True))
    centres = [np.mean([p for p, k in placed if k == c], axis=0) for c in range(4)]
    assert panel.centroids[:4] == pytest.approx(np.array(centres))
    assert np.isnan(panel.centroids[4:]).all()
    within = np.mean([np.hypot(*(p - centres[k])) for p, k in placed])
    pairs = [(a, b) for a in range(4) for b in range(a)]
    between = np.mean([np.hypot(*(centres[a] - centres[b])) for a, b in pairs])
    assert panel.spread == pytest.approx(within / between, rel=1e-12)
    plain = figures.last_features("SM", features, labels, DIGITS)
    assert np.array_equal(plain.points, features) and plain.radius is None
    scaled = figures.last_features("SM", 7 * features, labels, DIGITS)
    assert scaled.spread == pytest.approx(plain.spread, rel=1e-12)


@pytest.mark.parametrize(
    ("features", "labels", "word"),
    [
        (random(6, 3), np.arange(6), "mnist-cnn-2d"),
        (random(6, 2), np.arange(5), "5 labels"),
        (np.full((6, 2), np.nan), np.arange(6), "not finite"),
        (random(6, 2), np.zeros(6, dtype=np.int64), "one class"),
    ],
)
def test_last_features_that_make_no_panel(
    features: np.ndarray, labels: np.ndarray, word: str
) -> None:
    with pytest.raises(InputError, match=word):
        figures.last_features("SM", features, labels, DIGITS)


# Figure 3


def test_the_toy_example_by_definition() -> None:
    toy = figures.toy_convolution()
    for patch, scaled, norm, ordinary, compact in zip(
        toy.patches, toy.scaled, toy.norms, toy.ordinary, toy.compact, strict=True
    ):
        length = sum(float(x) ** 2 for x in patch.flat) ** 0.5
        product = sum(float(x) * float(w) for x, w in zip(patch.flat, toy.kernel.flat, strict=True))
        assert norm == pytest.approx(length, rel=1e-12)
        assert ordinary == pytest.approx(product, rel=1e-12)
        assert compact == pytest.approx(product / (length + 0.01), rel=1e-12)
        assert scaled == pytest.approx(patch / (length + 0.01), rel=1e-12)
    # What the example is for: brightness wins the one, the edge wins the other.
    assert toy.ordinary.tolist() == [4.0, 7.0]
    assert toy.compact[0] > 6 * toy.compact[1]


def test_a_toy_example_of_other_numbers() -> None:
    patches, kernel = random(3, 2, 2, seed=1), random(2, 2, seed=2)
    toy = figures.toy_convolution(patches, kernel, alpha=2.5, delta=0.5)
    norms = np.sqrt((patches**2).sum((1, 2)))
    expected = 2.5 * (patches * kernel).sum((1, 2)) / (norms + 0.5)
    assert toy.compact == pytest.approx(expected, rel=1e-12)
    with pytest.raises(InputError, match="kernel's size"):
        figures.toy_convolution(patches, random(3, 3))


# Figure 5


def nearest_five(values: np.ndarray, labels: np.ndarray) -> float:
    """Five neighbours, five folds: of alternating labels, fold k is every eight rows in turn."""
    right = []
    for start in range(0, 40, 8):
        test = np.arange(start, start + 8)
        rest = np.setdiff1d(np.arange(40), test)
        for row in test:
            order = np.argsort(np.linalg.norm(values[rest] - values[row], axis=1))[:5]
            right.append((labels[rest[order]].sum() > 2) == labels[row])
    return float(np.mean(right))


def silhouette(values: np.ndarray, labels: np.ndarray) -> float:
    """Rousseeuw's definition, an image at a time."""
    widths = []
    for row, label in enumerate(labels):
        away = np.linalg.norm(values - values[row], axis=1)
        own = away[labels == label].sum() / ((labels == label).sum() - 1)
        other = away[labels != label].mean()
        widths.append((other - own) / max(own, other))
    return float(np.mean(widths))


def test_separability_is_measured_in_the_features_by_definition() -> None:
    panels = separable().panels
    values, labels = blobs()
    assert [(p.network, p.layer) for p in panels] == [
        ("SM", "conv1"), ("SM", "fc2"), ("CCN", "conv1"), ("CCN", "fc2"),
    ]  # fmt: skip
    for panel in panels:
        assert panel.accuracy == pytest.approx(nearest_five(values, labels), abs=1e-12)
        assert panel.silhouette == pytest.approx(silhouette(values, labels), abs=1e-12)
        assert panel.points.shape == (40, 2)
    assert 0.5 < panels[0].accuracy < 1.0  # so that the measure could differ
    assert np.array_equal(separable().panels[0].points, panels[0].points)
    assert separable().class_names == ("d", "e")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda x, y: (x, np.arange(40) % 3), "3 classes"),
        (lambda x, y: (x, (np.arange(40) < 4).astype(int)), "fewer than 5"),
        (lambda x, y: (x[:39], y), "39 images for 40"),
        (lambda x, y: (x * np.nan, y), "not finite"),
        (lambda x, y: (np.ones_like(x), y), "dead layer"),
    ],
)
def test_features_that_cannot_be_compared(change: Callable[..., Any], word: str) -> None:
    values, labels = change(*blobs())
    with pytest.raises(InputError, match=word):
        figures.separability({"SM": {"fc1": values}}, labels, DIGITS)


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"sklearn.*\n.*ccn-deploy\[train\]"):
        separable()


# Figure 6


def test_spectra_are_roots_of_eigenvalues_and_effective_rank_is_by_definition() -> None:
    kernels = random(5, 3, 2, 2, seed=4)
    (one,) = figures.spectra({"SM": {"conv1": kernels}}, ["conv1"], top=3)
    matrix = np.array([kernel.flatten() for kernel in kernels])
    values = np.sqrt(np.linalg.eigvalsh(matrix @ matrix.T))[::-1]
    assert one.values == pytest.approx(values[:3], rel=1e-9)
    assert one.rank == 5
    shares = values / values.sum()
    assert one.effective_rank == pytest.approx(np.prod(shares**-shares), rel=1e-9)


@pytest.mark.parametrize(
    ("matrix", "rank"),
    [(3 * np.eye(4), 4.0), (np.outer([1, 2, 3], [1, 1]), 1.0), (np.diag([5.0, 5.0, 0.0]), 2.0)],
)
def test_effective_rank_of_known_matrices(matrix: np.ndarray, rank: float) -> None:
    for scale in (1.0, 1e-3):
        (found,) = figures.spectra({"SM": {"fc1": scale * matrix}}, ["fc1"])
        assert found.effective_rank == pytest.approx(rank, abs=1e-9)


def test_a_layer_that_a_network_lacks_is_named() -> None:
    with pytest.raises(UsageError, match=r"layer of CCN 'conv1'"):
        figures.spectra({"SM": {"conv1": random(2, 2)}, "CCN": {"conv2": random(2, 2)}}, ["conv1"])


# What is read out of bundles


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("bundles")
    return {
        name: export_bundle(
            as_run(random_network("mnist-cnn-2d", name)), root / name, gradient=False
        )
        for name in ("sm", "ccn")
    }


@pytest.mark.parametrize("name", ["sm", "ccn"])
def test_features_are_those_of_the_trained_network(name: str, bundles: dict[str, Bundle]) -> None:
    images = np.random.default_rng(0).random((7, 1, 28, 28), dtype=np.float32)
    found = figures.layer_features(
        open_layer_outputs(bundles[name]), images, ["act1", "fc3"], batch=3
    )
    x, expected = torch.from_numpy(images), {}
    for layer, module in random_network("mnist-cnn-2d", name).named_layers():
        x = expected[layer] = module(x)
    assert {layer: values.shape for layer, values in found.items()} == {
        "act1": (7, 32 * 26 * 26),
        "fc3": (7, 2),
    }
    for layer, values in found.items():
        truth = expected[layer].flatten(1).numpy()
        assert np.abs(values - truth).max() < 1e-5 * np.abs(truth).max()
    with pytest.raises(UsageError, match="'fc33'") as caught:
        figures.layer_features(open_layer_outputs(bundles[name]), images, ["fc33"])
    assert "'fc3'" in caught.value.hint


@pytest.mark.parametrize("name", ["sm", "ccn"])
def test_weights_are_those_deployed(name: str, bundles: dict[str, Bundle]) -> None:
    found = figures.layer_weights(bundles[name])
    model = random_network("mnist-cnn-2d", name)
    assert list(found) == ["conv1", "conv2", "conv3", "conv4", "fc1", "fc2", "fc3", "fc4"]
    for layer, matrix in found.items():
        module = getattr(model, layer)
        alpha = module.alpha if name == "ccn" else 1.0
        assert np.array_equal(matrix, (alpha * module.weight).flatten(1).numpy())
    if name == "ccn":
        assert figures.alpha_of(bundles[name], "fc4") == float(model.fc4.alpha)
    else:
        with pytest.raises(RuntimeUnavailableError, match="not compact"):
            figures.alpha_of(bundles[name], "fc4")
