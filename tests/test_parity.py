"""Parity end to end: a healthy bundle passes, every planted fault is caught."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.cli.main import app
from ccn_deploy.data import load_dataset
from ccn_deploy.errors import ExitCode, IntegrityError, RuntimeUnavailableError, UsageError
from ccn_deploy.exporters import export_bundle
from ccn_deploy.parity import ParityRequest, ParityResult, collect, judge
from ccn_deploy.runs import open_run
from ccn_deploy.verdict import Verdict
from tests import faults

DATA = load_dataset("mnist5k", "test")
REQUEST = ParityRequest(DATA, samples=9, per_layer=True, threads=1)


def measure(bundle: Bundle, request: ParityRequest = REQUEST) -> ParityResult:
    return judge(collect(bundle, request))


@pytest.mark.parametrize("defense", ["sm", "ccn"])
@pytest.mark.parametrize("runtime", ["onnxruntime-cpu", "torch"])
def test_a_healthy_bundle_passes_in_float32(
    defense: str, runtime: str, copy_bundle: Callable[[str], Bundle]
) -> None:
    request = ParityRequest(DATA, runtime, samples=40, per_layer=True, threads=1)
    result = measure(copy_bundle(defense), request)
    assert result.verdict is Verdict.PASS
    assert result.first_departure is None
    assert len(result.inputs) == 6 * 3
    for finding in result.inputs:
        assert finding.row.deviation.relative < 1e-4
        assert finding.row.deviation.units < 2.0  # what rounding explains, not just the bound
    worst = max(finding.row.deviation.units for finding in result.inputs)
    assert worst > 0.01  # a unit that explains everything would explain faults too
    assert result.gradients is not None and result.kinks is not None
    assert len(result.gradients) == 6 * 2
    for gradient in result.gradients:
        assert gradient.row.slopes.relative < 1e-5
        assert gradient.row.slopes.of_rounding < 2.0
    judged = [gradient.row.slopes.judged for gradient in result.gradients]
    assert sum(judged) > 0.6 * sum(gradient.row.slopes.n for gradient in result.gradients)


@pytest.mark.parametrize(
    ("plant", "layer"),
    [
        (faults.swap_rows, "fc3"),
        (faults.drop_delta, "conv1"),
        (faults.reorder_classes, "fc3"),
        (faults.perturb_layer, "conv2"),
        (faults.lose_alpha, "conv3"),
    ],
)
def test_a_planted_fault_is_caught_and_its_layer_named(
    plant: faults.Fault, layer: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    result = measure(plant(open_bundle(exported("ccn")), tmp_path / "faulty"))
    assert result.verdict is Verdict.FAIL
    assert result.first_departure is not None
    assert result.first_departure.subject == layer


@pytest.mark.parametrize("defense", ["sm", "ccn"])
@pytest.mark.parametrize(
    ("plant", "kinds"),
    [
        (faults.turn_kernel_back, {"clean", "noise"}),
        (faults.hold_norm_fixed, {"clean", "adversarial", "noise", "zero", "one", "near-mean"}),
        (faults.pass_to_every_maximum, {"clean", "zero", "one"}),
        (faults.swap_candidates, {"clean", "noise"}),
        (faults.swap_gradients, {"clean", "noise"}),
        (faults.another_forward, {"clean", "adversarial", "noise", "zero", "one", "near-mean"}),
    ],
)
def test_a_fault_in_the_gradient_graph_fails_the_gradients_and_nothing_else(
    defense: str,
    plant: faults.Fault,
    kinds: set[str],
    exported: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    if plant is faults.hold_norm_fixed and defense == "sm":
        pytest.skip("a plain network has no norm")
    request = replace(REQUEST, per_layer=False)
    result = measure(plant(open_bundle(exported(defense)), tmp_path / "faulty"), request)
    assert result.verdict is Verdict.FAIL
    assert result.gradients is not None
    assert kinds <= {f.row.kind for f in result.gradients if f.reasons}
    assert all(f.verdict is Verdict.PASS for f in (*result.inputs, *result.invariance))
    if plant in (faults.swap_candidates, faults.swap_gradients):  # one alone is right
        assert not [f.name for f in result.gradients if f.reasons and f.row.candidates == 1]


def test_a_bundle_without_a_gradient_graph_has_no_such_rows(
    trained_run: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = export_bundle(open_run(trained_run("sm")), tmp_path / "served", gradient=False)
    options = ["--samples", "8", "--threads", "1"]
    table = CliRunner().invoke(app, ["verify-parity", str(bundle.path), *options])
    assert table.exit_code == 0
    assert "No gradients to compare" in table.stdout
    document = CliRunner().invoke(app, ["verify-parity", str(bundle.path), *options, "--json"])
    assert json.loads(document.stdout)["gradients"] is None


def test_swapped_rows_are_right_one_at_a_time_and_wrong_together(
    exported: Callable[[str], Path], tmp_path: Path
) -> None:
    result = measure(faults.swap_rows(open_bundle(exported("sm")), tmp_path / "faulty"))
    by_batch = {
        batch: Verdict.all_of(f.verdict for f in result.inputs if f.document()["batch"] == batch)
        for batch in (1, 7, 9)
    }
    assert by_batch == {1: Verdict.PASS, 7: Verdict.FAIL, 9: Verdict.FAIL}
    failed = {f.subject for f in result.invariance if f.verdict is Verdict.FAIL}
    assert failed == {"alone", "duplicated", "permuted", "sizes", "neighbours"}


@pytest.mark.parametrize("layer", ["conv1", "conv4", "fc2"])
def test_a_slightly_wrong_weight_is_far_more_than_rounding_explains(
    layer: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    """One part in 10,000 stays within the bound on the scale; the bound in units sees it."""
    faulty = faults.perturb_layer(open_bundle(exported("ccn")), tmp_path / "faulty", layer, 1e-4)
    result = measure(faulty)
    assert result.verdict is Verdict.FAIL
    assert result.first_departure is not None
    assert result.first_departure.subject == layer


def test_evidence_is_measured_once(ccn_bundle: Bundle) -> None:
    steps: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        steps.append(what)

    first = collect(ccn_bundle, REQUEST, progress=progress)
    assert steps[-1] == "done"
    steps.clear()
    assert collect(ccn_bundle, REQUEST, progress=progress) == first
    assert not steps
    assert collect(ccn_bundle, REQUEST, progress=progress, fresh=True) == first  # reproducible
    assert steps


def test_evidence_is_judged_where_torch_is_not_installed(
    ccn_bundle: Bundle, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    command = [sys.executable, "-m", "ccn_deploy.cli.main", "verify-parity", str(ccn_bundle.path)]
    command += ["--samples", "9", "--per-layer", "--threads", "1", "--json", "--no-lineage"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    there = judge(collect(ccn_bundle, REQUEST)).document()
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert json.loads(result.stdout) == {**there, "evidence": "read", "lineage": None}
    assert not result.stderr
    command.remove("--no-lineage")
    refused = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (refused.returncode, refused.stdout) == (ExitCode.ENVIRONMENT, "")
    assert "--no-lineage" in refused.stderr and "ccn-deploy[train]" in refused.stderr


@pytest.mark.parametrize(
    "other",
    [ParityRequest(DATA, samples=9, seed=1, threads=1), ParityRequest(DATA, samples=10, threads=1)],
)
def test_another_question_gets_evidence_of_its_own(
    other: ParityRequest, ccn_bundle: Bundle
) -> None:
    collect(ccn_bundle, ParityRequest(DATA, samples=9, threads=1))
    collect(ccn_bundle, other)
    assert len(list((ccn_bundle.evidence / "parity").iterdir())) == 2


def test_changed_evidence_is_refused_and_measured_again_on_request(ccn_bundle: Bundle) -> None:
    collect(ccn_bundle, REQUEST)
    (path,) = (ccn_bundle.evidence / "parity").iterdir()
    path.write_bytes(path.read_bytes().replace(b'"argmax_flips": 0', b'"argmax_flips": 1', 1))
    with pytest.raises(IntegrityError, match=path.name):
        collect(ccn_bundle, REQUEST)
    assert judge(collect(ccn_bundle, REQUEST, fresh=True)).verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (ParityRequest(DATA, samples=7), UsageError, "--samples 8"),
        (ParityRequest(DATA, precision="fp31"), UsageError, "fp32"),
        (ParityRequest(DATA, runtime="onnxruntime-cup"), UsageError, "onnxruntime-cpu"),
        (ParityRequest(DATA, runtime="onnxruntime-cuda"), RuntimeUnavailableError, "GPU"),
    ],
)
def test_what_cannot_be_measured_is_said(
    request_: ParityRequest, error: type[Exception], words: str, ccn_bundle: Bundle
) -> None:
    with pytest.raises(error, match=words):
        collect(ccn_bundle, request_)
    assert not (ccn_bundle.evidence / "parity").exists()


class TestCommand:
    def run(self, *arguments: str | Path) -> tuple[int, str]:
        result = CliRunner().invoke(
            app, ["verify-parity", *map(str, arguments), "--samples", "16", "--threads", "1"]
        )
        return result.exit_code, result.stdout

    def test_json_is_one_document_of_the_contract(self, ccn_bundle: Bundle) -> None:
        code, text = self.run(ccn_bundle.path, "--json", "--per-layer")
        document = json.loads(text)
        assert code == 0
        assert document["schema"] == "ccn-deploy/parity/2"
        assert document["verdict"] == "pass"
        assert (document["runtime"], document["precision"]) == ("onnxruntime-cpu", "fp32")
        contract = {"kind", "n", "batch", "max_abs", "p99_abs", "argmax_flips", "nonfinite"}
        assert all(contract <= row.keys() for row in document["inputs"])
        assert {(row["kind"], row["batch"]) for row in document["inputs"]} == {
            (kind, batch)
            for kind in ("clean", "adversarial", "noise", "zero", "one", "near-mean")
            for batch in (1, 7, 16)
        }
        assert document["first_departure"] is None
        gradients = document["gradients"]
        assert {(row["kind"], row["candidates"]) for row in gradients["rows"]} == {
            (kind, candidates)
            for kind in ("clean", "adversarial", "noise", "zero", "one", "near-mean")
            for candidates in (1, 5)
        }
        contract = {"n", "near_a_kink", "max_abs", "cosine", "of_rounding", "scale", "nonfinite"}
        assert all(contract <= row["slopes"].keys() for row in gradients["rows"])
        assert gradients["kinks"]["verdict"] == "pass"
        assert document["policy"]["max_gradient"] == 1e-4
        assert document["setting"]["bundle"] == ccn_bundle.manifest.digest

    def test_a_fault_exits_1_and_the_table_says_where(
        self, exported: Callable[[str], Path], tmp_path: Path
    ) -> None:
        faulty = faults.perturb_layer(open_bundle(exported("ccn")), tmp_path / "faulty")
        code, text = self.run(faulty.path, "--per-layer", "--no-lineage")
        assert code == 1
        assert "First layer to depart: conv2" in text
        assert text.splitlines()[-1].startswith("FAIL")
        assert json.loads(self.run(faulty.path, "--json", "--no-lineage")[1])["verdict"] == "fail"

    def test_the_table_fits_eighty_columns(self, ccn_bundle: Bundle) -> None:
        code, text = self.run(ccn_bundle.path, "--per-layer")
        assert code == 0
        assert "…" not in text
        assert text.splitlines()[-1].startswith("PASS")
