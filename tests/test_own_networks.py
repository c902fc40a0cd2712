"""A user's own networks, end to end by the commands that the user types.

Two of them always run; the others do by `make test-wide`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.cli.main import main
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.targets import Role
from tests import own_classifiers
from tests.own_classifiers import CLASSES, FAMILIES, pictures

FILE = Path(own_classifiers.__file__)
NAMES = tuple(f"{family}_{kind}" for family in FAMILIES for kind in ("plain", "compact"))
SHORT = ("resnet18_compact", "mobilenetv3_plain")
"""Between them: skips, squares of all kinds, depthwise, squeeze and excitation, hardswish."""

IMAGES = 48
ATTACKED = 8
CANDIDATES = 2


class Exported(NamedTuple):
    """A network of the user's, and the bundle that the command made of it."""

    module: torch.nn.Module
    bundle: Bundle
    data: Path


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    """Run a command with --json in this process and return its exit code and document."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit_:
        patch.setattr(sys, "argv", ["ccn-deploy", *map(str, arguments), "--json"])
        main()
    out, err = capsys.readouterr()
    assert out, err
    return int(exit_.value.code or 0), json.loads(out)


def export(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], *options: object
) -> Exported:
    """Export a network with fp16 and int8; its labels are what it says of its images itself."""
    module = getattr(own_classifiers, name)()
    images = pictures(IMAGES)
    with torch.no_grad():
        labels = module(torch.from_numpy(images)).argmax(dim=1).numpy()
    data = folder / "images.npz"
    np.savez(data, images=images, labels=labels)
    code, document = command(
        *(capsys, "export", f"{FILE}:{name}", "--output", folder / "bundle"),
        *("--input-size", "32x32", "--precision", "fp16", "--precision", "int8"),
        *("--dataset", data, "--calibration-samples", IMAGES, *options),
    )
    assert (code, document["name"]) == (0, name)
    return Exported(module, open_bundle(folder / "bundle"), data)


def gradient_errors(module: torch.nn.Module, bundle: Bundle) -> tuple[float, float, float]:
    """Return relative l2 errors of native and of float32 torch gradients, and of the logits.

    The truth is autograd of the module itself in float64. Of each, the image with the median
    error counts: on a few images rounding turns a unit on or off, for either of them.
    """
    images = pictures(16, seed=4)
    random = np.random.default_rng(1)
    cotangents = random.standard_normal((len(images), CANDIDATES, CLASSES)).astype(np.float32)
    with open_runtime(bundle, "onnxruntime-cpu", options=RuntimeOptions(threads=1)) as runtime:
        logits, native = runtime.vjp(images, cotangents)
    exact_logits, exact = autograd(module.double(), images, cotangents)
    _, single = autograd(module.float(), images, cotangents)
    return (
        median_error(native, exact),
        median_error(single, exact),
        float(np.abs(logits - exact_logits).max() / np.abs(exact_logits).max()),
    )


def autograd(
    module: torch.nn.Module, images: np.ndarray, cotangents: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    dtype = next(module.parameters()).dtype
    leaf = torch.from_numpy(images).to(dtype).requires_grad_(True)
    logits = module(leaf)
    rows = torch.from_numpy(cotangents).to(dtype).unbind(1)
    found = [torch.autograd.grad(logits, leaf, row, retain_graph=True)[0] for row in rows]
    return logits.detach().numpy(), torch.stack(found, 1).numpy()


def median_error(got: np.ndarray, truth: np.ndarray) -> float:
    off = np.linalg.norm((got - truth).reshape(len(truth), -1), axis=1)
    return float(np.median(off / np.linalg.norm(truth.reshape(len(truth), -1), axis=1)))


WIDE = [pytest.param(name, marks=() if name in SHORT else pytest.mark.wide) for name in NAMES]


@pytest.mark.parametrize("name", WIDE)
def test_from_the_factory_to_attacks_on_what_is_deployed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, bundle, data = export(name, tmp_path, capsys)
    roles = {(record.role, record.precision) for record in bundle.manifest.files}
    for precision in ("fp32", "fp16", "int8"):
        assert (Role.FORWARD, precision) in roles
        assert ((Role.GRADIENT, precision) in roles) == (precision != "int8")
    figures = bundle.card.source.agreement
    assert figures["module"] / figures["scale"] < 1e-5  # where normalisations were folded
    assert figures["spread"] > 0.1

    native, single, logits = gradient_errors(module, bundle)
    assert logits < 2e-5
    assert native <= max(2 * single, 1e-5)

    measured = ("--dataset", data, "--threads", 1)
    for precision in ("fp32", "fp16", "int8"):
        asked = (*measured, "--samples", 16, "--precision", precision)
        code, parity = command(capsys, "verify-parity", bundle.path, *asked)
        if precision == "int8":  # too coarse for some random weights, but that alone is the error
            clean = [found for found in parity["inputs"] if found["kind"] == "clean"]
            assert max(found["rounding_units"] for found in clean) <= parity["policy"]["max_units"]
        else:
            assert (code, parity["verdict"]) == (0, "pass")

    code, robustness = command(
        *(capsys, "verify-robustness", bundle.path, *measured, "--samples", ATTACKED),
        *("--attack", "fgsm", "--attack", "pgd", "--epsilons", "0.02", "--gradient", "native"),
        *("--max-drop", 0.49, "--no-report"),
    )
    assert (code, robustness["verdict"], robustness["gradient"]) == (0, "pass", "native")
    assert robustness["clean"]["runtime"]["accuracy"] == 1.0
    for agreement in robustness["gradient_agreement"].values():
        assert agreement["vanished"] == 0
        assert agreement["cosine_mean"] > 0.999
    fgsm, pgd = (attack["runtime"]["robust_accuracy"] for attack in robustness["attacks"])
    assert pgd <= fgsm < 1.0


@pytest.mark.parametrize("name", WIDE)
def test_engines_of_both_graphs_build_without_a_gpu(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    code, _ = command(
        *(capsys, "export", f"{FILE}:{name}", "--output", tmp_path / "bundle"),
        *("--input-size", "32x32", "--format", "tensorrt-rtx", "--batch", "1,4,8"),
    )
    assert code == 0
    roles = {record.role for record in open_bundle(tmp_path / "bundle").manifest.files}
    assert {Role.FORWARD.engine, Role.GRADIENT.engine} <= roles
