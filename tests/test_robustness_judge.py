"""The judge against records made by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
from msgspec.structs import replace
from scipy import stats

from ccn_deploy.attacks import ATTACKS, AttackSpec, suite
from ccn_deploy.robustness import Evidence, Measurement, Pair, RobustnessResult, Sample, judge
from ccn_deploy.robustness.tables import settings_table, stage_table
from ccn_deploy.verdict import Verdict


def sample(at: int, status: str, rho: float | None = None, stages: Sequence[object] = ()) -> Sample:
    right = status != "already-wrong"
    return Sample(
        index=at,
        label=1,
        clean=(1 if right else 0, 1 if right else 0),
        adversarial=(0 if status == "fooled" else 1, None),
        status=status,  # type: ignore[arg-type]
        linf=0.1,
        l2=1.0,
        rho=rho,
        stages=((1, 1),) * len(stages),
    )


def evidence(word: str, seconds: float = 1.0) -> Evidence:
    """One letter an image: h held, f fooled, w already wrong, i invalid."""
    names = {"h": "held", "f": "fooled", "w": "already-wrong", "i": "invalid"}
    return Evidence.of([sample(at, names[c]) for at, c in enumerate(word)], seconds=seconds)


def measured(*pairs: Pair, runtime: str = "onnxruntime-cpu") -> Measurement:
    return Measurement(
        runtime=runtime,
        precision="fp32",
        gradient="reference",
        dataset={"name": "d", "split": "test", "digest": "0"},
        seed=0,
        n=len(pairs[0].runtime),
        pairs=pairs,
    )


def bounded(reference: str, runtime: str, name: str = "pgd", epsilon: float = 0.1) -> Pair:
    return Pair(AttackSpec(name, "linf", epsilon), evidence(reference), evidence(runtime, 2.0))


def test_shares_flips_and_intervals_of_one_attack() -> None:
    result = judge(measured(bounded("hhhffw", "hffhfw")))
    (row,) = result.bounded
    assert (row.reference.count, row.runtime.count, row.runtime.n) == (3, 2, 6)
    assert row.flips == 3
    assert (row.gate.lost, row.gate.gained) == (2, 1)
    assert row.gate.drop == pytest.approx(1 / 6)
    assert row.already_wrong == 1
    assert row.effort.seconds == 3.0
    exact = stats.binomtest(2, 6).proportion_ci(0.95, "exact")
    assert row.runtime.ci95 == pytest.approx((exact.low, exact.high))
    assert result.clean.runtime.value == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("lost", "n", "max_drop", "expected"),
    [
        (0, 298, 0.01, Verdict.INCONCLUSIVE),
        (0, 299, 0.01, Verdict.PASS),
        (4, 1000, 0.01, Verdict.PASS),
        (5, 1000, 0.01, Verdict.INCONCLUSIVE),
        (10, 1000, 0.01, Verdict.INCONCLUSIVE),
        (11, 1000, 0.01, Verdict.FAIL),
        (0, 500, 0.005, Verdict.INCONCLUSIVE),
        (0, 1000, 0.0, Verdict.INCONCLUSIVE),
        (1, 1000, 0.0, Verdict.FAIL),
    ],
)
def test_the_gate_is_paired_and_one_sided(
    lost: int, n: int, max_drop: float, expected: Verdict
) -> None:
    result = judge(measured(bounded("h" * n, "f" * lost + "h" * (n - lost))), max_drop)
    (row,) = result.bounded
    assert row.gate.verdict is expected
    assert row.gate.upper95 == pytest.approx(stats.beta.ppf(0.95, lost + 1, n - lost))


def test_too_few_images_are_told_how_many_would_do() -> None:
    result = judge(measured(bounded("h" * 100, "h" * 100)), 0.01)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert any("299" in reason for reason in result.reasons)


def test_the_number_that_would_do_would() -> None:
    gate = judge(measured(bounded("h" * 300, "f" + "h" * 299)), 0.01).bounded[0].gate
    needed = gate.needed()
    assert needed is not None
    lost = round(needed / 300)
    again = judge(measured(bounded("h" * needed, "f" * lost + "h" * (needed - lost))), 0.01)
    assert again.bounded[0].gate.verdict is Verdict.PASS


def test_a_drop_that_is_shown_fails_the_whole() -> None:
    weak, strong = bounded("h" * 400, "h" * 400), bounded("h" * 400, "f" * 20 + "h" * 380, "fgsm")
    result = judge(measured(weak, strong), 0.01)
    assert result.verdict is Verdict.FAIL
    assert [name for name, gate in result.gates.items() if gate.reason] == ["FGSM at epsilon 0.1"]


def test_a_runtime_that_is_more_robust_passes_but_not_one_that_is_much_more_so() -> None:
    result = judge(measured(bounded("f" * 4 + "h" * 396, "h" * 400)), 0.01)
    assert (result.verdict, result.doubts) == (Verdict.PASS, ())
    result = judge(measured(bounded("f" * 60 + "h" * 340, "h" * 400)), 0.01)
    assert all(gate.verdict is Verdict.PASS for gate in result.gates.values())
    assert result.verdict is Verdict.INCONCLUSIVE
    (doubt,) = result.doubts
    assert result.reasons == (doubt.sentence,)
    assert result.shown == f"The numbers bear no verdict: {doubt.sentence}"


def test_a_fail_stays_a_fail_whatever_else_is_known() -> None:
    gaining = bounded("f" * 60 + "h" * 340, "h" * 400)
    losing = bounded("h" * 400, "f" * 20 + "h" * 380, epsilon=0.2)
    result = judge(measured(gaining, losing), 0.01)
    assert result.doubts
    assert result.verdict is Verdict.FAIL
    assert result.shown.startswith("PGD at epsilon 0.2: 20 of 400 images lost")
    assert result.doubts[0].sentence in result.reasons


def test_an_illegal_image_is_never_robust_and_leaves_doubt() -> None:
    for pair in (bounded("h" * 400, "i" + "h" * 399), bounded("i" + "h" * 399, "h" * 400)):
        result = judge(measured(pair), 0.01)
        assert result.verdict is Verdict.INCONCLUSIVE
        assert "no legal" in result.bounded[0].gate.reason
    assert judge(measured(bounded("hh", "ih"))).bounded[0].runtime.count == 1


def test_clean_accuracy_is_a_gate_too() -> None:
    # Wrong before the attack on the runtime alone, on images that the attack would win anyway.
    result = judge(measured(bounded("f" * 20 + "h" * 380, "w" * 20 + "h" * 380)), 0.01)
    assert result.bounded[0].gate.verdict is Verdict.PASS
    assert result.clean.gate.verdict is Verdict.FAIL
    assert result.verdict is Verdict.FAIL


RHO = [
    ("fooled", 0.05),
    ("fooled", 0.2),
    ("fooled", 0.25),
    ("held", None),
    ("already-wrong", 0.15),
    ("already-wrong", None),
    ("fooled", 0.6),
]


def deepfool(clip: bool = True, records: list[tuple[str, float | None]] = RHO) -> Pair:
    made = Evidence.of([sample(at, s, rho) for at, (s, rho) in enumerate(records)], seconds=1.0)
    return Pair(AttackSpec("deepfool", "l2", None, clip), made, made)


def test_deepfool_bookkeeping_is_equations_8_and_9() -> None:
    (row,) = judge(measured(deepfool())).minimal
    side = row.runtime
    assert (side.already_wrong, side.failed, side.failed_correct) == (2, 2, 1)
    found = [0.05, 0.2, 0.25, 0.15, 0.6]
    document = side.document()
    assert document["rho_adv_mean"] == pytest.approx(np.mean(found))
    assert document["rho_adv_median"] == pytest.approx(np.median(found))
    without = document["without_already_wrong"]
    assert without["rho_adv_mean"] == pytest.approx(np.mean([0.05, 0.2, 0.25, 0.6]))
    assert without["failed"] == 1
    # Right, and not found at all or only beyond d; rho = d counts as fooled within d.
    counts = {d: share.count for d, share in side.accuracy_at.items()}
    assert counts == {0.1: 4, 0.2: 3, 0.3: 2, 0.4: 2, 0.5: 2}


def test_the_smallest_distance_and_the_success_are_of_what_was_found() -> None:
    found = [replace(sample(at, "fooled", 0.1), l2=l2) for at, l2 in enumerate((1.0, 2.0, 6.0))]
    lost = [replace(sample(3, "held"), l2=99.0), replace(sample(4, "invalid"), l2=None)]
    made = Evidence.of([*found, *lost])
    (row,) = judge(measured(Pair(AttackSpec("cw", "l2"), made, made))).minimal
    document = row.document()
    assert (document["attack"], document["title"]) == ("cw", "C&W")
    for side in ("reference", "runtime"):
        assert document[side]["l2_mean"] == pytest.approx(3.0)
        assert document[side]["l2_median"] == pytest.approx(2.0)
        assert document[side]["success"] == pytest.approx(3 / 5)
        exact = stats.binomtest(3, 5).proportion_ci(0.95, "exact")
        assert document[side]["success_ci95"] == pytest.approx((exact.low, exact.high))


@pytest.mark.parametrize("name", ATTACKS)
def test_a_row_is_named_by_its_own_attack(name: str) -> None:
    title = ATTACKS[name].title
    spec = suite([name], [0.1])[0]
    made = Evidence.of(
        [sample(at, c, stages=spec.stages) for at, c in enumerate(["held", "fooled"])]
    )
    result = judge(measured(Pair(spec, made, made)))
    assert {row["title"] for row in result.document()["attacks"]} == {title}
    strengths = {gate.split(" at ")[0] for gate in result.gates}
    assert strengths == {"no attack", title}
    assert list(result.efforts) == [title]


def test_unclipped_deepfool_is_shown_and_not_judged() -> None:
    worse = deepfool(clip=False)
    worse = Pair(worse.spec, worse.reference, evidence("w" * len(RHO)))
    result = judge(measured(deepfool(), worse), max_drop=0.9)
    (row,) = result.minimal
    assert row.unclipped is not None
    assert row.unclipped.runtime.already_wrong == len(RHO)
    assert result.verdict is Verdict.PASS
    assert result.document()["attacks"][0]["unclipped"]["clip"] is False


def test_deepfool_fails_where_any_distance_does() -> None:
    near = [("fooled", 0.15)] * 50 + [("fooled", 0.45)] * 350
    far = [("fooled", 0.25)] * 50 + [("fooled", 0.45)] * 350
    pair = Pair(deepfool().spec, deepfool(records=far).runtime, deepfool(records=near).runtime)
    (row,) = judge(measured(pair), 0.01).minimal
    assert {d for d, gate in row.gates.items() if gate.verdict is Verdict.FAIL} == {0.2}
    assert row.gate is row.gates[0.2]
    assert row.flips == 50


def test_the_document_keeps_the_contract() -> None:
    result = judge(measured(bounded("hhfwwww", "hffwwww", "fgsm"), bounded("hhfwwww", "hffwwww")))
    document = json.loads(json.dumps(result.document(), allow_nan=False))
    assert document["schema"] == "ccn-deploy/robustness/2"
    assert document["verdict"] in {"pass", "fail", "inconclusive"}
    assert document["runtime"] == "onnxruntime-cpu"
    fgsm, pgd = document["attacks"]
    (smallest,) = judge(measured(deepfool())).document()["attacks"]
    for row, name in ((fgsm, "fgsm"), (pgd, "pgd")):
        assert row["attack"] == name
        assert (row["norm"], row["epsilon"], row["n"], row["verdict_flips"]) == ("linf", 0.1, 7, 1)
        for side, share in (("reference", 2 / 7), ("runtime", 1 / 7)):
            assert row[side]["robust_accuracy"] == share
            low, high = row[side]["ci95"]
            assert 0 <= low < share < high <= 1
    assert smallest["attack"] == "deepfool"
    assert (smallest["n"], smallest["already_wrong"], smallest["failed"]) == (7, 2, 2)
    for side in ("reference", "runtime"):
        assert set(smallest[side]["accuracy_at"]) == {"0.1", "0.2", "0.3", "0.4", "0.5"}
        assert smallest[side]["rho_adv_mean"] > 0
        assert smallest[side]["rho_adv_median"] > 0


def test_nothing_found_is_null_and_not_nan() -> None:
    pair = deepfool(records=[("held", None), ("already-wrong", None)])
    document = judge(measured(pair)).document()
    json.dumps(document, allow_nan=False)
    assert document["attacks"][0]["runtime"]["rho_adv_mean"] is None


def warned(result: RobustnessResult, words: str) -> bool:
    return any(words in finding.sentence for finding in result.findings)


def test_numbers_that_flatter_are_named() -> None:
    flattering = judge(measured(bounded("h" * 10, "h" * 10, "fgsm"), bounded("f" * 10, "f" * 10)))
    assert warned(flattering, "FGSM flatters")
    honest = judge(measured(bounded("h" * 10, "h" * 10, "fgsm"), bounded("h" * 10, "h" * 10)))
    assert not honest.findings
    masked = judge(measured(bounded("f" * 10, "f" * 10, "fgsm"), bounded("h" * 10, "h" * 10)))
    assert warned(masked, "Many steps find less than one")
    assert warned(judge(measured(bounded("hh", "hh", "fgsm"))), "Only FGSM was run")
    assert warned(judge(measured(bounded("ww", "ww"))), "Every image is wrong")
    assert warned(judge(measured(bounded("h", "h"), runtime="torch")), "reference itself")
    rising = judge(
        measured(bounded("f" * 7, "f" * 7, epsilon=0.1), bounded("h" * 7, "h" * 7, epsilon=0.2))
    )
    assert warned(rising, "does not find what is there")


def test_effort_is_a_mean_over_the_images_that_were_attacked() -> None:
    asked = [(1, 1), (3, 2), (0, 0), (8, 9)]
    words = ["fooled", "held", "already-wrong", "held"]
    made = Evidence.of(
        [
            replace(sample(at, s), queries=q)
            for at, (s, q) in enumerate(zip(words, asked, strict=True))
        ],
        seconds=2.0,
    )
    other = Evidence.of([replace(sample(at, "held"), queries=(1, 1)) for at in range(4)])
    pairs = [Pair(AttackSpec("pgd", "linf", e), other, made) for e in (0.1, 0.2)]
    result = judge(measured(*pairs))
    for row in result.document()["attacks"]:
        assert row["effort"]["runtime"] == {
            "attacked": 3, "forward_mean": 4.0, "backward_mean": 4.0, "seconds": 2.0
        }  # fmt: skip
        assert row["effort"]["reference"]["forward_mean"] == 1.0
    both = result.efforts["PGD"]
    assert (both.runtime.attacked, both.runtime.forward, both.runtime.seconds) == (6, 24, 4.0)
    nothing = judge(measured(bounded("w", "w"))).document()["attacks"][0]["effort"]["runtime"]
    assert nothing["attacked"] == 0 and nothing["forward_mean"] is None


def test_exact_numbers_of_a_row_are_finite() -> None:
    gate = judge(measured(bounded("hf", "fh"))).bounded[0].gate
    assert math.isfinite(gate.upper95)
    assert gate.drop == 0


def test_the_stages_of_an_audit_add_up() -> None:
    first, second = suite(["pgd", "deepfool"], [0.1])[:2]
    last = AttackSpec("transfer", "linf", 0.1)
    audit = AttackSpec(
        "audit", "linf", 0.1, stages=(first, dataclasses.replace(second, part=3), last)
    )
    # Wrong already; fooled by the first; by the second, of the first three; held; by the last.
    asked = [
        ("already-wrong", None, (0, 0), (0, 0), (0, 0)),
        ("fooled", "pgd", (3, 2), (0, 0), (0, 0)),
        ("fooled", "deepfool", (9, 9), (5, 40), (0, 0)),
        ("held", None, (9, 9), (0, 0), (1, 0)),
        ("fooled", "transfer", (9, 9), (0, 0), (1, 0)),
    ]
    made = Evidence.of(
        [
            replace(sample(at, status), stage=stage, stages=tuple(queries))
            for at, (status, stage, *queries) in enumerate(asked)
        ]
    )
    (row,) = judge(measured(Pair(audit, made, made)), 0.4).bounded
    assert [
        (
            s.runtime.attacked,
            s.runtime.fooled,
            s.runtime.left,
            s.runtime.forward,
            s.runtime.backward,
        )
        for s in row.stages
    ] == [(4, 1, 3, 30, 29), (1, 1, 2, 5, 40), (2, 1, 1, 2, 0)]
    assert row.runtime.count == row.stages[-1].runtime.left
    table = stage_table(row)
    assert [r.name for r in table.rows] == ["PGD", "DeepFool, first 3", "transfer"]
    assert [cell.text for cell in table.rows[1].cells] == [
        "1 | 1", "1 | 1", "2 | 2", "5 | 5", "40 | 40"
    ]  # fmt: skip
    stages = row.document()["stages"]
    assert [stage["attack"] for stage in stages] == ["pgd", "deepfool", "transfer"]
    assert stages[0]["parameters"] == dict(first.parameters)
    assert (stages[1]["part"], stages[1]["runtime"]["left"]) == (3, 2)


def test_every_setting_of_every_attack_is_told() -> None:
    specs = suite(["pgd", "fgsm"], [0.1], settings={"pgd": {"steps": 7}})
    result = judge(measured(*(Pair(spec, evidence("h"), evidence("h")) for spec in specs)))
    told = {row.name: row.cells[0].text for row in settings_table(result).rows}
    assert told["PGD"].startswith("steps 7, ") and "random_start yes" in told["PGD"]
    assert told["FGSM"] == "none"
    first, second = result.document()["attacks"]
    assert first["parameters"]["steps"] == 7
    assert second["parameters"] == {}
