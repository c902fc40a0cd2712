"""The loop: SGD from a checkpoint, or from fresh weights, to the end of the last epoch."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from ccn_deploy.data.dataset import Dataset
from ccn_deploy.models import soft_cross_entropy
from ccn_deploy.trainers.batches import Batch, Reading, epoch_batches, fetch_ahead
from ccn_deploy.trainers.checkpoint import (
    Checkpoint,
    detached,
    load_checkpoint,
    save_checkpoint,
)
from ccn_deploy.trainers.config import OwnNetwork, Plan
from ccn_deploy.trainers.crafting import adversarial_loss, craft
from ccn_deploy.trainers.divergence import diverged
from ccn_deploy.trainers.events import EpochEnded, Skipped, Started, Stepped, Watcher
from ccn_deploy.trainers.network import forward, make_network, scalars
from ccn_deploy.trainers.recipes import Recipe
from ccn_deploy.trainers.reproducible import reproducible
from ccn_deploy.trainers.rundir import RunDirectory

EVALUATION_BATCH = 500
"""Test images per forward pass, at most."""

EVALUATION_BYTES = 1 << 26
"""Bytes that these may have: 111 images of 3x224x224, of which several batches are in memory."""

_STARTS = 1
"""Sets the seeds of random starts apart from those of the order and of dropout."""

LOOK_EVERY = {"cpu": 1, "cuda": 16}
"""Steps between looks at the loss; a look makes a GPU wait."""


@dataclass(frozen=True)
class Task:
    """What one process needs to know to take part in a training."""

    plan: Plan
    train: Dataset
    test: Dataset
    directory: RunDirectory
    reading: Reading


def fit(fabric: Fabric, task: Task, watcher: Watcher) -> None:
    """Train as planned, from the last checkpoint if there is one, and write the finished run.

    Raises:
        TrainingDivergedError: The loss or a weight stopped being a number; the last checkpoint
            is as it was.
        InputError: An image cannot be read; the last checkpoint is as it was.
        EnvironmentUnfitError: A process that reads images ended; the last checkpoint is as it was.
        StorageError: A file could not be written; the last checkpoint is as it was.
    """
    with reproducible(task.plan.threads, fabric.device):
        _Fit(fabric, task, watcher).run()


class _Fit:
    """One process of one training: model, optimizer, and how far they are."""

    def __init__(self, fabric: Fabric, task: Task, watcher: Watcher) -> None:
        self.fabric, self.task, self.watcher = fabric, task, watcher
        self.plan, self.recipe = task.plan, task.plan.recipe
        self.steps_per_epoch = math.ceil(len(task.train) / self.recipe.batch_size)

        self.model = make_network(self.plan)
        self.own = isinstance(self.plan.network, OwnNetwork)
        # A user's code may call .view() on its features, which needs them to be NCHW in memory.
        self.layout = torch.contiguous_format if self.own else torch.channels_last
        _lay_out(self.model, self.layout)
        saved = load_checkpoint(task.directory.checkpoint)
        self.done = list(saved.epochs) if saved else []
        if saved:
            self.model.load_state_dict(dict(saved.weights))
        self.optimizer = _sgd(self.model, self.recipe)
        # Wrapped for devices and processes; the parameters stay those of self.model.
        self.net, self.wrapped = fabric.setup(self.model, self.optimizer)
        if saved:
            _set_momentum(self.model, self.optimizer, saved)

    def run(self) -> None:
        """Train the epochs that are left, then write the finished run."""
        first, directory = len(self.done), self.task.directory
        self.tell(
            Started(
                step=first * self.steps_per_epoch,
                steps=self.recipe.epochs * self.steps_per_epoch,
                epochs=self.recipe.epochs,
            )
        )
        for epoch in range(first, self.recipe.epochs):
            ended = self._epoch(epoch)
            self.done.append(ended)
            if self.fabric.is_global_zero:
                state = Checkpoint(self.model.state_dict(), self._momentum(), self.done)
                save_checkpoint(directory.checkpoint, state)
                directory.write_metrics(self.done)
            self.tell(ended)
        if self.fabric.is_global_zero:
            directory.finish(self.plan, save(detached(self.model.state_dict())), self.done)

    def _epoch(self, epoch: int) -> EpochEnded:
        """Train one epoch, counted from 0, and measure it."""
        started = time.perf_counter()
        before = self.done[-1].seconds if self.done else 0.0
        self._seed(epoch)
        batches = epoch_batches(len(self.task.train), self.recipe.batch_size, self.plan.seed, epoch)
        tally = _Tally(self, epoch, batches)
        self.net.train()
        with self._fetching(self.task.train, batches) as shares:
            for index, batch in enumerate(shares):
                step = epoch * self.steps_per_epoch + index
                rate = self.recipe.learning_rate_at(step, self.steps_per_epoch)
                tally.add(*self._step(batch, step, rate), seen=batch.share)
        tally.look()
        self._check_weights(epoch)
        test_accuracy, skipped_test = self._accuracy(self.task.test)
        return EpochEnded(
            epoch=epoch + 1,
            step=(epoch + 1) * self.steps_per_epoch,
            loss=tally.loss,
            train_accuracy=tally.accuracy,
            test_accuracy=test_accuracy,
            learning_rate=rate,
            seconds=round(before + time.perf_counter() - started, 3),
            skipped_train=len(self.task.train) - tally.seen,
            skipped_test=skipped_test,
            crafted_accuracy=tally.crafted_accuracy if self.recipe.adversary else None,
        )

    @contextlib.contextmanager
    def _fetching(
        self, data: Dataset, batches: Sequence[NDArray[np.int64]]
    ) -> Iterator[Iterator[Batch]]:
        """Fetch this process's shares, and tell what is left out of them."""
        rank, world = self.fabric.global_rank, self.fabric.world_size
        with contextlib.closing(
            fetch_ahead(data, batches, rank, world, self.task.reading)
        ) as shares:
            yield map(self._told, shares)

    def _told(self, batch: Batch) -> Batch:
        for what in batch.skipped:
            self.watcher(Skipped(what))  # each process its own
        return batch

    def _step(self, batch: Batch, step: int, rate: float) -> tuple[Tensor, Tensor, Tensor]:
        """Take one step, counted from 0.

        Returns:
            This process's part of the loss, and its numbers of right labels: of the images that
            cross-entropy sees, and of the crafted ones.
        """
        targets = torch.from_numpy(
            self.plan.network.targets(batch.labels, len(self.plan.class_names))
        ).to(self.fabric.device)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss, logits, crafted = self._answer(batch, targets, step)
        # Fabric averages gradients over processes. Weighting each by its share of the images
        # makes that the gradient of the mean over the whole batch, unequal shares included.
        share = batch.share * self.fabric.world_size / batch.size
        loss = loss * share
        self.fabric.backward(loss)
        if self.recipe.clip_norm is not None:
            self.fabric.clip_gradients(
                self.net, self.wrapped, max_norm=self.recipe.clip_norm, error_if_nonfinite=False
            )
        self.wrapped.step()
        self.wrapped.zero_grad()
        labels = targets.argmax(1)
        right, held = (
            (answer.detach().argmax(1) == labels)[: batch.share].sum()
            for answer in (logits, crafted)
        )
        return loss.detach() / self.fabric.world_size, right, held

    def _answer(self, batch: Batch, targets: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean loss, and the logits of the images it sees and of the crafted ones."""
        images, adversary = self._images(batch.images), self.recipe.adversary
        if adversary is None:
            logits = forward(self.net, images)
            return soft_cross_entropy(logits, targets), logits, logits
        epoch = step // self.steps_per_epoch
        epsilon = adversary.epsilon_at(step, self.recipe.epochs * self.steps_per_epoch)
        # Of the image, not of the process: so any number of processes trains on the same ones.
        seeds = np.array([[self.plan.seed, epoch, index, _STARTS] for index in batch.indices])
        labels = torch.from_numpy(batch.labels).to(self.fabric.device)
        crafted = craft(
            self.model, images, labels, adversary=adversary, epsilon=epsilon, seeds=seeds
        )
        return adversarial_loss(self.net, images, crafted, targets, adversary)

    @torch.no_grad()
    def _accuracy(self, data: Dataset) -> tuple[float, int]:
        """Measure by all processes together.

        Returns:
            The share of images classified right among those that could be read, and how many
            could not.
        """
        self.net.eval()
        if self.fabric.world_size > 1:
            for buffer in self.model.buffers():  # running statistics: each process has its own
                torch.distributed.broadcast(buffer, src=0)
        counts = torch.zeros(2, dtype=torch.float64)  # right, seen
        with self._fetching(data, epoch_batches_in_order(data)) as shares:
            for batch in shares:
                predicted = self.model(self._images(batch.images)).argmax(1).cpu()
                hits = predicted == torch.from_numpy(batch.labels)
                counts += torch.tensor([hits[: batch.share].sum().item(), batch.share])
        right, seen = map(int, self.total(counts.to(self.fabric.device)).tolist())
        return right / seen, len(data) - seen

    def _images(self, images: NDArray[np.float32]) -> Tensor:
        tensor = torch.from_numpy(images)
        if self.fabric.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.fabric.device, non_blocking=True).contiguous(
            memory_format=self.layout
        )

    def total(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all processes."""
        total: Any = self.fabric.all_reduce(tensor, reduce_op="sum")
        assert isinstance(total, Tensor)
        return total

    def _seed(self, epoch: int) -> None:
        """Seed dropout for one epoch, so that it needs nothing of the epochs before."""
        entropy = [self.plan.seed, epoch, self.fabric.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def _momentum(self) -> dict[str, Tensor]:
        return {
            name: self.optimizer.state[parameter]["momentum_buffer"]
            for name, parameter in self.model.named_parameters()
            if parameter in self.optimizer.state  # not if it is frozen or had no gradient yet
        }

    def _check_weights(self, epoch: int) -> None:
        """Refuse weights that are no numbers: the last step may have made them so."""
        norms = torch.stack([p.detach().norm() for p in self.model.parameters()])
        if not bool(norms.isfinite().all()):
            raise diverged(
                self.plan.recipe, self.task.train, epoch, self.steps_per_epoch - 1, what="A weight"
            )

    def tell(self, event: Started | Stepped | EpochEnded) -> None:
        if self.fabric.is_global_zero:
            self.watcher(event)


class _Tally:
    """Loss and accuracy of an epoch so far, looked at every few steps."""

    def __init__(self, fit: _Fit, epoch: int, batches: list[NDArray[np.int64]]) -> None:
        self.fit, self.epoch, self.batches = fit, epoch, batches
        self.every = LOOK_EVERY[fit.fabric.device.type]
        self.waiting: list[Tensor] = []
        self.steps = self.seen = 0
        self.losses = self.right = self.held = 0.0

    @property
    def loss(self) -> float:
        return self.losses / self.seen

    @property
    def accuracy(self) -> float:
        return self.right / self.seen

    @property
    def crafted_accuracy(self) -> float:
        return self.held / self.seen

    def add(self, loss: Tensor, *right: Tensor, seen: int) -> None:
        """Count one step in, of which this process saw ``seen`` images."""
        counts = (*right, torch.full_like(loss, seen))
        self.waiting.append(torch.stack([loss, *(count.to(loss.dtype) for count in counts)]))
        if len(self.waiting) == self.every:
            self.look()

    def look(self) -> None:
        """Add up what is waiting, over all processes; every process looks at the same steps.

        Raises:
            TrainingDivergedError: A loss is not a number.
        """
        if not self.waiting:
            return
        fit = self.fit
        for loss, right, held, seen in fit.total(torch.stack(self.waiting)).tolist():
            indices = self.batches[self.steps]
            if not math.isfinite(loss):
                raise diverged(fit.recipe, fit.task.train, self.epoch, self.steps, indices)
            self.steps += 1
            self.seen += int(seen)
            self.losses += loss * len(indices)
            self.right += right
            self.held += held
        self.waiting.clear()
        step = self.epoch * fit.steps_per_epoch + self.steps
        if self.seen:
            fit.tell(Stepped(step, self.epoch + 1, self.loss, self.accuracy))


def epoch_batches_in_order(data: Dataset) -> list[NDArray[np.int64]]:
    """Return all indices in order, cut into evaluation batches."""
    fitting = EVALUATION_BYTES // (4 * math.prod(data.input_shape))
    most = max(1, min(EVALUATION_BATCH, fitting))
    return np.array_split(np.arange(len(data)), math.ceil(len(data) / most))


def _lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """Lay kernels out in memory; NHWC is 15 to 30 % faster than NCHW, with the same shapes."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=layout)


def _sgd(model: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    spared = scalars(model)
    identities = {id(parameter) for parameter in spared}
    others = [p for p in model.parameters() if id(p) not in identities]
    groups = [{"params": others, "weight_decay": recipe.weight_decay}]
    if spared:
        groups.append({"params": spared, "weight_decay": 0.0})
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum)


def _set_momentum(model: nn.Module, optimizer: torch.optim.SGD, saved: Checkpoint) -> None:
    for name, parameter in model.named_parameters():
        if name not in saved.momentum:
            continue
        # empty_like keeps the parameter's device and memory layout.
        buffer = torch.empty_like(parameter, requires_grad=False).copy_(saved.momentum[name])
        optimizer.state[parameter]["momentum_buffer"] = buffer
