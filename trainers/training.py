"""Training a network: :func:`train`."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ccn_deploy.data.dataset import Dataset
from ccn_deploy.runs import TrainedRun, open_run
from ccn_deploy.trainers.batches import Reading
from ccn_deploy.trainers.config import (
    OwnNetwork,
    TrainConfig,
    check_network,
    default_threads,
    make_plan,
)
from ccn_deploy.trainers.devices import launch, resolve_device
from ccn_deploy.trainers.events import Watcher, ignore
from ccn_deploy.trainers.loop import Task, fit
from ccn_deploy.trainers.network import own_network
from ccn_deploy.trainers.rundir import RunDirectory


def train(
    config: TrainConfig,
    train_data: Dataset,
    test_data: Dataset,
    output: str | os.PathLike[str],
    *,
    watcher: Watcher = ignore,
    overwrite: bool = False,
) -> TrainedRun:
    """Train a network into a run directory, going on where an interrupted run left off.

    A run that was killed and is started again with the same configuration ends with the same
    weights as one that was not, bit for bit on a CPU. A finished run is returned as it is, and
    ``watcher`` is not called.

    Args:
        config: What to train, and how.
        train_data: Its training split.
        test_data: Its test split: measured after every epoch, never trained on.
        output: The run directory (:mod:`ccn_deploy.runs`).
        watcher: Called with every :data:`~ccn_deploy.trainers.events.Event`, on this process.
        overwrite: Whether to discard the run that is there.

    Raises:
        UsageError: A name, number or combination that cannot be, or a run there with other
            settings.
        RuntimeUnavailableError: The device is not here.
        TrainingDivergedError: The loss stopped being a number.
        InputError: An image file cannot be opened or used; with ``strict``, or if it is so with
            all of a split, also one that is damaged.
        EnvironmentUnfitError: A process that reads images ended before its time.
        StorageError: The directory cannot be written.
    """
    check_network(config)
    directory = RunDirectory(Path(output))
    device = resolve_device(config.device, config.devices)
    threads = config.threads
    if threads is None:
        threads = default_threads(config.devices, torch.get_num_threads())
        found = None if overwrite else directory.record()
        if found is not None:
            threads = found.training["threads"]
    plan = make_plan(
        config,
        train_data,
        test_data,
        threads=threads,
        device=device,
        torch=str(torch.__version__),
        own=_own_network(config, train_data),
    )
    if overwrite:
        directory.discard()
    if not directory.begin(plan):
        reading = Reading(config.workers, config.strict)
        task = Task(plan, train_data, test_data, directory, reading)
        launch(fit, task, device=device, devices=config.devices, watcher=watcher)
    return open_run(directory.path)


def _own_network(config: TrainConfig, data: Dataset) -> OwnNetwork | None:
    """Make the user's own network once, if there is one."""
    if config.network is None:
        return None
    compact = "none" if config.compact is None else config.compact
    return own_network(config.network, compact, config.label_smoothing, data, config.seed)
