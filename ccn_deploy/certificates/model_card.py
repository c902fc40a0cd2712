"""A certificate as a model card for the Hugging Face Hub: Markdown with YAML in front.

The metadata are those of https://github.com/huggingface/hub-docs/blob/main/modelcard.md. Names and
sentences in a certificate are other people's: nothing in them is taken for YAML, Markdown or HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ccn_deploy.certificates.statement import (
    AttackResult,
    Certificate,
    CertifiedTarget,
    Proportion,
    Statement,
)
from ccn_deploy.certificates.wording import (
    CHECK,
    LATE,
    claimed,
    demanded,
    headline,
    outcome,
    sees,
    strength,
    summary,
    waiver_of,
)
from ccn_deploy.tables import NORMS, Mark, Row, Table, markdown, percent, texts

LIBRARY = "ccn-deploy"
TASK = "image-classification"


def model_card(statement: Statement, certificate: str = "certificate.json") -> str:
    """Return the model card that says what a certificate says.

    Args:
        statement: What was signed.
        certificate: Name of the certificate's file.
    """
    said = statement.predicate
    front = "".join(_yaml(_metadata(said)))
    return f"---\n{front}---\n\n" + "\n\n".join(_body(said, certificate)) + "\n"


def _metadata(said: Certificate) -> dict[str, Any]:
    families = [certified.target.kind.family for certified in said.targets]
    tags = [LIBRARY, "onnx", *families, "adversarial-robustness"]
    return {
        "library_name": LIBRARY,
        "pipeline_tag": TASK,
        "tags": list(dict.fromkeys(tags)),
        "metrics": ["accuracy"],
        "model-index": [
            {
                "name": said.network["title"],
                "results": [_results(said, certified) for certified in said.targets],
            }
        ],
    }


def _results(said: Certificate, certified: CertifiedTarget) -> dict[str, Any]:
    target, metrics = str(certified.target), []

    def add(name: str, found: Proportion, **how: Any) -> None:
        metrics.append(
            {
                "type": "accuracy",
                "name": f"{name} ({target})",
                "value": found.value,
                "args": {**how, "images": found.n, "right": found.count, "ci95": [*found.ci95]},
                "verified": False,  # the Hub keeps true for what it has measured itself
            }
        )

    add("Accuracy without attack", certified.clean[1])
    if certified.worst is not None:
        add(f"Accuracy in the worst case: {certified.worst_attack}", certified.worst)
    for attack in certified.results:
        threat = attack.threat
        add(
            f"Accuracy under {strength(attack)}",
            attack.target,
            norm=threat.norm,
            knowledge=threat.knowledge,
            **({"distance": attack.distance} if threat.epsilon is None else {}),
            **({"epsilon": threat.epsilon} if threat.epsilon is not None else {}),
        )
    return {
        "task": {"type": TASK, "name": "Image classification"},
        "dataset": {
            "type": _identifier(said.data.name),
            "name": said.data.name,
            "split": _identifier(said.data.split),
        },
        "metrics": metrics,
    }


def _identifier(name: str) -> str:
    """Return a name as the Hub allows it where it expects the id of a data set or a split."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:96] or "unknown"


def _body(said: Certificate, certificate: str) -> Iterator[str]:
    yield f"# {_text(said.network['title'])}"
    yield f"> **{headline(said.verdict, said.targets).word}:** {_text(claimed(said))}"
    several = len(said.targets) > 1
    for certified in said.targets:
        yield _worst(certified)
    yield (
        f"Shown by attacks that were tried, not by proof, on {said.data.samples:,} images of "
        f"{_text(said.data.name)}, {_text(said.data.split)} split. Good from {said.issued} until "
        f"{said.expires}."
    )
    yield "## What was not shown"
    yield _list(said.not_claimed)
    yield "## Intended use"
    yield _text(said.intended_use) or "Not said."
    yield f"Where it fails or is not sure: {_text(said.fallback) or 'not said'}"
    yield f"How it is watched: {_text(said.monitoring) or 'not said'}"
    yield "## What it takes for granted"
    yield _list(said.assumptions)
    for certified in said.targets:
        of = f": {certified.target}" if several else ""
        yield f"## What was demanded{of}"
        yield summary(certified)
        yield _set(_demands(said, certified))
        yield f"## Under attack{of}"
        yield _set(_attacks(certified))
    yield (
        "Images that are right and stay right, each program attacked by itself, with 95 % "
        "intervals for the choice of images. A number beside an attack that has no strength of its "
        "own is the distance within which no image was found."
    )
    if findings := [*_findings(said)]:
        yield "## What readers of these numbers must know"
        yield _list(findings)
    yield "## What was measured"
    yield "\n".join(f"* {_text(name)}: {_text(value)}" for name, value in _facts(said) if value)
    yield "## How to check it"
    yield (
        "This card says what the certificate says; anybody could have written it. What counts is "
        "the certificate, the bundle, and the public key of whoever vouches for them, got from "
        "themselves. Without the key nobody vouches for it."
    )
    command = CHECK.format(certificate)
    yield f"```console\n$ pip install 'ccn-deploy[certify]'\n$ {command}\n```"


def _worst(certified: CertifiedTarget) -> str:
    if (worst := certified.worst) is None:
        return f"**{certified.target}**: no attack has a strength, so there is no worst case."
    low, high = worst.ci95
    return (
        f"**{percent(worst.value)} %** of the images stay right whichever attack is tried: "
        f"{worst.count:,} of {worst.n:,}, 95 % interval {percent(low)} to {percent(high)} %. "
        f"{_text(certified.worst_attack)}, on {certified.target}."
    )


def _demands(said: Certificate, certified: CertifiedTarget) -> Table:
    rows = []
    for claim in demanded(certified):
        cells = (claim.bound, f"{claim.measured} {waiver_of(claim, certified, said.waivers)}")
        rows.append(Row(_text(claim.name), texts(*map(_text, cells)), outcome(claim)))
    return Table("", ("Claim", "Demanded", "Reached"), rows)


def _attacks(certified: CertifiedTarget) -> Table:
    return Table(
        "",
        ("Attack", "Norm", "Sees", "Reference", str(certified.target)),
        [
            Row("none", texts("", "", *map(_share, certified.clean))),
            *map(_attack, certified.results),
        ],
        judged="No worse than the reference",
    )


def _attack(attack: AttackResult) -> Row:
    shares = map(_share, (attack.reference, attack.target))
    mark = Mark(attack.verdict.capitalize(), attack.verdict)
    return Row(
        _text(strength(attack)), texts(NORMS[attack.threat.norm], sees(attack), *shares), mark
    )


def _share(found: Proportion) -> str:
    low, high = found.ci95
    return f"{percent(found.value)} % ({percent(low)} to {percent(high)})"


def _findings(said: Certificate) -> Iterator[str]:
    if not said.policy.before_results:
        yield LATE
    for certified in said.targets:
        for note in certified.findings:
            yield f"{certified.target}: {note.word}: {note.sentence}"


def _facts(said: Certificate) -> Iterator[tuple[str, str]]:
    for name, value in said.network.items():
        yield name.capitalize(), value
    yield "Bundle", said.bundle
    yield "Data", f"{said.data.name}, {said.data.split} split, {said.data.sha256}"
    yield "Selection", f"{said.data.selection}; seed {said.data.seed}"
    yield "Policy", f"{said.policy.name}, {said.policy.sha256}"
    yield "Measured by", said.tester
    for certified in said.targets:
        hardware = certified.hardware
        facts = (
            f"{certified.program}, {certified.program_sha256}",
            f"{certified.library} {certified.library_version}",
            f"{hardware.system} {hardware.architecture}",
            hardware.processor,
            hardware.gpu,
            f"{certified.gradient} gradients",
        )
        yield str(certified.target), ", ".join(filter(None, facts))


def _set(table: Table) -> str:
    """Return a table as Markdown, its text to the left."""
    heads, rule, *rows = markdown(table).split("\n")
    return "\n".join([heads, rule.replace(":", ""), *rows])


def _list(sentences: Iterable[str]) -> str:
    return "\n".join(f"* {_text(sentence)}" for sentence in sentences)


def _text(text: str) -> str:
    """Return text that Markdown shows as it is, on one line.

    What could begin markup, HTML, a formula, an entity or a mention is escaped, and addresses are
    no links. Pipes are left to whoever sets a table.
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = re.sub(r"[\\`*_\[\]<>~$&!#@{}]", r"\\\g<0>", line)
    line = re.sub(r"^([-+=]|\d+(?=[.)]))", _first, line)
    return line.replace("://", ":\\//").replace("www.", "www\\.")


def _first(found: re.Match[str]) -> str:
    """Escape what would make a line a list: a dash, or the point after a number."""
    start = found.group()
    return f"{start}\\" if start.isdigit() else f"\\{start}"


def _yaml(value: Any, indent: int = 0) -> Iterator[str]:
    """Yield the lines of a mapping or a list. Keys are ours; every other string is quoted."""
    pad = "  " * indent
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(item, Mapping | list):
                yield f"{pad}{key}:\n"
                yield from _yaml(item, indent + 1)
            else:
                yield f"{pad}{key}: {_scalar(item)}\n"
    elif isinstance(value, list):
        for item in value:
            first, *rest = _yaml(item, indent + 1)
            yield f"{pad}- {first.lstrip(' ')}"
            yield from rest
    else:
        yield f"{pad}{_scalar(value)}\n"


def _scalar(value: str | float | bool) -> str:
    """Return a scalar in YAML, which is mostly as JSON has it.

    JSON leaves characters as they are that YAML does not allow, and writes 1e-07, which YAML 1.1
    takes for text for want of a point.
    """
    if isinstance(value, str):
        quoted = json.dumps(value, ensure_ascii=False)
        return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)
    text = json.dumps(value)
    return text.replace("e", ".0e") if isinstance(value, float) and "." not in text else text
