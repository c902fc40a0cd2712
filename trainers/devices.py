"""Devices and processes, through Lightning Fabric."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessRaisedException

from ccn_deploy.errors import CcnDeployError, RuntimeUnavailableError, UsageError
from ccn_deploy.trainers.config import Device
from ccn_deploy.trainers.events import Event, Watcher

Work = Callable[[Fabric, Any, Watcher], None]
"""What every process does: a module-level function of (fabric, task, watcher)."""


def resolve_device(device: Device, devices: int) -> Literal["cpu", "cuda"]:
    """Return the device that is meant, once it is known to be there.

    Raises:
        RuntimeUnavailableError: CUDA, or that many GPUs, cannot be had; nothing falls back.
        UsageError: Not a device, or fewer than one.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"Unknown device {device!r}.", "Known: auto, cpu, cuda.")
    if devices < 1:
        raise UsageError(f"The number of devices is {devices}.", "Give a whole number above 0.")
    if device == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        if device == "auto":
            return "cpu"
        built = torch.version.cuda
        why = "no GPU or driver answers" if built else f"torch {torch.__version__} has no CUDA"
        raise RuntimeUnavailableError(
            f"CUDA was asked for and {why}.",
            "Check `nvidia-smi`, or train with --device cpu."
            if built
            else "Install a torch built with CUDA, or train with --device cpu.",
        )
    if devices > (found := torch.cuda.device_count()):
        raise RuntimeUnavailableError(
            f"{devices} GPUs were asked for and {found} are here.", f"Use --devices {found}."
        )
    return "cuda"


def launch(
    work: Work, task: Any, *, device: Literal["cpu", "cuda"], devices: int, watcher: Watcher
) -> None:
    """Do ``work`` in this process, or in ``devices`` spawned ones that exchange gradients.

    Spawned processes get ``task`` by pickling; events come back through a queue, so that
    ``watcher`` is always called in this process.

    Raises:
        CcnDeployError: As ``work`` raises.
        UsageError: The task cannot be sent to another process.
    """
    if devices == 1:
        work(Fabric(accelerator=device, devices=1), task, watcher)
        return
    _check_sendable(task)
    strategy = DDPStrategy(start_method="spawn")
    fabric = Fabric(accelerator=device, devices=devices, strategy=strategy)
    queue: Any = multiprocessing.get_context("spawn").SimpleQueue()
    errors: list[CcnDeployError] = []

    def relay() -> None:
        while (item := queue.get()) is not None:
            errors.append(item) if isinstance(item, CcnDeployError) else watcher(item)

    thread = threading.Thread(target=relay, name="training-events", daemon=True)
    thread.start()
    try:
        fabric.launch(partial(_in_process, work=work, task=task, queue=queue))
    except ProcessRaisedException:
        if errors:
            raise errors[0] from None
        raise
    finally:
        queue.put(None)
        thread.join()


def _in_process(fabric: Fabric, work: Work, task: Any, queue: Any) -> None:
    def tell(event: Event) -> None:
        queue.put(event)

    try:
        work(fabric, task, tell)
    except CcnDeployError as error:
        queue.put(error)
        raise


def _check_sendable(task: Any) -> None:
    try:
        pickle.dumps(task)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UsageError(
            f"The data set cannot be sent to the processes of several devices: {error}.",
            "Let Dataset.fetch be a module-level function, a partial of one, or a method.",
        ) from error
