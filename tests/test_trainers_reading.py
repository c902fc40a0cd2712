"""Training on files: worker processes, images that cannot be read, and memory."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from safetensors.torch import load as load_weights

from ccn_deploy.cli.main import main
from ccn_deploy.data import Dataset, ModelInput, load_dataset
from ccn_deploy.errors import (
    EnvironmentUnfitError,
    InputError,
    UnreadableImageError,
    UsageError,
)
from ccn_deploy.runs import open_run
from ccn_deploy.trainers import Event, Skipped, Stepped, TrainConfig, train
from ccn_deploy.trainers.batches import Reading, epoch_batches, fetch_ahead, read_images
from tests.trainings import InterruptError, interrupt_after

Image = pytest.importorskip("PIL.Image")

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc of Linux")
TRAIN, TEST, BATCH = 26, 7, 4
LIKE = ModelInput((1, 12, 12))
NETWORK = """
from torch import nn

def small(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), nn.Dropout(0.3),
                         nn.Linear(16, classes))
"""


def picture(label: int, seed: int) -> NDArray[np.uint8]:
    pixels = np.random.default_rng(seed).integers(0, 120, (12, 12), dtype=np.uint8)
    pixels[6 * label : 6 * label + 6] += 120
    return pixels


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of images, bright above or below, and a network's file beside them."""
    (tmp_path / "network.py").write_text(NETWORK)
    for split, count in (("train", TRAIN), ("test", TEST)):
        for at in range(count):
            path = tmp_path / "data" / split / ("high", "low")[at % 2] / f"{at:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(at % 2, 100 * len(split) + at)).save(path)
    return tmp_path


def spoil(root: Path, *at: int, split: str = "train") -> list[Path]:
    """Damage some of the images, each in another way."""
    paths = [root / "data" / split / ("high", "low")[n % 2] / f"{n:02}.png" for n in at]
    for way, path in enumerate(paths):
        whole = path.read_bytes()
        path.write_bytes([whole[: len(whole) // 2], b"no image", b""][way % 3])
    return paths


def data(root: Path) -> tuple[Dataset, Dataset]:
    return (
        load_dataset(root / "data", "train", like=LIKE),
        load_dataset(root / "data", "test", like=LIKE),
    )


def config(root: Path, **changes: Any) -> TrainConfig:
    made = TrainConfig(
        dataset="data/",
        network=f"{root / 'network.py'}:small",
        epochs=2,
        batch_size=BATCH,
        threads=1,
    )
    return replace(made, **changes)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


def finished(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_bytes())["finished"]
    return found


# Worker processes.


def test_the_batches_are_the_same_whoever_reads_them(root: Path) -> None:
    spoil(root, 3, 4, 5)
    images = data(root)[0]
    batches = epoch_batches(TRAIN, BATCH, 0, 0)
    first, *others = [
        [
            batch
            for rank in (0, 1)
            for batch in fetch_ahead(images, batches, rank, 2, Reading(workers))
        ]
        for workers in (0, 1, 3)
    ]
    assert [batch.size for batch in first] == ([4] * 6 + [2]) * 2
    assert sum(batch.share for batch in first) == TRAIN - 3
    assert sum(len(batch.skipped) for batch in first) == 3
    for found in others:
        for one, other in zip(first, found, strict=True):
            assert np.array_equal(one.images, other.images)
            assert np.array_equal(one.labels, other.labels)
            assert (one.size, one.share, one.skipped) == (other.size, other.share, other.skipped)


def test_workers_change_no_bit_of_a_training_and_a_resumed_one(root: Path) -> None:
    """The network has dropout: its random numbers must not be drawn for the workers."""
    spoil(root, 3, 4)
    whole = train(config(root), *data(root), root / "whole")
    workers = train(config(root, workers=2), *data(root), root / "workers")
    assert workers.weights == whole.weights
    assert rows(workers.path) == rows(whole.path)
    with pytest.raises(InterruptError):
        train(config(root, workers=2), *data(root), root / "run", watcher=interrupt_after(14))
    resumed = train(config(root, workers=1), *data(root), root / "run")
    assert resumed.weights == whole.weights


def test_errors_of_a_worker_are_the_errors_of_the_file(root: Path) -> None:
    (bad,) = spoil(root, 3)
    before = psutil.Process().children()
    with pytest.raises(UnreadableImageError) as caught:
        train(config(root, workers=2, strict=True), *data(root), root / "run")
    assert str(bad) in caught.value.what
    assert len(str(caught.value).splitlines()) == 2
    assert not psutil.wait_procs(started_since(before), timeout=20)[1]


def started_since(before: list[psutil.Process]) -> list[psutil.Process]:
    """Return this process's children that are new: other tests may have left some."""
    return [child for child in psutil.Process().children() if child not in before]


@pytest.mark.parametrize("workers", [-1])
def test_fewer_than_no_worker_are_refused(root: Path, workers: int) -> None:
    with pytest.raises(UsageError, match="workers"):
        train(config(root, workers=workers), *data(root), root / "run")
    assert not (root / "run").exists()


@LINUX
def test_a_killed_worker_is_an_error_and_loses_nothing(root: Path) -> None:
    whole = train(config(root), *data(root), root / "whole")
    before = psutil.Process().children()
    seen: list[Event] = []

    def kill(event: Event) -> None:
        seen.append(event)
        if isinstance(event, Stepped) and event.epoch == 2 and event.step == 8:
            children = started_since(before)
            assert len(children) == 2
            for child in children:
                child.send_signal(signal.SIGKILL)

    with pytest.raises(EnvironmentUnfitError) as caught:
        train(config(root, workers=2), *data(root), root / "run", watcher=kill)
    assert "has stopped sending them" in caught.value.what
    assert "--workers" in caught.value.hint
    assert not psutil.wait_procs(started_since(before), timeout=20)[1]
    assert [row["epoch"] for row in rows(root / "run")] == ["1"]
    resumed = train(config(root), *data(root), root / "run")
    assert resumed.weights == whole.weights


@LINUX
@pytest.mark.parametrize("stopped_by", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_command(root: Path, stopped_by: signal.Signals) -> None:
    """Ctrl-C reaches the whole group; SIGKILL reaches only the command itself."""
    arguments = [
        *("train", "--network", f"{root / 'network.py'}:small", "--dataset", root / "data"),
        *("--resize", "stretch", "--epochs", "100000", "--batch-size", "4", "--threads", "1"),
        *("--workers", "2", "--device", "cpu", "--output", root / "run"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "ccn_deploy.cli.main", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background job ignores Ctrl-C, and hands that on to all that it starts.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    with process, process.stderr as lines:
        assert any("epoch 1 " in line for line in lines), "no epoch was reported"
        workers: list[psutil.Process] = []
        while not workers:  # between two epochs there are none
            workers = psutil.Process(process.pid).children()
        if stopped_by == signal.SIGINT:
            os.killpg(process.pid, stopped_by)
        else:
            process.send_signal(stopped_by)
        rest = lines.read()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    if stopped_by == signal.SIGINT:
        assert process.returncode == 130, rest
        assert "Interrupted" in rest
        assert "Traceback" not in rest
    else:
        assert process.returncode == -signal.SIGKILL


def test_workers_may_be_started_from_any_thread(root: Path) -> None:
    images, found = data(root)[0], []

    def work() -> None:
        batches = fetch_ahead(images, epoch_batches(TRAIN, BATCH, 0, 0), reading=Reading(1))
        found.extend(batch.share for batch in batches)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert sum(found) == TRAIN


# Images that cannot be read.


def reference(root: Path, bad: set[int]) -> list[float]:
    """Train the linear network below by SGD's formulas, a bad image counting as nothing."""
    images, labels = [], []
    for at in [*range(0, TRAIN, 2), *range(1, TRAIN, 2)]:  # by class
        images.append(picture(at % 2, 500 + at).ravel() / 255)
        labels.append(at % 2)
    kept = np.array([at not in bad for at in [*range(0, TRAIN, 2), *range(1, TRAIN, 2)]])
    x, y = np.array(images), np.eye(2)[labels]
    w, v = np.zeros((2, 144)), np.zeros((2, 144))
    for epoch in range(2):
        order = np.random.default_rng([0, epoch]).permutation(TRAIN)
        for start in range(0, TRAIN, BATCH):
            batch = order[start : start + BATCH]
            used = batch[kept[batch]]
            logits = x[used] @ w.T
            share = np.exp(logits - logits.max(axis=1, keepdims=True))
            share /= share.sum(axis=1, keepdims=True)
            v = 0.9 * v + (share - y[used]).T @ x[used] / len(batch) + 5e-4 * w
            w = w - 0.1 * v
    return w.ravel().tolist()


LINEAR = """
from torch import nn

def linear(classes):
    layer = nn.Linear(144, classes, bias=False)
    nn.init.zeros_(layer.weight)
    return nn.Sequential(nn.Flatten(), layer)
"""


@pytest.mark.parametrize("devices", [1, 2])
def test_an_image_that_cannot_be_read_counts_as_nothing(root: Path, devices: int) -> None:
    """A whole batch of such images among them, and with two processes whole shares."""
    from ccn_deploy.trainers.recipes import Recipe

    (root / "network.py").write_text(LINEAR)
    order = np.random.default_rng([0, 1]).permutation(TRAIN)
    names = np.array([*range(0, TRAIN, 2), *range(1, TRAIN, 2)])
    bad = {int(at) for at in names[order[BATCH : 2 * BATCH]]} | {3}
    spoil(root, *sorted(bad))
    recipe = Recipe("plain", 2, BATCH, 0.1, (), 1.0, warmup_steps=0, clip_norm=None)
    settings = config(
        root, network=f"{root / 'network.py'}:linear", recipe=recipe, devices=devices, epochs=None
    )
    run = train(settings, *data(root), root / "run")
    weights = load_weights(run.weights)["1.weight"].double().numpy().ravel()
    np.testing.assert_allclose(weights, reference(root, bad), rtol=1e-4, atol=1e-6)
    assert [int(row["skipped_train"]) for row in rows(run.path)] == [len(bad)] * 2


def test_each_epoch_names_and_counts_them_and_a_resumed_run_ends_the_same(root: Path) -> None:
    bad = spoil(root, 3, 4, 5) + spoil(root, 1, split="test")
    events: list[Event] = []
    whole = train(config(root), *data(root), root / "whole", watcher=events.append)
    told = [event.what for event in events if isinstance(event, Skipped)]
    assert len(told) == 2 * len(bad)
    for path in bad:
        assert sum(str(path) in what for what in told) == 2
    assert [(row["skipped_train"], row["skipped_test"]) for row in rows(whole.path)] == [
        ("3", "1")
    ] * 2
    assert (finished(whole.path)["skipped_train"], finished(whole.path)["skipped_test"]) == (3, 1)
    assert whole.card.training["skipped_train"] == 3
    assert (whole.card.training["test_accuracy"] * (TEST - 1)).is_integer()
    for stop in (3, 12, 13, 14, 20, len(events)):
        with pytest.raises(InterruptError):
            train(config(root), *data(root), root / str(stop), watcher=interrupt_after(stop))
        resumed = train(config(root), *data(root), root / str(stop))
        assert resumed.weights == whole.weights
        assert finished(resumed.path) == finished(whole.path)
        assert rows(resumed.path) == rows(whole.path)


def test_a_run_without_such_images_does_not_mention_them(root: Path) -> None:
    run = train(config(root, epochs=1), *data(root), root / "run")
    assert not [key for key in finished(run.path) if "skipped" in key]
    assert not [key for key in run.card.training if "skipped" in key]


@pytest.mark.parametrize("split", ["train", "test"])
def test_strict_stops_with_the_files_name(root: Path, split: str) -> None:
    (bad,) = spoil(root, 3, split=split)
    with pytest.raises(UnreadableImageError) as caught:
        train(config(root, strict=True), *data(root), root / "run")
    assert str(bad) in caught.value.what
    (root / "data" / split / "low" / "03.png").write_bytes(
        (root / "data" / split / "low" / "05.png").read_bytes()
    )
    with pytest.raises(UsageError, match=f"{split}_digest was"):  # other data, another run
        train(config(root), *data(root), root / "run")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_split_without_one_readable_image_is_an_error(root: Path, split: str) -> None:
    spoil(root, *range(TRAIN if split == "train" else TEST), split=split)
    with pytest.raises(InputError, match=rf"No image of data/ \({split}\) can be read"):
        train(config(root), *data(root), root / "run")


def test_only_damaged_files_are_left_out(root: Path) -> None:
    """A file that is gone, or is a picture that nobody knows how to use, is an error as ever."""
    images = data(root)
    path = root / "data" / "train" / "low" / "03.png"
    Image.fromarray(np.full((12, 12, 4), 100, np.uint8)).save(path)
    with pytest.raises(InputError, match=r"03\.png has transparent pixels"):
        train(config(root), *images, root / "run")
    path.unlink()
    with pytest.raises(InputError, match=r"03\.png cannot be opened"):
        train(config(root), *images, root / "run")


def test_reading_keeps_the_order_and_names_what_it_leaves_out(root: Path) -> None:
    bad = spoil(root, 4, 0)
    images = data(root)[0]
    read = read_images(images, np.array([5, 0, 1, 2]))
    assert read.indices.tolist() == [5, 1]
    assert np.array_equal(read.images, images.images([5, 1]))
    assert [str(path) in what for path, what in zip(reversed(bad), read.skipped, strict=True)]
    nothing = read_images(images, np.array([0]))
    assert nothing.images.shape == (0, 1, 12, 12)


def test_a_decompression_bomb_is_left_out(root: Path) -> None:
    path = root / "data" / "train" / "low" / "03.png"
    Image.new("1", (9000, 9000)).save(path)
    run = train(config(root, epochs=1), *data(root), root / "run")
    assert finished(run.path)["skipped_train"] == 1


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["ccn-deploy", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return int(exit.value.code or 0)


def test_the_command_names_each_file_once_and_ends_with_the_count(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [*spoil(root, 4, 5), *spoil(root, 1, split="test")]
    command = [
        *("train", "--network", f"{root / 'network.py'}:small", "--dataset", root / "data"),
        *("--epochs", "2", "--batch-size", "4", "--threads", "1", "--device", "cpu"),
        *("--resize", "stretch"),
    ]
    assert run_main(monkeypatch, *command, "--output", root / "run") == 0
    shown = capsys.readouterr()
    for path in bad:
        assert shown.err.count(str(path)) == 1
    assert "Left out, since their files cannot be read: 2 training images, 1 test" in shown.out
    assert "on 6 test images" in shown.out
    assert run_main(monkeypatch, *command, "--output", root / "run", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["skipped_train"], document["skipped_test"]) == (2, 1)
    assert open_run(root / "run").card.training["skipped_train"] == 2

    assert run_main(monkeypatch, *command, "--output", root / "strict", "--strict") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "cannot be read as an image" in shown.err


# Memory.


@LINUX
@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_takes_the_memory_of_a_few_batches(tmp_path: Path, workers: int) -> None:
    """300 images of 224x224 are 181 MB of float32; a batch of 8 is 5 MB."""
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for at in range(150):
            path = tmp_path / "data" / label / f"{at}.jpg"
            Image.new("RGB", (240, 230), (at, 0, 0)).save(path)
    code = f"""
import resource
from pathlib import Path
from ccn_deploy.data import ModelInput, load_dataset
from ccn_deploy.trainers.batches import Reading, epoch_batches, fetch_ahead

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

data = load_dataset(Path({str(tmp_path / "data")!r}), "train", like=ModelInput((3, 224, 224)))
read = lambda batches: sum(b.images.nbytes for b in fetch_ahead(
    data, batches, reading=Reading({workers}))) / 1e6
batches = epoch_batches(len(data), 8, 0, 0)
read(batches[:1])  # what Pillow and the workers need once
before = peak()
print(read(batches), peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    decoded, grown = map(float, result.stdout.split())
    assert decoded > 180
    assert grown < 60
