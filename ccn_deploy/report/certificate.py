"""The page of a certificate: what was shown, what was not, and everything that it rests on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ccn_deploy.bundle import Bundle
from ccn_deploy.certificates.statement import (
    AttackResult,
    Certificate,
    CertifiedTarget,
    PolicyFacts,
    Statement,
    WaiverUse,
    time_of,
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
from ccn_deploy.report.curves import worst_case_curve
from ccn_deploy.report.examples import Example
from ccn_deploy.report.html import render
from ccn_deploy.report.page import target_of
from ccn_deploy.report.parity import parity_tables
from ccn_deploy.report.provenance import provenance
from ccn_deploy.report.rounding import Answer, fooled_in_8_bits
from ccn_deploy.report.view import (
    CertificatePage,
    Demand,
    Demands,
    Fact,
    Note,
    Target,
    WorstCase,
)
from ccn_deploy.robustness import Evidence, RobustnessResult, compare
from ccn_deploy.robustness.attack_session import REFERENCE
from ccn_deploy.robustness.result import listed
from ccn_deploy.robustness.tables import precision_table
from ccn_deploy.tables import NORMS, Row, Table, percent, texts

CERTIFICATE = "certificate.json"

_THRESHOLDS = ("accurate[", "robust[")
"""What the names of claims begin with that say how much must be left."""


def certificate_page(
    bundle: Bundle,
    statement: Statement,
    results: Sequence[RobustnessResult],
    parities: Sequence[Mapping[str, Any]],
    examples: Sequence[Example],
    *,
    command: str,
    answers: Mapping[str, Answer] | None = None,
    certificate: str = CERTIFICATE,
) -> str:
    """Return the page as HTML, complete in itself and without a script.

    The same certificate and evidence give the same text.

    Args:
        bundle: What was certified.
        statement: What was signed.
        results: Of the attacks, one for each of its targets, in their order.
        parities: Documents of schema ``ccn-deploy/parity/2``, likewise.
        examples: Images to show, of the first target, from
            :func:`~ccn_deploy.report.examples.hardest_examples`.
        command: What the user typed.
        answers: By target, such as ``"onnxruntime-cpu-fp32"``: what it says of images. The attacked
            ones are then asked about again as image files hold them. Of a target that is not
            among them, the page does not say how many fool it even so.
        certificate: Name of the certificate's file.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
        IntegrityError: Attacked images are not those that were kept.
        ValueError: Results or parities are not those of the statement's targets.
    """
    said, answers = statement.predicate, answers or {}
    names = [str(certified.target) for certified in said.targets]
    if names != [one.measurement.target for one in results] or names != [
        f"{one['runtime']}-{one['precision']}" for one in parities
    ]:
        raise ValueError("results and parities must be those of the certificate's targets")
    demands = [_demands(certified, said.waivers) for certified in said.targets]
    page = CertificatePage(
        verdict=headline(said.verdict, said.targets),
        reason=_unbroken(claimed(said)),
        model=bundle.card.title,
        target=listed(names),
        reference=str(REFERENCE),
        facts=_facts(said),
        precisions=_precisions(results),
        targets=[
            _target(certified, result, of_it, answers.get(of_it.target))
            for certified, result, of_it in zip(said.targets, results, demands, strict=True)
        ],
        parity=_parity(parities),
        examples=examples,
        class_names=bundle.card.class_names,
        pictured=names[0],
        findings=list(_findings(said)),
        command=command,
        provenance=_provenance(bundle, said, results),
        digests=_digests(statement),
        version=said.versions["ccn-deploy"],
        worst=[_worst(certified) for certified in said.targets],
        not_claimed=said.not_claimed,
        assumptions=said.assumptions,
        use=[
            Fact("Intended use", said.intended_use, "not said"),
            Fact("Where it fails or is not sure", said.fallback, "what happens then is not said"),
            Fact("How it is watched", said.monitoring, "not said"),
        ],
        demands=demands,
        check=CHECK.format(certificate),
        machines=[(str(certified.target), _machine(certified)) for certified in said.targets],
    )
    return render(page, "certificate.html.j2")


def _worst(certified: CertifiedTarget) -> WorstCase:
    name, mark = str(certified.target), headline(certified.verdict, [certified])
    if (worst := certified.worst) is None:
        return WorstCase(name, mark)
    low, high = worst.ci95
    return WorstCase(
        target=name,
        verdict=mark,
        percent=percent(worst.value),
        interval=(100 * low, 100 * high),
        count=worst.count,
        n=worst.n,
        attack=certified.worst_attack,
    )


def _facts(said: Certificate) -> list[Fact]:
    data, clean = said.data, said.targets[0].clean[1]
    low, high = clean.ci95
    return [
        Fact("Issued", _day(said.issued), f"by {said.tester}" if said.tester else ""),
        Fact("Good until", _day(said.expires)),
        Fact(
            "Accuracy without attack",
            f"{percent(clean.value)}\N{NO-BREAK SPACE}%",
            f"{percent(low)} to {percent(high)}",
        ),
        Fact("Images", f"{data.samples:,}", f"{data.name}, {data.split}"),
        Fact("Policy", said.policy.name, f"committed {_day(said.policy.committed)}")
        if said.policy.committed
        else Fact("Policy", said.policy.name, "never committed"),
        Fact("Thresholds were fixed", *_fixed(said.policy)),
        Fact("Kind of evidence", "empirical", "attacks that were tried, no proof"),
    ]


def _fixed(policy: PolicyFacts) -> tuple[str, str]:
    if policy.before_results:
        return "before any result", ""
    return "not before every result", "they may have been set to fit"


def _demands(certified: CertifiedTarget, waivers: Sequence[WaiverUse]) -> Demands:
    """Return what was demanded: what does not hold, what was required of accuracy, the rest."""
    first: list[Demand] = []
    others: list[Demand] = []
    for claim in demanded(certified):
        held = claim.verdict in ("pass", "void")
        (others if held and not claim.name.startswith(_THRESHOLDS) else first).append(
            Demand(
                name=claim.name,
                demanded=_unbroken(claim.bound),
                reached=_unbroken(claim.measured),
                mark=outcome(claim),
                waiver=waiver_of(claim, certified, waivers),
            )
        )
    return Demands(str(certified.target), summary(certified), first, others)


def _target(
    certified: CertifiedTarget, result: RobustnessResult, demands: Demands, answer: Answer | None
) -> Target:
    """Return what was found of a target: its worst case first, then attack by attack."""
    found, worst = target_of(result), worst_case_curve(result)
    return replace(
        found,
        verdict=headline(certified.verdict, [certified]),
        reason=demands.summary,
        curves=[*([worst] if worst else []), *found.curves],
        tables=[
            *found.tables[:-2],
            _attack_table(certified, result, answer),
            *found.tables[-2:],  # settings and effort
        ],
    )


def _attack_table(
    certified: CertifiedTarget, result: RobustnessResult, answer: Answer | None
) -> Table:
    """Return what attackers were allowed, what they asked, and what is left of it in a file."""
    evidence = {pair.spec.label: pair.runtime for pair in result.measurement.pairs}
    asked = answer if all(one.fetch is not None for one in evidence.values()) else None
    about = (
        "An attack may change every pixel, to values from 0 to 1, within the norm that stands "
        "beside it. "
        f"{' '.join(dict.fromkeys(map(_class, certified.results)))} Queries are those of all "
        "images."
    )
    columns = ["Attack", "Norm", "Sees", "Logits\nasked", "Gradients\nasked", "Not legal"]
    if asked is not None:
        columns += ["Fooled it", "Still fooled after\nrounding to 8\N{NO-BREAK SPACE}bits"]
        about += (
            " Image files round every pixel to one of 256 values: the last column counts the "
            "images that fool it even so. Rounding moves a pixel by up to 0.002."
        )
    rows = []
    for one in {attack.label: attack for attack in certified.results}.values():
        rows.append(
            Row(
                one.title if one.distance is not None else strength(one),
                texts(
                    NORMS[one.threat.norm],
                    sees(one),
                    *(f"{count:,}" for count in one.queries),
                    one.invalid,
                    *(_in_8_bits(evidence[one.label], asked) if asked is not None else ()),
                ),
            )
        )
    return Table("What attackers were given", columns, rows, about)


def _class(attack: AttackResult) -> str:
    return f"Its class is {attack.threat.taxonomy}; it is after {attack.threat.goal}."


def _in_8_bits(evidence: Evidence, answer: Answer) -> tuple[str, str]:
    fooled, still = fooled_in_8_bits(evidence, answer)
    return f"{fooled:,}", f"{still:,}" + (f" ({percent(still / fooled)} %)" if fooled else "")


def _precisions(results: Sequence[RobustnessResult]) -> list[Table]:
    """Return precision against robustness, for every runtime that has several."""
    runtimes = dict.fromkeys(result.measurement.runtime for result in results)
    same = [[one for one in results if one.measurement.runtime == name] for name in runtimes]
    return [precision_table(compare(several)) for several in same if len(several) > 1]


def _parity(parities: Sequence[Mapping[str, Any]]) -> list[Table]:
    tables = [table for parity in parities for table in parity_tables(parity)]
    if len(parities) == 1:
        return tables
    return [
        replace(table, title=f"{table.title}: {parity['runtime']}-{parity['precision']}")
        for parity in parities
        for table in parity_tables(parity)
    ]


def _findings(said: Certificate) -> Iterator[Note]:
    several = len(said.targets) > 1
    if not said.policy.before_results:
        yield Note("Warning", LATE)
    for certified in said.targets:
        for note in certified.findings:
            whose = f"{certified.target}: " if several else ""
            yield Note(note.word, f"{whose}{note.sentence}")


def _machine(certified: CertifiedTarget) -> list[Fact]:
    hardware = certified.hardware
    gpu = [hardware.gpu, f"compute capability {hardware.compute_capability}",
           f"driver {hardware.driver}"]  # fmt: skip
    versions = (f"{name} {version}" for name, version in sorted(certified.measured_with.items()))
    facts = [
        Fact("Target", str(certified.target)),
        Fact("Program", certified.program),
        Fact("SHA-256 of the program", certified.program_sha256, code=True),
        Fact("Executed by", f"{certified.library} {certified.library_version}".strip()),
        Fact("Processor", f"{hardware.processor}, {hardware.system} {hardware.architecture}"),
        Fact("Instruction sets", ", ".join(hardware.instruction_sets)),
        Fact("GPU", ", ".join(gpu) if hardware.gpu else ""),
        Fact("Gradients of the attacks", certified.gradient),
        Fact("Evidence", certified.origin),
        Fact("Measured with", ", ".join(versions)),
    ]
    return [fact for fact in facts if fact.value]


def _provenance(
    bundle: Bundle, said: Certificate, results: Sequence[RobustnessResult]
) -> list[Fact]:
    again = [f"{fact.path} {fact.status}" for fact in said.lineage]
    measured = {"Versions", "Machine"}  # stand with each target
    facts = [
        Fact("Measured by", said.tester),
        Fact("Issued", said.issued),
        Fact("Good until", said.expires),
        *(
            fact
            for fact in provenance(bundle, [one.measurement for one in results])
            if fact.name not in measured
        ),
        Fact("Derived again", "; ".join(again)),
        Fact("Written by", ", ".join(f"{name} {v}" for name, v in sorted(said.versions.items()))),
        Fact("Policy", said.policy.name),
        Fact("Policy committed", said.policy.committed or "never"),
    ]
    return [fact for fact in facts if fact.value]


def _digests(statement: Statement) -> list[Fact]:
    """Return what the certificate is about and rests on, as it has it."""
    said = statement.predicate
    facts = [
        Fact("Bundle", said.bundle, code=True),
        *(Fact(one.name, one.digest.sha256, code=True) for one in statement.subject),
        Fact("Policy", said.policy.sha256, code=True),
        Fact("Commitment of the policy", said.policy.commitment, code=True),
        *(Fact(file.path, file.sha256, code=True) for file in said.evidence),
    ]
    return [fact for fact in facts if fact.value]


def _unbroken(text: str) -> str:
    """Keep numbers and their sign of percent on one line."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _day(moment: str) -> str:
    day = time_of(moment)
    return f"{day.day}\N{NO-BREAK SPACE}{day:%B}\N{NO-BREAK SPACE}{day.year}"
