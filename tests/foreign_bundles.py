"""Bundles of networks that are none of ours, made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx

from ccn_deploy.bundle import Bundle, NewFile, Source, write_bundle
from ccn_deploy.data import Dataset, dataset_from_arrays
from ccn_deploy.graph.builder import to_bytes
from ccn_deploy.targets import Role
from tests.cards import a_card
from tests.modules import SHAPE

CLASSES = 10


def foreign_bundle(
    path: Path,
    forward: onnx.ModelProto,
    deployed: onnx.ModelProto | None = None,
    gradient: onnx.ModelProto | None = None,
) -> Bundle:
    """Write a bundle of a forward graph, perhaps of another one that ONNX Runtime executes."""
    files = [NewFile("graphs/forward-fp32.onnx", to_bytes(forward), Role.FORWARD, "fp32")]
    if deployed is not None:
        files.append(
            NewFile(
                "graphs/forward-fp32-onnxruntime-cpu.onnx",
                to_bytes(deployed),
                Role.FORWARD,
                "fp32",
                runtime="onnxruntime-cpu",
            )
        )
    if gradient is not None:
        data = to_bytes(gradient)
        files.append(NewFile("graphs/gradient-fp32.onnx", data, Role.GRADIENT, "fp32"))
    card = a_card(
        name="foreign",
        input_shape=SHAPE,
        architecture="",
        defense="",
        source=Source(kind="onnx", sha256="0" * 64),
    )
    return write_bundle(path, card=card, files=files)


def pictures(count: int = 24) -> Dataset:
    """Return smooth images in colour, of which no two are alike."""
    rng = np.random.default_rng(2)
    small = rng.integers(0, 256, (count, SHAPE[0], 9, 9)).astype(np.float32)
    across = np.linspace(0, 8, SHAPE[1])
    low = across.astype(int).clip(max=7)
    part = (across - low).astype(np.float32)
    rows = small[:, :, low] * (1 - part)[:, None] + small[:, :, low + 1] * part[:, None]
    pixels = rows[..., low] * (1 - part) + rows[..., low + 1] * part
    names = [str(label) for label in range(CLASSES)]
    labels = np.arange(count) % CLASSES
    return dataset_from_arrays("smooth", pixels.astype(np.uint8), labels, names, split="test")
