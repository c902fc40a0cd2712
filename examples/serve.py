"""Serve a bundle over HTTP with nothing but the standard library, NumPy and ``ccn_deploy.load``.

    python examples/serve.py BUNDLE --port 8080

    GET  /health   what answers, why this runtime was chosen, and until when it is certified
    POST /predict  images, as the bytes of a .npy file (Content-Type: application/x-npy) or as
                   JSON {"images": [N, C, H, W nested lists]}; float32 in [0, 1]

The answer is JSON: {"labels": [...], "names": [...], "logits": [[...]]}. What is wrong with a
request comes back as {"error": ..., "hint": ...} and a status of 4xx. SIGTERM lets the requests
that have come in finish, then the process ends with exit code 0.

With --certificate and --key it starts only on what is certified: of this bundle, on this machine,
signed with that key, not ended.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as TooLateError
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

import ccn_deploy

NPY, JSON = "application/x-npy", "application/json"


class RefusedError(Exception):
    """A request that gets no labels.

    Args:
        status: Of the answer.
        error: What is wrong.
        hint: What to send instead.
    """

    def __init__(self, status: HTTPStatus, error: str, hint: str) -> None:
        super().__init__(error)
        self.status, self.error, self.hint = status, error, hint


class Server(ThreadingHTTPServer):
    """A thread for each connection, which waits; a few workers, which compute.

    Args:
        address: Host and port; port 0 is any that is free.
        model: What answers.
        workers: Requests that compute at once; others wait for their turn.
        max_bytes: Largest body of a request.
        patience: Seconds that a request may wait for its turn and its answer.
    """

    daemon_threads = False  # so that server_close() waits for answers that are on their way

    def __init__(
        self,
        address: tuple[str, int],
        model: ccn_deploy.Model,
        *,
        workers: int,
        max_bytes: int,
        patience: float,
    ) -> None:
        super().__init__(address, Handler)
        self.model = model
        self.max_bytes = max_bytes
        self.patience = patience
        self.workers = ThreadPoolExecutor(workers, thread_name_prefix="predict")

    def health(self) -> dict[str, Any]:
        """Return what answers, and why."""
        spec, certificate = self.model.spec, self.model.certificate
        return {
            "status": "ok",
            "bundle": self.model.digest,
            "certified_until": None if certificate is None else certificate.expires,
            "device": spec.device,
            "versions": dict(spec.versions),
            "input_shape": list(spec.input_shape),
            "classes": list(self.model.class_names),
            "max_batch": self.model.max_batch,
            **dataclasses.asdict(self.model.choice),
        }

    def predict(self, images: np.ndarray) -> dict[str, Any]:
        """Return labels, their names and logits.

        Raises:
            RefusedError: There was no worker in time.
            CcnDeployError: The images or the runtime are at fault.
        """
        work = self.workers.submit(self.model.predict, images)
        try:
            logits = work.result(self.patience)
        except TooLateError:
            work.cancel()
            raise RefusedError(
                HTTPStatus.SERVICE_UNAVAILABLE, "Too many requests are waiting.", "Try again."
            ) from None
        labels = self.model.labels(logits)
        return {
            "labels": labels.tolist(),
            "names": self.model.names(labels),
            "logits": logits.tolist(),
        }


class Handler(BaseHTTPRequestHandler):
    """One connection, one request, one answer."""

    server: Server
    timeout = 10  # seconds that a client may be silent

    def do_GET(self) -> None:
        """Answer /health."""
        if self.path == "/health":
            self.answer(HTTPStatus.OK, self.server.health())
        else:
            self.answer(HTTPStatus.NOT_FOUND, {"error": "No such page.", "hint": "GET /health"})

    def do_POST(self) -> None:
        """Answer /predict."""
        try:
            if self.path != "/predict":
                raise RefusedError(HTTPStatus.NOT_FOUND, "No such page.", "POST /predict")
            self.answer(HTTPStatus.OK, self.server.predict(self.images()))
        except RefusedError as refused:
            self.answer(refused.status, {"error": refused.error, "hint": refused.hint})
        except ccn_deploy.CcnDeployError as error:
            wrong_input = error.exit_code == 2
            status = HTTPStatus.BAD_REQUEST if wrong_input else HTTPStatus.SERVICE_UNAVAILABLE
            self.answer(status, {"error": error.what, "hint": error.hint})

    def images(self) -> np.ndarray:
        """Read the images of a request, whatever their shape and values are.

        Raises:
            RefusedError: No length, too long, cut short, or no images.
        """
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            raise RefusedError(
                HTTPStatus.LENGTH_REQUIRED, "The request has no length.", "Send Content-Length."
            )
        if int(length) > self.server.max_bytes:
            raise RefusedError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"The request has {length} bytes; {self.server.max_bytes} are allowed.",
                "Send fewer images at a time.",
            )
        body = self.rfile.read(int(length))
        kind = self.headers.get_content_type()
        try:
            if kind == NPY:
                return np.lib.format.read_array(io.BytesIO(body), allow_pickle=False)
            if kind == JSON:
                return np.array(json.loads(body)["images"], dtype=np.float32)
        except (ValueError, KeyError, TypeError, OverflowError, MemoryError, RecursionError) as e:
            raise RefusedError(
                HTTPStatus.BAD_REQUEST,
                f"The request is no array of images: {type(e).__name__}: {str(e)[:200]}",
                'Send a .npy file, or JSON {"images": [...]} with N x C x H x W numbers.',
            ) from e
        raise RefusedError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            f"The content type is {kind}.",
            f"Send {NPY} or {JSON}.",
        )

    def answer(self, status: HTTPStatus, document: dict[str, Any]) -> None:
        """Send JSON, and close the connection."""
        body = json.dumps(document).encode()
        with contextlib.suppress(ConnectionError):  # the client has gone
            self.send_response(status)
            self.send_header("Content-Type", JSON)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


def main() -> int:
    """Load, warm up, serve until SIGTERM or SIGINT; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--certificate", help="by which it may serve; needs --key")
    parser.add_argument("--key", help="public key of who is to have signed it")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, help="0 is any that is free")
    parser.add_argument("--workers", type=int, default=4, help="requests that compute at once")
    parser.add_argument("--max-bytes", type=int, default=16 << 20, help="of one request")
    parser.add_argument("--patience", type=float, default=5.0, help="seconds until a 503")
    arguments = parser.parse_args()
    try:
        model = ccn_deploy.load(
            arguments.bundle,
            arguments.runtime,
            arguments.precision,
            certificate=arguments.certificate,
            key=arguments.key,
        )
    except ccn_deploy.CcnDeployError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    with model:
        model.warm_up()
        server = Server(
            (arguments.host, arguments.port),
            model,
            workers=arguments.workers,
            max_bytes=arguments.max_bytes,
            patience=arguments.patience,
        )
        for name in (signal.SIGTERM, signal.SIGINT):
            # shutdown() waits for serve_forever(), which runs in the thread that gets the signal.
            signal.signal(name, lambda *_: threading.Thread(target=server.shutdown).start())
        url = f"http://{arguments.host}:{server.server_port}"
        print(f"{url} answers on {model.spec.target}", flush=True)
        server.serve_forever()
        server.server_close()
        server.workers.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
