"""From a policy to a certificate: what it says is what the evidence says, and nothing more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest

from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.certificates.commitment import commit, commitments, find_commitment
from ccn_deploy.certificates.statement import Certificate
from ccn_deploy.certification.certify import Certified, certify
from ccn_deploy.certification.policy import Policy, read_policy
from ccn_deploy.errors import ExitCode, IntegrityError
from ccn_deploy.robustness.evidence import Evidence
from ccn_deploy.robustness.worst_case import worst_case
from ccn_deploy.statistics import clopper_pearson
from ccn_deploy.storage import sha256
from tests.faults import swap_rows
from tests.test_certification import certify as run_claims
from tests.test_cli import assert_clear_error, ccn_deploy

NOW = datetime(2026, 6, 1, 12, 0, 0, tzinfo=timezone.utc)

POLICY = """\
schema = "ccn-deploy/policy/1"
name = "gate"
intended-use = "digits"
fallback = "a person looks"
valid-days = 30
[[target]]
runtime = "onnxruntime-cpu"
[data]
samples = 30
parity-samples = 8
[attacks]
names = ["fgsm", "pgd", "fmn-linf"]
epsilons = [0.1, 0.2]
[thresholds]
max-drop = "10%"
min-robust = ["fgsm@0.1=20%"]
"""
STRICT = POLICY.replace("fgsm@0.1=20%", "pgd@0.2=95%")
WAIVER = """
[[waiver]]
claim = "robust[pgd@0.2>=0.95]"
reason = "known, and watched"
owner = "the release manager"
expires = 2099-12-31
"""


def policy(path: Path, text: str = POLICY) -> Policy:
    (path / "policy.toml").write_text(text)
    return read_policy(path / "policy.toml")


def certified(bundle: Bundle, demanded: Policy, now: datetime = NOW) -> Certified:
    return certify(bundle, demanded, now=lambda: now, threads=1, tester="us", recheck="0", jobs=1)


@pytest.fixture(scope="module")
def measured(
    exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Certified]:
    """A bundle that was certified: committed first, then measured."""
    root = tmp_path_factory.mktemp("measured")
    shutil.copytree(exported("ccn"), root / "bundle")
    return root / "bundle", certified(open_bundle(root / "bundle"), policy(root))


@pytest.fixture
def again(measured: tuple[Path, Certified], tmp_path: Path) -> Bundle:
    """A copy of it, with its evidence."""
    shutil.copytree(measured[0], tmp_path / "bundle")
    return open_bundle(tmp_path / "bundle")


@pytest.fixture
def found(measured: tuple[Path, Certified]) -> Certificate:
    return measured[1].certificate


def test_a_certificate_says_what_the_evidence_says(
    measured: tuple[Path, Certified], found: Certificate
) -> None:
    path, made = measured
    (target,) = found.targets
    assert (found.verdict, target.verdict, found.tier) == ("pass", "pass", "empirical")
    assert found.claim.startswith("Certified: ") and "20 %" in found.claim
    evidence = {p.spec.label: p.runtime for p in made.results[0].measurement.pairs}
    assert len(evidence) == 5
    for result in target.results:
        rows = evidence[result.label]
        held = rows.status == "held"
        if result.distance is not None:
            held |= (rows.status == "fooled") & (rows.linf > result.distance)
        assert (result.target.count, result.target.n) == (held.sum(), 30)
        assert result.target.ci95 == clopper_pearson(int(held.sum()), 30)
        assert result.queries == (rows.forward.sum(), rows.backward.sum())
        assert result.threat.epsilon == rows.header["attack"]["epsilon"]
    assert target.worst is not None
    assert target.worst.count == still_right(evidence, 0.2) <= still_right(evidence, 0.1)
    assert "0.2" in target.worst_attack
    assert (found.data.samples, found.data.seed) == (30, 0)
    assert target.library == "onnxruntime" and target.hardware.instruction_sets
    assert {c.name for c in target.claims} >= {"intact[bundle]", "robust[fgsm@0.1>=0.2]"}
    assert found.issued == "2026-06-01T12:00:00Z" and found.expires == "2026-07-01T12:00:00Z"
    assert (found.intended_use, found.fallback, found.tester) == ("digits", "a person looks", "us")
    manifest = json.loads((path / "manifest.json").read_text())
    assert found.bundle == manifest["digest"]


def still_right(evidence: dict[str, Evidence], size: float) -> int:
    """Count images that no attack moved within a distance, one by one."""
    count = 0
    for row in range(30):
        lost = False
        for rows in evidence.values():
            lost |= bool(rows.clean_runtime[row] != rows.label[row])
            fooled = rows.adversarial_runtime[row] not in (rows.label[row], -1)
            lost |= bool(fooled and rows.linf[row] <= size * 1.000001)
        count += not lost
    return count


def test_the_worst_case_counts_every_attack(measured: tuple[Path, Certified]) -> None:
    result = measured[1].results[0]
    norm, left = worst_case(result)
    assert norm == "linf" and list(left) == [0.1, 0.2]
    for row in result.bounded:
        assert left[row.epsilon].count <= row.runtime.count
    for size, share in left.items():
        assert share.count <= result.minimal[0].runtime.accuracy_at[size].count


def test_subjects_and_evidence_are_the_files_that_are_there(
    measured: tuple[Path, Certified], found: Certificate
) -> None:
    path, made = measured
    for subject in made.statement.subject:
        if not subject.name.startswith("data:"):
            assert sha256((path / subject.name).read_bytes()) == subject.digest.sha256
    names = {subject.name for subject in made.statement.subject}
    assert names == {
        "manifest.json", "graphs/forward-fp32.onnx", "graphs/gradient-fp32.onnx",
        "data:mnist5k/test",
    }  # fmt: skip
    for file in found.evidence:
        data = (path / file.path).read_bytes()
        assert (len(data), sha256(data)) == (file.bytes, file.sha256)
    listed = {file.path for file in found.evidence}
    there = {p.relative_to(path).as_posix() for p in (path / "evidence").rglob("*") if p.is_file()}
    assert listed == there


def test_evidence_says_that_the_policy_stood_before_it(
    measured: tuple[Path, Certified], found: Certificate, again: Bundle, tmp_path: Path
) -> None:
    (commitment,) = commitments(again)
    assert found.policy.before_results
    assert found.policy.commitment == commitment.digest
    assert found.policy.committed == commitment.at == "2026-06-01T12:00:00Z"
    # Another policy, on the same evidence: its thresholds came after the results.
    later = certified(again, policy(tmp_path, POLICY.replace("20%", "25%"))).certificate
    assert later.verdict == "pass" and not later.policy.before_results
    # The first policy still stood before.
    assert certified(again, policy(tmp_path)).certificate.policy.before_results


def test_a_commitment_that_is_made_again_is_a_new_one(again: Bundle, tmp_path: Path) -> None:
    """Who deletes one and commits again gets another digest, which no seal carries."""
    demanded = policy(tmp_path)
    (first,) = commitments(again)
    for file in (again.evidence / "policies").iterdir():
        file.unlink()
    assert find_commitment(again, demanded.digest) is None
    second = certified(again, demanded, NOW + timedelta(hours=1)).certificate.policy
    assert second.commitment != first.digest
    assert not second.before_results


def test_evidence_of_before_makes_the_whole_late(ccn_bundle: Bundle, tmp_path: Path) -> None:
    """Ten images were measured before the policy was committed, twenty after."""
    few = policy(tmp_path, POLICY.replace("samples = 30", "samples = 10"))
    certified(ccn_bundle, few)
    made = certified(ccn_bundle, policy(tmp_path)).certificate
    assert made.data.samples == 30 and not made.policy.before_results


def test_commitments_are_sealed(again: Bundle, tmp_path: Path) -> None:
    (path,) = (again.evidence / "policies").iterdir()
    healthy = path.read_bytes()
    for forged in (healthy.replace(b"12:00", b"11:00"), healthy[:-9], b"{}", b""):
        path.write_bytes(forged)
        with pytest.raises(IntegrityError):
            certified(again, policy(tmp_path))
    path.write_bytes(healthy)
    path.rename(path.with_name("0123456789abcdef.json"))
    with pytest.raises(IntegrityError, match="another policy"):
        commitments(again)


def test_committing_twice_changes_nothing(ccn_bundle: Bundle, tmp_path: Path) -> None:
    demanded = policy(tmp_path)
    first = commit(ccn_bundle, demanded.digest, NOW)
    assert commit(ccn_bundle, demanded.digest, NOW + timedelta(days=1)) == first
    result = ccn_deploy("policy", "commit", ccn_bundle.path, tmp_path / "policy.toml")
    assert result.returncode == 0 and first.digest in result.stdout


def test_a_demand_that_is_not_met_is_no_certificate_of_passing(
    again: Bundle, tmp_path: Path
) -> None:
    made = certified(again, policy(tmp_path, STRICT)).certificate
    assert made.verdict == "fail"
    assert made.claim.startswith("Not certified: ") and "robust[pgd@0.2>=0.95]" in made.claim
    waived = certified(again, policy(tmp_path, STRICT + WAIVER)).certificate
    assert waived.verdict == "pass" and "95 % right" not in waived.claim
    assert "1 demand was waived: robust[pgd@0.2>=0.95]" in waived.claim
    (use,) = waived.waivers
    assert use.used and use.owner == "the release manager"
    (claim,) = [c for c in waived.targets[0].claims if c.waived]
    assert (claim.name, claim.verdict) == ("robust[pgd@0.2>=0.95]", "fail")


def test_a_waiver_that_nothing_rests_on_is_said_to_be_unused(again: Bundle, tmp_path: Path) -> None:
    text = POLICY + WAIVER.replace("pgd@0.2>=0.95", "fgsm@0.1>=0.2")
    made = certified(again, policy(tmp_path, text)).certificate
    assert made.verdict == "pass" and not made.waivers[0].used and "waived" not in made.claim


def test_a_planted_fault_is_not_certified(ccn_bundle: Bundle, tmp_path: Path) -> None:
    bundle = swap_rows(ccn_bundle, tmp_path / "faulty")
    with pytest.raises(IntegrityError, match="forward-fp32-edited"):
        certified(bundle, policy(tmp_path))


def test_the_command_writes_a_certificate_whatever_the_verdict(
    again: Bundle, tmp_path: Path
) -> None:
    """The worked example of the documentation, in small."""
    policy(tmp_path, STRICT)
    output = tmp_path / "out" / "strict.json"
    asked = [
        *("certify", again.path, "--policy", tmp_path / "policy.toml"),
        *("--threads", "1", "--recheck", "0"),
    ]
    output.parent.mkdir()
    result = ccn_deploy(*asked, "-o", output)
    assert result.returncode == ExitCode.GATE_FAILED, result.stderr
    assert "Not certified" in result.stdout and "not signed" in result.stdout
    assert "before it" in result.stdout  # the evidence is of another policy's time
    assert output.is_file() and output.with_suffix(".html").is_file()
    kept = output.read_bytes()
    assert_clear_error(ccn_deploy(*asked, "-o", output, "--format", "pdf"), ExitCode.USAGE, "pdf")
    (tmp_path / "policy.toml").write_text(STRICT.replace("95%", "195%"))
    assert_clear_error(ccn_deploy(*asked, "-o", output), ExitCode.USAGE, "195%")
    assert output.read_bytes() == kept


def test_layers_are_compared_where_the_policy_says_so(ccn_bundle: Bundle, tmp_path: Path) -> None:
    text = POLICY.replace("parity-samples = 8", "parity-samples = 8\nparity-layers = true")
    made = certified(ccn_bundle, policy(tmp_path, text))
    layers = made.parities[0].layers
    assert layers is not None and {finding.subject for finding in layers} >= {"conv1", "fc1"}
    assert made.certificate.verdict == "pass"


def test_evidence_that_was_cut_is_measured_again_or_refused(again: Bundle, tmp_path: Path) -> None:
    """Cut in the middle of a line: what was not sealed is measured again, to the same numbers."""
    demanded = policy(tmp_path)
    before = certified(again, demanded).certificate
    (rows,) = again.evidence.glob("robustness/onnxruntime*/linf-0.1-fgsm-*.jsonl")
    rows.write_bytes(rows.read_bytes()[:-300])
    after = certified(again, demanded).certificate
    assert [r.target for r in after.targets[0].results] == [
        r.target for r in before.targets[0].results
    ]
    data = bytearray(rows.read_bytes())
    data[len(data) // 2] ^= 1
    rows.write_bytes(bytes(data))
    with pytest.raises(IntegrityError):
        certified(again, demanded)


def test_the_claims_of_a_policy_are_those_of_the_certificate(again: Bundle, tmp_path: Path) -> None:
    policy(tmp_path, STRICT)
    options = ["--ccn-bundle", again.path, "--ccn-policy", tmp_path / "policy.toml",
               "--ccn-threads=1", "--ccn-recheck=0"]  # fmt: skip
    outcome = run_claims(tmp_path, *options)
    assert set(outcome.failed) == {"robust[pgd@0.2>=0.95]"}, outcome.terminal
    made = certified(again, policy(tmp_path, STRICT)).certificate
    for claim in made.targets[0].claims:
        assert (claim.name in outcome.passed) == (claim.verdict == "pass")
    assert made.targets[0].claims[-1].measured.split()[0] in outcome.failed["robust[pgd@0.2>=0.95]"]
    policy(tmp_path, STRICT + WAIVER)
    waived = run_claims(tmp_path, *options, "-rx")
    assert not waived.failed and waived.exit_code == 0
    assert "1 xfailed" in waived.terminal and "the release manager" in waived.terminal
    clash = run_claims(tmp_path, *options, "--ccn-attack=pgd")
    assert clash.exit_code == pytest.ExitCode.USAGE_ERROR
    assert "--ccn-attack" in clash.errors and "--ccn-policy" in clash.errors


def test_processes_share_the_attacks_and_measure_the_same(
    measured: tuple[Path, Certified], found: Certificate, ccn_bundle: Bundle, tmp_path: Path
) -> None:
    told: list[float] = []
    made = certify(
        ccn_bundle, policy(tmp_path), now=lambda: NOW, threads=1, tester="us", recheck="0", jobs=2,
        progress=lambda what, done, total: told.append(done / total),
    ).certificate  # fmt: skip
    assert made.targets == found.targets and made.policy == found.policy
    assert told and max(told) <= 1.0
    # Seconds are all that differs between the files of evidence.
    assert {file.path for file in made.evidence} == {file.path for file in found.evidence}
    images = {f.path: f.sha256 for f in found.evidence if f.path.endswith(".images")}
    assert images == {f.path: f.sha256 for f in made.evidence if f.path.endswith(".images")}


def test_several_targets_are_told_apart(again: Bundle, tmp_path: Path) -> None:
    result = ccn_deploy(
        *("export", again.path, "--precision", "fp32", "--precision", "int8", "--output"),
        tmp_path / "two",
        *("--calibration-samples", "50"),
    )
    assert result.returncode == 0, result.stderr
    bundle = open_bundle(tmp_path / "two")
    second = '[[target]]\nruntime = "onnxruntime-cpu"\nprecision = "int8"\n[data]'
    demanded = policy(tmp_path, POLICY.replace("[data]", second))
    made = certified(bundle, demanded).certificate
    assert [str(target.target) for target in made.targets] == [
        "onnxruntime-cpu-fp32", "onnxruntime-cpu-int8",
    ]  # fmt: skip
    fp32, int8 = made.targets
    assert fp32.program != int8.program and int8.gradient == "reference"
    outcome = run_claims(
        tmp_path, "--ccn-bundle", bundle.path, "--ccn-policy", tmp_path / "policy.toml",
        "--ccn-threads=1", "--ccn-recheck=0", "-k", "no-worse or intact",
    )  # fmt: skip
    every = outcome.passed | set(outcome.failed)
    for target in ("fp32", "int8"):
        assert f"no-worse[onnxruntime-cpu-{target}-linf-0.1-fgsm]" in every
    assert len([name for name in every if name.startswith("intact")]) == 1


def test_a_bundle_that_cannot_keep_evidence_is_not_certified(
    ccn_bundle: Bundle, tmp_path: Path
) -> None:
    (ccn_bundle.path / "evidence").write_text("in the way")
    policy(tmp_path)
    result = ccn_deploy("certify", ccn_bundle.path, "--policy", tmp_path / "policy.toml")
    assert result.returncode == ExitCode.ENVIRONMENT, result.stderr
    assert "Traceback" not in result.stderr
    assert not (ccn_bundle.path / "certificate.json").exists()


def test_confidence_intervals_are_exact() -> None:
    """Clopper and Pearson for none and all, by their closed forms."""
    low, high = clopper_pearson(0, 30)
    assert low == 0.0 and np.isclose(high, 1 - 0.025 ** (1 / 30))
