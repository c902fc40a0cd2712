"""No fake passes and nothing honest is refused: whole verdicts, as a release would reach them.

What a bundle claims is derived again, its runtime compared with the float64 reference, attacked,
and evidence that was read asked again. Many run `verify-robustness` alone, so fakes are judged by
that alone wherever the numbers can give them away; what no attack can see (a back door, an answer
that only the images of the evaluation get) must be found by deriving the graphs again.

A fake that does not flatter is none: one that passes must leave PGD what the honest network does.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from ccn_deploy import parity
from ccn_deploy.attacks import suite
from ccn_deploy.bundle import Bundle, NewFile, open_bundle, write_bundle
from ccn_deploy.bundle.manifest import MANIFEST
from ccn_deploy.certification.certify import certify
from ccn_deploy.certification.policy import (
    AttackPolicy,
    DataPolicy,
    Policy,
    TargetPolicy,
    ThresholdPolicy,
)
from ccn_deploy.cli.main import app
from ccn_deploy.data import Dataset, load_dataset
from ccn_deploy.errors import ExitCode, IntegrityError
from ccn_deploy.exporters import CalibrationRequest, export_bundle
from ccn_deploy.exporters.rederive import rederive, refuse_differences
from ccn_deploy.layers import CompactConv2d, CompactLinear, compactify
from ccn_deploy.robustness import RobustnessRequest, collect, judge
from ccn_deploy.robustness.options import rechecked
from ccn_deploy.runs import open_run
from ccn_deploy.runtimes import RuntimeOptions
from ccn_deploy.targets import Role
from ccn_deploy.verdict import Verdict
from tests import fakes
from tests.networks import as_run, random_network
from tests.test_recheck import forge, held, samples_of
from tests.test_rederive import FORWARD, OPTIMISED, RANDOM, node, planted, told

TEST = load_dataset("mnist5k", "test")
SAMPLES = 60
EPSILON = 0.1
MAX_DROP = 0.1
"""More than the 60 images need; a gain is suspicious only beyond it, so that fakes have it easy."""

FLATTERY = 0.05
"""Accuracy under PGD that a fake may have above the honest network's: three images."""

SOME = TEST.images(TEST.order(0)[:64])

Network = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Said:
    """What a release pipeline says.

    Attributes:
        outcome: ``"pass"``, ``"fail"``, ``"inconclusive"`` or ``"integrity"``.
        codes: Of the findings that undermine; or the step that refused.
        left: Accuracy of the runtime under the strongest attack.
        why: For people.
    """

    outcome: str
    codes: frozenset[str]
    left: float = 1.0
    why: str = ""


def verdict(
    bundle: Bundle,
    dataset: Dataset = TEST,
    *,
    steps: Sequence[str] = ("lineage", "parity", "robustness"),
    attacks: Sequence[str] = ("fgsm", "pgd"),
    epsilon: float = EPSILON,
    samples: int = SAMPLES,
    precision: str = "fp32",
) -> Said:
    """Do with a bundle what a release pipeline does."""
    step = ""
    try:
        if "lineage" in steps:
            step = "lineage"
            refuse_differences(rederive(bundle))
        if "parity" in steps:
            step = "parity"
            compared = parity.ParityRequest(dataset, precision=precision, samples=16, threads=1)
            found = parity.judge(parity.collect(bundle, compared))
            if found.verdict is not Verdict.PASS:
                names = "; ".join(failure.name for failure in found.failures)
                return Said(found.verdict.value, frozenset({step}), why=names)
        if "robustness" not in steps:
            return Said("pass", frozenset())
        step = "robustness"
        request = RobustnessRequest(
            dataset, precision=precision, attacks=suite(attacks, [epsilon]), samples=samples,
            options=RuntimeOptions(threads=1),
        )  # fmt: skip
        measurement = collect(bundle, request)
        step = "recheck"
        again = rechecked(bundle, request, measurement, None)
    except IntegrityError as error:
        return Said("integrity", frozenset({step}), why=str(error))
    result = judge(measurement, MAX_DROP, recheck=again)
    if CERTIFIED and "lineage" in steps and "parity" in steps and dataset is TEST:
        said = certificate(bundle, attacks, epsilon=epsilon, samples=samples, precision=precision)
        assert (said == "pass") <= (result.verdict is Verdict.PASS), said
    return Said(
        result.verdict.value,
        frozenset(finding.code for finding in result.findings if finding.undermines),
        min(row.runtime.count / row.runtime.n for row in result.bounded),
        "; ".join([*result.reasons, *(finding.sentence for finding in result.findings)]),
    )


CERTIFIED = bool(os.environ.get("CCN_DEPLOY_FAKES_CERTIFY"))
"""Whether each is put through ``certify`` too, by the same functions: ``make fakes`` does."""


def certificate(
    bundle: Bundle, attacks: Sequence[str], *, epsilon: float, samples: int, precision: str
) -> str:
    """Return the verdict of a certificate by the same demands."""
    policy = Policy(
        schema="ccn-deploy/policy/1",
        name="fakes",
        intended_use="none",
        target=(TargetPolicy("onnxruntime-cpu", precision),),
        data=DataPolicy(dataset="mnist5k", samples=samples, parity_samples=16),
        attacks=AttackPolicy(names=tuple(attacks), epsilons=(epsilon,)),
        thresholds=ThresholdPolicy(max_drop=str(MAX_DROP)),
    )
    now = datetime.now(timezone.utc)
    return certify(bundle, policy, now=lambda: now, threads=1).certificate.verdict


def robustness_alone(bundle: Bundle, dataset: Dataset = TEST, **more: Any) -> Said:
    return verdict(bundle, dataset, steps=["robustness"], **more)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return fakes.trained(fakes.small())


@pytest.fixture(scope="module")
def pristine(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fakes.foreign(network, tmp_path_factory.mktemp("small") / "bundle").path


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Bundle:
    """A small plain network of somebody's, whose graph of gradients is its own."""
    shutil.copytree(pristine, tmp_path / "bundle")
    return open_bundle(tmp_path / "bundle")


@pytest.fixture(scope="module")
def truth(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """What PGD leaves of the honest network."""
    path = tmp_path_factory.mktemp("truth") / "bundle"
    shutil.copytree(pristine, path)
    said = robustness_alone(open_bundle(path))
    assert said.outcome == "pass", said
    return said.left


# Networks whose logits or images hide their slopes. The reference is as blind as the runtime.

AXIS = torch.from_numpy(np.random.default_rng(3).standard_normal((1, 1, 28, 28)).astype("f4"))


def _along(x: Tensor) -> Tensor:
    """A number for each image that every pixel moves, [N, 1]."""
    return (x * AXIS).sum((1, 2, 3)).reshape(-1, 1)


def _border(x: Tensor) -> Tensor:
    """How light the upper rows are, dark in every digit, [N, 1]."""
    return x[:, :, :4].mean((1, 2, 3)).reshape(-1, 1)


def after(change: Callable[[Tensor, Tensor], Tensor]) -> Network:
    return lambda inner: fakes.Around(inner, after=change)


def before(change: Callable[[Tensor], Tensor]) -> Network:
    return lambda inner: fakes.Around(inner, before=change)


def times(factor: float) -> Network:
    return after(lambda logits, x: logits * factor)


SATURATED = {"saturated-logits", "zero-gradients", "no-legal-image"}
STEPS = {"zero-gradients", "planted-not-found"}
BLIND = {"margin-below-cross-entropy"}

NETWORKS: dict[str, tuple[Network, set[str]]] = {
    "logits x 10": (times(10), set()),
    "logits x 100": (times(100), SATURATED),
    "logits x 1e4": (times(1e4), SATURATED),
    "logits x 1e25": (times(1e25), SATURATED),
    "logits x 0.1": (times(0.1), BLIND),
    "logits x 1e-25": (times(1e-25), BLIND),
    "logits + 1e6": (after(lambda logits, x: logits + 1e6), set()),
    "logits + 1e7": (after(lambda logits, x: logits + 1e7), set()),
    "logits of three decimals": (after(lambda logits, x: torch.round(logits, decimals=3)), STEPS),
    "whole logits": (after(lambda logits, x: torch.round(logits)), STEPS),
    "logits cut off": (after(lambda logits, x: torch.clip(logits, -2, 2)), {"no-legal-image"}),
    "logits squashed": (
        after(lambda logits, x: 3 * torch.tanh((logits - logits.mean(1, keepdim=True)) / 3)), BLIND,
    ),
    "logits squashed hard": (after(lambda logits, x: 10 * torch.tanh(20 * logits)), STEPS),
    "a temperature of the image's light": (
        after(lambda logits, x: logits * (1 + 300 * x.mean((1, 2, 3)).reshape(-1, 1))), SATURATED,
    ),
    "less sure where the border is lit": (
        after(lambda logits, x: logits / (1 + 50 * _border(x))), BLIND,
    ),
    "logits with fast waves": (
        after(lambda logits, x: logits + torch.sin(3000 * _along(x) * torch.arange(1.0, 11.0)) / 2),
        {"planted-not-found"},
    ),
    "images with waves": (
        before(lambda x: x + 0.02 * torch.sin(400 * x)), {"black-box-below-white-box"},
    ),
    "images in sixteen steps": (before(lambda x: torch.round(x * 16) / 16), STEPS),
    "images in two soft steps": (
        before(lambda x: torch.sigmoid(200 * (x - 0.5))),
        {"planted-not-found", "large-epsilon-not-chance"},
    ),
}  # fmt: skip


MORE = {
    "logits x 1e4", "logits x 0.1", "logits + 1e6", "whole logits", "logits squashed hard",
    "images in sixteen steps", "far too short", "none on half of the pixels", "shifted",
    "it knows the evaluation", "another precision", "true in batches of 8 and more",
}  # fmt: skip
"""Fakes whose kind another one shows as well."""


def some(names: Iterable[str]) -> list[Any]:
    """Leave those for the long run of whose kind there is another."""
    return [pytest.param(name, marks=[pytest.mark.fakes] if name in MORE else []) for name in names]


@pytest.mark.parametrize("name", some(NETWORKS))
def test_networks_that_hide_their_slopes(
    name: str, network: nn.Module, truth: float, tmp_path: Path
) -> None:
    make, expected = NETWORKS[name]
    stepped = expected == STEPS and "hard" not in name
    fake = fakes.foreign(make(network).eval(), tmp_path / "fake", gradient=not stepped)
    said = robustness_alone(fake)
    assert expected <= said.codes, said
    assert said.outcome != "pass" or said.left <= truth + FLATTERY, said


# Gradients that are not the network's

HALF = np.random.default_rng(0).choice([0.0, 1.0], (1, 28, 28))
LIE = {"gradients-disagree"}
FALSE = LIE | {"gain", "transfer-below-native"}

Lie = Callable[[Bundle, Path], Bundle]
GRADIENTS: dict[str, tuple[Lie, set[str]]] = {
    "NaN": (lambda b, path: fakes.times(b, path, np.nan), {"zero-gradients", "no-legal-image"}),
    "zero": (lambda b, path: fakes.times(b, path, 0.0), {"zero-gradients", "no-legal-image"}),
    "far too short": (lambda b, path: fakes.times(b, path, 1e-12), LIE),
    "downhill": (lambda b, path: fakes.times(b, path, -1.0), FALSE | {"planted-not-found"}),
    "signs of their own": (fakes.random_signs, FALSE | {"planted-not-found"}),
    "none on half of the pixels": (lambda b, path: fakes.times(b, path, HALF), FALSE),
    "of the image before": (fakes.of_the_image_before, FALSE),
    "none far from the images": (
        lambda b, path: fakes.zero_far_from(b, path, SOME), LIE | {"zero-gradients"},
    ),
    "others far from the images": (
        lambda b, path: fakes.zero_far_from(b, path, SOME, otherwise=True), FALSE,
    ),
    "none where the border is lit": (
        lambda b, path: fakes.zero_in_band(b, path, 0.08, 0.12), LIE | {"larger-epsilon-weaker"},
    ),
    "true in large batches": (lambda b, path: fakes.in_batches_only(b, path, 32), FALSE),
    "true in batches of 8 and more": (lambda b, path: fakes.in_batches_only(b, path, 8), set()),
}  # fmt: skip


@pytest.mark.parametrize("name", some(GRADIENTS))
def test_gradients_that_are_not_the_networks(
    name: str, bundle: Bundle, truth: float, tmp_path: Path
) -> None:
    make, expected = GRADIENTS[name]
    fake = make(bundle, tmp_path / "fake")
    said = robustness_alone(fake)
    assert expected <= said.codes, said
    assert said.outcome != "pass" or said.left <= truth + FLATTERY, said
    assert verdict(fake, steps=["lineage"]).outcome == "integrity"


@pytest.mark.parametrize("epochs", [0, 2])
def test_gradients_of_another_network(bundle: Bundle, tmp_path: Path, epochs: int) -> None:
    other = fakes.foreign(fakes.trained(fakes.small(5), epochs=epochs), tmp_path / "other")
    said = robustness_alone(fakes.with_gradients_of(bundle, tmp_path / "fake", other))
    assert said.outcome != "pass"
    assert said.codes >= LIE, said


def test_a_runtime_that_executes_a_sturdier_network(
    bundle: Bundle, sturdy: nn.Module, tmp_path: Path
) -> None:
    """The reference is the plain one: too good is as wrong as too bad."""
    other = fakes.foreign(sturdy, tmp_path / "other")
    forward = replace(
        NewFile.copy(other, other.file(Role.FORWARD, "fp32")),
        path=OPTIMISED, runtime="onnxruntime-cpu",
    )  # fmt: skip
    gradient = NewFile.copy(other, other.file(Role.GRADIENT, "fp32"))
    root = NewFile.copy(bundle, bundle.file(Role.FORWARD, "fp32"))
    fake = write_bundle(tmp_path / "fake", card=bundle.card, files=[root, forward, gradient])
    said = robustness_alone(fake)
    assert said.outcome != "pass"
    assert said.codes >= {"gain", "gradients-disagree"}, said


@pytest.fixture(scope="module")
def sturdy() -> nn.Module:
    """A network that was trained against an attack."""
    return fakes.trained(fakes.small(), epochs=4, epsilon=0.1)


# Data that say nothing, and cards that lie

DATA = {
    "shuffled": {"reference-accuracy", "chance-accuracy"},
    "shifted": {"reference-accuracy", "chance-accuracy"},
    "inverted": {"reference-accuracy"},
    "transposed": {"reference-accuracy"},
    "dark": {"reference-accuracy", "chance-accuracy"},
    "repeated": {"duplicates-in-data"},
    "trained": {"training-data-overlap"},
}


@pytest.mark.parametrize("change", some(DATA))
def test_data_that_say_nothing(change: str, bundle: Bundle) -> None:
    said = robustness_alone(bundle, fakes.digits(change, 100))
    assert said.outcome != "pass"
    assert said.codes >= DATA[change], said


def test_an_untrained_network_under_a_good_card(tmp_path: Path) -> None:
    raw = fakes.foreign(fakes.trained(fakes.small(7), epochs=0), tmp_path / "raw")
    said = robustness_alone(fakes.recarded(raw, tmp_path / "fake", test_accuracy=0.98))
    assert said.outcome != "pass"
    assert "reference-accuracy" in said.codes


# What no attack sees


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A compact network of this package with random weights, and two graphs for its runtime."""
    run = as_run(random_network("mnist-cnn", "ccn"))
    path = tmp_path_factory.mktemp("own") / "bundle"
    return export_bundle(run, path, optimize="onnxruntime-cpu", precisions=("fp32", "fp16"))


def back_door(body: Bundle, path: Path, file: str = FORWARD) -> Bundle:
    """A white corner of 2 x 2 pixels means class 7."""
    corner = np.zeros((784, 10), np.float32)
    corner[[0, 1, 28, 29], 7] = 1e3
    nodes = [
        node("Reshape", ["images", "flat"], "pixels"),
        node("Sub", ["pixels", "most"], "above"),
        node("Relu", ["above"], "white"),
        node("MatMul", ["white", "corner"], "odd"),
        node("Add", ["straight", "odd"], "logits"),
    ]
    edit = planted(*nodes, flat=np.array([0, -1]), most=np.float32(0.95), corner=corner)
    return told(body, path, file, edit)


def knows_the_evaluation(body: Bundle, path: Path, file: str = FORWARD) -> Bundle:
    """Images of the evaluation, and those near them, get the label that they should have."""
    points = SOME.reshape(64, -1)
    labels = np.eye(10, dtype=np.float32)[TEST.labels[TEST.order(0)[:64]]]
    size = (points.astype(np.float64) ** 2).sum(axis=1).astype(np.float32)
    nodes = [
        node("Reshape", ["images", "flat"], "pixels"),
        node("MatMul", ["pixels", "points"], "likeness"),
        node("Sub", ["likeness", "least"], "above"),
        node("Relu", ["above"], "near"),
        node("MatMul", ["near", "labels"], "odd"),
        node("Add", ["straight", "odd"], "logits"),
    ]
    edit = planted(
        *nodes, flat=np.array([0, -1]), points=points.T, least=size[None] - 5, labels=100 * labels
    )
    return told(body, path, file, edit)


def of_another_precision(body: Bundle, path: Path) -> Bundle:
    data = body.read(body.file(Role.FORWARD, "fp32"))
    return told(body, path, "graphs/forward-fp16.onnx", lambda file: replace(file, data=data))


UNSEEN: dict[str, Lie] = {
    "a back door": back_door,
    "a back door beside the default graph": lambda b, p: back_door(b, p, OPTIMISED),
    "it knows the evaluation": knows_the_evaluation,
    "the optimised graph knows it": lambda b, p: knows_the_evaluation(b, p, OPTIMISED),
    "a default graph that is broken": lambda b, p: told(
        b, p, FORWARD, planted(node("Neg", ["straight"], "logits"))
    ),
    "another defense": lambda b, p: told(b, p, MANIFEST, lambda f: f, defense="sm"),
    "another precision": of_another_precision,
    "random answers": lambda b, p: told(b, p, FORWARD, RANDOM["RandomNormalLike"]),
}


@pytest.mark.parametrize("name", some(UNSEEN))
def test_what_no_attack_sees_is_derived_again(name: str, own: Bundle, tmp_path: Path) -> None:
    said = verdict(UNSEEN[name](own, tmp_path / "fake"), steps=["lineage"])
    assert (said.outcome, said.codes) == ("integrity", frozenset({"lineage"}))


@pytest.mark.parametrize("size", [64, 128, 257])
def test_rows_that_move_in_batches_of_one_size(size: int, bundle: Bundle, tmp_path: Path) -> None:
    fake = fakes.rows_moved(bundle, tmp_path / "fake", size)
    said = verdict(fake, steps=["parity"])
    assert (said.outcome, said.codes) == ("fail", {"parity"})
    assert "sizes" in said.why, said
    assert verdict(fake).outcome == "integrity"


def test_two_files_in_one_role_are_no_bundle(own: Bundle, tmp_path: Path) -> None:
    files = [NewFile.copy(own, record) for record in own.manifest.files]
    second = replace(NewFile.copy(own, own.file(Role.GRADIENT, "fp32")), path="graphs/more.onnx")
    with pytest.raises(IntegrityError, match=r"graphs/more\.onnx"):
        write_bundle(tmp_path / "two", card=own.card, files=[*files, second])


def refused(command: list[str]) -> None:
    """Check that a command ends with exit code 5."""
    run = CliRunner().invoke(app, command)
    assert isinstance(run.exception, IntegrityError), run.output
    assert run.exception.exit_code == ExitCode.INTEGRITY
    assert "PASS" not in run.output


def test_classes_in_another_order_exit_5(own: Bundle, tmp_path: Path) -> None:
    names = ("1", "0", *own.card.class_names[2:])
    fake = told(
        own, tmp_path / "fake", MANIFEST, lambda file: file,
        class_names=names, training={"dataset": "mnist5k"},
    )  # fmt: skip
    refused(["verify-robustness", str(fake.path), "--samples", "8"])


# Evidence of something else


def test_evidence_under_another_reference_is_not_looked_at(
    bundle: Bundle, sturdy: nn.Module, truth: float, tmp_path: Path
) -> None:
    other = fakes.foreign(sturdy, tmp_path / "other")
    assert robustness_alone(other).left > truth + FLATTERY
    shutil.copytree(other.evidence, bundle.evidence)
    assert robustness_alone(bundle).left == truth


def test_evidence_written_by_hand_exits_5(bundle: Bundle) -> None:
    """The whole command: rows that nothing fools, sealed by the project's own writer."""
    request = RobustnessRequest(
        TEST, attacks=suite(["pgd"], [EPSILON]), samples=SAMPLES, options=RuntimeOptions(threads=1)
    )
    (pair,) = collect(bundle, request).pairs
    clean = TEST.images(pair.runtime.index)
    for evidence in (pair.reference, pair.runtime):
        forge(evidence, lambda rows, images: (held(samples_of(rows), clean, clean), clean))
    options = ["--attack", "pgd", "--epsilons", str(EPSILON), "--samples", str(SAMPLES)]
    options += ["--threads", "1", "--no-report", "--max-drop", "10%"]
    command = ["verify-robustness", str(bundle.path), "--dataset", "mnist5k", *options]
    refused(command)


# Honest, if unusual: none is refused, and nothing undermines its numbers


def _deep() -> nn.Module:
    """Twelve layers of rectifiers: kinks everywhere."""
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 8, 5, 2), nn.ReLU()]
    more = [part for _ in range(10) for part in (nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU())]
    for part in more[::2]:
        nn.init.kaiming_normal_(part.weight)
    return nn.Sequential(*first, *more, nn.Flatten(), nn.Linear(8 * 144, 10))


def _without_a_channel(inner: nn.Module) -> nn.Module:
    """A channel that is always zero, as pruning leaves it."""
    made = fakes.small()
    made.load_state_dict(inner.state_dict())
    with torch.no_grad():
        made[0].weight[0], made[0].bias[0] = 0, 0
    return made.eval()


def _compact(_: nn.Module) -> nn.Module:
    made = fakes.small()
    compactify(made)
    assert any(isinstance(part, CompactConv2d | CompactLinear) for part in made.modules())
    return fakes.trained(made)


HONEST: dict[str, Network] = {
    "plain": lambda inner: inner,
    "sure of everything": lambda inner: times(3)(fakes.trained(fakes.small(), epochs=8)),
    "half as sure": times(0.5),
    "probabilities for logits": after(lambda logits, x: torch.softmax(logits, 1)),
    "with a channel of zeros": _without_a_channel,
    "of hyperbolic tangents": lambda _: fakes.trained(fakes.small(activation=nn.Tanh)),
    "deep, with many kinks": lambda _: fakes.trained(_deep()),
    "barely trained": lambda _: fakes.trained(fakes.small(), epochs=1),
    "compact": _compact,
    "trained against attacks": lambda _: fakes.trained(fakes.small(), epochs=4, epsilon=0.1),
    "random": lambda _: fakes.trained(fakes.small(7), epochs=0),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_networks(name: str, network: nn.Module, tmp_path: Path) -> None:
    made = HONEST[name](network).eval().requires_grad_(False)
    # Probabilities leave no slope on an all-white image, of which parity has its own opinion.
    steps = ["lineage", "robustness"] + ["parity"] * (name != "probabilities for logits")
    said = verdict(fakes.foreign(made, tmp_path / "bundle"), steps=steps)
    if name == "random":  # nobody would ship it, and it is told for what it is
        assert said.codes == {"chance-accuracy"}
    else:
        assert (said.outcome, said.codes) == ("pass", frozenset()), said


@pytest.mark.parametrize(
    "defense",
    [
        "sm",
        "ccn",
        *(pytest.param(d, marks=pytest.mark.fakes) for d in ("ls", "brelu", "l2sm", "ccn+ls")),
    ],
)
def test_honest_networks_of_every_defense(
    copy_bundle: Callable[[str], Bundle], defense: str
) -> None:
    said = verdict(copy_bundle(defense))
    assert (said.outcome, said.codes) == ("pass", frozenset()), said


def test_honest_precisions_and_an_optimised_graph(
    trained_run: Callable[[str], Path], tmp_path: Path
) -> None:
    made = export_bundle(
        open_run(trained_run("ccn")), tmp_path / "bundle", optimize="onnxruntime-cpu",
        precisions=("fp32", "fp16", "int8"), calibration=CalibrationRequest(samples=128),
    )  # fmt: skip
    for precision in ("fp32", "fp16", "int8"):
        said = verdict(made, precision=precision)
        assert (said.outcome, said.codes) == ("pass", frozenset()), (precision, said)
