"""Policies: what a file may say, what is wrong with one that may not, and what it takes."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from ccn_deploy.bundle import Bundle
from ccn_deploy.certification.plan import plan
from ccn_deploy.certification.policy import (
    Policy,
    json_schema,
    read_policy,
    shipped_schema,
    template,
)
from ccn_deploy.errors import CcnDeployError, EnvironmentUnfitError, ExitCode, UsageError
from ccn_deploy.targets import Target
from tests.test_cli import assert_clear_error, ccn_deploy

TODAY = datetime.date(2026, 6, 1)
HEAD = 'schema = "ccn-deploy/policy/1"\nname = "gate"\nintended-use = "digits"\n'
TARGET = '[[target]]\nruntime = "onnxruntime-cpu"\n'
WAIVER = (
    '[[waiver]]\nclaim = "no-worse[linf-0.1-fgsm]"\nreason = "known"\nowner = "me"\n'
    "expires = 2026-12-31\n"
)


def written(path: Path, text: str) -> Policy:
    (path / "policy.toml").write_text(text)
    return read_policy(path / "policy.toml")


def test_what_is_left_out_is_as_for_the_commands(tmp_path: Path) -> None:
    policy = written(tmp_path, HEAD + TARGET)
    policy.check(TODAY)
    options = policy.options(Path("bundle"), Target("onnxruntime-cpu"))
    assert [spec.label for spec in options.suite] == [
        f"linf-{epsilon}-audit" for epsilon in (0.1, 0.2, 0.3, 0.4)
    ]
    assert (options.allowed, options.thresholds, options.samples) == (0.01, (), 500)


def test_every_key_reaches_what_it_is_about(tmp_path: Path) -> None:
    text = (
        HEAD
        + "seed = 3\nvalid-days = 7\n"
        + TARGET
        + 'precision = "fp16"\n[data]\ndataset = "pictures"\nsamples = 40\n'
        "parity-samples = 9\nparity-layers = true\n"
        'resize = "stretch"\ncrop = "none"\ninterpolation = "box"\nlayout = "nhwc"\n'
        'npz-images = "x"\nnpz-labels = "y"\n'
        '[attacks]\nnames = ["pgd", "pgd-l2"]\nepsilons = ["8/255", 0.1]\nepsilons-l2 = [0.5]\n'
        "steps = 5\nstep-size = 0.5\nrestarts = 2\n"
        '[thresholds]\nmax-drop = "2%"\nmin-accuracy = "90%"\nmin-robust = ["pgd@0.1=50%"]\n'
    )
    policy = written(tmp_path, text)
    (target,) = policy.targets
    options = policy.options(Path("b"), target, threads=2, recheck="all", data_dir=Path("d"))
    assert str(target) == "onnxruntime-cpu-fp16" and policy.valid_days == 7
    assert (options.seed, options.samples, options.parity_samples) == (3, 40, 9)
    assert options.parity_layers
    assert (options.threads, options.again, options.data_dir) == (2, "all", Path("d"))
    data = options.data
    assert (data.resize, data.crop, data.interpolation) == ("stretch", "none", "box")
    assert (data.layout, data.images_key, data.labels_key) == ("nhwc", "x", "y")
    assert options.dataset == "pictures" and options.allowed == 0.02
    strengths = {(spec.name, round(spec.epsilon or 0, 4)) for spec in options.suite}
    assert strengths == {("pgd", 0.0314), ("pgd", 0.1), ("pgd-l2", 0.5)}
    assert all(spec.parameters["steps"] == 5 for spec in options.suite)
    assert all(spec.parameters["restarts"] == 2 for spec in options.suite)
    assert [limit.label for limit in options.thresholds] == ["accuracy>=0.9", "pgd@0.1>=0.5"]


def test_the_digest_is_of_what_a_policy_says_and_not_of_how(tmp_path: Path) -> None:
    one = written(tmp_path, HEAD + TARGET)
    assert written(tmp_path, f"# a comment\n\n{HEAD}{TARGET}").digest == one.digest
    assert written(tmp_path, HEAD + TARGET + "[data]\nsamples = 500\n").digest == one.digest
    assert written(tmp_path, HEAD + TARGET + "[data]\nsamples = 501\n").digest != one.digest


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = 'x'\n", ["schema"]),
        ("schema = 7\n", ["schema"]),
        ("not toml", ["TOML"]),
        (HEAD, ["target"]),
        (HEAD + "sampels = 4\n" + TARGET, ["sampels"]),
        (HEAD + TARGET + "[data]\nsampels = 4\n", ["data.sampels", "data.samples"]),
        (HEAD + TARGET + "[[waiver]]\nclam = 'x'\n", ["waiver.clam", "waiver.claim"]),
        (HEAD + TARGET + "[data]\nsamples = 0\n", ["samples"]),
        (HEAD + TARGET + "[data]\nsamples = 'many'\n", ["samples"]),
        (HEAD + TARGET.replace("onnxruntime-cpu", "onnxruntime"), ["onnxruntime-cpu"]),
        (HEAD + TARGET.replace("onnxruntime-cpu", "torch"), ["reference"]),
        (HEAD + TARGET + TARGET, ["twice"]),
        (HEAD + TARGET + "[thresholds]\nmin-robust = ['audit@0.1=155%']\n", ["155%"]),
        (HEAD + TARGET + "[thresholds]\nmin-accuracy = '1.0'\n", ["never be shown"]),
        (HEAD + TARGET + "[thresholds]\nmax-drop = '60'\n", ["60"]),
        (HEAD + TARGET + "[thresholds]\nmin-robust = ['adit@0.1=55%']\n", ["audit"]),
        (HEAD + TARGET + "[attacks]\nnames = []\n", ["names"]),
        (HEAD + TARGET + "[attacks]\nepsilons = [2.0]\n", ["2.0"]),
        (HEAD + TARGET + WAIVER.replace("2026-12-31", "2026-05-31"), ["ended", "2026-05-31"]),
        (HEAD + TARGET + WAIVER.replace("2026-12-31", "'soon'"), ["expires"]),
        (HEAD + TARGET + WAIVER.replace("no-worse[linf-0.1-fgsm]", "intact[bundle]"), ["waived"]),
        (HEAD + TARGET + WAIVER + "target = 'tensorrt-fp32'\n", ["tensorrt-fp32", "no target"]),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        written(tmp_path, text).check(TODAY)
    assert len(str(caught.value).splitlines()) <= 2
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("data", [b"\xff\xfe", b"a = [" * 3000, b"#" * (1 << 21)])
def test_what_is_no_policy_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "policy.toml").write_bytes(data)
    with pytest.raises(UsageError):
        read_policy(tmp_path / "policy.toml")


def test_a_newer_schema_says_to_upgrade(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentUnfitError, match="upgrade"):
        written(tmp_path, HEAD.replace("policy/1", "policy/2") + "new-key = 1\n")


def test_waivers_are_for_their_target(tmp_path: Path) -> None:
    second = '[[target]]\nruntime = "onnxruntime-cpu"\nprecision = "int8"\n'
    text = HEAD + TARGET + second + WAIVER + 'target = "onnxruntime-cpu-int8"\n'
    policy = written(tmp_path, text)
    policy.check(TODAY)
    fp32, int8 = policy.targets
    assert policy.waiver_for("no-worse[linf-0.1-fgsm]", fp32) is None
    assert policy.waiver_for("no-worse[linf-0.1-fgsm]", int8) is policy.waiver[0]
    assert policy.waiver_for("no-worse[linf-0.2-fgsm]", int8) is None


def test_the_schema_that_is_shipped_is_that_of_the_types() -> None:
    assert json.loads(shipped_schema()) == json.loads(json.dumps(json_schema()))


@pytest.mark.parametrize("defense", ["ccn"])
def test_the_template_is_a_policy_that_can_pass(
    defense: str, exported: Callable[[str], Path], tmp_path: Path
) -> None:
    path = exported(defense)
    made = tmp_path / "policy.toml"
    assert ccn_deploy("policy", "init", path, "-o", made).returncode == 0
    policy = read_policy(made)
    policy.check(TODAY)
    assert policy.targets == (Target("onnxruntime-cpu", "fp32"),)
    before = made.read_bytes()
    assert_clear_error(
        ccn_deploy("policy", "init", path, "-o", made), ExitCode.USAGE, "exists already"
    )
    assert made.read_bytes() == before
    checked = ccn_deploy("policy", "check", path, made, "--threads", "1", "--json")
    assert checked.returncode == 0, checked.stderr
    told = json.loads(checked.stdout)
    assert told["verdict"] == "pass" and told["images"] == 500
    needs = [demand["needed"] for demand in told["demands"]]
    assert needs[0] == 299  # the rule of three: (1 - 0.01) ** 299 < 0.05
    assert 0.99**299 < 0.05 < 0.99**298


def test_an_uncommented_waiver_of_the_template_is_one(ccn_bundle: Bundle, tmp_path: Path) -> None:
    text = template(ccn_bundle)
    start = text.index("# [[waiver]]")
    lines = [line.removeprefix("# ") for line in text[start:].splitlines()]
    policy = written(tmp_path, text[:start] + "\n".join(lines))
    policy.check(TODAY)
    assert policy.waiver[0].claim == "no-worse[linf-0.2-audit]"


def test_too_few_images_cannot_pass(ccn_bundle: Bundle, tmp_path: Path) -> None:
    policy = written(tmp_path, HEAD + TARGET + "[data]\nsamples = 298\n")
    found = plan(ccn_bundle, policy, threads=1)
    assert found.verdict.exit_code is ExitCode.INCONCLUSIVE
    result = ccn_deploy("policy", "check", ccn_bundle.path, tmp_path / "policy.toml")
    assert result.returncode == ExitCode.INCONCLUSIVE
    assert "too few" in result.stdout


def test_a_waiver_of_no_claim_is_refused(ccn_bundle: Bundle, tmp_path: Path) -> None:
    text = HEAD + TARGET + '[attacks]\nnames = ["fgsm"]\n' + WAIVER.replace("0.1-fgsm", "0.5-fgsm")
    (tmp_path / "policy.toml").write_text(text.replace("2026-12-31", "2099-12-31"))
    path = tmp_path / "policy.toml"
    for command in (
        ["policy", "check", ccn_bundle.path, path],
        ["certify", ccn_bundle.path, "--policy", path],
    ):
        assert_clear_error(ccn_deploy(*command), ExitCode.USAGE, "no-worse[linf-0.5-fgsm]")
    assert not (ccn_bundle.path / "certificate.json").exists()


def test_no_policy_says_how_to_get_one(ccn_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(CcnDeployError, match="policy init"):
        read_policy(tmp_path / "policy.toml")
