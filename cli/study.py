"""`ccn-deploy study`: a grid of one's own networks, data and attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ccn_deploy.cli.options import JsonOption
from ccn_deploy.cli.reproduce import JobsOption, fill, show_record

SCHEMA = "ccn-deploy/studies/1"


def study(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE.toml", help="Networks, data and attacks; docs/studies.md."),
    ],
    *,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Directory of results and page; it goes on there."),
    ] = Path("study"),
    jobs: JobsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Attack a grid of bundles on data sets, and rank them on one page."""
    import dataclasses

    from ccn_deploy.attacks.spec import kinds_of
    from ccn_deploy.cli import console
    from ccn_deploy.cli.text import plain
    from ccn_deploy.records import document
    from ccn_deploy.studies import store
    from ccn_deploy.studies.grid import read_grid
    from ccn_deploy.studies.paper import Budget
    from ccn_deploy.studies.work import Setting

    own = read_grid(file)
    grid = own.grid
    samples = {kind.name: grid.samples for kind in kinds_of(grid.attacks)}
    budget = Budget("", "", {}, samples=samples)
    records = []
    for name, dataset in own.datasets.items():
        root = output / name
        setting = Setting(root, dataset, None, budget, grid.runtime, grid.precision)
        titled = dataclasses.replace(own.study, title=f"{grid.title}, {name}")
        record = fill(setting, [titled], [0], jobs=jobs, title=grid.title)
        store.write(root, record)
        records.append(record)
    page, text = store.write_pages(output, f"# {grid.title}")
    if as_json:
        found = [document(record) for record in records]
        console.print_json({"schema": SCHEMA, "datasets": found})
        return
    for record in records:
        show_record(record)
    written = f"Written: {page}, {text}, and {store.RESULTS} by data set"
    console.out.print(plain(written), soft_wrap=True)
