"""The claims, run as users run them: `pytest --pyargs ccn_deploy.certification` in a process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import onnx
import pytest

from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.certification.session import Options
from ccn_deploy.errors import ExitCode, UsageError
from ccn_deploy.exporters import export_bundle
from ccn_deploy.exporters.sources.opening import open_source
from ccn_deploy.parity.evidence import KINDS
from ccn_deploy.robustness.options import AttackOptions
from ccn_deploy.runs import open_run
from tests.fakes import times
from tests.faults import Fault, drop_delta, reorder_classes, swap_rows
from tests.foreign_files import classifier

TARGET = "onnxruntime-cpu-fp32"
PARITY = {f"parity[{TARGET}-{kind}]" for kind in KINDS}
STEADY = {f"batch-invariant[{TARGET}]", f"deterministic[{TARGET}]"}
ATTACKED = {f"accurate[{TARGET}]", "no-worse[linf-0.1-fgsm]", "no-worse[l2-deepfool]"}
SANE = f"sane[{TARGET}]"
DERIVED = {f"derived[graphs/{role}-fp32.onnx]" for role in ("forward", "gradient")}
CLAIMS = {"intact[bundle]", SANE} | DERIVED | PARITY | STEADY | ATTACKED
UNDER_FGSM = ATTACKED - {"no-worse[l2-deepfool]"}

# 29 images, none lost, are the fewest that show a drop of at most 10 points.
FGSM = ["--ccn-attack=fgsm", "--ccn-epsilons=0.1", "--ccn-samples=30", "--ccn-max-drop=0.1",
        "--ccn-parity-samples=8", "--ccn-threads=1"]  # fmt: skip
SMALL = [*FGSM, "--ccn-attack=deepfool"]


class Outcome:
    """What a run of the claims said: through its exit code, its terminal and its JUnit file."""

    def __init__(self, run: subprocess.CompletedProcess[str], junit: Path) -> None:
        self.exit_code = run.returncode
        self.terminal = run.stdout
        self.errors = run.stderr
        self.passed: set[str] = set()
        self.failed: dict[str, str] = {}
        for case in ElementTree.parse(junit).iter("testcase") if junit.exists() else ():
            assert case.get("classname") == "ccn_deploy.certification.claims"
            name, failure = case.get("name"), case.find("failure")
            assert name is not None and case.find("error") is None
            if failure is None:
                self.passed.add(name)
            else:
                self.failed[name] = failure.text or ""
        assert "Traceback" not in self.terminal + self.errors


def certify(
    cwd: Path, *arguments: str | Path, package: str = "ccn_deploy.certification", **env: str
) -> Outcome:
    junit = cwd / "junit.xml"
    junit.unlink(missing_ok=True)
    paths = [*filter(None, (env.get("PYTHONPATH"), os.environ.get("PYTHONPATH")))]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--pyargs", package, "-p", "no:cacheprovider",
         f"--junitxml={junit}", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    return Outcome(run, junit)


@pytest.fixture(scope="module")
def certified(
    exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcome]:
    """A healthy bundle with evidence, and what the run that collected it said."""
    root = tmp_path_factory.mktemp("certified")
    shutil.copytree(exported("ccn"), root / "bundle")
    return root / "bundle", certify(root, "--ccn-bundle", root / "bundle", *SMALL)


def test_a_healthy_bundle_holds_every_claim(certified: tuple[Path, Outcome]) -> None:
    _, outcome = certified
    assert outcome.failed == {}, outcome.terminal
    assert outcome.passed == CLAIMS
    assert outcome.exit_code == pytest.ExitCode.OK


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        (swap_rows, {f"parity[{TARGET}-clean]", f"batch-invariant[{TARGET}]"} | UNDER_FGSM),
        (drop_delta, {f"parity[{TARGET}-near-mean]"}),
        (reorder_classes, {f"parity[{TARGET}-clean]"} | UNDER_FGSM),
    ],
)
def test_a_planted_fault_breaks_the_claims_that_are_about_it(
    fault: Fault, broken: set[str], ccn_bundle: Bundle, tmp_path: Path
) -> None:
    bundle = fault(ccn_bundle, tmp_path / "faulty")
    outcome = certify(tmp_path, "--ccn-bundle", bundle.path, *FGSM)
    assert outcome.exit_code == pytest.ExitCode.TESTS_FAILED
    assert broken <= set(outcome.failed), outcome.terminal
    forged = "derived[graphs/forward-fp32-edited.onnx]"
    assert outcome.passed | set(outcome.failed) == CLAIMS - {"no-worse[l2-deepfool]"} | {forged}
    assert forged in outcome.failed and outcome.passed >= DERIVED
    assert "intact[bundle]" in outcome.passed  # its digests agree: only behaviour shows the fault
    for name in broken:
        lines = outcome.failed[name].splitlines()
        assert lines[0] == "fail"
        assert [line.split()[0] for line in lines[1:]] == ["measured", "bound", "to"]


def test_too_few_images_fail_as_inconclusive(
    certified: tuple[Path, Outcome], tmp_path: Path
) -> None:
    bundle, _ = certified
    options = [option for option in SMALL if not option.startswith("--ccn-samples")]
    outcome = certify(
        tmp_path, "--ccn-bundle", bundle, *options, "--ccn-samples=28", "-k", "no-worse or accurate"
    )
    assert outcome.exit_code == pytest.ExitCode.TESTS_FAILED
    assert set(outcome.failed) == ATTACKED
    for text in outcome.failed.values():
        assert text.startswith("inconclusive")
        assert "--ccn-samples 29" in text


def test_what_must_be_left_is_a_claim_of_its_own(
    certified: tuple[Path, Outcome], tmp_path: Path
) -> None:
    """Of thirty images, 26 in a row show 89 %, and what no network keeps is missed."""
    required = ["fgsm@0.1=20%", "fgsm@0.12=0.999", "deepfool@0.05=0.2"]
    options = [f"--ccn-min-robust={text}" for text in required]
    outcome = certify(
        tmp_path, "--ccn-bundle", certified[0], *SMALL, *options, "--ccn-min-accuracy=99.9%",
        "-k", "robust or accurate or no-worse",
    )  # fmt: skip
    assert {"robust[fgsm@0.1>=0.2]", "robust[deepfool@0.05>=0.2]"} <= outcome.passed
    assert "no-worse[linf-0.12-fgsm]" in outcome.passed  # the attack that a threshold added
    assert set(outcome.failed) == {"robust[fgsm@0.12>=0.999]", f"accurate[{TARGET}]"}
    for text in outcome.failed.values():
        assert text.splitlines()[0] in ("fail", "inconclusive")
        assert "at least 99.9 %, shown at 95 % confidence" in text


def test_no_claim_passes_on_numbers_that_are_undermined(sm_bundle: Bundle, tmp_path: Path) -> None:
    # The reference's gradients are what they were; those of the runtime lead nowhere.
    bundle = times(sm_bundle, tmp_path / "blind", 0.0)
    options = ["--ccn-attack=pgd", "--ccn-epsilons=0.2", "--ccn-samples=30", "--ccn-threads=1",
               "--ccn-min-robust=pgd@0.2=50%"]  # fmt: skip
    outcome = certify(
        tmp_path, "--ccn-bundle", bundle.path, *options, "-k", "robust or sane or no-worse"
    )
    assert outcome.passed == set()
    assert set(outcome.failed) == {SANE, "no-worse[linf-0.2-pgd]", "robust[pgd@0.2>=0.5]"}
    assert outcome.failed[SANE].startswith("inconclusive\nmeasured  doubt: ")


def test_evidence_is_judged_from_the_cache(certified: tuple[Path, Outcome], tmp_path: Path) -> None:
    """Nothing is attacked again: a second run works where torch is not installed."""
    bundle, _ = certified
    before = contents(bundle)
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    outcome = certify(tmp_path, "--ccn-bundle", bundle, *SMALL, PYTHONPATH=str(tmp_path))
    assert outcome.passed == CLAIMS - DERIVED, outcome.terminal
    assert set(outcome.failed) == DERIVED  # graphs are always derived again: evidence can be forged
    assert outcome.exit_code == ExitCode.ENVIRONMENT
    for text in outcome.failed.values():
        assert text.startswith("could not be judged: ") and "ccn-deploy[train]" in text
    assert contents(bundle) == before


def test_what_is_missing_to_judge_is_named_in_two_lines(ccn_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    options = ["--ccn-bundle", ccn_bundle.path, *FGSM]
    outcome = certify(tmp_path, *options, PYTHONPATH=str(tmp_path))
    assert outcome.passed == {"intact[bundle]"}
    for text in outcome.failed.values():
        what, hint = text.splitlines()
        assert what.startswith("could not be judged: ")
        assert hint.endswith("'ccn-deploy[train]'")


def test_a_precision_without_a_kernel_is_no_bad_bundle(
    trained_run: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = export_bundle(
        open_run(trained_run("sm")), tmp_path / "bundle", precisions=("fp32", "bf16")
    )
    options = ["--ccn-bundle", bundle.path, "--ccn-precision=bf16", *FGSM]
    outcome = certify(tmp_path, *options)
    assert outcome.exit_code == ExitCode.ENVIRONMENT, outcome.terminal
    assert {name.partition("[")[0] for name in outcome.passed} == {"intact", "derived"}
    assert all("could not be judged: onnxruntime-cpu" in text for text in outcome.failed.values())
    broken = swap_rows(bundle, tmp_path / "broken")
    outcome = certify(tmp_path, "--ccn-bundle", broken.path, *options[2:])
    assert outcome.exit_code == pytest.ExitCode.TESTS_FAILED  # a lie beside it is a bad bundle


def test_a_graph_that_the_bundle_begins_with_is_skipped_with_the_reason(tmp_path: Path) -> None:
    onnx.save(classifier(), tmp_path / "theirs.onnx")
    source = open_source(str(tmp_path / "theirs.onnx"))
    bundle = export_bundle(source, tmp_path / "bundle")
    outcome = certify(tmp_path, "--ccn-bundle", bundle.path, "-k", "derived", "-rs")
    assert outcome.exit_code == pytest.ExitCode.OK
    assert "1 passed, 1 skipped" in outcome.terminal
    assert "graphs/forward-fp32.onnx is what was taken in from onnx theirs.onnx" in outcome.terminal


def test_a_bundle_that_cannot_keep_evidence_is_judged_all_the_same(
    copy_bundle: Callable[[str], Bundle], tmp_path: Path
) -> None:
    # A file where the directory would be: unwritable for root too, unlike a mode.
    bundle = copy_bundle("ccn")
    bundle.evidence.write_text("not a directory")
    outcome = certify(tmp_path, "--ccn-bundle", bundle.path, *FGSM, "-k", "no-worse")
    assert outcome.passed == {"no-worse[linf-0.1-fgsm]"}, outcome.terminal
    assert outcome.terminal.count("cannot be written to") == 1
    assert bundle.evidence.read_text() == "not a directory"


def test_a_damaged_bundle_breaks_every_claim(ccn_bundle: Bundle, tmp_path: Path) -> None:
    weights = ccn_bundle.path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    outcome = certify(tmp_path, "--ccn-bundle", ccn_bundle.path, *SMALL)
    assert outcome.exit_code == pytest.ExitCode.TESTS_FAILED
    assert set(outcome.failed) == CLAIMS - DERIVED  # no manifest says what there is to derive
    assert all("weights.safetensors" in text for text in outcome.failed.values())
    assert not ccn_bundle.evidence.exists()


def test_no_claim_means_no_evidence(ccn_bundle: Bundle, tmp_path: Path) -> None:
    certify(tmp_path, "--ccn-bundle", ccn_bundle.path, "--collect-only")
    outcome = certify(tmp_path, "--ccn-bundle", ccn_bundle.path, "-k", "intact")
    assert outcome.passed == {"intact[bundle]"}
    assert not ccn_bundle.evidence.exists()


def test_a_claim_is_run_again_by_the_name_it_failed_under(
    certified: tuple[Path, Outcome], tmp_path: Path
) -> None:
    claim = "ccn_deploy.certification.claims::no-worse[linf-0.1-fgsm]"
    outcome = certify(tmp_path, "--ccn-bundle", certified[0], *SMALL, package=claim)
    assert outcome.passed == {"no-worse[linf-0.1-fgsm]"}


def test_the_claims_run_under_a_foreign_configuration(
    certified: tuple[Path, Outcome], tmp_path: Path
) -> None:
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\naddopts = --strict-markers -W error\npython_files = *.py\n"
        "norecursedirs = certification ccn_deploy\n"
    )
    (tmp_path / "conftest.py").write_text(
        "import pytest\n\n\n@pytest.fixture(autouse=True)\ndef everywhere():\n    yield\n"
    )
    (tmp_path / "below").mkdir()
    outcome = certify(tmp_path / "below", f"--ccn-bundle={certified[0]}", *SMALL, "-k", "no-worse")
    assert outcome.passed == {"no-worse[linf-0.1-fgsm]", "no-worse[l2-deepfool]"}, outcome.terminal
    assert f"rootdir: {tmp_path}" in outcome.terminal


def test_workers_share_the_evidence(certified: tuple[Path, Outcome], tmp_path: Path) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    outcome = certify(tmp_path, "--ccn-bundle", certified[0], *SMALL, "-n", "2", "-k", "no-worse")
    assert outcome.passed == {"no-worse[linf-0.1-fgsm]", "no-worse[l2-deepfool]"}, outcome.terminal


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["need a bundle", "--ccn-bundle BUNDLE"]),
        (["--ccn-bundle", "."], ["manifest.json"]),
        (["--ccn-bundle", ".", "--ccn-attack", "fsgm"], ["'fgsm'"]),
    ],
)
def test_wrong_usage_is_told_before_anything_runs(
    options: list[str], words: list[str], tmp_path: Path
) -> None:
    outcome = certify(tmp_path, *options)
    assert outcome.exit_code == pytest.ExitCode.USAGE_ERROR
    message = outcome.errors.removeprefix("ERROR: ").strip()
    assert 1 <= len(message.splitlines()) <= 2, message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("option", "word"),
    [
        ({"attack": AttackOptions(epsilons="0.1,big")}, "'big'"),
        ({"attack": AttackOptions(["fgsm"], steps=5)}, "--steps"),
        ({"min_robust": ["pgd@0.1=55"]}, "--ccn-min-robust pgd@0.1=55%"),
        ({"min_accuracy": "97"}, "--ccn-min-accuracy 97%"),
        ({"runtime": "onnxruntime-cp"}, "'onnxruntime-cpu'"),
        ({"precision": "fp17"}, "'fp17'"),
        ({"max_drop": "0"}, "--ccn-max-drop 0"),
        ({"max_drop": "1"}, "--ccn-max-drop 1%"),
        ({"samples": 0}, "--ccn-samples 0"),
        ({"threads": -1}, "--ccn-threads -1"),
    ],
)
def test_options_that_mean_nothing_are_named(option: dict[str, Any], word: str) -> None:
    healthy = {"bundle": Path("anywhere"), "runtime": "onnxruntime-cpu", "precision": "fp32"}
    Options(**healthy)
    with pytest.raises(UsageError, match=re.escape(word)):
        Options(**{**healthy, **option})


def test_the_plugin_costs_other_test_runs_nothing(tmp_path: Path) -> None:
    """In a run of other tests it is loaded, collects nothing and imports nothing."""
    (tmp_path / "test_other.py").write_text(
        "import sys\n\n\ndef test_other():\n"
        "    assert 'ccn_deploy.certification.plugin' in sys.modules\n"
        "    ours = {name for name in sys.modules if name.startswith('ccn_deploy')}\n"
        "    assert ours == {'ccn_deploy', 'ccn_deploy.certification',"
        " 'ccn_deploy.certification.plugin'}\n"
        "    assert not {'torch', 'numpy', 'onnxruntime', 'onnx', 'scipy', 'typer', 'rich'}"
        " & set(sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path],
        cwd=tmp_path,
        # Only this plugin: others may import what they like.
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
             "PYTEST_PLUGINS": "ccn_deploy.certification.plugin"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    assert "1 passed" in run.stdout


def test_the_plugin_is_found_by_its_entry_point(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--ccn-bundle" in run.stdout


def test_the_claims_agree_with_the_commands(certified: tuple[Path, Outcome]) -> None:
    """The evidence that the claims left is what the commands find and judge."""
    from ccn_deploy.attacks import suite
    from ccn_deploy.data import load_dataset
    from ccn_deploy.robustness import RobustnessRequest, collect, judge
    from ccn_deploy.runtimes import RuntimeOptions

    bundle = open_bundle(certified[0])
    before = contents(bundle.path)
    request = RobustnessRequest(
        dataset=load_dataset("mnist5k", "test"),
        attacks=suite(["fgsm", "deepfool"], [0.1]),
        samples=30,
        options=RuntimeOptions(threads=1),
    )
    result = judge(collect(bundle, request), 0.1)
    assert contents(bundle.path) == before
    assert result.verdict.value == "pass"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in directory.rglob("*") if file.is_file()}
