"""The programs in ``examples/``, run as a user runs them."""

from __future__ import annotations

import ast
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ccn_deploy
from ccn_deploy.bundle import Bundle
from ccn_deploy.exporters import export_bundle
from tests.networks import as_run, random_network

EXAMPLES = Path(__file__).parent.parent / "examples"
NPY, JSON = "application/x-npy", "application/json"
MAX_BYTES = 1 << 20


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    run = as_run(random_network("mnist-cnn", "ccn"))
    return export_bundle(run, tmp_path_factory.mktemp("b") / "ccn", gradient=False)


@dataclass(frozen=True)
class Served:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    url: str

    def post(
        self, body: bytes, kind: str = NPY, path: str = "/predict", length: int | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Return the status and the document of the answer."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        size = str(len(body) if length is None else length)
        headers = {"Content-Type": kind, "Content-Length": size}
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        document = json.loads(answer.read())
        connection.close()
        return answer.status, document


def start(*arguments: str | Path) -> Served:
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / "serve.py", "--port", "0", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    return Served(process, process.stdout.readline().split(" ")[0])


@pytest.fixture(scope="module")
def served(bundle: Bundle) -> Iterator[Served]:
    server = start(bundle.path, "--max-bytes", str(MAX_BYTES))
    yield server
    server.process.terminate()
    assert server.process.wait(60) == 0


def npy(array: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def digits(count: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).random((count, 1, 28, 28), dtype=np.float32)


def test_it_uses_the_package_by_its_front_door_only() -> None:
    tree = ast.parse((EXAMPLES / "serve.py").read_text())
    modules = {
        (alias.name if isinstance(node, ast.Import) else node.module or "").partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert modules - set(sys.stdlib_module_names) == {"numpy", "ccn_deploy"}


@pytest.mark.parametrize("kind", [NPY, JSON])
def test_answers_are_those_of_the_loaded_bundle(served: Served, bundle: Bundle, kind: str) -> None:
    images = digits(3)
    body = npy(images) if kind == NPY else json.dumps({"images": images.tolist()}).encode()
    status, answer = served.post(body, kind)
    assert status == 200
    with ccn_deploy.load(bundle) as model:
        np.testing.assert_allclose(answer["logits"], model.predict(images), rtol=1e-5)
        assert answer["labels"] == model.classify(images).tolist()
        assert answer["names"] == model.names(answer["labels"])


def test_eight_clients_at_once_get_their_own_answers(served: Served, bundle: Bundle) -> None:
    batches = [digits(1 + seed % 3, seed) for seed in range(32)]
    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(lambda images: served.post(npy(images)), batches))
    with ccn_deploy.load(bundle) as model:
        for (status, answer), images in zip(answers, batches, strict=True):
            assert status == 200
            np.testing.assert_allclose(answer["logits"], model.predict(images), rtol=1e-5)


def test_health_says_what_answers_and_why(served: Served, bundle: Bundle) -> None:
    with urllib.request.urlopen(f"{served.url}/health", timeout=60) as answer:
        health = json.load(answer)
    assert health["bundle"] == bundle.manifest.digest
    with ccn_deploy.load(bundle) as model:
        assert health["runtime"] == model.choice.runtime
        assert health["why"] == model.choice.why
        assert [p["runtime"] for p in health["passed_over"]] == [
            p.runtime for p in model.choice.passed_over
        ]
        assert health["input_shape"] == [1, 28, 28]


@pytest.mark.parametrize(
    ("body", "kind", "status", "words"),
    [
        (npy(digits(1)[0]), NPY, 400, "batch axis"),
        (npy(digits(1) * 255), NPY, 400, "outside [0, 1]"),
        (npy(digits(1).astype(np.float64)), NPY, 400, "float32"),
        (npy(np.full((1, 1, 28, 28), np.nan, np.float32)), NPY, 400, "NaN"),
        (npy(digits(1))[:-1], NPY, 400, "no array of images"),
        (npy(np.array([{"a": 1}], dtype=object)), NPY, 400, "Object arrays"),
        (npy(digits(1)).replace(b"(1, 1", b"(9**9"), NPY, 400, "no array of images"),
        (b"", NPY, 400, "no array of images"),
        (b"{", JSON, 400, "no array of images"),
        (b"[1]", JSON, 400, "no array of images"),
        (b'{"images": "cat"}', JSON, 400, "no array of images"),
        (b'{"images": [[1], [1, 2]]}', JSON, 400, "no array of images"),
        (b'{"images": [[[[0.5]]]]}', JSON, 400, "[N, 1, 28, 28]"),
        (b"[" * 100_000, JSON, 400, "no array of images"),
        (npy(digits(1)), "image/png", 415, "image/png"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(
    served: Served, body: bytes, kind: str, status: int, words: str
) -> None:
    found, answer = served.post(body, kind)
    assert found == status
    assert words in f"{answer['error']} {answer['hint']}"
    assert answer["hint"]


def test_an_array_that_claims_to_be_huge_takes_no_memory(served: Served) -> None:
    header = npy(digits(1)).replace(
        b"'shape': (1, 1, 28, 28), }      ", b"'shape': (99999999999999,), }"
    )
    status, answer = served.post(header)
    assert status == 400
    assert "no array of images" in answer["error"]


def test_a_body_that_is_too_large_is_not_read(served: Served) -> None:
    status, answer = served.post(b"", length=MAX_BYTES + 1)
    assert status == 413
    assert str(MAX_BYTES) in answer["error"]


def test_other_pages_are_not_there(served: Served) -> None:
    assert served.post(npy(digits(1)), path="/")[0] == 404
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{served.url}/", timeout=60)


def test_a_request_that_has_come_in_is_answered_before_it_stops(bundle: Bundle) -> None:
    server = start(bundle.path)
    body = npy(digits(2))
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Type", NPY)
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body[:100])
    # Connections are accepted in order: once a later one is answered, ours has come in.
    urllib.request.urlopen(f"{server.url}/health", timeout=60).close()
    server.process.send_signal(signal.SIGTERM)
    connection.send(body[100:])
    answer = connection.getresponse()
    assert answer.status == 200
    assert len(json.loads(answer.read())["labels"]) == 2
    assert server.process.wait(60) == 0


def test_it_says_why_it_cannot_start(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "serve.py", tmp_path / "nothing"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "ccn-deploy export" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_client_prints_names_and_passes_refusals_on(
    served: Served, bundle: Bundle, tmp_path: Path
) -> None:
    def ask(images: np.ndarray[Any, Any]) -> subprocess.CompletedProcess[str]:
        np.save(tmp_path / "images.npy", images)
        return subprocess.run(
            [sys.executable, EXAMPLES / "client.py", served.url, tmp_path / "images.npy"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    with ccn_deploy.load(bundle) as model:
        wanted = model.names(model.classify(digits(4)))
    done = ask(digits(4))
    assert (done.returncode, done.stdout.split()) == (0, wanted)
    done = ask(digits(1) * 2)
    assert done.returncode == 1
    assert done.stderr.startswith("400: Image 0 has values from")
