"""Ask a server that runs ``examples/serve.py`` for the labels of images, or how it is.

    python examples/client.py http://127.0.0.1:8080 images.npy
    python examples/client.py http://127.0.0.1:8080

``images.npy`` holds float32 [N, C, H, W] in [0, 1]; its labels are printed, one class name a line.
"""

from __future__ import annotations

import io
import json
import sys
import urllib.error
import urllib.request
from typing import Any

import numpy as np


def health(url: str) -> dict[str, Any]:
    """Return what the server says of itself."""
    return _open(urllib.request.Request(f"{url}/health"))


def ask(url: str, images: np.ndarray) -> dict[str, Any]:
    """Return the server's answer: labels, names and logits.

    Raises:
        SystemExit: The server refused; the message says why and what to do.
    """
    body = io.BytesIO()
    np.save(body, images)
    headers = {"Content-Type": "application/x-npy"}
    return _open(urllib.request.Request(f"{url}/predict", body.getvalue(), headers))


def _open(request: urllib.request.Request) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            document: dict[str, Any] = json.load(answer)
            return document
    except urllib.error.HTTPError as refused:
        document = json.load(refused)
        sys.exit(f"{refused.code}: {document['error']}\n{document['hint']}")


if __name__ == "__main__":
    server, *paths = sys.argv[1:]
    if not paths:
        print(json.dumps(health(server), indent=2))
    for path in paths:
        for class_name in ask(server, np.load(path, allow_pickle=False))["names"]:
            print(class_name)
