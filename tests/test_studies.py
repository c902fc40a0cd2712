"""Studies: the paper's tables as data, filled on real digits, and grids of one's own."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ccn_deploy.attacks import suite
from ccn_deploy.cli.main import app
from ccn_deploy.data import load_dataset
from ccn_deploy.errors import CcnDeployError, ExitCode
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.studies import paper, pictures, run, store
from ccn_deploy.studies.grid import read_grid
from ccn_deploy.studies.paper import BUDGETS, Budget, attack_spec
from ccn_deploy.studies.published import PAPER, Family
from ccn_deploy.studies.results import CellRecord, leaderboard, tables, to_csv
from ccn_deploy.studies.study import (
    Attacked,
    Claim,
    Column,
    FromSubstitute,
    Study,
    System,
    Transferred,
    ranking,
)
from ccn_deploy.studies.work import Setting
from ccn_deploy.tables import markdown

FAMILIES: tuple[Family, ...] = ("mnist", "cifar10", "imagenet")
FGSM = attack_spec("fgsm", "0.3")
ROWS = {"SM": System("sm"), "CCN": System("ccn")}
STUDY = Study(
    "table7",
    "two networks",
    ROWS,
    (
        Column("clean", Attacked(FGSM, "clean")),
        Column("FGSM 0.3", Attacked(FGSM)),
        Column("on SM", Transferred(FGSM, ROWS["SM"])),
        Column("on CCN", Transferred(FGSM, ROWS["CCN"])),
        Column("substitute", FromSubstitute(0.3), extra=True),
    ),
    {"SM": (99.0, 30.0, 31.76, 91.22), "CCN": (99.0, 80.0, 64.15, 81.38)},
    (Claim("CCN above SM", "FGSM 0.3", ranking("CCN", "SM")),),
)
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tests.test_studies import STUDY, setting
from ccn_deploy.studies import run, store
root = Path(sys.argv[1])
record = run.fill(setting(root, Path(sys.argv[2])), [STUDY], [0, 1], jobs=int(sys.argv[4]))
store.write(root, record)
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return real digits: 500 to train on and 220 to test on."""
    arrays = {}
    for split, name, count in (("train", "train", 500), ("test", "test", 220)):
        data = load_dataset("mnist5k", split)
        chosen = data.order()[:count]
        arrays[f"x_{name}"], arrays[f"y_{name}"] = data.images(chosen), data.labels[chosen]
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, class_names=np.array(list("0123456789")), **arrays)
    return path


def setting(root: Path, data: Path) -> Setting:
    samples = {"fgsm": 60, "substitute": 40, "deepfool": 10}
    quick = {"mnist": "quick", "cifar10": "quick", "imagenet": "quick"}
    budget = Budget("test", "", quick, epochs=2, samples=samples, rounds=1)  # type: ignore[arg-type]
    return Setting(root, str(data), None, budget)


@pytest.fixture(scope="module")
def filled(
    digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Setting, store.StudiesRecord]:
    chosen = setting(tmp_path_factory.mktemp("study"), digits)
    record = run.fill(chosen, [STUDY], [0, 1])
    store.write(chosen.root, record)
    return chosen, record


@pytest.mark.parametrize("family", FAMILIES)
def test_every_published_table_is_a_study_of_the_same_rows_and_columns(family: Family) -> None:
    studies = paper.tables(family, BUDGETS["quick"])
    assert set(studies) == {name for name in PAPER if family in PAPER[name]}
    for name, study in studies.items():
        numbers = PAPER[name][family]
        own = [column for column in study.columns if not column.extra or column.head == "unclipped"]
        columns = [column for column in study.columns if not column.extra]
        assert numbers.keys() <= study.rows.keys() and own
        assert {len(row) for row in numbers.values()} == {len(columns)}
        assert any(c.head.startswith("audit") for c in study.columns)
        for claim in study.claims:
            assert claim.column in {c.head for c in study.columns}
            assert {row for rows in claim.order for row in rows} <= study.rows.keys()


def test_the_networks_are_those_of_table_10() -> None:
    for family in ("mnist", "cifar10"):
        study = paper.architecture(family)  # type: ignore[arg-type]
        assert study is not None and study.claims[0].holds


def test_numbers_of_the_paper_stand_in_their_cells() -> None:
    known = paper.tables("mnist", BUDGETS["quick"])
    by_head = {c.head: c for c in known["table1"].columns}
    assert known["table1"].paper("CCN", by_head["FGSM 0.3"]) == 81.38
    assert known["table1"].paper("CCN", by_head["audit 0.3"]) is None
    crafted = {c.head: c for c in known["table7"].columns}
    assert known["table7"].paper("CCN", crafted["LS"]) == 75.7  # tested on CCN, crafted on LS
    layers = {c.head: c for c in known["table13"].columns}
    assert known["table13"].paper("fc2", layers["FGSM 0.3"]) == 58.71


@pytest.mark.parametrize(
    ("values", "factor", "holds"),
    [
        ({"a": 3.0, "b": 2.0, "c": 1.0}, 1.0, True),
        ({"a": 3.0, "b": 3.0, "c": 1.0}, 1.0, False),
        ({"a": 3.0, "b": 2.0, "c": 1.6}, 2.0, False),
        ({"a": 3.0, "b": 2.0, "c": 1.5}, 2.0, True),
        ({"a": 3.0, "b": None, "c": 1.0}, 1.0, None),
    ],
)
def test_a_claim_is_held_against_the_numbers(
    values: dict[str, float | None], factor: float, holds: bool | None
) -> None:
    assert Claim("", "x", ranking("a", "b", "c"), factor).holds(values) is holds


def test_a_group_is_above_another_if_its_least_is_above_the_others_best() -> None:
    claim = Claim("", "x", (("a", "b"), ("c", "d")))
    assert claim.holds({"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0})
    assert not claim.holds({"a": 4.0, "b": 2.0, "c": 3.0, "d": 1.0})


def test_networks_that_tables_share_are_trained_once() -> None:
    known = paper.tables("mnist", BUDGETS["quick"])
    systems = run.systems_of(list(known.values()))
    names = [system.name for system in systems]
    assert len(set(names)) == len(names)
    assert len(systems) == 6 + 2 + 6 + 8  # plain, BN and LRN, one compact layer, adversarial


def test_numbers_are_those_of_the_deployed_programs(
    filled: tuple[Setting, store.StudiesRecord], digits: Path
) -> None:
    chosen, record = filled
    cells = {(c.row, c.column): c for c in record.studies[0].cells}
    data = load_dataset(digits, "test")
    images, labels = data.images(data.order()[:60]), data.labels[data.order()[:60]]
    for row, name in (("SM", "sm"), ("CCN", "ccn")):
        for seed in (0, 1):
            path = chosen.root / "bundles" / f"{name}-seed{seed}"
            with open_runtime(path, options=RuntimeOptions(threads=1)) as runtime:
                right = 100 * float((runtime.logits(images).argmax(1) == labels).mean())
            assert cells[row, "clean"].seeds[seed] == pytest.approx(right)
        # The diagonal of the matrix and the attack on the network itself are two programs.
        assert cells[row, f"on {row}"].seeds == pytest.approx(cells[row, "FGSM 0.3"].seeds)
        whole = cells[row, "FGSM 0.3"]
        low, high = sorted(v for v in whole.seeds if v is not None)
        assert (whole.low, whole.high, whole.n) == (low, high, 60)
        assert whole.value == pytest.approx((low + high) / 2)
    assert cells["SM", "substitute"].n == 40
    assert cells["SM", "FGSM 0.3"].paper == 30.0
    assert record.training == {"recipe": "quick", "epochs": 2, "images": 500}


def test_what_is_there_is_not_made_again_and_the_numbers_do_not_depend_on_jobs(
    filled: tuple[Setting, store.StudiesRecord], digits: Path, tmp_path: Path
) -> None:
    chosen, record = filled
    before = {p: p.stat().st_mtime_ns for p in chosen.root.rglob("*.safetensors")}
    again = run.fill(chosen, [STUDY], [0, 1])
    assert again.studies == record.studies
    assert before == {p: p.stat().st_mtime_ns for p in chosen.root.rglob("*.safetensors")}
    assert run.fill(setting(tmp_path, digits), [STUDY], [0, 1], jobs=2).studies == record.studies


def test_killed_and_started_again_it_ends_with_the_same_numbers(
    filled: tuple[Setting, store.StudiesRecord], digits: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(digits)]
    command += [str(Path(__file__).parents[1]), "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    marks = ["runs/*/run.json", "bundles/*", "bundles/*/evidence/**/*.jsonl", "counts/*.json"]
    for mark in marks:  # killed as soon as the first trace of each step is there
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        while process.poll() is None and not list(tmp_path.glob(mark)):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True)
    ended = store.read(tmp_path)
    assert ended is not None and ended.studies == filled[1].studies


def test_results_are_written_and_read_back(
    filled: tuple[Setting, store.StudiesRecord], tmp_path: Path
) -> None:
    _, record = filled
    root = tmp_path / "digits-test"
    store.write(root, record)
    assert store.read(root) == record
    page, text = store.write_pages(tmp_path, "# Intro")
    lines = list(csv.DictReader(io.StringIO(to_csv(record))))
    cell = next(c for c in lines if (c["row"], c["column"]) == ("CCN", "FGSM 0.3"))
    assert float(cell["difference"]) == pytest.approx(float(cell["value"]) - 80.0)
    assert (cell["n"], cell["epochs"], cell["seeds"]) == ("60", "2", "0 1")
    said = text.read_text()
    assert "## Table 7: two networks" in said
    assert said.startswith("# Intro") and "| paper | 99.0 | 80.0 |" in said
    assert "500 images, epochs 2, recipe quick, seeds 0, 1; mean and range." in said
    assert "CCN above SM" in said
    reader = _Page()
    reader.feed(page.read_text())
    assert "script" not in reader.tags and not reader.loads
    assert {"SM", "CCN", "paper", "difference"} <= {text.strip() for text in reader.texts}


class _Page(HTMLParser):
    """Which tags a page has, what it loads from elsewhere, and what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href") and value and not value.startswith(("data:", "#")):
                self.loads.append(value)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_an_earlier_table_stays_in_the_same_setting_only(
    filled: tuple[Setting, store.StudiesRecord], tmp_path: Path
) -> None:
    _, record = filled
    import msgspec

    other = msgspec.structs.replace(record.studies[0], name="table11")
    store.write(tmp_path, msgspec.structs.replace(record, studies=(other,)))
    both = store.merged(tmp_path, record)
    assert [study.name for study in both.studies] == ["table7", "table11"]
    moved = msgspec.structs.replace(record, seeds=(0,))
    assert [study.name for study in store.merged(tmp_path, moved).studies] == ["table7"]


def test_a_damaged_record_is_refused(
    filled: tuple[Setting, store.StudiesRecord], tmp_path: Path
) -> None:
    store.write(tmp_path, filled[1])
    path = tmp_path / store.RESULTS
    path.write_bytes(path.read_bytes().replace(b'"row"', b'"raw"', 1))
    with pytest.raises(CcnDeployError) as raised:
        store.read(tmp_path)
    assert raised.value.exit_code == ExitCode.INTEGRITY


def test_the_leaderboard_ranks_by_the_worst_attack_of_each_strength() -> None:
    specs = suite(["fgsm", "pgd"], [0.1, 0.2])
    columns = (Column("clean", Attacked(specs[0], "clean")),
               *(Column(f"{s.title} {s.epsilon:g}", Attacked(s)) for s in specs))  # fmt: skip
    numbers = {"a": (99, 90, 10, 50, 40), "b": (98, 80, 70, 60, 20)}
    cells = [
        CellRecord(row=row, column=column.head, value=float(value), n=1, seeds=(float(value),))
        for row, values in numbers.items()
        for column, value in zip(columns, values, strict=True)
    ]
    from ccn_deploy.studies.results import StudyRecord, column_record

    record = StudyRecord(
        name="study", title="", first="Network", rows=("a", "b"), cells=tuple(cells),
        columns=tuple(map(column_record, columns)), ranked=True,
    )  # fmt: skip
    board = leaderboard(record)
    # fgsm 0.1, 0.2 then pgd 0.1, 0.2: a keeps min(90, 50) and min(10, 40), b min(80, 60), (70, 20).
    assert [row.name for row in board.rows] == ["1. b", "2. a"]
    assert [cell.text for cell in board.rows[0].cells] == ["40.0", "98.0", "60.0", "20.0"]
    assert [cell.text for cell in board.rows[1].cells] == ["30.0", "99.0", "50.0", "10.0"]
    assert tables(record)[0] == board and "| 1. b | 40.0 |" in markdown(board)


GRID = """
title = "Ours"
datasets = ["{data}"]
attacks = ["FGSM", "deepfool"]
epsilons = ["8/255", 0.3]
samples = 12

[networks]
plain = "bundles/sm"
compact = "bundles/ccn"
"""


def test_a_grid_of_ones_own_ends_in_a_leaderboard(
    exported: Callable[[str], Path], digits: Path, tmp_path: Path
) -> None:
    import shutil

    for name in ("sm", "ccn"):
        shutil.copytree(exported(name), tmp_path / "bundles" / name)
    shutil.copy(digits, tmp_path / "mine.npz")
    (tmp_path / "grid.toml").write_text(GRID.format(data="mine.npz"))
    output = tmp_path / "out"
    arguments = ["study", str(tmp_path / "grid.toml"), "--jobs", "1", "--output", str(output)]
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    (record,) = document["datasets"]
    study = record["studies"][0]
    heads = [column["head"] for column in study["columns"]]
    assert heads[:3] == ["clean", "FGSM 0.0314", "FGSM 0.3"] and "DeepFool L2" in heads
    assert {cell["n"] for cell in study["cells"]} == {12}
    assert study["columns"][1]["attack"]["epsilon"] == pytest.approx(8 / 255)
    assert "Leaderboard" in (output / "index.html").read_text()
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "Leaderboard: Ours, mine" in shown.stdout and "1. " in shown.stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("title", "titel"), "titel"),
        (('title = "Ours"', "title = "), "no TOML"),
        (("bundles/sm", "bundles/nowhere"), "the network 'plain' is not there"),
        (("8/255", "8/0"), "8/0"),
        (('"deepfool"', '"deepfol"'), "deepfol"),
        (("samples = 12", "samples = 0"), "samples"),
        (('["{data}"]', "[]"), "names no datasets"),
        (('["{data}"]', '["a/own.npz", "b/own"]'), "two data sets that are called 'own'"),
        (("samples = 12", 'runtime = "onnx"'), "onnx"),
        (("samples = 12", 'precision = "fp7"'), "fp7"),
    ],
)
def test_bad_grids_are_refused(change: tuple[str, str], said: str, tmp_path: Path) -> None:
    for name in ("sm", "ccn"):
        (tmp_path / "bundles" / name).mkdir(parents=True)
    path = tmp_path / "grid.toml"
    path.write_text(GRID.replace(*change).format(data="mnist5k"))
    with pytest.raises(CcnDeployError) as raised:
        read_grid(path)
    assert said in raised.value.what and raised.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["table14"], "table14"),
        (["table5"], "imagenet"),
        (["table1", "--budget", "huge"], "huge"),
        (["table1", "--dataset", "mnist6k"], "mnist6k"),
        ([], "Nothing to reproduce was named"),
    ],
)
def test_what_cannot_be_reproduced_is_said(arguments: list[str], said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ccn_deploy.cli.main", "reproduce", *arguments]
    result = subprocess.run(
        [*command, "--output", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert result.returncode == ExitCode.USAGE
    assert said in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_list_says_what_each_needs() -> None:
    result = CliRunner().invoke(app, ["reproduce", "--list"], catch_exceptions=False)
    names = [line.split()[0] for line in result.stdout.splitlines()[1:]]
    tables_of_mnist = [f"table{number}" for number in (1, 2, 3, 4, 6, 7, 9, 10, 11, 13)]
    assert names == [*tables_of_mnist, *paper.FIGURES, "all"]
    assert set(pictures.figures()) == set(paper.FIGURES)


def test_a_figure_that_cannot_be_drawn_is_said_and_loses_nothing(
    filled: tuple[Setting, store.StudiesRecord],
) -> None:
    chosen, _ = filled  # networks this poor get no image right together
    record = run.fill(chosen, [], [0], figures=[pictures.figures()["figure1"]])
    assert not record.figures
    assert record.notes[0].startswith("figure1 was not drawn: 0 images")


@pytest.mark.parametrize("name", ["figure3", "figure6"])
def test_figures_are_drawn_from_what_is_deployed(
    filled: tuple[Setting, store.StudiesRecord], name: str
) -> None:
    chosen, _ = filled
    figure = pictures.figures()[name]
    record = run.fill(chosen, [], [0], figures=[figure])
    directory = chosen.root / run.FIGURES
    assert (directory / f"{name}.svg").read_bytes().startswith(b"<?xml")
    assert (directory / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert record.figures == {name: figure.study.title} and replace(figure) == figure


def test_work_on_images_of_any_size_has_a_cost(tmp_path: Path) -> None:
    images = np.zeros((4, 3, 64, 48), np.float32)
    np.savez(tmp_path / "own.npz", images=images, labels=np.array([0, 1, 0, 1]))
    chosen = setting(tmp_path, tmp_path / "own.npz")
    system = System(bundle=tmp_path / "bundle")
    study = replace(STUDY, rows={"own": system}, columns=(STUDY.columns[1],))
    ((), (attack,)) = run.plan(chosen, [study], [0])
    assert run.cost(chosen, attack) > 0


def test_the_first_images_are_those_of_the_order() -> None:
    data = load_dataset("mnist5k", "test")
    few = data.first(7)
    assert few.labels.tolist() == data.labels[data.order()[:7]].tolist()
    np.testing.assert_array_equal(few.images([2, 5]), data.images(data.order()[[2, 5]]))
    assert few.digest != data.digest and data.first(len(data)) is data
