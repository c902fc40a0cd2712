"""The model card of a certificate: YAML that parsers read, Markdown that no name breaks."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from markdown_it import MarkdownIt

from ccn_deploy.certificates.model_card import model_card
from ccn_deploy.certificates.statement import Statement, WaiverUse
from ccn_deploy.statistics import clopper_pearson
from tests.test_certificate_page import (
    CLAIMS,
    WORDS,
    a_statement,
    certified,
    claim,
    judged,
    replaced,
    share,
)
from tests.test_report import measured

EVIL = [
    "---\nlicense: mit\n---",
    "[click](javascript:alert(1))",
    "![](http://example.invalid/pixel.png)",
    "<script>alert(1)</script>",
    "<!-- hidden",
    "<div hidden",
    "a | b \\| c \\\\| d",
    "`code` ``` ~~~",
    "# heading",
    "1. one",
    "+ item",
    "= = =",
    "*bold* __too__ ~~gone~~",
    "&lt;b&gt; &copy;",
    "http://example.invalid/a?b=c www.example.invalid",
    '"quoted": {yes: [no, *alias, &anchor]} # comment',
    "tab\there, bell\x07, next\x85line, separator\u2028, mark\ufeff",
    "Größe 数字 🙂 $x^2$ @someone",
    "yes",
    "1e-07",
    "null",
    "'single' \"double\"",
    "ends in a backslash \\",
]


def parse_yaml(text: str) -> list[Any]:
    """Return what every YAML parser that is installed makes of a text."""
    found = []
    try:
        from ruamel.yaml import YAML

        found.append(YAML(typ="safe", pure=True).load(text))
    except ImportError:
        pass
    try:
        import yaml

        found.append(yaml.safe_load(text))
    except ImportError:
        pass
    return found or pytest.skip("no YAML parser is installed to read the card with")


def parts(card: str) -> tuple[str, str]:
    begin, front, body = card.split("---\n", 2)
    assert begin == ""
    return front, body


def shown(body: str) -> tuple[str, set[str]]:
    """Return the text of Markdown as it is rendered, and the kinds of its tokens."""
    tokens = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable(
        ["table", "strikethrough"]
    )
    text, kinds = [], set()
    for token in tokens.parse(body):
        kinds.add(token.type)
        for child in token.children or ():
            kinds.add(child.type)
            text.append(child.content)
        if token.type.endswith("_close"):
            text.append("\n")
        if token.type == "fence":
            text.append(token.content)
    return "".join(text), kinds


@pytest.mark.parametrize("verdict", list(WORDS))
def test_the_card_says_what_the_certificate_says(verdict: str) -> None:
    statement = a_statement(verdict)
    body, kinds = shown(parts(model_card(statement))[1])
    assert f"{WORDS[verdict]}: {CLAIMS[verdict].removeprefix(WORDS[verdict] + ': ')}" in body
    low, high = clopper_pearson(27, 60)
    assert "45.0 % of the images stay right whichever attack is tried: 27 of 60" in body
    assert f"{100 * low:.1f} to {100 * high:.1f} %. FGSM, PGD and DeepFool, within Linf 0.3" in body
    said = statement.predicate
    for sentence in (*said.not_claimed, *said.assumptions, said.intended_use, said.fallback):
        assert sentence in body
    for found in said.targets[0].claims:
        assert found.name in body and found.bound in body
    assert "ccn-deploy verify certificate.json --bundle BUNDLE --key KEY.pub" in body
    assert "Without the key nobody vouches for it" in body
    assert said.bundle in body and said.targets[0].program_sha256 in body
    assert "table_open" in kinds


def test_the_metadata_are_those_that_the_hub_reads() -> None:
    statement = a_statement()
    (target,) = statement.predicate.targets
    for data in parse_yaml(parts(model_card(statement))[0]):
        assert (data["library_name"], data["pipeline_tag"]) == (
            "ccn-deploy",
            "image-classification",
        )
        assert "onnx" in data["tags"] and "onnxruntime" in data["tags"]
        (index,) = data["model-index"]
        (result,) = index["results"]
        assert index["name"] == "ccn on mnist-cnn"
        assert result["task"]["type"] == "image-classification"
        assert result["dataset"] == {"type": "digits", "name": "digits", "split": "test"}
        metrics = {metric["name"]: metric for metric in result["metrics"]}
        assert len(metrics) == len(result["metrics"]) == 2 + len(target.results)
        for metric in metrics.values():
            assert metric["type"] == "accuracy" and metric["verified"] is False
            assert metric["value"] == metric["args"]["right"] / metric["args"]["images"]
            assert metric["args"]["ci95"] == list(clopper_pearson(metric["args"]["right"], 60))
        worst = "FGSM, PGD and DeepFool, within Linf 0.3"
        name = f"Accuracy in the worst case: {worst} (onnxruntime-cpu-fp32)"
        assert metrics[name]["value"] == 27 / 60
        pgd = metrics["Accuracy under PGD 0.3 (onnxruntime-cpu-fp32)"]["args"]
        assert (pgd["norm"], pgd["epsilon"], pgd["knowledge"]) == ("linf", 0.3, "gradients")


def evil_statement(evil: str) -> Statement:
    """Return a statement in which everything that others name has one name."""
    broken = claim(evil, "fail", measured=evil, bound=evil, waived=True)
    waiver = WaiverUse(claim=evil, reason=evil, owner=evil, expires=evil, used=True)
    target = certified(judged(), claims=(broken,), worst_attack=evil)
    attacks = tuple(replaced(attack, title=evil) for attack in target.results)
    plain = a_statement().predicate
    return a_statement(
        "pass", (replaced(target, results=attacks),), claim=evil, not_claimed=(evil,),
        assumptions=(evil,), waivers=(waiver,), intended_use=evil, fallback=evil, monitoring=evil,
        tester=evil, network={"title": evil, evil: evil},
        data=replaced(plain.data, name=evil, split=evil, selection=evil),
        policy=replaced(plain.policy, name=evil),
    )  # fmt: skip


@pytest.mark.parametrize("evil", EVIL)
def test_names_of_others_are_text(evil: str) -> None:
    front, body = parts(model_card(evil_statement(evil)))
    for data in parse_yaml(front):
        assert set(data) == {"library_name", "pipeline_tag", "tags", "metrics", "model-index"}
        (index,) = data["model-index"]
        assert index["name"] == evil
        (result,) = index["results"]
        assert result["dataset"]["name"] == evil
        assert result["dataset"]["type"].replace("-", "a").replace("_", "a").isalnum()
    text, kinds = shown(body)
    expected = " ".join("".join(c if c.isprintable() else " " for c in evil).split())
    assert text.count(expected) >= 15
    plain = shown(parts(model_card(a_statement()))[1])[1]
    assert kinds <= plain  # no link, no image, no HTML, no code that we do not write ourselves
    # Every row of every table has the cells of its head.
    tables = [line for line in body.split("\n") if line.startswith("| ")]
    assert tables
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    rows = [
        sum(token.type in ("td_open", "th_open") for token in tokens[start:end])
        for start, end in row_spans(tokens)
    ]
    assert len(rows) == len(tables) - 2 and set(rows) == {4, 6}  # less a rule for each


def row_spans(tokens: list[Any]) -> list[tuple[int, int]]:
    starts = [at for at, token in enumerate(tokens) if token.type == "tr_open"]
    ends = [at for at, token in enumerate(tokens) if token.type == "tr_close"]
    return list(zip(starts, ends, strict=True))


def test_small_numbers_stay_numbers() -> None:
    target = certified(judged())
    threat = replaced(target.results[0].threat, epsilon=1e-7)
    target = replaced(target, results=(replaced(target.results[0], threat=threat),))
    for data in parse_yaml(parts(model_card(a_statement("pass", (target,))))[0]):
        (result,) = data["model-index"][0]["results"]
        assert result["metrics"][-1]["args"]["epsilon"] == 1e-7


def test_several_targets_and_what_was_waived() -> None:
    other = judged(replace(measured(3), precision="fp16"))
    broken = claim("robust[pgd@0.3>=0.9]", "fail", waived=True)
    waiver = WaiverUse(
        claim=broken.name, reason="watched", owner="Ada", expires="2027-01-31", used=True
    )
    targets = (certified(judged()), certified(other, worst=share(24), claims=(broken,)))
    late = replaced(a_statement().predicate.policy, before_results=False)
    statement = a_statement("pass", targets, waivers=(waiver,), policy=late)
    front, body = parts(model_card(statement))
    text = shown(body)[0]
    assert "Waived by Ada until 2027-01-31: watched" in text and "Not met, waived" in text
    assert "0 of 1 claims are met; 1 not met, waived." in text
    assert "What was demanded: onnxruntime-cpu-fp16" in text
    assert "40.0 % of the images" in text and "45.0 % of the images" in text
    assert "The policy was not committed before every result" in text
    for data in parse_yaml(front):
        assert len(data["model-index"][0]["results"]) == 2
    none = a_statement("pass", (certified(judged(), worst=None, worst_attack=""),))
    assert "there is no worst case" in model_card(none)


def test_it_needs_nothing_that_production_does_not_have() -> None:
    code = (
        "import sys, ccn_deploy.certificates.model_card; "
        "heavy = {'torch', 'onnx', 'scipy', 'numpy', 'jinja2', 'matplotlib'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy - {'numpy'} else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
