"""What a training step of the compact network costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from benchmarks.subjects import Subjects
from benchmarks.tables import ratios
from benchmarks.timing import compare
from ccn_deploy.defenses import DEFENSES
from ccn_deploy.models import build_model, soft_cross_entropy


def training(subjects: Subjects, rounds: int) -> Iterator[str]:
    """One SGD step, batch 128, in the layout that the trainer uses."""

    def step(defense: str) -> Callable[[], None]:
        model = build_model("mnist-cnn", defense).to(memory_format=torch.channels_last)
        images = torch.from_numpy(subjects.images[:128]).to(memory_format=torch.channels_last)
        targets = torch.from_numpy(DEFENSES[defense].targets(subjects.labels[:128], 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

        def run() -> None:
            for _ in range(5):
                optimizer.zero_grad()
                soft_cross_entropy(model(images), targets).backward()
                optimizer.step()

        return run

    ratio = compare(step("ccn"), step("sm"), rounds=rounds)
    yield from ratios([("training, 5 steps of 128", "CCN, SM", "CCN", "SM", ratio)])
