"""Data of one's own through every command that takes a data set."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.cli.main import main
from ccn_deploy.data import dataset_from_arrays, load_dataset
from ccn_deploy.errors import UsageError
from ccn_deploy.evaluation import check_fits, evaluation_data, trained_on

Image = pytest.importorskip("PIL.Image")

CLASSES = ("high", "low")
QUICK = ("--samples", "8", "--threads", "1")


def images_of(label: int, count: int, seed: int) -> NDArray[np.uint8]:
    """Images 28x28 with a bright upper half for class 0 and a bright lower one for class 1."""
    images = np.random.default_rng(seed).integers(0, 80, (count, 28, 28), dtype=np.uint8)
    images[:, 14 * label : 14 * label + 14] += 150
    return images


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "halves"
    for split, count in (("train", 40), ("test", 10)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for at, pixels in enumerate(images_of(label, count, label)):
                image = Image.fromarray(pixels).resize((56, 84))  # of another size and aspect
                image.save(root / split / name / f"{at}.png")
    (root / "test" / "high" / "notes.txt").touch()
    return root


@pytest.fixture(scope="module")
def bundle_path(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network trained on folders and exported with calibrated int8, by the commands."""
    root = tmp_path_factory.mktemp("bundle")
    options = ["--dataset", str(folders), "--resize", "stretch"]
    train = ["train", *options, "--architecture", "mnist-cnn", "--epochs", "2", "--threads", "1"]
    code, _, err = run(*train, "--batch-size", "16", "--device", "cpu", "--output", root / "run")
    assert code == 0, err
    export = ["export", root / "run", "--precision", "int8", "--calibration-samples", "16"]
    code, _, err = run(*export, *options, "--output", root / "bundle")
    assert code == 0, err
    return root / "bundle"


@pytest.fixture
def bundle(bundle_path: Path, tmp_path: Path) -> Bundle:
    return open_bundle(shutil.copytree(bundle_path, tmp_path / "bundle"))


def run(*arguments: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ccn-deploy", *map(str, arguments)])
        import contextlib
        import io

        from ccn_deploy.cli import console

        out, err = io.StringIO(), io.StringIO()
        patch.setattr(console.err, "_file", err)  # undone to None: whatever stderr is then
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as exit:
            main()
    return int(exit.value.code or 0), out.getvalue(), err.getvalue()


def test_a_network_is_trained_on_folders_and_knows_how_images_were_made(bundle: Bundle) -> None:
    assert bundle.manifest.card.class_names == CLASSES
    assert bundle.manifest.card.training["dataset"] == "halves/"
    assert bundle.manifest.card.training["test_accuracy"] == 1.0
    found = [file.details for file in bundle.manifest.files if file.precision == "int8"]
    assert all(part in json.dumps(found) for part in ('"halves/"', '"stretch"', '"bilinear"'))


@pytest.mark.parametrize("command", ["verify-parity", "verify-robustness"])
def test_without_data_the_error_says_which_option_gives_them(command: str, bundle: Bundle) -> None:
    code, out, err = run(command, bundle.path)
    assert (code, out) == (2, "")
    assert "'halves/'" in err
    assert "--dataset DIR or --dataset FILE.npz" in err


def test_parity_is_shown_on_folders(bundle: Bundle, folders: Path) -> None:
    options = ("--dataset", folders, "--resize", "stretch", *QUICK)
    code, out, err = run("verify-parity", bundle.path, *options, "--json")
    assert code == 0, err
    assert "1 files that are no images were skipped: .txt" in err
    assert json.loads(out)["verdict"] == "pass"
    evidence = "".join(p.read_text() for p in bundle.path.rglob("evidence/**/*.json*"))
    assert '"stretch"' in evidence


@pytest.mark.parametrize("command", ["verify-parity", "verify-robustness"])
def test_what_is_measured_is_never_fewer_images_than_were_asked_for(
    bundle: Bundle, folders: Path, tmp_path: Path, command: str
) -> None:
    """Training leaves an unreadable image out; a measurement that did would be of other images."""
    root = Path(shutil.copytree(folders, tmp_path / "halves"))
    bad = root / "test" / "low" / "3.png"
    bad.write_bytes(bad.read_bytes()[:300])
    options = ("--dataset", root, "--resize", "stretch", "--samples", "20", "--threads", "1")
    code, out, err = run(command, bundle.path, *options)
    assert (code, out) == (2, "")
    assert str(bad) in err


def test_robustness_is_shown_on_an_npz_file_with_classes_in_another_order(
    bundle: Bundle, tmp_path: Path
) -> None:
    path = tmp_path / "halves.npz"
    images = np.concatenate([images_of(1, 8, 7), images_of(0, 8, 8)])
    labels = np.repeat([0, 1], 8)
    np.savez(path, images=images, labels=labels, class_names=np.array(["low", "high"]))
    attack = ("--attack", "fgsm", "--epsilons", "0.1", "--no-report", "--max-drop", "49%", *QUICK)
    code, _, err = run("verify-robustness", bundle.path, "--dataset", path, *attack, "--json")
    assert code in (0, 4), err
    assert '"by name, another order"' in "".join(
        p.read_text() for p in bundle.path.rglob("evidence/**/*.json*")
    )
    data = evaluation_data(bundle, path)
    assert data.labels.tolist() == [1] * 8 + [0] * 8
    assert [data.class_names[label] for label in data.labels] == ["low"] * 8 + ["high"] * 8


def test_classes_that_the_network_does_not_have_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "own.npz"
    np.savez(path, images=images_of(0, 4, 0), labels=[0] * 4, class_names=np.array(["hihg"]))
    code, _, err = run("verify-parity", bundle.path, "--dataset", path)
    assert code == 2
    assert "Did you mean 'high'?" in err
    digits = ("--dataset", "mnist5k")
    code, _, err = run("verify-robustness", bundle.path, *digits)
    assert code == 2
    assert "10 of 10 classes that the network does not have" in err


def test_data_that_nobody_matched_are_refused_by_the_library(bundle: Bundle) -> None:
    def own(names: list[str]) -> None:
        images = images_of(0, 2, 0)[:, None]
        check_fits(bundle, dataset_from_arrays("own", images, np.array([0, 1]), names))

    own(["high", "low"])
    with pytest.raises(UsageError, match="match_classes"):
        own(["low", "high"])
    with pytest.raises(UsageError, match="'cat'"):
        own(["cat", "low"])


def test_the_claims_take_data_of_ones_own(bundle: Bundle, folders: Path) -> None:
    options = ["--ccn-dataset", str(folders), "--ccn-resize", "stretch", "--ccn-threads", "1"]
    attack = ["--ccn-attack", "fgsm", "--ccn-epsilons", "0.1", "--ccn-samples", "8"]
    command = ["--pyargs", "ccn_deploy.certification", "--ccn-bundle", str(bundle.path)]
    few = ["--ccn-parity-samples", "8", "--ccn-max-drop", "49%", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *command, *options, *attack, *few],
        capture_output=True,
        text=True,
        check=False,
        cwd=bundle.path.parent,
    )
    assert "could not be judged" not in result.stdout
    assert "passed" in result.stdout, result.stdout + result.stderr
    wrong = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *command, "--ccn-crop", "random"],
        capture_output=True,
        text=True,
        check=False,
        cwd=bundle.path.parent,
    )
    assert wrong.returncode == pytest.ExitCode.USAGE_ERROR
    assert "Unknown crop 'random'" in wrong.stderr


def test_data_in_memory_leave_a_name_that_no_option_loads() -> None:
    assert trained_on({"dataset": "MNIST"}) == "MNIST"
    with pytest.raises(UsageError, match=r"--dataset FILE\.npz"):
        trained_on({"dataset": "mine"})
    with pytest.raises(UsageError, match=r"FILE\.npz"):
        trained_on({})


def test_training_says_that_data_are_not_divided_and_numbered(tmp_path: Path) -> None:
    small = ("--epochs", "1", "--batch-size", "16", "--threads", "1", "--device", "cpu")
    path = tmp_path / "own.npz"
    images = np.concatenate([images_of(0, 16, 0), images_of(1, 16, 1)])
    np.savez(path, images=images, labels=np.repeat([0, 1], 16))
    code, _, err = run("train", "--dataset", path, *small, "--output", tmp_path / "run")
    assert code == 0, err
    assert "own.npz: Not divided into train and test" in err
    assert "labels are taken as the network's numbers" in err
    code, _, err = run("train", "--dataset", path, "--download", "--output", tmp_path / "other")
    assert code == 2
    assert "--download is for data sets that have a name" in err
    assert load_dataset(path, "train").class_names == ("0", "1")
    np.savez(path, images=images, labels=np.zeros(32, int))
    code, _, err = run("train", "--dataset", path, *small, "--output", tmp_path / "other")
    assert code == 2
    assert "one class only" in err
