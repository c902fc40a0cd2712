from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load

from ccn_deploy.architectures import ARCHITECTURES, POOL, Architecture
from ccn_deploy.data import Dataset, Split
from ccn_deploy.errors import (
    IntegrityError,
    NotARunError,
    RuntimeUnavailableError,
    TrainingDivergedError,
    UsageError,
)
from ccn_deploy.models import build_model
from ccn_deploy.runs import open_run
from ccn_deploy.trainers import (
    EpochEnded,
    Event,
    Recipe,
    Started,
    Stepped,
    TrainConfig,
    train,
)
from tests.trainings import InterruptError, interrupt_after

TINY = Architecture(
    name="tiny",
    title="For these tests: with dropout, which only the ImageNet network has",
    input_shape=(1, 12, 12),
    features=(4, POOL),
    padding=0,
    hidden=(16,),
    dropout=0.5,
    classes=3,
)
RECIPE = Recipe("test", 3, 16, 0.1, (1.8, 2.4), 0.1, warmup_steps=4)
CONFIG = TrainConfig("ccn", "blobs", RECIPE, architecture="tiny", threads=1)
TRAIN, TEST = 50, 20
STEPS = math.ceil(TRAIN / RECIPE.batch_size)


def pixels(shape: tuple[int, ...], labels: NDArray[np.int64], seed: int) -> NDArray[np.float32]:
    """Noise with a bright band whose place is the label."""
    images = np.random.default_rng(seed).uniform(0, 0.5, (len(labels), *shape))
    band = shape[1] // 3
    for image, label in zip(images, labels, strict=True):
        image[:, label * band : (label + 1) * band] += 0.5
    return images.astype(np.float32)


def blobs(split: Split, count: int, shape: tuple[int, int, int] = (1, 12, 12)) -> Dataset:
    labels = np.arange(count, dtype=np.int64) % 3
    fetch = partial(np.take, pixels(shape, labels, len(split)), axis=0)
    return Dataset("blobs", split, ("a", "b", "c"), shape, labels, fetch, digest=split)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "tiny", TINY)


@pytest.fixture
def data() -> tuple[Dataset, Dataset]:
    return blobs("train", TRAIN), blobs("test", TEST)


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def with_images(data: Dataset, change: Callable[[NDArray[np.float32]], None]) -> Dataset:
    images = data.images(range(len(data))).copy()
    change(images)
    return replace(data, fetch=partial(np.take, images, axis=0))


def reference_weights(config: TrainConfig, data: Dataset) -> dict[str, torch.Tensor]:
    """Train by the formulas of SGD, in NCHW, without optimizer, Fabric or clipping helper."""
    recipe = config.recipe
    assert isinstance(recipe, Recipe) and recipe.clip_norm is not None
    model = build_model("tiny", config.defense, classes=3, seed=config.seed)
    model.dropout1.p = 0.0
    images, steps = torch.from_numpy(data.images(range(len(data)))), 0
    velocity: dict[str, torch.Tensor] = {}
    for epoch in range(recipe.epochs):
        order = np.random.default_rng([config.seed, epoch]).permutation(len(data))
        for start in range(0, len(data), recipe.batch_size):
            batch = order[start : start + recipe.batch_size]
            rate = recipe.learning_rate * min(1.0, (steps + 1) / recipe.warmup_steps)
            for drop in recipe.drops:
                rate *= recipe.drop_factor if steps / STEPS >= drop else 1.0
            logits = model(images[batch])
            smooth = config.defense.endswith("ls")
            targets = np.full((len(batch), 3), 0.05 if smooth else 0.0, dtype=np.float32)
            targets[np.arange(len(batch)), data.labels[batch]] = 0.9 if smooth else 1.0
            loss = -(torch.from_numpy(targets) * logits.log_softmax(1)).sum() / len(batch)
            names, parameters = zip(*model.named_parameters(), strict=True)
            gradients = torch.autograd.grad(loss, parameters)
            norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
            scale = min(1.0, recipe.clip_norm / norm)
            with torch.no_grad():
                for name, w, g in zip(names, parameters, gradients, strict=True):
                    decay = 0.0 if "alpha" in name else recipe.weight_decay
                    step = scale * g + decay * w
                    velocity[name] = recipe.momentum * velocity.get(name, torch.zeros(())) + step
                    w -= rate * velocity[name]
            steps += 1
    return model.state_dict()


@pytest.mark.parametrize("defense", ["sm", "ccn", "ccn+ls"])
def test_training_is_sgd_by_its_formulas(
    defense: str,
    data: tuple[Dataset, Dataset],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "tiny", replace(TINY, dropout=1e-9))
    config = replace(CONFIG, recipe=replace(RECIPE, clip_norm=0.3, weight_decay=0.01))
    config = replace(config, defense=defense)
    found = load(train(config, *data, tmp_path / "run").weights)
    expected = reference_weights(config, data[0])
    assert found.keys() == expected.keys()
    start = build_model("tiny", defense, classes=3).state_dict()
    for name, weights in expected.items():
        assert not torch.equal(weights, start[name]), f"{name} did not move"
        torch.testing.assert_close(found[name], weights, rtol=1e-4, atol=1e-5)


def test_the_run_holds_what_the_exporter_reads(
    data: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    events: list[Event] = []
    run = train(CONFIG, *data, tmp_path / "run", watcher=events.append)
    assert run == open_run(tmp_path / "run")
    assert (run.card.architecture, run.card.defense, run.card.class_names) == (
        "tiny",
        "ccn",
        ("a", "b", "c"),
    )
    assert sorted(f.name for f in run.path.iterdir()) == [
        "metrics.csv",
        "run.json",
        "weights.safetensors",
    ]
    model = build_model("tiny", "ccn", classes=3)
    model.load_state_dict(load(run.weights))
    predicted = model.eval()(torch.from_numpy(data[1].images(range(TEST)))).argmax(1).numpy()
    assert run.card.training["test_accuracy"] == np.mean(predicted == data[1].labels)
    assert json.dumps(dict(run.card.training))

    assert events[0] == Started(step=0, steps=3 * STEPS, epochs=3)
    steps = [event.step for event in events if isinstance(event, Stepped)]
    assert steps == list(range(1, 3 * STEPS + 1))
    ended = [event for event in events if isinstance(event, EpochEnded)]
    assert [float(row["test_accuracy"]) for row in rows(run.path)] == [
        event.test_accuracy for event in ended
    ]
    assert [row["epoch"] for row in rows(run.path)] == ["1", "2", "3"]
    assert [row["step"] for row in rows(run.path)] == [str(STEPS * n) for n in (1, 2, 3)]
    assert float(rows(run.path)[-1]["learning_rate"]) == pytest.approx(0.001)


def test_a_seed_decides_every_bit(data: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    first = train(CONFIG, *data, tmp_path / "first")
    torch.manual_seed(1234)  # whatever ran before
    np.random.seed(1234)
    again = train(CONFIG, *data, tmp_path / "again")
    other = train(replace(CONFIG, seed=1), *data, tmp_path / "other")
    assert first.weights == again.weights
    assert (tmp_path / "first/run.json").read_bytes() == (tmp_path / "again/run.json").read_bytes()
    assert first.weights != other.weights


def test_the_caller_keeps_its_torch_settings(data: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    train(replace(CONFIG, threads=2), *data, tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 1
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("events", range(1, 3 * (STEPS + 1) + 1))
def test_interrupted_anywhere_it_ends_with_the_same_weights(
    events: int, data: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    whole = train(CONFIG, *data, tmp_path / "whole")
    with pytest.raises(InterruptError):
        train(CONFIG, *data, tmp_path / "run", watcher=interrupt_after(events))
    with pytest.raises(NotARunError, match="again"):
        open_run(tmp_path / "run")
    resumed = train(CONFIG, *data, tmp_path / "run")
    assert resumed.weights == whole.weights
    assert [row["epoch"] for row in rows(resumed.path)] == ["1", "2", "3"]
    for row, expected in zip(rows(resumed.path), rows(whole.path), strict=True):
        assert {**row, "seconds": ""} == {**expected, "seconds": ""}


KILLER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_trainers as here
from ccn_deploy.architectures import ARCHITECTURES
from ccn_deploy.trainers import train
ARCHITECTURES["tiny"] = here.TINY
data = here.blobs("train", here.TRAIN), here.blobs("test", here.TEST)

def attempt(path, kill_at):
    '''Train in a fork, killed at its kill_at-th file operation; return whether it was.'''
    child = os.fork()
    if not child:
        seen = 0
        def audit(event, arguments):
            nonlocal seen
            named = [a for a in arguments if isinstance(a, str)]
            if event in ("open", "os.rename", "os.remove") and any(path in a for a in named):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(audit)
        train(here.CONFIG, *data, path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False

attempt(sys.argv[2] + "/whole", 0)
kill_at = 1
while attempt(f"{sys.argv[2]}/{kill_at}", kill_at):
    # Killed once more on the way, at another place, and only then left in peace.
    attempt(f"{sys.argv[2]}/{kill_at}", 5)
    assert not attempt(f"{sys.argv[2]}/{kill_at}", 0)
    kill_at += 1
print(kill_at - 1)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_killed_at_every_file_operation_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    """A real SIGKILL before each open, rename and removal of a file of the run, in turn."""
    result = subprocess.run(
        [sys.executable, "-c", KILLER, str(Path(__file__).parent), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    kills = int(result.stdout)
    assert kills > 20
    whole = open_run(tmp_path / "whole")
    for kill in range(1, kills + 1):
        run = open_run(tmp_path / str(kill))
        assert run.weights == whole.weights, f"killed at file operation {kill}"
        assert [row["epoch"] for row in rows(run.path)] == ["1", "2", "3"]
        names = {file.name for file in run.path.iterdir()}
        assert names <= {"metrics.csv", "run.json", "weights.safetensors", "checkpoint.safetensors"}


FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import test_trainers as here
from ccn_deploy.architectures import ARCHITECTURES
from ccn_deploy.errors import StorageError
from ccn_deploy.trainers import EpochEnded, train
ARCHITECTURES["tiny"] = here.TINY

def fill(event):
    if isinstance(event, EpochEnded):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, -1))

try:
    train(here.CONFIG, here.blobs("train", here.TRAIN), here.blobs("test", here.TEST),
          sys.argv[2], watcher=fill)
except StorageError as error:
    sys.exit(0 if sys.argv[2] in str(error) else str(error))
sys.exit("no error")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_a_full_disk_leaves_the_last_checkpoint(
    data: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(Path(__file__).parent), str(run)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert not list(run.glob(".*"))
    events: list[Event] = []
    resumed = train(CONFIG, *data, run, watcher=events.append)
    assert events[0] == Started(step=STEPS, steps=3 * STEPS, epochs=3)
    assert resumed.weights == train(CONFIG, *data, tmp_path / "whole").weights


def test_resuming_with_other_settings_names_them(
    data: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    with pytest.raises(InterruptError):
        train(CONFIG, *data, tmp_path / "run", watcher=interrupt_after(STEPS + 3))
    before = {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()}
    for change, word in (
        ({"learning_rate": 0.05}, "recipe.learning_rate was 0.1 and is now 0.05"),
        ({"defense": "sm"}, "defense was 'ccn' and is now 'sm'"),
        ({"seed": 3}, "seed was 0 and is now 3"),
        ({"epochs": 5}, "recipe.epochs was 3 and is now 5"),
        ({"threads": 2}, "threads was 1 and is now 2"),
    ):
        with pytest.raises(UsageError, match=word):
            train(replace(CONFIG, **change), *data, tmp_path / "run")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="train_digest"):
        train(CONFIG, replace(data[0], digest="other"), data[1], tmp_path / "run")
    assert {f.name: f.read_bytes() for f in (tmp_path / "run").iterdir()} == before


def test_threads_not_given_are_those_of_the_run(
    data: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    with pytest.raises(InterruptError):
        train(
            replace(CONFIG, threads=2), *data, tmp_path / "run", watcher=interrupt_after(STEPS + 3)
        )
    run = train(replace(CONFIG, threads=None), *data, tmp_path / "run")
    assert run.card.training["threads"] == 2


def test_a_finished_run_is_left_alone_unless_overwritten(
    data: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    events: list[Event] = []
    first = train(CONFIG, *data, tmp_path / "run")
    before = {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in first.path.iterdir()}
    assert train(CONFIG, *data, tmp_path / "run", watcher=events.append) == first
    assert events == []
    assert before == {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in first.path.iterdir()}
    other = train(replace(CONFIG, seed=5), *data, tmp_path / "run", overwrite=True)
    assert other.weights == train(replace(CONFIG, seed=5), *data, tmp_path / "other").weights


def test_nothing_that_is_no_run_is_overwritten(
    data: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="holds files and no training run"):
            train(CONFIG, *data, tmp_path, overwrite=overwrite)
        with pytest.raises(UsageError, match="is a file"):
            train(CONFIG, *data, tmp_path / "thesis.tex", overwrite=overwrite)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_any_flipped_byte_of_a_checkpoint_is_noticed(
    data: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(InterruptError):
        train(CONFIG, *data, run, watcher=interrupt_after(STEPS + 2))
    file = run / "checkpoint.safetensors"
    healthy = file.read_bytes()
    places = np.random.default_rng(0).integers(0, len(healthy), 40)
    for place in [0, 9, len(healthy) // 2, len(healthy) - 1, *map(int, places)]:
        file.write_bytes(healthy[:place] + bytes([healthy[place] ^ 4]) + healthy[place + 1 :])
        with pytest.raises(IntegrityError, match="damaged"):
            train(CONFIG, *data, run)
    file.write_bytes(healthy[: len(healthy) // 2])
    with pytest.raises(IntegrityError, match="damaged"):
        train(CONFIG, *data, run)


def test_a_rate_that_is_too_high_is_named(data: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    reckless = replace(RECIPE, learning_rate=1e30, warmup_steps=0, clip_norm=None)
    with pytest.raises(TrainingDivergedError) as caught:
        train(replace(CONFIG, defense="sm", recipe=reckless), *data, tmp_path / "run")
    message = str(caught.value)
    assert "step 2" in message
    assert "learning rate, 1e+30" in message
    assert "no warm-up and no gradient clipping" in message
    assert not (tmp_path / "run/checkpoint.safetensors").exists()


def test_a_last_step_that_ruins_the_weights_is_not_saved(
    data: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    """One step to an epoch: its loss is finite, the weights after it are not."""
    reckless = replace(
        RECIPE, batch_size=TRAIN, learning_rate=1e38, warmup_steps=0, clip_norm=None, momentum=0.0
    )
    bright = with_images(data[0], lambda images: np.multiply(images, 100, out=images))
    with pytest.raises(TrainingDivergedError, match=r"weight is not a number at step 1 "):
        train(replace(CONFIG, defense="sm", recipe=reckless), bright, data[1], tmp_path / "run")
    assert not (tmp_path / "run/checkpoint.safetensors").exists()


def test_a_poisoned_image_is_named_and_the_checkpoint_kept(
    data: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    def poison(images: NDArray[np.float32]) -> None:
        images[17, 0, 3, 4] = np.nan

    with pytest.raises(InterruptError):
        train(CONFIG, *data, tmp_path / "run", watcher=interrupt_after(STEPS + 2))
    checkpoint = (tmp_path / "run/checkpoint.safetensors").read_bytes()
    order = np.random.default_rng([0, 1]).permutation(TRAIN)
    step = STEPS + int(np.flatnonzero(order == 17)[0]) // RECIPE.batch_size + 1
    with pytest.raises(TrainingDivergedError) as caught:
        train(CONFIG, with_images(data[0], poison), data[1], tmp_path / "run")
    assert f"step {step} (epoch 2)" in str(caught.value)
    assert "image 17 of blobs (train)" in str(caught.value)
    assert (tmp_path / "run/checkpoint.safetensors").read_bytes() == checkpoint
    healed = train(CONFIG, *data, tmp_path / "run")
    assert healed.weights == train(CONFIG, *data, tmp_path / "whole").weights


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"defense": "cnn"}, "'ccn'"),
        ({"recipe": "qick"}, "'quick'"),
        ({"architecture": "mnist-cn"}, "'mnist-cnn'"),
        ({"architecture": "mnist-cnn"}, r"\(1, 28, 28\)"),
        ({"dataset": "mnist"}, "'blobs'"),
        ({"seed": -1}, "seed"),
        ({"epochs": 0}, "epochs"),
        ({"devices": 0}, "devices"),
        ({"device": "gpu"}, "'gpu'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    change: dict[str, Any], word: str, data: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=word):
        train(replace(CONFIG, **change), *data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_architecture_follows_from_the_images(tmp_path: Path) -> None:
    colour = blobs("train", 2, (3, 32, 32)), blobs("test", 2, (3, 32, 32))
    config = replace(CONFIG, architecture=None, epochs=1)
    assert train(config, *colour, tmp_path / "run").card.architecture == "vgg11-cifar10"
    odd = blobs("train", 2, (2, 9, 9)), blobs("test", 2, (2, 9, 9))
    with pytest.raises(UsageError, match=r"No architecture takes images of shape \(2, 9, 9\)"):
        train(config, *odd, tmp_path / "odd")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_cuda_without_a_gpu_is_an_error_and_auto_is_the_cpu(
    data: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    with pytest.raises(RuntimeUnavailableError, match="--device cpu"):
        train(replace(CONFIG, device="cuda"), *data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run = train(replace(CONFIG, device="auto", epochs=1), *data, tmp_path / "run")
    assert run.card.training["device"] == "cpu"


# 33 images in batches of 16: shares of 8 and 8, twice, then 1 and none.
PAIR = TrainConfig("ccn", "blobs", replace(RECIPE, batch_size=16), epochs=2, threads=1)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    data = blobs("train", 33, (1, 28, 28)), blobs("test", 15, (1, 28, 28))
    events: list[Event] = []
    pair = train(replace(PAIR, devices=2), *data, tmp_path / "pair", watcher=events.append)
    alone = train(PAIR, *data, tmp_path / "alone")
    assert [e.step for e in events if isinstance(e, Stepped)] == [1, 2, 3, 4, 5, 6]
    for name, weights in load(alone.weights).items():
        torch.testing.assert_close(load(pair.weights)[name], weights, rtol=1e-4, atol=1e-5)
    for one, two in zip(rows(alone.path), rows(pair.path), strict=True):
        assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-4)
        assert two["train_accuracy"] == one["train_accuracy"]
        assert two["test_accuracy"] == one["test_accuracy"]


@pytest.mark.parametrize("fetch", ["lambda", "unknown module"])
def test_data_that_cannot_be_sent_to_other_processes(
    fetch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is only found out there; it must not hang, with more than a pipe holds."""
    here_only = ModuleType("a_module_that_is_in_no_file")
    exec("def pick(images, indices): return images[indices]", here_only.__dict__)
    monkeypatch.setitem(sys.modules, here_only.__name__, here_only)
    data = blobs("train", 33, (1, 28, 28)), blobs("test", 15, (1, 28, 28))
    images = data[0].images(range(33))
    assert images.nbytes > 65536
    bad = (
        (lambda indices: images[indices]) if fetch == "lambda" else partial(here_only.pick, images)
    )
    with pytest.raises(UsageError, match="cannot be sent to the processes"):
        train(replace(PAIR, devices=2), replace(data[0], fetch=bad), data[1], tmp_path / "run")


def test_three_epochs_learn_the_digits(trained_run: Callable[[str], Path]) -> None:
    for defense in ("sm", "ccn"):
        assert open_run(trained_run(defense)).card.training["test_accuracy"] > 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_a_gpu_learns_what_the_cpu_learns(tmp_path: Path) -> None:
    data = blobs("train", 33, (1, 28, 28)), blobs("test", 15, (1, 28, 28))
    gpu = train(replace(PAIR, device="cuda"), *data, tmp_path / "gpu")
    cpu = train(PAIR, *data, tmp_path / "cpu")
    assert gpu.card.training["device"] == "cuda"
    for name, weights in load(cpu.weights).items():
        torch.testing.assert_close(load(gpu.weights)[name], weights, rtol=1e-2, atol=1e-3)
