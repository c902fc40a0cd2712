"""Fill studies: plan the work, share it out over processes, and put the answers together."""

from __future__ import annotations

import datetime
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from ccn_deploy.errors import UsageError
from ccn_deploy.machine import processor, this_machine
from ccn_deploy.studies.paper import family_of
from ccn_deploy.studies.pictures import PaperFigure
from ccn_deploy.studies.published import TRAINING, Family
from ccn_deploy.studies.results import (
    SCHEMA,
    Measured,
    StudiesRecord,
    StudyRecord,
    cell,
    claims,
    column_record,
    of_attack,
    of_counts,
)
from ccn_deploy.studies.study import (
    Attacked,
    Column,
    FromSubstitute,
    Study,
    System,
    Transferred,
    systems_of,
)
from ccn_deploy.studies.work import (
    Attack,
    Setting,
    Substitute,
    Tell,
    Train,
    Transfer,
    Work,
    data,
)
from ccn_deploy.workers import Workers

FIGURES = "figures"
"""The directory of the figures, below that of the setting."""

Watch = Callable[[str, float, float], None]
"""Told what is being done, how much of all is done, and how much there is, in rough seconds."""

_IMAGE: Mapping[Family, float] = {"mnist": 1e-3, "cifar10": 3e-2, "imagenet": 2.0}
"""Seconds that an image takes in an epoch of training, on one core of 2024."""

_GRADIENT: Mapping[Family, float] = {"mnist": 8e-4, "cifar10": 2e-2, "imagenet": 1.0}
"""Seconds that logits and an input gradient of an image take, likewise."""

_EXPORT = 4.0
_DEARER = {"fgsm": 2.5, "pgd": 8.0, "trades": 10.0}
"""How many times as long adversarial training takes."""

_SUBSTITUTE = 60.0
"""Seconds that training a substitute takes, with six rounds of augmentation."""


def plan(setting: Setting, studies: Sequence[Study], seeds: Sequence[int]) -> list[list[Work]]:
    """Return the work that studies need, in phases: a phase needs the one before it."""
    systems = systems_of(studies)
    trains: list[Work] = [
        Train(system, seed) for seed in seeds for system in systems if system.bundle is None
    ]
    rest: list[Work] = []
    for seed in seeds:
        for system in systems:
            rest += _attacks(studies, system, seed)
        for study in studies:
            rest += _others(study, seed)
    unique = dict.fromkeys(rest)
    return [trains, sorted(unique, key=lambda work: -cost(setting, work))]


def _attacks(studies: Sequence[Study], system: System, seed: int) -> Iterator[Attack]:
    """Yield the attacks on a network, those together that get the same images."""
    specs = dict.fromkeys(
        column.measure.spec
        for study in studies
        if system in study.rows.values()
        for column in study.columns
        if isinstance(column.measure, Attacked)
    )
    by_name: dict[str, list[Any]] = {}
    for spec in specs:
        by_name.setdefault(spec.name, []).append(spec)
    for together in by_name.values():
        yield Attack(system, seed, tuple(together))


def _others(study: Study, seed: int) -> Iterator[Substitute | Transfer]:
    measures = [column.measure for column in study.columns]
    epsilons = tuple(m.epsilon for m in measures if isinstance(m, FromSubstitute))
    if epsilons:
        yield from (Substitute(system, seed, epsilons) for system in study.rows.values())
    transfers = [m for m in measures if isinstance(m, Transferred)]
    for spec in dict.fromkeys(m.spec for m in transfers):
        yield Transfer(systems_of([study]), seed, spec)


def cost(setting: Setting, work: Work) -> float:
    """Return roughly how many seconds of one core a piece of work takes."""
    images = data(setting, "test")
    if isinstance(work, Train):
        return _EXPORT + _training_cost(setting, work.system)
    if isinstance(work, Attack):
        n = min(setting.samples(work.specs[0].name), len(images))
        gradient = _gradient_cost(images.input_shape)
        return 2 * n * gradient * sum(spec.cost for spec in work.specs)
    if isinstance(work, Substitute):
        return float(_SUBSTITUTE * 2.0 ** (setting.budget.rounds - 6))
    n = min(setting.samples(work.spec.name), len(images))
    return n * _gradient_cost(images.input_shape) * len(work.systems) ** 2 * 0.5


def _gradient_cost(shape: tuple[int, int, int]) -> float:
    """Return the seconds for an image; by its size, for networks that are not the paper's."""
    try:
        return _GRADIENT[family_of(shape)]
    except UsageError:
        return 5e-6 * math.prod(shape)


def _training_cost(setting: Setting, system: System) -> float:
    from ccn_deploy.trainers.recipes import recipe_named

    family = _family(setting)
    recipe = recipe_named(system.recipe or setting.budget.recipes[family])
    epochs = setting.budget.epochs or recipe.epochs
    images = min(len(data(setting, "train")), setting.budget.images)
    kind = system.adversarial or (recipe.adversary.kind if recipe.adversary else "")
    return epochs * images * _IMAGE[family] * _DEARER.get(kind, 1.0)


def _family(setting: Setting) -> Family:
    return family_of(data(setting, "test").input_shape)


def fill(
    setting: Setting,
    studies: Sequence[Study],
    seeds: Sequence[int],
    *,
    jobs: int = 1,
    watch: Watch = lambda what, done, total: None,
    title: str = "",
    command: str = "",
    described: Sequence[StudyRecord] = (),
    figures: Sequence[PaperFigure] = (),
) -> StudiesRecord:
    """Do what is not done yet of studies, and return every number.

    Interrupted and called again, it goes on where it was. The numbers do not depend on ``jobs``.

    Args:
        setting: What all have in common.
        studies: What to fill.
        seeds: Of the trainings, one network each.
        jobs: Processes that share the work.
        watch: Told how far it is.
        title: What the page is called.
        command: What the user typed.
        described: Tables that need no work.
        figures: What to draw, into the setting's directory.

    Raises:
        CcnDeployError: As the trainers, the exporters and the attacks say.
    """
    drawn = [figure.study for figure in figures]
    phases = plan(setting, [*studies, *drawn], seeds)
    tracker = _Tracker(watch, {work: cost(setting, work) for phase in phases for work in phase})
    most = min(jobs, max(map(len, phases)))
    with Workers(most) if most > 1 else nullcontext() as workers:
        for phase in phases:
            _run(setting, phase, workers, tracker)
    missing = {}
    for figure in figures:
        try:
            figure.write(setting, setting.root / FIGURES)
        except UsageError as error:  # too few images for it; the tables do not depend on it
            missing[figure.name] = error.what
    answers = _Answers(setting)
    return StudiesRecord(
        schema=SCHEMA,
        title=title,
        dataset=dict(data(setting, "test").identity),
        training=_training(answers, [*studies, *drawn], seeds),
        paper=TRAINING[_family(setting)] if any(study.published for study in studies) else "",
        budget=setting.budget.name,
        seeds=tuple(seeds),
        runtime=setting.runtime,
        precision=setting.precision,
        machine=_machine(),
        command=command,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        figures={f.name: f.study.title for f in figures if f.name not in missing},
        notes=tuple(f"{name} was not drawn: {why}" for name, why in missing.items()),
        studies=(*(_study(answers, study, seeds) for study in studies), *described),
    )


def _machine() -> dict[str, Any]:
    machine = this_machine()
    return {
        "processor": processor(),
        "system": machine.system,
        "python": machine.python,
        "packages": dict(machine.packages),
        "gpus": [gpu.name for gpu in machine.gpus],
    }


def _training(answers: _Answers, studies: Sequence[Study], seeds: Sequence[int]) -> dict[str, Any]:
    """Return how the plain networks were trained; nothing if all were given."""
    trained = [system for system in systems_of(studies) if system.bundle is None]
    if not trained:
        return {}
    training = answers[Train(trained[0], seeds[0])].card.training
    recipe = training["recipe"]
    return {
        "recipe": recipe["name"],
        "epochs": recipe["epochs"],
        "images": training["train_images"],
    }


class _Answers(dict[Work, Any]):
    """What pieces of work return that were done before, each read once."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self._setting = setting

    def __missing__(self, work: Work) -> Any:
        self[work] = work(self._setting)
        return self[work]


def _study(answers: _Answers, study: Study, seeds: Sequence[int]) -> StudyRecord:
    cells = [
        cell(study, row, column, [_answer(answers, study, row, seed, column) for seed in seeds])
        for row in study.rows
        for column in study.columns
    ]
    return StudyRecord(
        name=study.name,
        title=study.title,
        first=study.first,
        rows=tuple(study.rows),
        columns=tuple(map(column_record, study.columns)),
        cells=tuple(cells),
        claims=claims(study, cells),
        findings=tuple(_findings(answers, study, seeds)),
        ranked=study.ranked,
    )


def _answer(answers: _Answers, study: Study, row: str, seed: int, column: Column) -> Measured:
    """Read one number from what was kept."""
    measure, system = column.measure, study.rows[row]
    if isinstance(measure, Attacked):
        attack = next(w for w in _attacks([study], system, seed) if measure.spec in w.specs)
        return of_attack(measure, answers[attack])
    work: Work
    others = _others(study, seed)
    if isinstance(measure, FromSubstitute):
        work = next(w for w in others if isinstance(w, Substitute) and w.system == system)
        question = f"{measure.epsilon:g}"
    else:
        work = next(w for w in others if isinstance(w, Transfer) and w.spec == measure.spec)
        question = f"{system.name} {measure.crafted_on.name}"
    return of_counts(answers[work].right[question], answers[work].n)


def _findings(answers: _Answers, study: Study, seeds: Sequence[int]) -> Iterator[str]:
    """Yield what undermines the evidence behind a table: a sentence for each kind and row."""
    said: set[tuple[str, str]] = set()
    for row, system in study.rows.items():
        for seed in seeds:
            for attack in _attacks([study], system, seed):
                for doubt in answers[attack].doubts:
                    if (row, doubt.code) not in said:
                        said.add((row, doubt.code))
                        yield f"{row}: {doubt.sentence}"


class _Tracker:
    """Adds up how far the pieces of work are."""

    def __init__(self, watch: Watch, costs: Mapping[Work, float]) -> None:
        self._watch, self._costs = watch, costs
        self._done = dict.fromkeys(costs, 0.0)
        self._total = sum(costs.values())

    def __call__(self, work: Work, share: float) -> None:
        self._done[work] = share
        done = sum(self._costs[w] * part for w, part in self._done.items())
        self._watch(work.label, done, self._total)


def _run(
    setting: Setting, phase: Sequence[Work], workers: Workers | None, tracker: _Tracker
) -> None:
    """Do a phase, by workers or in this process."""
    pieces = [functools.partial(_do, setting, work) for work in phase]
    if workers is not None:
        workers.run(pieces, lambda place, share: tracker(phase[place], share))
        return
    for work, piece in zip(phase, pieces, strict=True):
        tracker(work, 0.0)
        piece(functools.partial(tracker, work))


def _do(setting: Setting, work: Work, tell: Tell) -> None:
    work(setting, tell)
    tell(1.0)
