"""The paper's colour data sets from files in their published formats to robustness, end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ccn_deploy.cli.main import main
from ccn_deploy.data import Dataset, Split, dataset_from_arrays, load_dataset
from ccn_deploy.runs import open_run
from ccn_deploy.trainers import TrainConfig, train

Image = pytest.importorskip("PIL.Image")

WNIDS = ("n01440764", "n02105855")
NETWORK = """
from torch import nn

def small(classes):
    return nn.Sequential(
        nn.Conv2d(3, 4, 7, stride=4), nn.ReLU(), nn.MaxPool2d(4),
        nn.Flatten(), nn.Linear(4 * 13 * 13, classes))
"""


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["ccn-deploy", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0)


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """ImageNet's layout with two classes: four images to train on, four to test."""
    random = np.random.default_rng(0)
    for label, wnid in enumerate(WNIDS):
        for at in range(4):
            pixels = random.integers(0, 120, (120, 160, 3), dtype=np.uint8)
            pixels[..., label] += 130
            name = f"{wnid}_{at}" if at < 2 else f"ILSVRC2012_val_{2 * at + label:08d}"
            path = tmp_path / "imagenet" / ("train" if at < 2 else "val") / wnid / f"{name}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize((500, 375)).save(path)
    return tmp_path / "imagenet"


def attacked(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    bundle: Path,
    directory: Path,
    dataset: str,
) -> dict[str, object]:
    """Export what is in the run beside a bundle and attack the bundle with FGSM on 4 images."""
    run = bundle.parent / "run"
    assert run_main(monkeypatch, "export", run, "--output", bundle) == 0
    capsys.readouterr()
    attack = ("--attack", "fgsm", "--epsilons", "0.03", "--samples", "4", "--threads", "1")
    data = ("--dataset", dataset, "--data-dir", directory, "--no-report", "--json")
    code = run_main(monkeypatch, "verify-robustness", bundle, *data, *attack)
    shown = capsys.readouterr()
    assert code in (0, 4), shown.err  # four images are too few to pass
    document: dict[str, object] = json.loads(shown.out)
    return document


PAPER = ("--recipe", "paper-imagenet", "--epochs", "1", "--batch-size", "4", "--threads", "1")


@pytest.mark.parametrize("workers", ["0", "2"])
def test_imagenets_files_and_recipe_with_a_network_of_ones_own(
    imagenet: Path,
    tmp_path: Path,
    workers: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "network.py").write_text(NETWORK)
    options = (*PAPER, "--network", f"{tmp_path / 'network.py'}:small", "--device", "cpu")
    data = ("--dataset", "imagenet", "--data-dir", imagenet, "--workers", workers)
    assert run_main(monkeypatch, "train", *data, *options, "--output", tmp_path / "run") == 0
    card = open_run(tmp_path / "run").card
    assert (card.input_shape, card.class_names) == ((3, 224, 224), WNIDS)
    assert card.training["recipe"]["name"] == "paper-imagenet"
    found = attacked(monkeypatch, capsys, tmp_path / "bundle", imagenet, "imagenet")
    assert found["verdict"] in ("pass", "inconclusive")


@pytest.mark.wide  # four minutes of one core, and 9 GB
@pytest.mark.timeout(3600)
def test_imagenets_protocol_with_the_papers_network(
    imagenet: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = ("--dataset", "imagenet", "--data-dir", imagenet, "--device", "cpu")
    assert run_main(monkeypatch, "train", *data, *PAPER, "--output", tmp_path / "run") == 0
    run = open_run(tmp_path / "run")
    assert (run.card.architecture, run.card.defense) == ("vgg11-imagenet", "ccn")
    assert len(run.weights) > 500e6
    found = attacked(monkeypatch, capsys, tmp_path / "bundle", imagenet, "imagenet")
    assert found["verdict"] in ("pass", "inconclusive")


def test_cifar10s_protocol_with_the_papers_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files are whole; two steps are trained on the first images of each split."""
    directory = tmp_path / "cifar-10-batches-bin"
    directory.mkdir()
    for number, name in enumerate(
        [*(f"data_batch_{at}.bin" for at in range(1, 6)), "test_batch.bin"]
    ):
        records = np.random.default_rng(number).integers(0, 256, (10_000, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        records.tofile(directory / name)

    def first(split: Split, count: int) -> Dataset:
        data = load_dataset("cifar10", split, tmp_path)
        images = data.images(range(count))
        return dataset_from_arrays(
            "cifar10", images, data.labels[:count], data.class_names, split=split
        )

    config = TrainConfig(
        dataset="cifar10", recipe="paper-cifar10", epochs=1, batch_size=4, threads=1
    )
    run = train(config, first("train", 8), first("test", 4), tmp_path / "run")
    assert run.card.architecture == "vgg11-cifar10"
    found = attacked(monkeypatch, capsys, tmp_path / "bundle", tmp_path, "cifar10")
    assert found["verdict"] in ("pass", "inconclusive")
