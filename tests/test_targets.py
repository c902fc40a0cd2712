import pytest

from ccn_deploy.errors import UsageError
from ccn_deploy.targets import (
    DEPLOYED_PRECISIONS,
    DEPLOYED_RUNTIMES,
    PRECISIONS,
    RUNTIMES,
    Role,
    Target,
    precision_named,
    runtime_named,
)


def test_a_target_is_named_by_runtime_and_precision() -> None:
    target = Target("onnxruntime-cpu", "int8")
    assert str(target) == "onnxruntime-cpu-int8"
    assert (target.family, target.on_gpu, target.is_reference) == ("onnxruntime", False, False)
    assert Target("torch") == Target("torch", "fp32") and Target("torch").is_reference


@pytest.mark.parametrize("name", RUNTIMES)
def test_what_a_runtime_needs_is_told_by_its_kind(name: str) -> None:
    kind = runtime_named(name)
    assert kind.name == name
    assert kind.on_gpu == ("cuda" in name or "tensorrt" in name)
    assert kind.runs_engines == (kind.family == "tensorrt")
    assert (name in DEPLOYED_RUNTIMES) != kind.is_reference


def test_precisions_are_ordered_and_grids_have_no_gradients() -> None:
    assert DEPLOYED_PRECISIONS == ("fp32", "fp16", "bf16", "int8", "fp8")
    assert [p.name for p in PRECISIONS.values() if not p.has_gradients] == ["int8", "fp8"]
    assert not precision_named("fp64").deployed


@pytest.mark.parametrize("make", [precision_named, lambda name: Target("torch", name)])
def test_an_unknown_precision_has_one_answer(make) -> None:
    with pytest.raises(UsageError, match="Unknown precision 'in8'") as caught:
        make("in8")
    assert "Did you mean 'int8'?" in caught.value.hint


def test_an_unknown_runtime_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="Unknown runtime") as caught:
        Target("onnxruntime_cpu", "fp32")
    assert "Did you mean 'onnxruntime-cpu'?" in caught.value.hint


def test_engines_are_built_from_graphs_of_their_role() -> None:
    assert Role.GRADIENT.engine is Role.GRADIENT_ENGINE
    assert Role.FORWARD.engine is Role.ENGINE
    assert str(Role.GRADIENT_ENGINE) == "gradient-engine"
    assert [role for role in Role if role.is_engine] == [Role.ENGINE, Role.GRADIENT_ENGINE]
    assert [role for role in Role if role.has_gradients] == [Role.GRADIENT, Role.GRADIENT_ENGINE]
