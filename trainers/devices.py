"""Devices and processes, through Lightning Fabric."""

from __future__ import annotations

import contextlib
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
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

    Spawned processes get ``task`` through a private temporary file, gone when they end; events
    come back through a queue, so that ``watcher`` is always called in this process.

    Raises:
        CcnDeployError: As ``work`` raises.
        UsageError: The task cannot be sent to another process.
    """
    if devices == 1:
        work(Fabric(accelerator=device, devices=1), task, watcher)
        return
    fabric = Fabric(accelerator=device, devices=devices, strategy=DDPStrategy(start_method="spawn"))
    queue: Any = multiprocessing.get_context("spawn").SimpleQueue()
    errors: list[CcnDeployError] = []

    def relay() -> None:
        while (item := queue.get()) is not None:
            errors.append(item) if isinstance(item, CcnDeployError) else watcher(item)

    thread = threading.Thread(target=relay, name="training-events", daemon=True)
    thread.start()
    try:
        with _task_file(task) as file:
            fabric.launch(partial(_in_process, work=work, file=file, queue=queue))
    except ProcessRaisedException:
        if errors:
            raise errors[0] from None
        raise
    finally:
        queue.put(None)
        thread.join()


def _in_process(fabric: Fabric, work: Work, file: Path, queue: Any) -> None:
    """Do the work in a spawned process."""

    def tell(event: Event) -> None:
        queue.put(event)

    try:
        work(fabric, _read_task(file), tell)
    except CcnDeployError as error:
        queue.put(error)
        raise


@contextlib.contextmanager
def _task_file(task: Any) -> Iterator[Path]:
    """Write ``task`` where only this user can, for as long as the processes need it.

    Not through the pipe that starts a process: one that fails to start never reads it, and
    writing more than a pipe holds would then wait forever.
    """
    with tempfile.TemporaryDirectory(prefix="ccn-deploy-") as directory:
        path = Path(directory, "task")
        try:
            path.write_bytes(pickle.dumps(task))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise _unsendable(error) from error
        yield path


def _read_task(path: Path) -> Any:
    try:
        return pickle.loads(path.read_bytes())  # written by the process that started this one
    except (pickle.UnpicklingError, AttributeError, ImportError) as error:
        raise _unsendable(error) from error


def _unsendable(error: Exception) -> UsageError:
    return UsageError(
        f"The data set cannot be sent to the processes of several devices: {error}.",
        "Let Dataset.fetch be a function of an installed module, a partial of one, or a method.",
    )
