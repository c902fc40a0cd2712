"""`ccn-deploy study`: a grid of one's own networks, data and attacks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ccn_deploy.cli.options import JsonOption
from ccn_deploy.cli.reproduce import JobsOption, fill, finish


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

    from ccn_deploy.studies import store
    from ccn_deploy.studies.grid import read_grid
    from ccn_deploy.studies.paper import Budget
    from ccn_deploy.studies.work import Setting

    own = read_grid(file)
    grid = own.grid
    budget = Budget("", "", {}, samples=dict.fromkeys(grid.attacks, grid.samples))
    for dataset in own.datasets:
        root = output / (Path(dataset).stem or dataset)
        setting = Setting(root, dataset, None, budget, grid.runtime, grid.precision)
        titled = dataclasses.replace(own.study, title=f"{grid.title}, {Path(dataset).stem}")
        record = fill(setting, [titled], [0], jobs=jobs, title=grid.title)
        store.write(root, record)
        paths = [*store.write_pages(output, f"# {grid.title}"), root / store.RESULTS]
        finish(record, paths, as_json=as_json)
