"""Measure, and print the tables of ``docs/benchmarks.md``."""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import foolbox
import numpy as np
import onnxruntime
import torch

from benchmarks.subjects import DEFENSES, Subjects, make_subjects
from benchmarks.timing import Ratio, compare
from ccn_deploy.attacks import suite
from ccn_deploy.attacks.perform import perform
from ccn_deploy.attacks.surrogate import foolbox_model, twin_model
from ccn_deploy.defenses import DEFENSES as KNOWN
from ccn_deploy.models import build_model, soft_cross_entropy
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.runtimes.torch_runtime import load_twin

Row = tuple[str, str, str, str, Ratio]
"""What, of which network, a, b, how long a took for each unit of time of b."""

ONE_THREAD = RuntimeOptions(threads=1)


def main() -> None:
    """Train the two networks, measure every pair, print one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="pairs of runs for each row")
    rounds = parser.parse_args().rounds

    print(_machine(), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        subjects = make_subjects(Path(scratch))
        torch.set_num_threads(1)
        print("| what | network | a | b | time of a / time of b | range | a | b |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
        for measure in (training_steps, forward_passes, attacks, deepfool, serving):
            for what, network, a, b, ratio in measure(subjects, rounds):
                print(
                    f"| {what} | {network} | {a} | {b} | **{ratio.median:.2f}** "
                    f"| {ratio.low:.2f} to {ratio.high:.2f} "
                    f"| {_duration(ratio.a_seconds)} | {_duration(ratio.b_seconds)} |",
                    flush=True,
                )


def training_steps(subjects: Subjects, rounds: int) -> Iterator[Row]:
    """One SGD step, batch 128, in the layout that the trainer uses."""

    def step(defense: str) -> Callable[[], None]:
        model = build_model("mnist-cnn", defense).to(memory_format=torch.channels_last)
        images = torch.from_numpy(subjects.images[:128]).to(memory_format=torch.channels_last)
        targets = torch.from_numpy(KNOWN[defense].targets(subjects.labels[:128], 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

        def run() -> None:
            for _ in range(5):
                optimizer.zero_grad()
                soft_cross_entropy(model(images), targets).backward()
                optimizer.step()

        return run

    yield ("training, 5 steps of 128", "CCN, SM", "CCN", "SM",
           compare(step("ccn"), step("sm"), rounds=rounds))  # fmt: skip


def forward_passes(subjects: Subjects, rounds: int) -> Iterator[Row]:
    """Logits of a batch, by network and by runtime."""
    for batch in (1, 64):
        images = subjects.images[:batch]
        repeat = 200 // batch + 1

        def run(defense: str, name: str, images=images, repeat=repeat) -> Callable[[], None]:  # type: ignore[no-untyped-def]
            runtime = open_runtime(subjects.bundles[defense], name, options=ONE_THREAD)

            def call() -> None:
                for _ in range(repeat):
                    runtime.logits(images)

            return call

        what = f"forward, {repeat} times batch {batch}"
        for name, title in (("torch", "PyTorch"), ("onnxruntime-cpu", "ONNX Runtime")):
            yield (what, title, "CCN", "SM",
                   compare(run("ccn", name), run("sm", name), rounds=rounds))  # fmt: skip
        for defense in DEFENSES:
            reference, deployed = run(defense, "torch"), run(defense, "onnxruntime-cpu")
            yield (what, defense.upper(), "PyTorch", "ONNX Runtime",
                   compare(reference, deployed, rounds=rounds))  # fmt: skip


def attacks(subjects: Subjects, rounds: int) -> Iterator[Row]:
    """Each attack, by network, and on the runtime beside the reference."""
    counts = {"fgsm": 256, "pgd": 32, "deepfool": 32}
    for spec in suite(epsilons=(0.1,)):
        if not spec.clip:
            continue
        n = counts[spec.name]
        images, labels = subjects.images[:n], subjects.labels[:n]
        seeds = np.zeros((n, 1), dtype=np.int64)

        def run(
            defense: str, deployed: bool, spec=spec, images=images, labels=labels, seeds=seeds
        ) -> Callable[[], object]:  # type: ignore[no-untyped-def]
            bundle = subjects.bundles[defense]
            twin = load_twin(bundle)
            model = twin_model(twin)
            if deployed:
                model = foolbox_model(open_runtime(bundle, options=ONE_THREAD), twin)
            return lambda: perform(spec, model, images, labels, seeds=seeds)

        what = f"{spec.name}, {n} images"
        few = max(3, rounds // 2)
        yield (what, "PyTorch", "CCN", "SM",
               compare(run("ccn", False), run("sm", False), rounds=few))  # fmt: skip
        for defense in DEFENSES:
            yield (what, defense.upper(), "ONNX Runtime, gradients of the twin", "PyTorch",
                   compare(run(defense, True), run(defense, False), rounds=few))  # fmt: skip


def deepfool(subjects: Subjects, rounds: int) -> Iterator[Row]:
    """Foolbox's own DeepFool against ours: the same steps, the same images."""
    n = 32
    spec = next(s for s in suite(("deepfool",)) if s.clip)
    images, labels = subjects.images[:n], subjects.labels[:n]
    seeds = np.zeros((n, 1), dtype=np.int64)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    for defense in DEFENSES:
        model = twin_model(load_twin(subjects.bundles[defense]))
        theirs = foolbox.attacks.L2DeepFoolAttack()

        def run_theirs(model=model, theirs=theirs) -> object:  # type: ignore[no-untyped-def]
            return theirs(model, x, y, epsilons=None)

        def run_ours(model=model) -> object:  # type: ignore[no-untyped-def]
            return perform(spec, model, images, labels, seeds=seeds)

        yield (f"deepfool, {n} images", defense.upper(), "Foolbox", "ours",
               compare(run_theirs, run_ours, rounds=max(3, rounds // 2)))  # fmt: skip


def serving(subjects: Subjects, rounds: int) -> Iterator[Row]:
    """One image through the runtime, input checks included, against a bare session."""
    image = subjects.images[:1]
    for defense in DEFENSES:
        bundle = subjects.bundles[defense]
        runtime = open_runtime(bundle, options=ONE_THREAD)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            bundle.read(bundle.file("forward", "fp32")),
            options,
            providers=["CPUExecutionProvider"],
        )

        def ours(runtime=runtime) -> None:  # type: ignore[no-untyped-def]
            for _ in range(300):
                runtime.logits(image)

        def bare(session=session) -> None:  # type: ignore[no-untyped-def]
            for _ in range(300):
                session.run(["logits"], {"images": image})

        yield ("serving, 300 times batch 1", defense.upper(), "Runtime.logits",
               "bare InferenceSession", compare(ours, bare, rounds=max(rounds, 15)))  # fmt: skip


def _machine() -> str:
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("torch", "onnxruntime", "foolbox", "numpy")
    )
    return f"{_processor()}, {os.cpu_count()} cores, one thread used; {versions}\n"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


if __name__ == "__main__":
    main()
