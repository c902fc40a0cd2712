"""The pieces of work that fill a study: train, attack, and what needs several networks.

Each is made of names and numbers, so that any process can do it, and each keeps what it found where
the next one that asks finds it: runs, bundles with their evidence, and files of counts. Nothing is
done twice, and a piece that was killed goes on where it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ccn_deploy.attacks.spec import AttackSpec, suite
from ccn_deploy.bundle import Bundle, open_bundle
from ccn_deploy.data import Dataset, ModelInput, Split, load_dataset
from ccn_deploy.errors import UsageError
from ccn_deploy.records import Count, Record, Text, decode, encode
from ccn_deploy.robustness import RobustnessRequest, RobustnessResult, collect, judge
from ccn_deploy.robustness.attack_session import labels_of
from ccn_deploy.robustness.cache_key import cache_key
from ccn_deploy.robustness.transfer import right_under, transfer_matrix
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.storage import canonical_json, sha256, write_atomic
from ccn_deploy.studies.paper import ALL_IMAGES, Budget
from ccn_deploy.studies.study import System
from ccn_deploy.targets import Role, Target

Tell = Callable[[float], None]
"""Told how far a piece of work is, from 0 to 1."""


def no_one(share: float) -> None:
    """Tell nobody."""


OPTIONS = RuntimeOptions(threads=1)
"""One thread each: results are the same however many processes share the work."""

SUBSTITUTE_SEEDS = 150
"""Images that the attacker of table 6 starts from (Papernot et al., section 5.1)."""


@dataclass(frozen=True)
class Setting:
    """What all pieces of work of a study share.

    Attributes:
        root: Directory of runs, bundles and counts.
        dataset: Name or path of the data.
        data_dir: Where the files of a named data set are.
        budget: How much is spent.
        runtime: A name in :data:`ccn_deploy.targets.RUNTIMES`.
        precision: Of the deployed graph.
    """

    root: Path
    dataset: str
    data_dir: Path | None
    budget: Budget
    runtime: str = "onnxruntime-cpu"
    precision: str = "fp32"

    @property
    def target(self) -> Target:
        """Runtime and precision."""
        return Target(self.runtime, self.precision)

    def samples(self, attack: str) -> int:
        """Return how many images an attack gets at most."""
        return self.budget.samples.get(attack, ALL_IMAGES)

    def directory(self, kind: Literal["runs", "bundles"], system: System, seed: int) -> Path:
        """Return where a network's run or bundle is."""
        suffix = "" if kind == "runs" or self.precision == "fp32" else f"-{self.precision}"
        return self.root / kind / f"{system.name}-seed{seed}{suffix}"


@dataclass(frozen=True)
class Train:
    """Train a network and export it, unless that was done."""

    system: System
    seed: int

    @property
    def label(self) -> str:
        """What progress calls it."""
        return f"train {self.system.name}"

    def __call__(self, setting: Setting, tell: Tell = no_one) -> Bundle:
        """Do it."""
        return trained(setting, self.system, self.seed, tell)


@dataclass(frozen=True)
class Attack:
    """Attack a deployed network and its reference.

    Attributes:
        system: Which network.
        seed: Of its training.
        specs: The attacks, all on the same number of images.
    """

    system: System
    seed: int
    specs: tuple[AttackSpec, ...]

    @property
    def label(self) -> str:
        """What progress calls it."""
        return f"{self.specs[0].title} on {self.system.name}"

    def __call__(self, setting: Setting, tell: Tell = no_one) -> RobustnessResult:
        """Do it."""
        return attacked(setting, self.system, self.seed, self.specs, tell)


@dataclass(frozen=True)
class Substitute:
    """Train a substitute of a deployed network and attack the network with its images."""

    system: System
    seed: int
    epsilons: tuple[float, ...]

    @property
    def label(self) -> str:
        """What progress calls it."""
        return f"substitute of {self.system.name}"

    def __call__(self, setting: Setting, tell: Tell = no_one) -> Counts:
        """Do it."""
        return substituted(setting, self.system, self.seed, self.epsilons, tell)


@dataclass(frozen=True)
class Transfer:
    """Try the images that were made on each network on every other."""

    systems: tuple[System, ...]
    seed: int
    spec: AttackSpec

    @property
    def label(self) -> str:
        """What progress calls it."""
        return f"transfer of {self.spec.title}"

    def __call__(self, setting: Setting, tell: Tell = no_one) -> Counts:
        """Do it."""
        return transferred(setting, self.systems, self.seed, self.spec, tell)


Work = Train | Attack | Substitute | Transfer


class Counts(Record, frozen=True):
    """How many images stayed right, by what was asked.

    Attributes:
        setting: Everything that the counts depend on.
        n: How many images.
        right: By question.
        queries: Labels that were asked of the network to prepare, if that is counted.
    """

    setting: dict[str, Any]
    n: Count
    right: dict[Text, Count]
    queries: Count = 0


def deployed(setting: Setting, system: System, seed: int) -> Bundle:
    """Open the bundle of a network: the one that was given, or that :class:`Train` made."""
    return open_bundle(system.bundle or setting.directory("bundles", system, seed))


def trained(setting: Setting, system: System, seed: int, tell: Tell = no_one) -> Bundle:
    """Return the bundle of a network, trained and exported now if that was not done.

    A run with the same settings is taken as it is, and so is a bundle of that run's weights.
    """
    from ccn_deploy.exporters import export_bundle
    from ccn_deploy.runtimes.tensorrt.library import LIBRARIES
    from ccn_deploy.trainers import Event, Skipped, Started, TrainConfig, train

    steps = 1

    def watch(event: Event) -> None:
        nonlocal steps
        if isinstance(event, Started):
            steps = event.steps
        if not isinstance(event, Skipped):
            tell(event.step / steps)

    budget = setting.budget
    train_data, test_data = (
        data(setting, split).first(budget.images) for split in ("train", "test")
    )
    config = TrainConfig(
        system.defense,
        train_data.name,
        system.recipe or budget.recipe_of(train_data.input_shape),
        architecture=system.architecture,
        compact=system.compact,
        adversarial=system.adversarial,
        epochs=budget.epochs,
        batch_size=budget.batch_size,
        seed=seed,
        threads=1,
        device="auto",
    )
    place = setting.directory("runs", system, seed)
    try:
        run = train(config, train_data, test_data, place, watcher=watch)
    except UsageError as error:
        if not place.exists():
            raise
        raise UsageError(error.what, f"Delete {place}, or give another --output.") from error
    path = setting.directory("bundles", system, seed)
    if path.exists():
        bundle = open_bundle(path)
        if bundle.file(Role.WEIGHTS).sha256 == sha256(run.weights):
            return bundle
    formats = (setting.runtime,) if setting.runtime in LIBRARIES else ()
    return export_bundle(
        run, path, overwrite=True, formats=("onnx", *formats), precisions=(setting.precision,)
    )


def attacked(
    setting: Setting,
    system: System,
    seed: int,
    specs: Sequence[AttackSpec],
    tell: Tell = no_one,
) -> RobustnessResult:
    """Return the judged evidence of attacks on a network, measured now where it is not there."""
    bundle = deployed(setting, system, seed)
    request = RobustnessRequest(
        data_of(setting, bundle),
        runtime=setting.runtime,
        precision=setting.precision,
        attacks=tuple(specs),
        samples=setting.samples(specs[0].name),
        options=OPTIONS,
        diagnose=False,
    )
    return judge(collect(bundle, request, lambda _, done, total: tell(done / total)))


def substituted(
    setting: Setting,
    system: System,
    seed: int,
    epsilons: Sequence[float],
    tell: Tell = no_one,
) -> Counts:
    """Return how many images a network gets right under FGSM from a substitute of it.

    The attacker's first images and those that are attacked are different ones of the test split.
    """
    bundle = deployed(setting, system, seed)
    images = data_of(setting, bundle)
    order = images.order()
    seeds, rest = order[:SUBSTITUTE_SEEDS], order[SUBSTITUTE_SEEDS:]
    rest = rest[: setting.samples("substitute")]
    asked = {"question": "substitute", "epsilons": list(epsilons), "n": len(rest),
             "rounds": setting.budget.rounds}  # fmt: skip

    def measure() -> tuple[dict[str, int], int]:
        from ccn_deploy.attacks.substitute import substitute_fgsm, train_substitute

        with open_runtime(bundle, setting.runtime, setting.precision, options=OPTIONS) as runtime:
            substitute = train_substitute(
                lambda batch: labels_of(runtime, batch),
                images.images(seeds),
                classes=bundle.card.classes,
                rounds=setting.budget.rounds,
                threads=1,
                progress=lambda _, done, total: tell(done / total),
            )
            x, y = images.images(rest), images.labels[rest]
            right = labels_of(runtime, x) == y
            found = {}
            for spec in suite(["fgsm"], epsilons):
                assert spec.epsilon is not None
                moved = substitute_fgsm(substitute, x, y, [spec.epsilon])[spec.epsilon]
                held = right & right_under(runtime, spec, x, y, moved)
                found[f"{spec.epsilon:g}"] = int(held.sum())
            return found, substitute.queries

    return _kept(setting, asked, [bundle], images, measure)


def transferred(
    setting: Setting,
    systems: Sequence[System],
    seed: int,
    spec: AttackSpec,
    tell: Tell = no_one,
) -> Counts:
    """Return how many images each network gets right that an attack made on each of them.

    A question is ``"TESTED ON CRAFTED"``, both by the names of networks.
    """
    bundles = {system.name: deployed(setting, system, seed) for system in systems}
    images = data_of(setting, next(iter(bundles.values())))
    chosen = images.order()[: setting.samples(spec.name)]
    asked = {"question": "transfer", "attack": spec.document(), "names": list(bundles),
             "n": len(chosen)}  # fmt: skip

    def measure() -> tuple[dict[str, int], int]:
        with ExitStack() as stack:
            runtimes = {
                name: stack.enter_context(
                    open_runtime(bundle, setting.runtime, setting.precision, options=OPTIONS)
                )
                for name, bundle in bundles.items()
            }
            x, y = images.images(chosen), images.labels[chosen]
            matrix = transfer_matrix(
                runtimes, x, y, spec, progress=lambda _, done, total: tell(done / total)
            )
        return {
            f"{on} {by}": int(matrix.held[row, column].sum())
            for row, on in enumerate(matrix.tested_on)
            for column, by in enumerate(matrix.crafted_on)
        }, 0

    return _kept(setting, asked, list(bundles.values()), images, measure)


def _kept(
    setting: Setting,
    asked: dict[str, Any],
    bundles: Sequence[Bundle],
    images: Dataset,
    measure: Callable[[], tuple[dict[str, int], int]],
) -> Counts:
    """Return counts that are there for the very same setting; else measure and keep them."""
    keys = [cache_key(b, setting.target, "native", images, seed=0) for b in bundles]
    depends = {**asked, "networks": keys}
    name = f"{asked['question']}-{sha256(canonical_json(depends))[:16]}.json"
    path = setting.root / "counts" / name
    if path.is_file():
        counts = decode(path.read_bytes(), Counts, str(path), "Delete it: it is measured again.")
        if counts.setting == depends:
            return counts
    right, queries = measure()
    counts = Counts(setting=depends, n=asked["n"], right=right, queries=queries)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, encode(counts))
    return counts


def data(setting: Setting, split: Split, like: ModelInput | None = None) -> Dataset:
    """Return a split of the data of a study; ``like`` as for :func:`load_dataset`."""
    return _loaded(setting.dataset, split, setting.data_dir, like)


@functools.lru_cache(maxsize=4)
def _loaded(name: str, split: Split, directory: Path | None, like: ModelInput | None) -> Dataset:
    return load_dataset(name, split, directory, like=like)


def data_of(setting: Setting, bundle: Bundle) -> Dataset:
    """Return the test split, its labels numbered as a bundle's classes."""
    card = bundle.card
    return data(setting, "test", ModelInput(card.input_shape, card.class_names))
