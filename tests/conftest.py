"""Networks that several tests share: trained once a session on real digits, briefly."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.machine import this_machine

EPOCHS = 3
"""Enough for about 95 % on mnist5k, which is enough to be attacked."""


def pytest_report_header() -> list[str]:
    """Say which GPUs the tests of this run may use."""
    machine = this_machine()
    return [
        f"GPU {gpu.index}: {gpu.name}, compute capability {gpu.compute_capability}, driver "
        f"{machine.driver}"
        for gpu in machine.gpus
    ] or [f"GPU: none ({machine.no_gpu_reason})"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and say why there is none."""
    reason = this_machine().no_gpu_reason
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs an NVIDIA GPU: {reason}"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from a defense to a run of it, trained when first asked for."""
    root = tmp_path_factory.mktemp("runs")

    def run(defense: str) -> Path:
        from ccn_deploy.data import load_dataset
        from ccn_deploy.trainers import TrainConfig, train

        output = root / defense
        if not output.exists():
            config = TrainConfig(defense=defense, dataset="mnist5k", epochs=EPOCHS, threads=1)
            train(config, load_dataset("mnist5k", "train"), load_dataset("mnist5k", "test"), output)
        return output

    return run


@pytest.fixture(scope="session")
def exported(
    trained_run: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function from a defense to the path of its pristine bundle."""
    root = tmp_path_factory.mktemp("bundles")

    def bundle(defense: str) -> Path:
        from ccn_deploy.exporters import export_bundle
        from ccn_deploy.runs import open_run

        output = root / defense
        if not output.exists():
            export_bundle(open_run(trained_run(defense)), output)
        return output

    return bundle


@pytest.fixture
def copy_bundle(exported: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Bundle]:
    """Return a function from a defense to a copy of its bundle that a test may spoil."""

    def copy(defense: str) -> Bundle:
        target = tmp_path / f"{defense}-copy"
        shutil.copytree(exported(defense), target)
        return open_bundle(target)

    return copy


@pytest.fixture
def ccn_bundle(copy_bundle: Callable[[str], Bundle]) -> Bundle:
    """A trained CCN with no evidence yet; this test's own copy."""
    return copy_bundle("ccn")


@pytest.fixture
def sm_bundle(copy_bundle: Callable[[str], Bundle]) -> Bundle:
    """A trained plain network with no evidence yet; this test's own copy."""
    return copy_bundle("sm")
