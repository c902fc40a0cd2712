from __future__ import annotations

import csv
import json
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ccn_deploy.cli.main import main
from ccn_deploy.data import load_dataset
from ccn_deploy.runs import open_run
from ccn_deploy.trainers import TrainConfig, train

OPTIONS = [
    *("--dataset", "mnist", "--defense", "sm", "--epochs", "3"),
    *("--batch-size", "32", "--seed", "4", "--threads", "1", "--device", "cpu"),
]
CONFIG = TrainConfig("sm", "mnist", epochs=3, batch_size=32, seed=4, threads=1)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with idx files of noise: 200 images to train on, 50 to test."""
    directory = tmp_path_factory.mktemp("mnist")
    random = np.random.default_rng(0)
    for stem, count in (("train", 200), ("t10k", 50)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        header = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28)
        (directory / f"{stem}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">4BI", 0, 0, 8, 1, count)
        (directory / f"{stem}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return directory


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["ccn-deploy", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_and_started_again_the_command_ends_the_same(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["train", *OPTIONS, "--data-dir", digits, "--output", tmp_path / "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ccn_deploy.cli.main", *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    with process, process.stderr as lines:
        assert any("epoch 1" in line for line in lines), "no epoch was reported"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "run/run.json").read_bytes())["finished"] is None

    assert run_main(monkeypatch, *command) == 0
    shown = capsys.readouterr()
    assert "resumed after step" in shown.err
    assert "Clean accuracy" in shown.out
    assert f"ccn-deploy export {tmp_path / 'run'}" in shown.out
    splits = load_dataset("mnist", "train", digits), load_dataset("mnist", "test", digits)
    whole = train(CONFIG, *splits, tmp_path / "whole")
    assert open_run(tmp_path / "run").weights == whole.weights
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]

    assert run_main(monkeypatch, *command, "--json") == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    assert document["schema"] == "ccn-deploy/train/1"
    assert document["already_finished"] is True
    assert document["test_accuracy"] == whole.card.training["test_accuracy"]
    assert shown.err == ""

    assert run_main(monkeypatch, *command, "--learning-rate", "0.2") == 2
    assert "learning_rate was 0.1 and is now 0.2" in capsys.readouterr().err


def test_a_diverged_training_is_one_error_and_exit_code_1(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["train", *OPTIONS, "--data-dir", digits, "--output", tmp_path / "run"]
    assert run_main(monkeypatch, *command, "--learning-rate", "1e30", "--json") == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    message = shown.err[shown.err.index("error:") :].strip().splitlines()
    assert len(message) == 2
    assert "is not a number at step" in message[0]
    assert "learning rate" in message[0]
    assert "--learning-rate 0.1 --overwrite" in message[1]


def test_adversarial_training_says_against_what(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["train", *OPTIONS, "--epochs", "1", "--data-dir", digits]
    for arguments, told in (
        (["fgsm"], "Adversarial training: fgsm, epsilon 0.3."),
        (["pgd", "--attack-steps", "2", "--epsilon", "8/255"],
         "Adversarial training: pgd, epsilon 0.03137, 2 steps of 0.0314."),
        (["trades", "--attack-steps", "5", "--beta", "3"],
         "Adversarial training: trades, epsilon 0.3, 5 steps of 0.15, beta 3."),
    ):  # fmt: skip
        output = tmp_path / arguments[0]
        call = [*command, "--output", output, "--adversarial", *arguments]
        assert run_main(monkeypatch, *call) == 0
        shown = capsys.readouterr()
        assert told in shown.out
        assert "crafted" in shown.err
        assert run_main(monkeypatch, *call, "--json") == 0
        document = json.loads(capsys.readouterr().out)
        assert document["recipe"]["adversary"]["kind"] == arguments[0]
    for wrong, word in (
        (["--adversarial", "pgd", "--epsilon", "a lot"], "'a lot'"),
        (["--adversarial", "pgd", "--epsilon", "0"], "epsilon"),
        (["--adversarial", "pgd", "--epsilon", "80/255/3"], "'80/255/3'"),
        (["--adversarial", "fgsm", "--beta", "6"], "fgsm has no beta"),
        (["--adversarial", "fgsm", "--attack-steps", "6"], "one step"),
        (["--adversarial", "fgms"], "'fgsm'"),
        (["--epsilon", "0.3"], "--adversarial"),
    ):
        assert run_main(monkeypatch, *command, "--output", tmp_path / "wrong", *wrong) == 2
        message = capsys.readouterr().err.strip().splitlines()
        assert word in message[0] + message[1] and len(message) == 2
        assert not (tmp_path / "wrong").exists()


def test_a_missing_data_set_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", *OPTIONS, "--data-dir", tmp_path, "--output", tmp_path / "run"]
    assert run_main(monkeypatch, *command) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_compact_layers_of_the_papers_network_by_name(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["train", *OPTIONS, "--data-dir", digits, "--epochs", "1", "--output"]
    assert run_main(monkeypatch, *command, tmp_path / "odd", "--compact", "conv1,conv5") == 2
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 2
    assert "has no layer 'conv5'" in message[0] and "conv4, fc1, fc2, fc3" in message[1]
    assert not (tmp_path / "odd").exists()

    for given, compact in (("fc1,conv1", ["conv1", "fc1"]), ("none", [])):
        run = tmp_path / given
        assert run_main(monkeypatch, *command, run, "--compact", given, "--json") == 0
        assert json.loads(capsys.readouterr().out)["compact"] == compact
    assert open_run(tmp_path / "fc1,conv1").card.name == "mnist-cnn-sm-compact-conv1-fc1"
    assert open_run(tmp_path / "none").card.name == "mnist-cnn-sm"
