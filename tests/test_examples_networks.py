"""The networks of ``examples/``: the commands of its README, run as they stand there.

Only what would take minutes is made smaller, and what is downloaded comes from the tests' cache.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ccn_deploy
from ccn_deploy.bundle import open_bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.errors import DatasetNotFoundError, ExitCode
from ccn_deploy.exporters.sources.agreement import probe_images
from ccn_deploy.graph.reader import read_graph
from ccn_deploy.targets import Role
from tests.foreign import wheel

pytestmark = pytest.mark.timeout(900)  # several commands each, and a training

ROOT = Path(__file__).parent.parent
README = ROOT / "examples" / "README.md"


def commands(section: str) -> list[str]:
    """Return the commands of a section of the README."""
    (text,) = re.findall(rf"^## {section}.*?^```sh\n(.*?)^```$", README.read_text(), re.S | re.M)
    return [line for line in text.replace("\\\n", " ").splitlines() if line]


def run(
    command: str, folder: Path, smaller: dict[str, str], allowed: tuple[int, ...] = (0,)
) -> str:
    """Run one command in a folder that looks like the repository's root; return what it prints."""
    words = command.split()
    if words[:2] == ["pip", "download"]:
        package, _, version = words[-1].partition("==")
        (folder / "download").mkdir(exist_ok=True)
        shutil.copy(wheel(package, version), folder / "download")
        return ""
    for large, small in smaller.items():
        command = command.replace(large, small)
    program = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{program}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in allowed, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return tmp_path


def test_the_digit_network(root: Path) -> None:
    factory = (ROOT / "examples" / "digits" / "network.py").read_text().split("def digits")[1]
    assert len(factory.splitlines()) <= 15
    download, unpack, export, parity, robustness = commands("A digit network")
    run(download, root, {})
    run(unpack, root, {})
    run(export, root, {})
    parity_words = run(f"{parity} --samples 12", root, {})
    assert "PASS" in parity_words
    data = load_dataset("mnist5k", "test")
    with ccn_deploy.load(root / "digits") as model:
        images = data.images(np.arange(len(data.labels)))
        assert (model.classify(images) == data.labels).mean() > 0.99
        source = (images[:8] - np.float32(0.1307)) / np.float32(0.3081)
        np.testing.assert_allclose(
            model.predict_source(source), model.predict(images[:8]), rtol=1e-3, atol=1e-3
        )
    smaller = {"--samples 300": "--samples 12", "--epsilons 0.1,0.2": "--epsilons 0.2"}
    shown = run(robustness, root, smaller, (ExitCode.PASS, ExitCode.INCONCLUSIVE))
    assert "native" in shown
    assert re.search(r"PGD 0\.2 +\d{1,2}\.", shown)


def test_the_faces(root: Path) -> None:
    """With pictures that are no faces, in the folders of what the network takes them for."""
    image = pytest.importorskip("PIL.Image")
    download, unpack, export, parity, robustness = commands("Faces")
    run(download, root, {})
    run(unpack, root, {})
    run(export, root, {})
    bundle = open_bundle(root / "faces")
    assert bundle.card.class_names == ("female", "male")
    assert bundle.card.source.removed == ("Softmax over axis 1",)
    pictures = np.concatenate([probe_images((3, 32, 32), seed)[2:5] for seed in range(16)])
    bytes_ = (pictures * 255).round().astype(np.uint8)
    with ccn_deploy.load(bundle) as model:
        labels = model.classify(bytes_.astype(np.float32) / 255)
    assert set(labels) == {0, 1}
    for number, (picture, label) in enumerate(zip(bytes_, labels, strict=True)):
        folder = root / "photos" / bundle.card.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(picture.transpose(1, 2, 0)).save(folder / f"{number}.png")
    assert "PASS" in run(f"{parity} --samples 12", root, {})
    smaller = {"--samples 100": "--samples 12", "0.01,0.03": "0.03"}
    shown = run(robustness, root, smaller, (ExitCode.PASS, ExitCode.INCONCLUSIVE))
    assert re.search(r"none +100\.0", shown)


@pytest.mark.parametrize("data", ["mnist5k", pytest.param("fashion-mnist", marks=pytest.mark.wide)])
def test_the_compact_resnet(root: Path, data: str) -> None:
    """On few digits, or under `make test-wide` on Fashion-MNIST, as the page has it."""
    try:
        load_dataset(data, "test")
    except DatasetNotFoundError as error:
        pytest.skip(error.what)
    train, export, parity, robustness = commands("A compact ResNet-18")
    smaller = {
        "fashion-mnist --download": data,
        "--samples 100": "--samples 8",
        "0.02,0.05": "0.05",
    }
    assert "Made compact: 1, 4.conv1, " in run(train, root, smaller)
    run(export, root, smaller)
    bundle = open_bundle(root / "compact")
    graph = read_graph(bundle.read(bundle.file(Role.FORWARD, "fp32")))
    ops = [node.op for node in graph.nodes]
    assert ops.count("ReduceSumSquare") == ops.count("Sqrt") == ops.count("Div") == 21
    assert "PASS" in run(f"{parity} --samples 8", root, smaller)
    run(robustness, root, smaller, (ExitCode.PASS, ExitCode.INCONCLUSIVE))
