"""The page of a certificate: what a manager, an auditor and a browser see of it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from ccn_deploy.bundle import Bundle
from ccn_deploy.certificates.statement import (
    AttackResult,
    Certificate,
    CertifiedTarget,
    ClaimResult,
    DataFacts,
    EvidenceFile,
    FileDigest,
    Hardware,
    LineageFact,
    ParityFigures,
    PolicyFacts,
    Proportion,
    SanityNote,
    Statement,
    Subject,
    ThreatModel,
    WaiverUse,
)
from ccn_deploy.records import decode, encode
from ccn_deploy.report import certificate_page, hardest_examples
from ccn_deploy.robustness import Evidence, Measurement, RobustnessResult, judge
from ccn_deploy.robustness.thresholds import Threshold
from ccn_deploy.statistics import clopper_pearson
from tests.test_report import (
    Browser,
    Seen,
    digits,
    installed_chromium,
    make_bundle,
    measured,
    parity,
)

chromium_of_this_module = installed_chromium
replaced = msgspec.structs.replace

COMMAND = "ccn-deploy certify bundles/ccn --policy policy.toml --sign env:KEY"
CLAIMS = {
    "pass": "Certified: ccn on mnist-cnn, deployed as onnxruntime-cpu-fp32: it keeps at least 35 % "
    "right under PGD at epsilon 0.3, shown at 95 % confidence on 60 images.",
    "fail": "Not certified: ccn on mnist-cnn, deployed as onnxruntime-cpu-fp32: "
    "robust[pgd@0.3>=0.9] is not met. Measured: 50.0 % (36.8 to 63.2) under PGD at epsilon 0.3.",
    "inconclusive": "Inconclusive, so not certified: ccn on mnist-cnn, deployed as "
    "onnxruntime-cpu-fp32: robust[pgd@0.3>=0.45] is not shown. Measured: 50.0 % (36.8 to 63.2).",
}
WORDS = {
    "pass": "Certified",
    "fail": "Not certified",
    "inconclusive": "Inconclusive, so not certified",
}


def share(count: int, n: int = 60) -> Proportion:
    return Proportion(count=count, n=n, ci95=clopper_pearson(count, n))


def claim(name: str, verdict: Any = "pass", **changed: Any) -> ClaimResult:
    return ClaimResult(**{
        "name": name,
        "verdict": verdict,
        "measured": "onnxruntime-cpu-fp32 50.0 % (36.8 to 63.2) under PGD at epsilon 0.3, at least "
        "38.7 % at 95 % confidence",
        "bound": "at least 35 %, shown at 95 % confidence",
        **changed,
    })  # fmt: skip


def attacks(result: RobustnessResult) -> Iterator[AttackResult]:
    rows: list[tuple[Any, float | None]] = [(row.spec, None) for row in result.bounded]
    rows += [(row.spec, d) for row in result.minimal for d in row.gates]
    for spec, d in rows:
        yield AttackResult(
            label=spec.label,
            title=spec.title,
            threat=ThreatModel(
                norm=spec.norm,
                epsilon=spec.epsilon,
                box=(0.0, 1.0),
                knowledge="gradients",
                goal="any wrong label",
                taxonomy="evasion, white-box (NIST AI 100-2e2025)",
            ),
            settings=dict(spec.parameters),
            distance=d,
            reference=share(30),
            target=share(30),
            invalid=0,
            queries=(6000, 2400),
            drop_upper95=0.049,
            verdict="pass",
        )


def certified(result: RobustnessResult, **changed: Any) -> CertifiedTarget:
    fields: dict[str, Any] = {
        "runtime": result.measurement.runtime,
        "precision": result.measurement.precision,
        "program": "graphs/forward-fp32.onnx",
        "program_sha256": "a" * 64,
        "library": "onnxruntime",
        "library_version": "1.23.2",
        "measured_with": {"onnxruntime": "1.23.2", "torch": "2.9.0"},
        "hardware": Hardware(
            system="linux",
            architecture="x86_64",
            processor="Sixty-four Cores at 3 GHz",
            instruction_sets=("avx2", "avx512f", "fma"),
        ),
        "gradient": "native",
        "origin": "All evidence was measured by this run.",
        "verdict": "pass",
        "clean": (share(60), share(60)),
        "worst": share(27),
        "worst_attack": "FGSM, PGD and DeepFool, within Linf 0.3",
        "results": tuple(attacks(result)),
        "parity": ParityFigures(
            verdict="pass",
            checks=12,
            failures=0,
            largest_relative=1.2e-7,
            largest_units=0.4,
            allowed_relative=1e-5,
            allowed_units=4.0,
            gradients=True,
        ),
        "claims": (
            claim("intact[bundle]", measured="9 files", bound="every SHA-256 as in the manifest"),
            claim("sane[onnxruntime-cpu-fp32]"),
            claim("no-worse[linf-0.3-pgd]"),
            claim("robust[pgd@0.3>=0.35]"),
        ),
        "findings": tuple(
            SanityNote(
                kind=found.code,
                word=found.word,
                undermines=found.undermines,
                sentence=found.sentence,
            )
            for found in result.findings
        ),
        **changed,
    }
    return CertifiedTarget(**fields)


def a_statement(
    verdict: Any = "pass", targets: tuple[CertifiedTarget, ...] = (), **changed: Any
) -> Statement:
    """Return what a certificate of 60 digits says."""
    if not targets:
        claims = certified(judged()).claims
        if verdict != "pass":
            claims = (*claims, claim("robust[pgd@0.3>=0.9]", verdict))
        targets = (certified(judged(), verdict=verdict, claims=claims),)
    fields: dict[str, Any] = {
        "claim": CLAIMS[verdict],
        "tier": "empirical",
        "verdict": verdict,
        "assumptions": (
            "Images that are met are like those of the data that it was measured on.",
            "Attackers change pixels of the images that the program is given, within the bounds "
            "that are named, and nothing else.",
        ),
        "not_claimed": (
            "This is no proof: an attack that was not tried may do more than those that were.",
            "Nothing is said of perturbations above 0.3 in Linf.",
            "Nothing is said of other changes: patches, rotations, weather, noise of cameras, "
            "images of other things, poisoned training data or back doors.",
            "Nothing is said of another runtime, precision, library version, processor or GPU than "
            "those named here.",
        ),
        "network": {"title": "ccn on mnist-cnn", "images": "1x4x4", "classes": "3"},
        "bundle": "b" * 64,
        "targets": targets,
        "data": DataFacts(
            name="digits",
            split="test",
            sha256="d" * 64,
            samples=60,
            selection="the first images of the permutation that the seed gives",
            seed=7,
        ),
        "policy": PolicyFacts(
            name="Release of the reader of digits",
            sha256="e" * 64,
            document={"name": "Release of the reader of digits"},
            committed="2026-05-30T09:00:00Z",
            commitment="f" * 64,
            before_results=True,
        ),
        "waivers": (),
        "lineage": (LineageFact(path="graphs/gradient-fp32.onnx", status="same"),),
        "evidence": (EvidenceFile(path="evidence/parity.json", bytes=9, sha256="1" * 64),),
        "intended_use": "Reads the digits of forms that were scanned.",
        "fallback": "A person reads the form.",
        "monitoring": "",
        "tester": "The release pipeline",
        "issued": "2026-06-01T12:00:00Z",
        "expires": "2026-08-30T12:00:00Z",
        "versions": {"ccn-deploy": "0.9.0", "python": "3.11.9"},
        **changed,
    }
    made = Statement(
        subject=(Subject(name="manifest.json", digest=FileDigest(sha256="2" * 64)),),
        predicate=Certificate(**fields),
    )
    return decode(encode(made), Statement, "the statement", "")  # what is not written is no truth


def judged(measurement: Measurement | None = None) -> RobustnessResult:
    thresholds = (Threshold(0.35, "pgd", 0.3),)
    return judge(measurement or measured(), 0.1, thresholds)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def page_of(bundle: Bundle, statement: Statement | None = None, **changed: Any) -> str:
    arguments: dict[str, Any] = {
        "results": [judged()],
        "parities": [parity()],
        "examples": hardest_examples(measured(), digits()),
        "command": COMMAND,
        **changed,
    }
    return certificate_page(bundle, statement or a_statement(), **arguments)


def cells(page: str) -> str:
    """Return the text of a page with cells of tables apart."""
    return Seen(page.replace("</t", " </t")).text


@pytest.mark.parametrize("verdict", ["pass", "fail", "inconclusive"])
def test_the_page_begins_with_the_certificate(verdict: str, bundle: Bundle) -> None:
    statement = a_statement(verdict)
    page = page_of(bundle, statement)
    seen = Seen(page)
    head = page[: page.index('<dl class="facts">')]
    assert f"<strong>{WORDS[verdict]}</strong>" in head
    assert f"<title>{WORDS[verdict]}: ccn on mnist-cnn</title>" in head
    said = Seen(head + "</main></body></html>").text
    assert CLAIMS[verdict].removeprefix(f"{WORDS[verdict]}: ") in said
    assert "45.0 % of the images stay right" in said
    low, high = clopper_pearson(27, 60)
    assert f"27 of 60, 95 % interval {100 * low:.1f} to {100 * high:.1f} %" in said
    assert "FGSM, PGD and DeepFool, within Linf 0.3, on onnxruntime-cpu-fp32" in said
    for sentence in statement.predicate.not_claimed:  # stands beside it, before all other things
        assert sentence in said
    assert len(re.findall(r"<strong>(?:Certified|Not|Inconcl)", page)) == 1
    assert "Reads the digits of forms" in seen.text and "A person reads the form." in seen.text


def test_everything_that_the_certificate_rests_on_is_there(bundle: Bundle) -> None:
    statement = a_statement()
    text = Seen(page_of(bundle, statement)).text
    said = statement.predicate
    for word in (
        *(digest.digest.sha256 for digest in statement.subject),
        *(file.sha256 for file in said.evidence),
        *(said.bundle, said.policy.sha256, said.policy.commitment, said.targets[0].program_sha256),
        *(said.tester, said.issued, said.expires, said.policy.name, COMMAND),
        *("1 June 2026", "30 August 2026", "Sixty-four Cores at 3 GHz", "avx512f"),
        *("onnxruntime 1.23.2", "graphs/gradient-fp32.onnx same", "before any result"),
        *said.assumptions,
    ):
        assert word in text, word
    assert "ccn-deploy verify certificate.json --bundle BUNDLE --key KEY.pub" in text
    assert "Without the key nobody vouches for it" in text
    assert "6,000" in text and "2,400" in text  # queries


def test_what_is_waived_is_said_with_its_owner(bundle: Bundle) -> None:
    broken = claim("robust[pgd@0.3>=0.9]", "fail", waived=True)
    target = certified(judged(), claims=(claim("intact[bundle]"), broken))
    waiver = WaiverUse(
        claim=broken.name,
        reason="known, and watched",
        owner="the release manager",
        expires="2027-01-31",
        used=True,
    )
    unused = replaced(waiver, claim="sane[onnxruntime-cpu-fp32]", owner="nobody", used=False)
    page = page_of(bundle, a_statement("pass", (target,), waivers=(waiver, unused)))
    text = Seen(page).text
    assert text.index(broken.name) < text.index("intact[bundle]")  # what does not hold comes first
    assert page.count("<strong>Certified, with 1 waived</strong>") == 1
    assert "1 of 2 claims are met; 1 not met, waived." in text
    assert "Not met, waived" in text and "nobody" not in text.replace("nobody vouches", "")
    assert "Waived by the release manager until 2027-01-31: known, and watched" in text


def test_a_policy_that_came_late_is_a_warning(bundle: Bundle) -> None:
    assert "may have been set to fit" not in Seen(page_of(bundle)).text
    late = replaced(a_statement().predicate.policy, before_results=False, committed=None)
    text = Seen(page_of(bundle, a_statement(policy=late))).text
    assert "Warning: The policy was not committed before every result" in text
    assert "never committed" in text


def test_the_worst_case_has_a_curve_below_all_others(bundle: Bundle) -> None:
    """FGSM holds the even images and PGD the odd ones: each leaves half, and together nothing."""

    def turned(evidence: Evidence) -> Evidence:
        other = np.where(evidence.status == "held", "fooled", "held")
        labels = np.where(other == "held", evidence.label, (evidence.label + 1) % 3)
        return replace(evidence, status=other, adversarial_runtime=labels, rho=evidence.linf)

    measurement = measured()
    pairs = tuple(
        replace(pair, runtime=turned(pair.runtime)) if pair.spec.name == "pgd" else pair
        for pair in measurement.pairs
    )
    result = judged(replace(measurement, pairs=pairs))
    page = page_of(bundle, a_statement("pass", (certified(result),)), results=[result])
    found = dict(re.findall(r'aria-label="Accuracy on the runtime under ([^:]+): ([^"]+)"', page))
    assert next(iter(found)) == "Worst case over all attacks"
    assert found["FGSM"] == found["PGD"] == "100.0 % at 0, 50.0 % at 0.1, 50.0 % at 0.3"
    assert found["Worst case over all attacks"] == "100.0 % at 0, 0.0 % at 0.1, 0.0 % at 0.3"


def test_rounding_to_8_bits_is_counted_image_by_image(bundle: Bundle) -> None:
    """A network that sees thousandths: half of the attacked images are rounded back."""
    measurement = measured()
    names = [pair.spec.label for pair in measurement.pairs]
    base = np.round(np.linspace(0.1, 0.9, 60) * 255).astype(np.float32) / np.float32(255)
    kept = base + np.where(np.arange(60) % 4 == 1, 0.001, 0.004).astype(np.float32)
    images = np.broadcast_to(kept[:, None, None, None], (60, 1, 4, 4)).astype(np.float32)
    pairs = tuple(
        replace(pair, runtime=replace(pair.runtime, fetch=images.__getitem__))
        for pair in measurement.pairs
    )
    result = judged(replace(measurement, pairs=pairs))

    def answer(asked: NDArray[np.float32]) -> NDArray[np.int64]:
        assert asked.dtype == np.float32 and asked.shape[1:] == (1, 4, 4)
        assert (asked * 255 == np.rint(asked * 255)).all()
        nearest = np.abs(asked[:, 0, 0, 0, None] - base[None]).argmin(axis=1)
        back = np.isclose(asked[:, 0, 0, 0], base[nearest], atol=1e-5)
        return np.where(back, nearest % 3, (nearest + 1) % 3)

    statement = a_statement("pass", (certified(result),))
    text = Seen(page_of(bundle, statement, results=[result])).text
    assert "rounding to 8 bits" not in text
    name = "onnxruntime-cpu-fp32"
    text = cells(page_of(bundle, statement, results=[result], answers={name: answer}))
    assert "Still fooled after rounding to 8 bits" in text
    # The odd images are fooled, thirty of them: fifteen by a step and fifteen by less than half.
    assert text.count("30 15 (50.0 %)") == len(names) - 1  # all but DeepFool outside of the box
    with pytest.raises(ValueError, match="answered with"):
        page_of(bundle, statement, results=[result], answers={name: lambda _: np.zeros(7, int)})


def test_the_hardest_images_fell_to_the_smallest_change() -> None:
    measurement = measured()

    def nearer(evidence: Evidence) -> Evidence:
        fooled = evidence.status == "fooled"
        return replace(evidence, linf=np.where(fooled, (70 - evidence.index) / 1000, np.nan))

    pairs = tuple(
        replace(pair, runtime=nearer(pair.runtime)) if pair.spec.name == "fgsm" else pair
        for pair in measurement.pairs
    )
    found = hardest_examples(replace(measurement, pairs=pairs), digits(), 5)
    assert [example.index for example in found] == [59, 57, 55, 53, 51]  # even ones hold
    assert all(example.clean.prediction == example.label for example in found)
    held = tuple(
        replace(pair, runtime=replace(pair.runtime, status=np.full(60, "held")))
        for pair in measurement.pairs
    )
    assert hardest_examples(replace(measurement, pairs=held), digits()) == []


def test_several_targets_stand_beside_each_other(bundle: Bundle) -> None:
    other = judged(replace(measured(3), precision="fp16"))
    targets = (
        certified(judged()),
        certified(other, verdict="fail", worst=share(24), claims=(claim("sane[x]", "fail"),)),
    )
    layers = [
        {"layer": "conv1", "kind": kind, "max_abs": size, "relative": size / 8,
         "rounding_units": 0.25, "nonfinite": 0, "verdict": "pass"}
        for kind, size in (("zero", 1e-6), ("clean", 8e-6))
    ]  # fmt: skip
    per_layer = {**parity(), "layers": layers, "first_departure": None}
    half = {**parity(), "precision": "fp16"}
    statement = a_statement("fail", targets)
    page = page_of(bundle, statement, results=[judged(), other], parities=[per_layer, half])
    seen = Seen(page)
    figures = re.findall(r'class="figure">([\d.]+)<', page)
    assert figures == ["45.0", "40.0"]
    assert "What each precision costs" in seen.text  # paired, one runtime
    assert "Parity, layer by layer: onnxruntime-cpu-fp32" in seen.text
    assert "conv1 8.0e-06 1.0e-06 0.25 0 Pass" in cells(page)  # the worst kind of input
    assert "All 4 claims are met." in seen.text and "0 of 1 claims are met; 1 not met." in seen.text
    ids = [attributes["id"] for _, attributes in seen.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = {a["aria-labelledby"] for _, a in seen.elements if "aria-labelledby" in a}
    assert named <= set(ids)
    with pytest.raises(ValueError, match="certificate's targets"):
        page_of(bundle, statement, results=[other, judged()], parities=[per_layer, half])


def test_a_policy_without_strengths_names_no_worst_case(bundle: Bundle) -> None:
    target = certified(judged(), worst=None, worst_attack="")
    page = page_of(bundle, a_statement("pass", (target,)))
    assert "not known" in page and "there is no worst case" in Seen(page).text


def test_nothing_is_loaded_and_names_are_text(tmp_path: Path) -> None:
    evil = '<script>alert(1)</script>" onerror="x'
    bundle = make_bundle(tmp_path / "bundle", [evil, "one", "two"])
    broken = claim(evil, "fail", measured=evil, bound=evil, waived=True)
    waiver = WaiverUse(claim=evil, reason=evil, owner=evil, expires=evil, used=True)
    target = certified(judged(), claims=(broken,), worst_attack=evil)
    statement = a_statement(
        "pass", (target,), claim=evil, not_claimed=(evil,), assumptions=(evil,), waivers=(waiver,),
        intended_use=evil, fallback=evil, monitoring=evil, tester=evil,
    )  # fmt: skip
    page = page_of(bundle, statement, command=evil)
    seen = Seen(page)
    assert not seen.all("script")
    assert not any("onerror" in attributes for _, attributes in seen.elements)
    assert seen.text.count(evil) > 10
    assert "//" not in re.sub(r"data:image/png;base64,[\w+/=]+", "", page)
    assert page == page_of(bundle, statement, command=evil)


MEASURE = """
<script>
const measure = (frame) => {
  const doc = frame.contentDocument, root = doc.documentElement, view = frame.contentWindow;
  const size = (node) => parseFloat(view.getComputedStyle(node).fontSize);
  const texts = [...doc.querySelectorAll("body *")].filter((node) => !node.closest("svg") &&
    [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
  const largest = Math.max(...texts.map(size));
  const word = doc.querySelector(".verdict strong").getBoundingClientRect();
  const edge = doc.querySelector("main").getBoundingClientRect().right + 0.5;
  const clipped = [...doc.querySelectorAll("main *")].filter((node) =>
    !node.closest("svg, .scroll table, thead") && node.getBoundingClientRect().right > edge);
  return {
    width: root.clientWidth, scroll: root.scrollWidth,
    clipped: clipped.map((node) => node.outerHTML.slice(0, 80)),
    broken: [...doc.images].filter((image) => !image.naturalWidth).length,
    images: doc.images.length, figures: doc.querySelectorAll("figure svg").length,
    largest: texts.filter((node) => size(node) === largest).map((node) => node.textContent),
    word: doc.querySelector(".verdict strong").textContent, bottom: word.bottom, top: word.top,
    paper: view.getComputedStyle(doc.body).backgroundColor,
  };
};
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(measure);
  document.body.innerHTML = "<pre id=found></pre>";
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>
"""


@pytest.mark.parametrize(
    ("scheme", "paper"), [("1", "rgb(255, 255, 255)"), ("0", "rgb(20, 23, 27)")]
)
def test_a_browser_shows_the_verdict_and_nothing_sticks_out(
    scheme: str, paper: str, bundle: Bundle, chromium: Browser, tmp_path: Path
) -> None:
    """Three verdicts on a telephone and on a screen, light and dark, measured by the browser."""
    long = claim("no-worse[linf-0.00392157-pgd-margin]", "inconclusive", waived=True)
    waived = certified(judged(), claims=(long, claim("robust[x]", "void")))
    pages = {word: page_of(bundle, a_statement(verdict)) for verdict, word in WORDS.items()}
    pages["Certified, with 1 waived"] = page_of(bundle, a_statement("pass", (waived,)))
    cases = [(word, size) for word in pages for size in ((390, 844), (1280, 800))]
    frames = "".join(
        f'<iframe width="{width}" height="{height}" style="border:0" '
        f'srcdoc="{html.escape(pages[word])}"></iframe>'
        for word, (width, height) in cases
    )
    # Frames inherit the scheme of the page around them.
    scheme_of = '<meta name="color-scheme" content="light dark">'
    around = tmp_path / "around.html"
    around.write_text(f"<!DOCTYPE html>{scheme_of}{MEASURE}<body>{frames}</body>", "utf-8")
    dom = chromium(
        tmp_path / "profile",
        "--dump-dom",
        f"--blink-settings=preferredColorScheme={scheme}",
        around.as_uri(),
    ).stdout
    found = json.loads(html.unescape(dom.partition('<pre id="found">')[2].partition("</pre>")[0]))
    assert len(found) == len(cases)
    for (word, (width, height)), seen in zip(cases, found, strict=True):
        assert seen["width"] == width
        assert seen["scroll"] <= width and seen["clipped"] == [], word
        assert seen["broken"] == 0 and seen["images"] > 8 and seen["figures"] == 4
        assert seen["largest"] == ["45.0\N{NO-BREAK SPACE}%"], word
        assert seen["word"] == word
        assert 0 < seen["top"] < seen["bottom"] < height / 2
        assert seen["paper"] == paper


def test_paper_has_the_verdict_on_its_first_page(
    bundle: Bundle, chromium: Browser, tmp_path: Path
) -> None:
    page, printed = tmp_path / "page.html", tmp_path / "page.pdf"
    page.write_text(page_of(bundle, a_statement("fail")), "utf-8")
    chromium(
        tmp_path / "profile",
        "--no-pdf-header-footer",
        f"--print-to-pdf={printed}",
        page.as_uri(),
    )
    assert printed.read_bytes().startswith(b"%PDF-")
    if shutil.which("pdftotext") is None:
        pytest.skip("no pdftotext is installed to read the paper with")

    def read(*pages: str) -> str:
        text = subprocess.run(
            ["pdftotext", "-raw", *pages, printed, "-"], capture_output=True, text=True, check=True
        ).stdout
        return re.sub(r"\s+", " ", text)

    first, whole = read("-l", "1"), read()
    assert "Not certified" in first and "45.0%" in first and "What was not shown" in first
    for sentence in a_statement().predicate.not_claimed:
        assert sentence in first
    # What is folded or scrolls on a screen is on the paper, whole.
    squeezed = whole.replace(" ", "")
    for word in ("1" * 64, "restarts1", "Notlegal", "Reached"):
        assert word in squeezed, word
