"""`ccn-deploy reproduce`: the paper's tables and figures, by name."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ccn_deploy.cli.options import DataDirOption, JsonOption, PrecisionOption, RuntimeOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ccn_deploy.studies.pictures import PaperFigure
    from ccn_deploy.studies.published import Family
    from ccn_deploy.studies.results import StudiesRecord, StudyRecord
    from ccn_deploy.studies.study import Study
    from ccn_deploy.studies.work import Setting

JobsOption = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        min=1,
        help="Processes that share the work, one thread each; the numbers do not depend on it.",
        show_default="the number of cores",
    ),
]


def reproduce(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WHAT...",
            help="table1 to table13, figure1, figure2, figure3, figure5, figure6, or all.",
            show_default=False,
        ),
    ] = None,
    *,
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset",
            metavar="NAME",
            help="mnist5k, mnist, fashion-mnist, cifar10 or imagenet.",
        ),
    ] = "mnist5k",
    data_dir: DataDirOption = None,
    download: Annotated[
        bool, typer.Option("--download", help="Download the data set if it is not there.")
    ] = False,
    budget: Annotated[
        str,
        typer.Option("--budget", help="smoke, quick or paper: how much is trained and attacked."),
    ] = "quick",
    runtime: RuntimeOption = "onnxruntime-cpu",
    precision: PrecisionOption = "fp32",
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Networks a row: mean and range are shown.")
    ] = 1,
    jobs: JobsOption = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Directory of all that is made; it goes on there."),
    ] = Path("reproduction"),
    list_only: Annotated[
        bool, typer.Option("--list", help="Say what each needs and about how long it takes.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Rerun the paper's tables and figures on the deployed runtime, its numbers beside ours."""
    from ccn_deploy.cli import console
    from ccn_deploy.cli.text import plain
    from ccn_deploy.data import load_dataset
    from ccn_deploy.errors import UsageError, named
    from ccn_deploy.records import document
    from ccn_deploy.studies import paper, pictures, store
    from ccn_deploy.studies.work import Setting

    chosen = named("budget", budget.lower(), paper.BUDGETS)
    data = load_dataset(dataset, "test", data_dir, download=download)
    family = paper.family_of(data.input_shape)
    root = output / f"{data.name}-{chosen.name}"
    setting = Setting(root, dataset, data_dir, chosen, runtime, precision)
    known = paper.tables(family, chosen)
    if list_only:
        for line in _overview(setting, family, range(seeds)):
            console.out.print(plain(line), soft_wrap=True)
        return
    if not what:
        raise UsageError("Nothing to reproduce was named.", "Give table1, ..., or all; see --list.")
    names = paper.asked(what, family)
    studies = [known[name] for name in names if name in known]
    described = [paper.architecture(family)] if "table10" in names else []
    drawn = [figure for name, figure in pictures.figures().items() if name in names]
    record = fill(
        setting,
        studies,
        range(seeds),
        jobs=jobs,
        title="Compact convolutional networks, reproduced",
        described=[one for one in described if one is not None],
        figures=drawn,
    )
    store.write(root, store.merged(root, record))
    page, text = store.write_pages(output, paper.INTRO)
    if as_json:
        console.print_json(document(record))
    else:
        show_record(record)
        console.out.print(plain(f"Written: {page}, {text}, {root / store.RESULTS}"), soft_wrap=True)


def fill(
    setting: Setting,
    studies: Sequence[Study],
    seeds: Sequence[int],
    *,
    jobs: int | None,
    title: str,
    described: Sequence[StudyRecord] = (),
    figures: Sequence[PaperFigure] = (),
) -> StudiesRecord:
    """Fill studies with a bar on stderr; Ctrl-C ends it with what is there kept."""
    from ccn_deploy.cli import console
    from ccn_deploy.extras import require
    from ccn_deploy.studies import run

    for module in ("torch", "lightning_fabric", "safetensors", "onnx", "foolbox", "jinja2"):
        require(module, "train", "to fill a study")
    processes = jobs or (1 if setting.target.on_gpu else os.cpu_count() or 1)
    with console.resumable("where it was"), console.Bar() as bar:
        return run.fill(
            setting,
            studies,
            seeds,
            jobs=processes,
            watch=bar,
            title=title,
            command=shlex.join(["ccn-deploy", *sys.argv[1:]]),
            described=described,
            figures=figures,
        )


def show_record(record: StudiesRecord) -> None:
    """Print what was found."""
    from ccn_deploy.cli import console
    from ccn_deploy.cli.tables import show
    from ccn_deploy.cli.text import plain
    from ccn_deploy.studies.results import about, tables

    for study in record.studies:
        for table in tables(study, about(record, study)):
            show(table)
            if table.about:
                console.out.print(plain(table.about), soft_wrap=True)
        for claim in study.claims:
            console.out.print(plain(f"{claim.word}: {claim.sentence}"), soft_wrap=True)
        for finding in study.findings:
            console.out.print(plain(f"Undermined: {finding}"), soft_wrap=True)
        console.out.print()
    for note in record.notes:
        console.out.print(plain(note), soft_wrap=True)


def _overview(setting: Setting, family: Family, seeds: Sequence[int]) -> list[str]:
    """Return a line for everything that can be asked for on these images."""
    from ccn_deploy.studies import paper, pictures

    tables = paper.tables(family, setting.budget)
    drawn = {name: figure.study for name, figure in pictures.figures().items()}
    known = {**tables, **drawn}
    lines = [f"On {setting.dataset}, budget {setting.budget.name}: {setting.budget.about}."]
    for name in paper.asked([paper.ALL], family):
        studies = [known[name]] if name in known else []
        title = studies[0].title if studies else "The network, layer by layer"
        lines.append(_line(name, studies, _minutes(setting, studies, seeds), title))
    everything = list(known.values())
    return [*lines, _line("all", everything, _minutes(setting, everything, seeds), "")]


def _line(name: str, studies: Sequence[Study], minutes: float, title: str) -> str:
    from ccn_deploy.studies.study import systems_of

    networks = len(systems_of(studies))
    return f"{name:8} {networks:3} networks {minutes:5,.0f} core minutes  {title}".rstrip()


def _minutes(setting: Setting, studies: Sequence[Study], seeds: Sequence[int]) -> float:
    from ccn_deploy.studies import run

    phases = run.plan(setting, studies, seeds)
    return sum(run.cost(setting, work) for phase in phases for work in phase) / 60
