"""What a precision costs: the paired comparison by hand, and int8 for real."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from scipy import stats
from typer.testing import CliRunner

from ccn_deploy.attacks import AttackSpec
from ccn_deploy.bundle import Bundle, NewFile, write_bundle
from ccn_deploy.cli.main import app
from ccn_deploy.data import load_dataset
from ccn_deploy.errors import ExitCode
from ccn_deploy.exporters.precision import Calibration, convert
from ccn_deploy.graph.graph import Graph
from ccn_deploy.report import write_report
from ccn_deploy.robustness import (
    Evidence,
    Measurement,
    Pair,
    RobustnessResult,
    Sample,
    compare,
    judge,
)
from ccn_deploy.targets import Role
from ccn_deploy.verdict import Verdict
from tests.test_report import Seen, make_bundle, parity

PGD = AttackSpec("pgd", "linf", 0.1)
DEEPFOOL = AttackSpec("deepfool", "l2")


def evidence(word: str, rho: float = 0.25) -> Evidence:
    """One letter an image: h held, f fooled, w already wrong, i invalid."""
    names = {"h": "held", "f": "fooled", "w": "already-wrong", "i": "invalid"}
    return Evidence.of(
        [
            Sample(
                index=100 + at,
                label=1,
                clean=(0 if c == "w" else 1, 1),
                adversarial=(0 if c == "f" else 1, None),
                status=names[c],  # type: ignore[arg-type]
                linf=0.1 if c == "f" else None,
                l2=2.0 if c == "f" else None,
                rho=rho if c == "f" else None,
            )
            for at, c in enumerate(word)
        ],
        {"attack": PGD.document()},
    )


def judged(
    precision: str, word: str, *, reference: str = "", gradient: str = "native", rho: float = 0.25,
    max_drop: float = 0.5, runtime: str = "onnxruntime-cpu",
) -> RobustnessResult:  # fmt: skip
    pairs = tuple(
        Pair(spec, evidence(reference or word), evidence(word, rho)) for spec in (PGD, DEEPFOOL)
    )
    return judge(
        Measurement(
            runtime=runtime,
            precision=precision,
            gradient=gradient,  # type: ignore[arg-type]
            dataset={"name": "d", "split": "test", "digest": "0"},
            seed=0,
            n=len(word),
            pairs=pairs,
        ),
        max_drop,
    )


def test_the_cost_is_paired_with_its_one_sided_bound() -> None:
    base, less = "h" * 90 + "f" * 10, "f" * 5 + "h" * 85 + "f" * 10
    both = "f" * 5 + "h" * 85 + "h" * 2 + "f" * 8
    result = compare([judged("fp32", base), judged("fp16", less), judged("int8", both)])
    clean, pgd, *deepfool = result.rows
    assert clean.attack is None and clean.cells["int8"].share.count == 100
    assert (pgd.attack, pgd.title, pgd.epsilon, pgd.d) == ("pgd", "PGD", 0.1, None)
    assert pgd.cells["fp32"].cost is None
    fp16, int8 = pgd.cells["fp16"].cost, pgd.cells["int8"].cost
    assert fp16 is not None and int8 is not None
    assert (fp16.lost, fp16.gained, fp16.drop) == (5, 0, 0.05)
    assert fp16.upper95 == pytest.approx(stats.beta.ppf(0.95, 6, 95))  # Clopper and Pearson
    assert (int8.lost, int8.gained, int8.drop) == (5, 2, pytest.approx(0.03))
    assert int8.drop < int8.upper95 < 0.1
    assert [row.d for row in deepfool] == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_agreement_counts_labels_and_not_right_ones() -> None:
    fp32, int8 = judged("fp32", "wwhhh"), judged("int8", "whhhw")
    agreement = compare([int8, fp32]).agreement
    assert (agreement["int8"].count, agreement["int8"].n) == (3, 5)
    assert agreement["fp32"].value == 1.0


def test_minimal_attacks_cost_by_distance() -> None:
    near = judged("int8", "f" * 10, rho=0.15)
    result = compare([judged("fp32", "f" * 10, rho=0.25), near])
    costs = {row.d: row.cells["int8"].cost.lost for row in result.rows[2:]}  # type: ignore[union-attr]
    assert costs == {0.1: 0, 0.2: 10, 0.3: 0, 0.4: 0, 0.5: 0}


def test_the_verdict_is_the_worst_and_each_is_judged_against_the_reference() -> None:
    good = judged("fp32", "h" * 60, max_drop=0.1)
    doubtful = judged("fp16", "h" * 60, reference="h" * 60, max_drop=0.01)
    bad = judged("int8", "f" * 20 + "h" * 40, reference="h" * 60, max_drop=0.1)
    assert compare([good]).verdict is Verdict.PASS
    assert compare([good, doubtful]).verdict is Verdict.INCONCLUSIVE
    assert compare([good, doubtful, bad]).verdict is Verdict.FAIL
    # No worse than a bad baseline, and still failing.
    worse = judged("fp32", "f" * 20 + "h" * 40, reference="h" * 60, max_drop=0.1)
    both = compare([worse, bad])
    assert both.verdict is Verdict.FAIL
    assert all(row.cells["int8"].cost.drop == 0 for row in both.rows)  # type: ignore[union-attr]


def test_the_baseline_is_fp32_or_else_the_first() -> None:
    fp32, fp16, int8 = (judged(name, "hf") for name in ("fp32", "fp16", "int8"))
    assert compare([int8, fp32]).baseline == "fp32"
    assert list(compare([int8, fp32]).results) == ["int8", "fp32"]
    assert compare([int8, fp16]).baseline == "int8"


def test_an_illegal_image_is_lost_and_counted() -> None:
    row = compare([judged("fp32", "hhh"), judged("int8", "hih")]).rows[1]
    assert row.cells["int8"].invalid == 1
    assert row.cells["int8"].cost.lost == 1  # type: ignore[union-attr]


def test_other_images_attacks_or_runtimes_cannot_be_compared() -> None:
    fp32 = judged("fp32", "hf")
    for other in (judged("int8", "hff"), judged("int8", "hf", runtime="tensorrt")):
        with pytest.raises(ValueError, match="same attacks and images"):
            compare([fp32, other])
    with pytest.raises(ValueError, match="one judgement for each"):
        compare([fp32, fp32])


def test_gradients_of_two_kinds_are_a_finding() -> None:
    fp32, int8 = judged("fp32", "hf"), judged("int8", "hf", gradient="reference")
    (finding,) = compare([fp32, int8]).findings
    assert (finding.code, finding.undermines) == ("gradients-of-two-kinds", False)
    assert "reference gradients on int8 and native ones on fp32" in finding.sentence
    assert compare([fp32, judged("int8", "hf")]).findings == ()


def test_the_document_is_one_for_all() -> None:
    result = compare([judged("fp32", "hhff"), judged("int8", "hfff", gradient="reference")])
    document = json.loads(json.dumps(result.document(), allow_nan=False))
    assert document["schema"] == "ccn-deploy/robustness-precisions/2"
    assert (document["runtime"], document["baseline"]) == ("onnxruntime-cpu", "fp32")
    for name, one in document["precisions"].items():
        assert one == result.results[name].document()
        assert one["schema"] == "ccn-deploy/robustness/2"
    assert document["label_agreement"]["int8"]["share"] == 1.0
    none, pgd, *_ = document["comparison"]
    assert none["attack"] is None
    assert pgd["precisions"]["fp32"] == {
        "robust_accuracy": 0.5, "ci95": pytest.approx([0.0676, 0.9324], abs=1e-4),
        "invalid": 0, "cost": None,
    }  # fmt: skip
    cost = pgd["precisions"]["int8"]["cost"]
    assert (cost["lost"], cost["gained"], cost["drop"]) == (1, 0, 0.25)


def test_the_report_has_the_table_and_every_precision(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    fp32 = judged("fp32", "h" * 50 + "f" * 10)
    int8 = judged("int8", "f" * 6 + "h" * 44 + "f" * 10, reference="h" * 50 + "f" * 10,
                  gradient="reference", max_drop=0.01)  # fmt: skip
    result = compare([fp32, int8])
    page = write_report(bundle, result, [], "ccn-deploy …", parity()).read_text("utf-8")
    seen = Seen(page)
    assert "<strong>Fail</strong>" in page
    assert seen.text.index("What each precision costs") < seen.text.index("Accuracy under attack")
    cost = result.rows[1].cells["int8"].cost
    assert cost is not None
    assert f"73.3 {100 * cost.drop:+.1f} ({100 * cost.upper95:.2f})" in seen.text
    assert seen.text.count("Accuracy (%) under attack on 60 images of d") == 2
    assert "onnxruntime-cpu-int8 Fail" in seen.text and "onnxruntime-cpu-fp32 Pass" in seen.text
    for finding in result.findings:
        assert finding.sentence in seen.text
    ids = [a["id"] for _, a in seen.elements if "id" in a]
    assert len(ids) == len(set(ids))


# int8 for real


@pytest.fixture
def quantised(ccn_bundle: Bundle, tmp_path: Path) -> Bundle:
    """The trained CCN with its own graph in int8 beside it; no gradient graph has that."""
    data = load_dataset("mnist5k", "train")
    images = data.images(np.arange(64))
    record = ccn_bundle.file(Role.FORWARD, "fp32")
    graph = onnx.load_model_from_string(ccn_bundle.read(record))
    calibration = Calibration(images, "min-max", {"dataset": "mnist5k"})
    made = convert(Graph(graph), "int8", calibration).graph
    files = [NewFile.copy(ccn_bundle, r) for r in ccn_bundle.manifest.files]
    return write_bundle(
        tmp_path / "quantised",
        card=ccn_bundle.card,
        files=[
            *files,
            NewFile("graphs/forward-int8.onnx", made.SerializeToString(), Role.FORWARD, "int8"),
        ],
    )


def command(bundle: Bundle, *more: str) -> tuple[int, str]:
    given = ["verify-robustness", str(bundle.path), "--attack", "fgsm", "--attack", "deepfool",
             "--epsilons", "0.2", "--samples", "20", "--threads", "1", "--max-drop", "0.2",
             *more]  # fmt: skip
    result = CliRunner().invoke(app, given)
    return result.exit_code, result.output


def test_int8_is_attacked_with_the_references_gradients_and_says_so(quantised: Bundle) -> None:
    names = ("--precision", "fp32", "--precision", "int8")
    code, output = command(quantised, *names, "--json")
    document = json.loads(output[output.index("{") :])
    assert code == {"pass": 0, "fail": 1, "inconclusive": 4}[document["verdict"]]
    both = document["precisions"]
    assert {name: one["gradient"] for name, one in both.items()} == {
        "fp32": "native",
        "int8": "reference",
    }
    assert "reference gradients on int8" in document["findings"][0]["sentence"]
    assert "What each precision costs" in (quantised.path / "report.html").read_text()

    # The reference was attacked once for both, and each precision has evidence of its own.
    kept = sorted(path.parent.name for path in quantised.evidence.rglob("*.jsonl"))
    assert kept == [
        *["onnxruntime-cpu-fp32"] * 3,
        *["onnxruntime-cpu-int8"] * 3,
        *["torch-fp32"] * 3,
    ]

    code, alone = command(quantised, "--precision", "int8", "--json", "--no-report")
    found = json.loads(alone[alone.index("{") :])
    for what in ("evidence", "recheck"):  # the second time it was read
        del found[what], both["int8"][what]
    assert found == both["int8"]

    code, table = command(quantised, *names, "--no-report")
    assert table.count("verdict") >= 1
    assert "drop to fp32" in table and "DeepFool 0.5" in table
    assert "int8: gradients reference, of the PyTorch reference" in table
    assert "FGSM 0.2" in table


def test_nothing_is_measured_if_one_precision_cannot_be(quantised: Bundle) -> None:
    for more, word in (
        (("--precision", "fp16"), "fp16"),
        (("--precision", "int8", "--gradient", "native"), "no gradients of its own"),
    ):
        given = ["verify-robustness", str(quantised.path), "--precision", "fp32", *more]
        result = CliRunner().invoke(app, given)
        assert isinstance(result.exception, Exception)
        assert word in str(result.exception)
        assert not quantised.evidence.exists()


def test_one_precision_is_what_it_was(ccn_bundle: Bundle) -> None:
    code, output = command(ccn_bundle, "--json", "--no-report", "--max-drop", "49%")
    document = json.loads(output[output.index("{") :])
    assert code == ExitCode.PASS
    assert document["schema"] == "ccn-deploy/robustness/2"
