"""A user's own study: bundles, data and attacks in a TOML file. Imports no torch.

::

    title = "Which of ours to ship"
    datasets = ["photos", "holiday.npz"]     # names, or paths relative to this file
    attacks = ["fgsm", "audit"]
    epsilons = ["2/255", "4/255", 0.05]
    samples = 200

    [networks]                               # what tables call it = bundle, relative to this file
    plain = "bundles/plain"
    compact = "bundles/compact"
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ccn_deploy.attacks.spec import DEFAULT_L2_EPSILONS, AttackSpec, parse_epsilons, suite
from ccn_deploy.data import DATASETS
from ccn_deploy.errors import InputError, UsageError
from ccn_deploy.extras import require
from ccn_deploy.storage import read_regular
from ccn_deploy.studies.study import Attacked, Column, Study, System
from ccn_deploy.targets import Target

LARGEST = 1 << 20
"""Bytes of a file."""

Positive = Annotated[int, msgspec.Meta(ge=1, le=1 << 30)]
Strength = float | str


class Grid(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the file says.

    Attributes:
        title: Of the page.
        networks: Path of each bundle by what tables call it.
        datasets: Names or paths.
        attacks: Names in :data:`ccn_deploy.attacks.ATTACKS`.
        epsilons: Strengths in Linf, numbers or text such as ``"8/255"``.
        epsilons_l2: Strengths in L2.
        distances: Distances d of attacks without an epsilon.
        samples: Images a data set.
        runtime: A name in :data:`ccn_deploy.targets.RUNTIMES`.
        precision: Of the deployed graph.
    """

    networks: dict[str, str]
    datasets: tuple[str, ...]
    title: str = "Robustness of what is deployed"
    attacks: tuple[str, ...] = ("fgsm", "audit")
    epsilons: tuple[Strength, ...] = ("2/255", "4/255", "8/255")
    epsilons_l2: tuple[Strength, ...] = DEFAULT_L2_EPSILONS
    distances: tuple[float, ...] = (0.1, 0.2, 0.3)
    samples: Positive = 200
    runtime: str = "onnxruntime-cpu"
    precision: str = "fp32"


@dataclass(frozen=True)
class OwnStudy:
    """A file that was read and checked.

    Attributes:
        grid: What it says.
        networks: Bundles by what tables call them.
        datasets: Names or paths, by what tables and directories call them.
        study: The table on each of them.
    """

    grid: Grid
    networks: dict[str, System]
    datasets: dict[str, str]
    study: Study


def read_grid(path: Path) -> OwnStudy:
    """Read a study.

    Raises:
        UsageError: No such file, or names, numbers and paths that cannot be.
        InputError: It is no TOML, or says something else than a study does.
        MissingExtraError: Python before 3.11 without tomli.
    """
    data = read_regular(path)
    if data is None:
        raise UsageError(f"There is no file {path}.", "Give a TOML file; docs/studies.md has one.")
    if len(data) > LARGEST:
        raise InputError(f"{path} has {len(data):,} bytes.", "A study is a few lines of TOML.")
    grid = _decode(data, path)
    Target(grid.runtime, grid.precision)
    if not grid.networks or not grid.datasets:
        missing = "networks" if not grid.networks else "datasets"
        raise UsageError(f"{path} names no {missing}.", "A study needs one of each at least.")
    networks = {
        title: System(bundle=_beside(path, place)) for title, place in grid.networks.items()
    }
    for title, system in networks.items():
        assert system.bundle is not None
        if not system.bundle.is_dir():
            raise UsageError(
                f"{path}: the network {title!r} is not there: {system.bundle}.",
                "Give the path of a bundle, relative to the file.",
            )
    datasets: dict[str, str] = {}
    for given in grid.datasets:
        place = given if given.lower() in DATASETS else str(_beside(path, given))
        name = Path(place).stem
        if name in datasets:
            raise UsageError(
                f"{path} has two data sets that are called {name!r}.",
                "Their results would go into one directory: rename one.",
            )
        datasets[name] = place
    columns = _columns(grid)
    study = Study("study", grid.title, networks, columns, ranked=True)
    return OwnStudy(grid, networks, datasets, study)


def _decode(data: bytes, path: Path) -> Grid:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        tomllib = require("tomli", "train", "to read a study")
    try:
        document: dict[str, Any] = tomllib.loads(data.decode("utf-8"))
        return msgspec.convert(document, Grid)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} is no TOML: {error}", "Mend the line that it names.") from error
    except msgspec.ValidationError as error:
        known = ", ".join(Grid.__struct_fields__)
        raise InputError(f"{path}: {error}", f"A study says: {known}.") from error


def _beside(path: Path, given: str) -> Path:
    return path.parent / Path(given).expanduser()


def _columns(grid: Grid) -> tuple[Column, ...]:
    linf = parse_epsilons(",".join(map(str, grid.epsilons)))
    l2 = parse_epsilons(",".join(map(str, grid.epsilons_l2)), "l2")
    specs = [spec for spec in suite(grid.attacks, linf, l2_epsilons=l2) if spec.clip]
    columns = [Column("clean", Attacked(specs[0], "clean"))]
    for spec in specs:
        columns += _asked(spec, grid.distances)
    return tuple(columns)


def _asked(spec: AttackSpec, distances: tuple[float, ...]) -> list[Column]:
    """Return the columns of an attack: one, or one a distance and how far it had to go."""
    if spec.epsilon is not None:
        return [Column(f"{spec.title} {spec.epsilon:.3g}", Attacked(spec))]
    at = [Column(f"{spec.title} d {d:g}", Attacked(spec, d=d)) for d in distances]
    return [*at, Column(f"{spec.title} L2", Attacked(spec, "l2"))]
