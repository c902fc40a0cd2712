"""The report: what it says, that it says it without network, and that it looks the same twice."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ccn_deploy.attacks import AttackSpec, suite
from ccn_deploy.bundle import Bundle, NewFile, open_bundle, write_bundle
from ccn_deploy.data import dataset_from_arrays
from ccn_deploy.data.dataset import Dataset
from ccn_deploy.errors import StorageError
from ccn_deploy.report import REPORT, Attacked, Example, examples_of, write_report
from ccn_deploy.report.examples import data_uri
from ccn_deploy.robustness import Evidence, Measurement, Pair, RobustnessResult, Sample, judge
from tests.cards import a_card

N = 60
COMMAND = "ccn-deploy verify-robustness bundles/ccn --samples 60"
SIDE = 4
VOID = {"meta", "link", "img", "br", "path", "circle", "use"}


def sample(index: int, label: int, spec: AttackSpec, held: bool) -> Sample:
    found = label if held else (label + 1) % 3
    return Sample(
        index=index,
        label=label,
        clean=(label, label),
        adversarial=(found, found),
        status="held" if held else "fooled",
        linf=spec.epsilon,
        l2=1.0,
        rho=None if held else 0.25,
    )


def measured(lost: int = 0, n: int = N) -> Measurement:
    """Each attack leaves every second image right; on the runtime, ``lost`` fewer."""

    def evidence(spec: AttackSpec, target: str, lost: int) -> Evidence:
        held = [at % 2 == 0 and at >= 2 * lost for at in range(n)]
        samples = [sample(at, at % 3, spec, held[at]) for at in range(n)]
        header = {
            "attack": spec.document(),
            "versions": {"torch": "2.99.0", target: "1.2.3"},
            "machine": "pdp11",
        }
        shade = (np.arange(n) % 60 / 255).astype(np.float32)
        images = np.broadcast_to(4 * shade[:, None, None, None], (n, 1, SIDE, SIDE))
        return Evidence.of(samples, header, fetch=images.__getitem__)

    specs = suite(["fgsm", "pgd", "deepfool"], [0.1, 0.3])
    return Measurement(
        runtime="onnxruntime-cpu",
        precision="fp32",
        gradient="reference",
        dataset={"name": "digits", "split": "test", "digest": "d" * 64},
        seed=7,
        n=n,
        pairs=tuple(
            Pair(spec, evidence(spec, "torch", 0), evidence(spec, "onnxruntime", lost))
            for spec in specs
        ),
    )


def digits(n: int = N) -> Dataset:
    images = np.zeros((n, 1, SIDE, SIDE), np.float32)
    images[:, 0, 0, 0] = np.arange(n) / 255
    return dataset_from_arrays("digits", images, np.arange(n) % 3, ("zero", "one", "two"))


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "bundle")


def make_bundle(path: Path, class_names: Iterable[str] = ("zero", "one", "two")) -> Bundle:
    return write_bundle(
        path,
        card=a_card(
            input_shape=(1, SIDE, SIDE),
            class_names=tuple(class_names),
            training={"dataset": "digits", "recipe": "quick", "seed": 3, "test_accuracy": 0.97531},
        ),
        files=[NewFile("weights.safetensors", b"weights", role="weights")],
    )


def parity(verdict: str = "pass") -> dict[str, object]:
    row = {"kind": "zero", "n": 8, "max_abs": 1e-6, "p99_abs": 1e-7, "rounding_units": 0.5,
           "argmax_flips": 0, "nonfinite": 0, "verdict": verdict}  # fmt: skip
    return {
        "schema": "ccn-deploy/parity/2",
        "verdict": verdict,
        "runtime": "onnxruntime-cpu",
        "precision": "fp32",
        "inputs": [{**row, "batch": batch} for batch in (1, 7, 64)],
        "gradients": {"rows": [{"kind": "zero", "relative": 3.3e-7, "verdict": verdict}]},
    }


def report(
    bundle: Bundle, result: RobustnessResult, examples: Iterable[Example] = ()
) -> tuple[Path, str]:
    path = write_report(bundle, result, tuple(examples), COMMAND, parity())
    return path, path.read_text("utf-8")


class Seen(HTMLParser):
    """What a reader of the page meets: text, and every element with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.styles = ""
        self.feed(page)
        assert not self.open, f"never closed: {self.open}"
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.mark.parametrize(
    ("lost", "max_drop", "word", "why"),
    [
        (0, 0.1, "Pass: no worse than the reference", "by more than 10 points under FGSM, PGD and"),
        (12, 0.1, "Fail", "12 of 60 images lost"),
        (0, 0.01, "Inconclusive", "about 299 images"),
    ],
)
def test_the_verdict_comes_first_with_its_reason(
    lost: int, max_drop: float, word: str, why: str, bundle: Bundle
) -> None:
    path, page = report(bundle, judge(measured(lost), max_drop))
    seen = Seen(page)
    assert path == bundle.path / REPORT
    assert f"<title>{word}: " in page
    verdict, first = page.index(f"<strong>{word}</strong>"), page.index("<h2")
    assert verdict < page.index(why) < first
    assert len(re.findall(r"<strong>(?:Pass|Fail|Inconclusive)", page)) == 1
    assert COMMAND in seen.text


def test_every_row_of_the_judgement_is_there(bundle: Bundle) -> None:
    result = judge(measured(lost=3), 0.2)
    seen = Seen(report(bundle, result)[1])
    for row in result.bounded:
        for side in (row.reference, row.runtime):
            low, high = side.ci95
            assert f"{100 * side.value:.1f} % {100 * low:.1f} to {100 * high:.1f}" in seen.text
        assert f"{100 * row.gate.upper95:.2f}" in seen.text
    assert "50.0 %" in seen.text  # reference, by construction
    assert "45.0 %" in seen.text  # three of sixty fewer
    (minimal,) = result.minimal
    for d in minimal.gates:
        assert f"DeepFool {d:g}" in seen.text
    assert "0.250" in seen.text  # mean rho, by construction
    for finding in result.findings:
        assert f"{finding.word}: {finding.sentence}" in seen.text
    for word in ("torch 2.99.0", "onnxruntime 1.2.3", "pdp11", "d" * 64, "seed 7", "digits"):
        assert word in seen.text
    for record in bundle.manifest.files:
        assert record.sha256 in seen.text
    assert bundle.manifest.digest in seen.text
    assert "Parity with the float64 reference" in seen.text
    assert "3.3e-07" in seen.text


def test_nothing_is_loaded_and_nothing_runs(bundle: Bundle) -> None:
    examples = examples_of(measured(), digits())
    page = report(bundle, judge(measured(), 0.1), examples)[1]
    seen = Seen(page)
    assert "//" not in re.sub(r"data:image/png;base64,[\w+/=]+", "", page)  # no address at all
    assert not seen.all("script")
    assert not re.search(r"@import|url\((?!#)|javascript:|\son\w+=", page)
    for _, attributes in seen.elements:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), value
    assert "<?xml" not in page
    assert page[:15] == "<!DOCTYPE html>"


def test_the_page_is_accessible(bundle: Bundle) -> None:
    seen = Seen(report(bundle, judge(measured(), 0.1), examples_of(measured(), digits()))[1])
    assert seen.all("html")[0]["lang"] == "en"
    assert len(seen.all("h1")) == 1
    assert seen.all("img") and all(image["alt"] for image in seen.all("img"))
    figures = [svg for svg in seen.all("svg") if svg.get("aria-hidden") != "true"]
    assert len(figures) == 3  # FGSM, PGD, DeepFool
    for svg in figures:
        assert svg["role"] == "img"
        assert re.search(r"\d+\.\d % at 0", svg["aria-label"] or "")
    assert all(cell["scope"] in ("row", "col") for cell in seen.all("th"))
    ids = [a["id"] for _, a in seen.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in seen.styles
    assert "@media print" in seen.styles


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_curves_stand_out_from_the_paper(scheme: str) -> None:
    """WCAG 2: 4.5 to 1 for text, 3 to 1 for lines, by its definition of contrast."""
    css = (Path(__file__).parents[1] / "ccn_deploy/report/report.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    colours = {
        name: tuple(int(value[at : at + 2], 16) / 255 for at in (1, 3, 5))
        for name, value in re.findall(
            r"--(\w+): (#[0-9a-f]{6})", blocks[0 if scheme == "light" else 1]
        )
    }

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        light, dark = sorted((luminance(colours[a]), luminance(colours[b])), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    for paper in ("paper", "raised"):
        for text in ("ink", "muted", "pass", "fail", "inconclusive"):
            assert contrast(text, paper) >= 4.5, (text, paper)
    assert contrast("runtime", "paper") >= 3.0


def test_the_same_judgement_gives_the_same_bytes(bundle: Bundle) -> None:
    first = report(bundle, judge(measured(), 0.1), examples_of(measured(), digits()))[1]
    assert report(bundle, judge(measured(), 0.1), examples_of(measured(), digits()))[1] == first


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    bundle = make_bundle(tmp_path / "bundle", [evil, '" onerror="x', "two"])
    examples = [
        Example(
            index=at,
            label=at,
            clean=Attacked(np.zeros((1, SIDE, SIDE), np.uint8), at),
            attacked={evil: Attacked(np.zeros((1, SIDE, SIDE), np.uint8), 1, note=evil)},
        )
        for at in (0, 1)
    ]
    measurement = replace(
        measured(), dataset={"name": evil, "split": "test", "digest": "</table>"}, runtime=evil
    )
    path = write_report(bundle, judge(measurement, 0.1), examples, f"{evil} & more", parity())
    seen = Seen(path.read_text("utf-8"))  # also: every element is closed where it must be
    assert not seen.all("script")
    assert not any("onerror" in attributes for _, attributes in seen.elements)
    assert f"{evil} & more" in seen.text


def test_examples_are_the_attacked_images_and_what_the_runtime_says() -> None:
    measurement = measured()
    examples = examples_of(measurement, digits())
    assert [example.index for example in examples] == list(range(8))
    for example in examples:
        assert list(example.attacked) == ["FGSM, ε = 0.3", "PGD, ε = 0.3", "DeepFool"]
        assert example.clean.image[0, 0, 0] == example.index
        assert example.clean.prediction == example.label
        for attacked in example.attacked.values():
            assert (attacked.image == 4 * example.index).all()
            held = example.index % 2 == 0
            assert (attacked.prediction == example.label) is held


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_hold_the_pixels(channels: int) -> None:
    from matplotlib.image import imread

    image = np.random.default_rng(0).integers(0, 256, (channels, 5, 7), dtype=np.uint8)
    uri = data_uri(image)
    shown = imread(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    rgb = np.rint(shown[..., :3] * 255).astype(np.uint8).transpose(2, 0, 1)
    assert (rgb == np.broadcast_to(image, rgb.shape)).all()


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before = report(bundle, judge(measured(), 0.1))

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        report(bundle, judge(measured(12), 0.1))
    assert path.read_text("utf-8") == before
    assert sorted(p.name for p in bundle.path.iterdir()) == sorted(
        ["manifest.json", REPORT, "weights.safetensors"]
    )


def test_the_report_is_no_part_of_the_bundle(bundle: Bundle) -> None:
    report(bundle, judge(measured(), 0.1))
    assert open_bundle(bundle.path).manifest == bundle.manifest


@pytest.fixture(scope="module", name="chromium")
def installed_chromium() -> Callable[..., subprocess.CompletedProcess[str]]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium is installed to open the report with")

    def run(profile: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                 "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--hide-scrollbars",
                 "--virtual-time-budget=2000", "--host-resolver-rules=MAP * ~NOTFOUND",
                 f"--user-data-dir={profile}"]  # fmt: skip
        return subprocess.run(
            [program, *flags, *arguments], capture_output=True, text=True, timeout=120, check=True
        )

    return run


Browser = Callable[..., subprocess.CompletedProcess[str]]


def open_in(chromium: Browser, page: Path, scratch: Path) -> tuple[str, set[str]]:
    """Return the page as the browser understood it, and what the page asked the network for."""
    log = scratch / "network.json"
    dom = chromium(scratch / "profile", "--dump-dom", f"--log-net-log={log}", page.as_uri()).stdout
    # The browser also calls home by itself; those requests have no page as their initiator.
    requests = re.findall(r'"initiator":"([^"]*)".*?"url":"([^"]*)"', log.read_text())
    return dom, {url for initiator, url in requests if initiator != "not an origin"}


def test_a_browser_opens_it_without_network(
    bundle: Bundle, chromium: Browser, tmp_path: Path
) -> None:
    path, _ = report(bundle, judge(measured(), 0.1), examples_of(measured(), digits()))
    dom, asked = open_in(chromium, path, tmp_path)
    assert "<strong>Pass: no worse than the reference</strong>" in dom
    assert "Accuracy under attack" in Seen(dom).text
    assert asked == set()

    # The same eyes do see a page that reaches out.
    leaking = tmp_path / "leaking.html"
    address = "http://example.invalid/pixel.png"
    leaking.write_text(path.read_text("utf-8").replace("<main>", f'<main><img src="{address}">'))
    assert open_in(chromium, leaking, tmp_path)[1] == {address}


def test_a_browser_paints_the_curves(bundle: Bundle, chromium: Browser, tmp_path: Path) -> None:
    """The colours of the two curves and of the verdict are on the screen."""
    from matplotlib.image import imread

    path, _ = report(bundle, judge(measured(lost=12), 0.1))
    picture = tmp_path / "screen.png"
    chromium(
        tmp_path / "profile",
        f"--screenshot={picture}",
        "--window-size=1200,1000",
        "--blink-settings=preferredColorScheme=1",
        path.as_uri(),
    )
    pixels = np.rint(imread(picture)[..., :3] * 255).astype(int)
    for colour, least in (("0b5cad", 200), ("b3261e", 200)):  # runtime, fail
        rgb = [int(colour[at : at + 2], 16) for at in (0, 2, 4)]
        assert (np.abs(pixels - rgb).max(axis=-1) <= 3).sum() > least, colour
    curves = pixels[400:]
    orange = (curves[..., 0] - curves[..., 2] > 60) & (curves[..., 0] > 180)
    assert orange.sum() > 200  # the reference, half transparent
