"""``ccn-deploy doctor`` in installations that are whole, bare and spoilt, each made for real."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from packaging.requirements import Requirement as Packaging
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from ccn_deploy import smoke_test
from ccn_deploy.bundle import Bundle
from ccn_deploy.diagnosis import TRIED, Diagnosis, Requirement, read_requirements, satisfies
from ccn_deploy.errors import ExitCode
from ccn_deploy.machine import Gpu, release, this_machine
from ccn_deploy.runtimes.compatibility import check_engine
from ccn_deploy.smoke_test import Trial, build, engine_file, try_runtime
from ccn_deploy.targets import RUNTIMES, Role

ROOT = Path(__file__).parent.parent
STATES = {"works", "builds", "absent", "broken"}


def doctor(python: Path | str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [str(python), "-m", "ccn_deploy.cli.main", "doctor", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**environment, "NO_COLOR": "1", "COLUMNS": "80", "OMP_WAIT_POLICY": "PASSIVE"},
        cwd=ROOT,
        check=False,
    )


def found(python: Path | str, *arguments: str | Path) -> dict[str, Any]:
    result = doctor(python, "--json", *arguments)
    assert "Traceback" not in result.stderr, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    assert result.returncode == (0 if document["healthy"] else ExitCode.ENVIRONMENT)
    assert document["schema"] == "ccn-deploy/doctor/1"
    document["states"] = {t["runtime"]: t["state"] for t in document["runtimes"]}
    document["by"] = {t["runtime"]: t for t in document["runtimes"]}
    return document


Installation = Callable[..., Path]


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    """Return a function that makes an environment with some packages and gives its Python.

    What a package requires comes with it, extras aside; the files are links to those here.
    """

    def make(*names: str) -> Path:
        root = tmp_path / "environment"
        venv.EnvBuilder(with_pip=False, symlinks=True).create(root)
        site = next(root.glob("lib/python*/site-packages"))
        wanted, seen = ["ccn-deploy", *names], set()
        while wanted:
            name = wanted.pop().lower().replace("_", "-")
            if name in seen:
                continue
            seen.add(name)
            for line in importlib.metadata.requires(name) or []:
                requirement = Packaging(line)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    wanted.append(requirement.name)
            link(name, site)
        (site / "this.pth").write_text(f"{ROOT}\n")
        return root / "bin" / "python"

    def link(name: str, site: Path) -> None:
        distribution = importlib.metadata.distribution(name)
        home = Path(str(distribution.locate_file("")))
        metadata = Path(str(distribution._path))  # type: ignore[attr-defined]
        tops = {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}
        for top in {metadata.name} | (tops if name != "ccn-deploy" else set()):
            if not (site / top).exists() and (home / top).exists():
                (site / top).symlink_to(home / top)

    return make


def site_of(python: Path) -> Path:
    return next(python.parent.parent.glob("lib/python*/site-packages"))


def pretend(python: Path, name: str, version: str) -> None:
    """Put the metadata of a package there, without the package."""
    info = site_of(python) / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_here() -> None:
    document = found(sys.executable)
    assert set(document["states"]) == set(TRIED)
    assert set(document["states"].values()) <= STATES
    assert document["states"]["onnxruntime-cpu"] == "works"
    assert document["states"]["torch"] == "works"
    assert document["by"]["onnxruntime-cpu"]["did"][-1] == "ran a network"
    rtx = document["by"]["tensorrt-rtx"]
    assert rtx["did"][:2] == [
        f"imported tensorrt_rtx {importlib.metadata.version('tensorrt-rtx')}",
        "built an engine",
    ]
    if not this_machine().gpus:
        assert rtx["state"] == "builds"
        assert this_machine().no_gpu_reason in rtx["problem"]
    for runtime in document["runtimes"]:
        assert bool(runtime["fix"]) == bool(runtime["problem"]) == (runtime["state"] != "works")


def test_every_runtime_is_tried() -> None:
    assert set(RUNTIMES) <= set(TRIED)


def test_the_table() -> None:
    """Lines are not wrapped, so that a command can be copied; nothing is hidden at 80 columns."""
    result = doctor(sys.executable)
    assert result.returncode == 0, result.stderr
    for runtime in TRIED:
        assert f" {runtime} " in result.stdout
    for line in read_requirements(this_machine()):
        assert line.name in result.stdout
    assert result.stdout.splitlines()[-1].startswith("HEALTHY: ")
    if "tensorrt" not in this_machine().packages:
        assert "\n" + " " * 26 + "Install it with: pip install 'ccn-deploy[gpu]'\n" in result.stdout


def test_the_base_install(installation: Installation) -> None:
    """The packages of the base install are enough to be told what to install."""
    python = installation()
    document = found(python)
    assert not document["healthy"]
    assert set(document["states"].values()) == {"absent"}
    assert document["problems"] == []
    for runtime, extra in (
        ("onnxruntime-cpu", "cpu"),
        ("onnxruntime-cuda", "gpu"),
        ("tensorrt", "gpu"),
        ("tensorrt-rtx", "rtx"),
        ("torch", "train"),
    ):
        assert f"pip install 'ccn-deploy[{extra}]'" in document["by"][runtime]["fix"]
    assert document["machine"]["packages"].keys() == {
        "ccn-deploy",
        "msgspec",
        "numpy",
        "typer",
        "rich",
    }
    assert document["machine"]["no_gpu_reason"].startswith("cuda-python is not installed")
    result = doctor(python)
    assert result.returncode == ExitCode.ENVIRONMENT
    assert result.stdout.splitlines()[-1].startswith("UNFIT: 0 of 6 runtimes work here")


def test_the_cpu_install(installation: Installation, ccn_bundle: Bundle) -> None:
    """A runtime, and a bundle that runs in it, without onnx, torch or anything else."""
    python = installation("onnxruntime")
    document = found(python, ccn_bundle.path)
    assert document["healthy"]
    assert "torch" not in document["machine"]["packages"]
    runs = {(use["runtime"], use["precision"]): use["runs"] for use in document["bundle"]}
    assert runs[("onnxruntime-cpu", "fp32")] is True
    assert runs[("onnxruntime-cuda", "fp32")] is False


def test_both_onnxruntimes(installation: Installation) -> None:
    python = installation("onnxruntime")
    pretend(python, "onnxruntime-gpu", "1.32.0")
    document = found(python)
    assert not document["healthy"]
    (problem,) = document["problems"]
    assert "both installed" in problem["what"]
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in problem["fix"]


def test_leftovers_of_an_uninstall(installation: Installation) -> None:
    python = installation()
    (site_of(python) / "onnxruntime" / "capi").mkdir(parents=True)
    (problem,) = found(python)["problems"]
    assert "an uninstall left" in problem["what"]
    assert str(site_of(python) / "onnxruntime") in problem["what"]


def test_an_uninstall_that_took_the_files_of_the_other(installation: Installation) -> None:
    python = installation()
    (site_of(python) / "onnxruntime" / "capi").mkdir(parents=True)
    pretend(python, "onnxruntime", "1.32.0")
    document = found(python)
    assert document["states"]["onnxruntime-cpu"] == "broken"
    assert "no InferenceSession" in document["by"]["onnxruntime-cpu"]["problem"]
    assert "Uninstall both" in document["by"]["onnxruntime-cpu"]["fix"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("import os; os._exit(9)", "exited with 9"),
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("raise SystemExit", "did not say"),
    ],
)
def test_a_library_that_takes_its_process_down(
    installation: Installation, source: str, words: str
) -> None:
    python = installation()
    package = site_of(python) / "onnxruntime"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    pretend(python, "onnxruntime", "1.32.0")
    trial = found(python)["by"]["onnxruntime-cpu"]
    assert trial["state"] == "broken"
    assert words in trial["problem"]
    assert trial["fix"] == "Install it again: pip install --force-reinstall onnxruntime"


def test_a_library_that_computes_something_else(installation: Installation) -> None:
    python = installation()
    package = site_of(python) / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import numpy, types\n"
        "__version__ = '2.13.0'\n"
        "class Tensor:\n"
        "    def __init__(self, array): self.array = array\n"
        "    def to(self, device): return self\n"
        "    flatten = lambda self, at: self\n"
        "    cpu = lambda self: self\n"
        "    numpy = lambda self: self.array\n"
        "from_numpy = Tensor\n"
        "wrong = lambda images, weight: Tensor(numpy.zeros((2, 2), 'f'))\n"
        "nn = types.SimpleNamespace(functional=types.SimpleNamespace(conv2d=wrong))\n"
    )
    pretend(python, "torch", "2.13.0+cpu")
    trial = found(python)["by"]["torch"]
    assert trial["state"] == "broken"
    assert "answered [[0.0, 0.0], [0.0, 0.0]]" in trial["problem"]


def test_an_old_package(installation: Installation) -> None:
    """A wrong version breaks what is always needed and an extra in use, and no other extra."""
    python = installation()
    pretend(python, "onnxruntime", "1.9.0")
    pretend(python, "scipy", "2.0.0")
    document = found(python)
    whats = [problem["what"] for problem in document["problems"]]
    assert "onnxruntime 1.9.0 is installed; ccn-deploy[cpu] needs onnxruntime>=1.20." in whats
    assert not any("scipy" in what for what in whats)
    (scipy,) = (r for r in document["requirements"] if r["name"] == "scipy")
    assert (scipy["installed"], scipy["met"]) == ("2.0.0", False)


def test_a_trial_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("import threading; threading.Event().wait()")
    monkeypatch.syspath_prepend(tmp_path)
    result = try_runtime("torch", patience=2)
    assert result.state == "broken"
    assert "did not end within 2 s" in result.problem


def test_a_bundle_that_nothing_here_runs() -> None:
    healthy = Diagnosis(
        machine=this_machine(),
        requirements=(),
        trials=(Trial("onnxruntime-cpu", "works"),),
        problems=(),
    )
    assert healthy.healthy
    assert replace(healthy, uses=()).exit_code == ExitCode.ENVIRONMENT
    assert replace(healthy, trials=(Trial("torch", "builds"),)).exit_code == ExitCode.ENVIRONMENT


def test_a_damaged_bundle_is_an_error(ccn_bundle: Bundle) -> None:
    graph = ccn_bundle.path / ccn_bundle.file(Role.FORWARD, "fp32").path
    graph.write_bytes(graph.read_bytes()[:-1] + b"\x00")
    result = doctor(sys.executable, ccn_bundle.path)
    assert result.returncode == ExitCode.INTEGRITY
    assert result.stdout == ""


class TestTheNetwork:
    def test_is_what_onnx_writes(self) -> None:
        """The bytes in the source are those of this model, so that nobody has to trust them."""
        from onnx import TensorProto, helper, numpy_helper

        def ends(name: str, *shape: int) -> onnx.ValueInfoProto:
            return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])

        graph = helper.make_graph(
            [
                helper.make_node("Conv", ["images", "weight"], ["scores"]),
                helper.make_node("Flatten", ["scores"], ["logits"]),
            ],
            "trial",
            [ends("images", *smoke_test.SHAPE)],
            [ends("logits", 2)],
            [numpy_helper.from_array(smoke_test.WEIGHT, "weight")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.checker.check_model(model, full_check=True)
        assert onnx.load_model_from_string(smoke_test.GRAPH) == model

    def test_answers_are_exact(self) -> None:
        (logits,) = ReferenceEvaluator(onnx.load_model_from_string(smoke_test.GRAPH)).run(
            None, {"images": smoke_test.IMAGES}
        )
        assert np.array_equal(logits, smoke_test.LOGITS)
        assert np.array_equal(smoke_test.LOGITS, [[2.5, 1.25], [7.5, 6.25]])

    @pytest.mark.gpu
    def test_runs_on_the_gpu(self) -> None:
        if not this_machine().gpus:
            pytest.skip(this_machine().no_gpu_reason)
        for runtime in ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda"):
            assert try_runtime(runtime).state in ("works", "absent")

    def test_builds(self) -> None:
        trt = pytest.importorskip("tensorrt_rtx")
        plan = build(trt, for_this_gpu=False)
        with_gpu = replace(this_machine(), gpus=(Gpu(0, "NVIDIA L4", "8.9", 24 << 30),))
        file = engine_file("tensorrt-rtx", trt.__version__, plan, with_gpu)
        check_engine(file.record(), plan[:4], with_gpu)


VERSION = st.lists(st.integers(0, 30), min_size=1, max_size=4).map(lambda n: ".".join(map(str, n)))
BOUND = st.tuples(st.sampled_from([">=", "<", ">", "<=", "==", "!="]), VERSION).map("".join)


@settings(deadline=None, max_examples=200)
@given(version=VERSION, needed=st.lists(BOUND, max_size=3).map(",".join))
def test_ranges_mean_what_packaging_says(version: str, needed: str) -> None:
    assert satisfies(version, needed) == SpecifierSet(needed).contains(version)


@settings(deadline=None, max_examples=100)
@given(first=VERSION, second=VERSION)
def test_releases_compare_as_packaging_does(first: str, second: str) -> None:
    assert (release(first) < release(second)) == (Version(first) < Version(second))
    assert release(f"{first}.post1+cpu") == release(first)


def test_requirements_are_those_of_the_metadata() -> None:
    wanted = {
        (str(extra), requirement.name, requirement.specifier)
        for line in importlib.metadata.requires("ccn-deploy") or []
        if (requirement := Packaging(line)).name != "ccn-deploy"
        for extra in ("", "cpu", "gpu", "rtx", "triton", "train")
        if (requirement.marker is None and extra == "")
        or (requirement.marker and extra and requirement.marker.evaluate({"extra": extra}))
    }
    have = read_requirements(this_machine())
    assert {(r.extra, r.name, SpecifierSet(r.needed)) for r in have} == wanted
    assert Requirement("train", "torch", ">=2.6", "2.13.0+cpu").met
    assert not Requirement("train", "torch", ">=2.6", None).met
