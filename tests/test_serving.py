from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ccn_deploy.errors import UsageError
from ccn_deploy.exporters import export_run
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from tests.networks import as_run, random_network


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = as_run(random_network("mnist-cnn", "ccn"))
    return export_run(run, tmp_path_factory.mktemp("b") / "ccn").path


SERVE = """
import sys
import numpy as np
import ccn_deploy

with ccn_deploy.open_runtime(sys.argv[1]) as runtime:
    logits = runtime.logits(np.zeros((2, 1, 28, 28), dtype=np.float32))
assert logits.shape == (2, 10)
heavy = {"torch", "onnx", "scipy", "foolbox", "matplotlib", "safetensors", "rich", "typer"}
print(sorted(heavy & set(sys.modules)))
"""


def test_serving_a_bundle_loads_numpy_and_the_runtime_and_nothing_else(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVE, str(path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


WITHOUT = """
import sys
sys.modules["onnxruntime"] = None  # what `import` finds where it is not installed
from ccn_deploy.errors import MissingExtraError
import ccn_deploy
try:
    ccn_deploy.open_runtime(sys.argv[1])
except MissingExtraError as error:
    print(int(error.exit_code), error)
"""


def test_a_missing_runtime_names_its_extra(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(path)], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("3 The package 'onnxruntime' is needed")
    assert "ccn-deploy[cpu]" in done.stdout


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "torch"])
def test_eight_threads_get_the_answers_that_one_gets(path: Path, name: str) -> None:
    generator = np.random.default_rng(0)
    batches = [generator.random((1 + i % 5, 1, 28, 28), dtype=np.float32) for i in range(64)]
    with open_runtime(path, name, options=RuntimeOptions(max_batch=4)) as runtime:
        assert runtime.spec.thread_safe
        serial = [runtime.logits(batch) for batch in batches]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(runtime.logits, batches))
    for one, other in zip(serial, together, strict=True):
        assert np.array_equal(one, other)


def test_closing_lets_a_call_finish_that_has_begun(path: Path) -> None:
    images = np.random.default_rng(1).random((64, 1, 28, 28), dtype=np.float32)
    with open_runtime(path, options=RuntimeOptions(max_batch=8)) as runtime:
        wanted = runtime.logits(images)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(runtime.logits, images)
            runtime.close()
            try:
                assert np.array_equal(running.result(), wanted)
            except UsageError as error:  # closed before the call began
                assert "closed" in error.what
