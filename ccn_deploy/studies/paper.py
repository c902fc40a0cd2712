"""The studies of the paper: its tables, each as data. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

from ccn_deploy.architectures import ARCHITECTURES, POOL, Architecture
from ccn_deploy.attacks.spec import AttackSpec, Setting, suite
from ccn_deploy.defenses import DEFENSES
from ccn_deploy.errors import UsageError, named
from ccn_deploy.robustness.judge import DISTANCES
from ccn_deploy.studies.published import LAYERS, PAPER, Family, Numbers
from ccn_deploy.studies.results import CellRecord, ClaimRecord, ColumnRecord, StudyRecord
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


@dataclass(frozen=True)
class Strengths:
    """How strong the attacks on a family of data are (section 5.1).

    Attributes:
        fgsm: Epsilons of table 1 (or 5), as they are printed.
        main: That of tables 4, 7, 8 and 13, likewise.
        audit: Those of the audit, which is ours.
    """

    fgsm: tuple[str, ...]
    main: str
    audit: tuple[str, ...]


STRENGTHS: Mapping[Family, Strengths] = {
    "mnist": Strengths(("0.1", "0.2", "0.3", "0.4"), "0.3", ("0.2", "0.3")),
    "cifar10": Strengths(("2/255", "4/255", "8/255", "16/255"), "8/255", ("8/255",)),
    "imagenet": Strengths(("0.1/255", "0.3/255", "0.5/255", "1/255"), "1/255", ("1/255",)),
}


ALL_IMAGES = 1 << 30
"""Where a budget does not say how many: no split has more."""


@dataclass(frozen=True)
class Budget:
    """How much is spent on a reproduction.

    Attributes:
        name: What the user types.
        about: What it is, in a line.
        recipes: Name of the recipe by family.
        epochs: Instead of the recipe's.
        samples: Images by attack at most; the test split if it has fewer.
        cw: Settings of C&W that differ from the paper's.
        rounds: Of augmentation of the substitute's images (table 6); each doubles them.
        images: Training images at most, and test images after every epoch.
        batch_size: Instead of the recipe's.
        audits: Strengths at which networks are audited, the paper's own last.
    """

    name: str
    about: str
    recipes: Mapping[Family, str] = field(hash=False)
    epochs: int | None = None
    samples: Mapping[str, int] = field(default_factory=dict, hash=False)
    cw: Mapping[str, Setting] = field(default_factory=dict, hash=False)
    rounds: int = 6
    images: int = ALL_IMAGES
    batch_size: int | None = None
    audits: int = 2

    def recipe_of(self, shape: tuple[int, int, int]) -> str:
        """Return the recipe for images of a shape (channels, height, width)."""
        return self.recipes[family_of(shape)]


_QUICK: Mapping[Family, str] = {"mnist": "quick", "cifar10": "quick", "imagenet": "paper-imagenet"}

BUDGETS: Mapping[str, Budget] = {
    budget.name: budget
    for budget in (
        Budget(
            "smoke",
            "few images and epochs: shows that everything runs, and no number means anything",
            _QUICK,
            epochs=3,
            images=500,
            batch_size=16,
            samples={"fgsm": 100, "deepfool": 10, "cw": 5, "audit": 2, "substitute": 100},
            audits=1,
            cw={"steps": 50, "binary_search_steps": 2},
            rounds=2,
        ),
        Budget(
            "quick",
            "the quick recipe, and as many images as tell large differences",
            _QUICK,
            samples={"fgsm": 1000, "deepfool": 300, "cw": 50, "audit": 100, "substitute": 800},
        ),
        Budget(
            "paper",
            "the paper's schedule and all test images for its attacks, 500 for the audit",
            {"mnist": "paper-mnist", "cifar10": "paper-cifar10", "imagenet": "paper-imagenet"},
            samples={"audit": 500},
        ),
    )
}


def family_of(shape: tuple[int, int, int]) -> Family:
    """Return whose images have this shape (channels, height, width).

    Raises:
        UsageError: None of the paper's networks takes them.
    """
    for family, architecture in _ARCHITECTURE.items():
        if architecture.input_shape == shape:
            return family
    raise UsageError(
        f"The paper has no network for images of shape {list(shape)}.",
        "Give data of one channel and 28x28, or three and 32x32 or 224x224; or compare networks "
        "of your own: ccn-deploy study FILE.toml",
    )


_ARCHITECTURE: Mapping[Family, Architecture] = {
    "mnist": ARCHITECTURES["mnist-cnn"],
    "cifar10": ARCHITECTURES["vgg11-cifar10"],
    "imagenet": ARCHITECTURES["vgg11-imagenet"],
}


def tables(family: Family, budget: Budget) -> dict[str, Study]:
    """Return the paper's tables of results for a family of data, by name."""
    made = _Tables(family, budget)
    studies = (
        made.fgsm("table1", "Accuracy (%) under FGSM", _plain()),
        made.deepfool(),
        made.robustness(),
        made.fgsm(
            "table4", "Accuracy (%) under FGSM, trained on FGSM's images too", _adversarial(family)
        ),
        made.imagenet(),
        made.substitute(),
        made.transfer("table7"),
        made.transfer("table8"),
        made.fgsm("table9", "Accuracy (%) under FGSM, by normalisation", _normalised()),
        made.cw("table11"),
        made.cw("table12"),
        made.layers(),
    )
    return {s.name: s for s in studies if s is not None}


class _Tables:
    """Makes the studies of one family; None for a table that is about another."""

    def __init__(self, family: Family, budget: Budget) -> None:
        self.family, self.budget, self.strengths = family, budget, STRENGTHS[family]

    def fgsm(self, name: str, title: str, rows: Mapping[str, System]) -> Study | None:
        """Tables 1, 4 and 9."""
        main = f"FGSM {self.strengths.main}"
        claims = {
            "table1": (
                Claim(
                    "CCN+LS above CCN above L2SM above SM",
                    main,
                    ranking("CCN+LS", "CCN", "L2SM", "SM"),
                ),
                Claim("CCN at least twice SM", main, ranking("CCN", "SM"), factor=2.0),
            ),
            "table4": (),
            "table9": (Claim("CCN above SM above BN", main, ranking("CCN", "SM", "BN")),),
        }[name]
        return self._study(name, title, rows, (self._clean(), *self._fgsm()), claims)

    def deepfool(self) -> Study | None:
        """Table 2."""
        spec = attack_spec("deepfool")
        columns = tuple(Column(f"d {d:g}", Attacked(spec, d=d)) for d in DISTANCES)
        claims = (Claim("CCN+LS above CCN above SM", "d 0.3", ranking("CCN+LS", "CCN", "SM")),)
        return self._study("table2", "Accuracy (%) under DeepFool", _plain(), columns, claims)

    def robustness(self) -> Study | None:
        """Table 3: the paper's attack leaves the box [0, 1] or not, so both are shown."""
        boxed = Column("rho_adv", Attacked(attack_spec("deepfool"), "rho"))
        free = Column("unclipped", Attacked(attack_spec("deepfool", clip=False), "rho"), extra=True)
        order = ranking("CCN+LS", "CCN", "L2SM", "SM")
        claims = (Claim("CCN+LS above CCN above L2SM above SM", "rho_adv", order),)
        title = "DeepFool's robustness rho_adv (equation 9)"
        return self._study("table3", title, _plain(), (boxed, free), claims)

    def imagenet(self) -> Study | None:
        """Table 5."""
        robustness = Column("rho_adv (%)", Attacked(attack_spec("deepfool"), "rho-percent"))
        columns = (self._clean(), *self._fgsm(), robustness)
        return self._study("table5", "ImageNet: FGSM and DeepFool", _plain(), columns)

    def substitute(self) -> Study | None:
        """Table 6."""
        columns = tuple(
            Column(f"eps {text}", FromSubstitute(_number(text))) for text in self.strengths.fgsm
        )
        order = ("CCN", "CCN+LS"), ("SM", "LS", "BReLU", "L2SM")
        claims = tuple(
            Claim("CCN and CCN+LS above the others", f"eps {eps}", order)
            for eps in self.strengths.fgsm[1:3]
        )
        title = "Accuracy (%) under FGSM from a substitute network (black box)"
        return self._study("table6", title, _plain(), columns, claims)

    def transfer(self, name: str) -> Study | None:
        """Tables 7 and 8."""
        spec = attack_spec("fgsm", self.strengths.main)
        columns = tuple(Column(title, Transferred(spec, s)) for title, s in _plain().items())
        order = ("CCN", "CCN+LS"), ("SM", "LS", "BReLU", "L2SM")
        claims = tuple(
            Claim("CCN and CCN+LS above the others", title, order) for title in ("SM", "LS")
        )
        title = f"Accuracy (%) under FGSM {self.strengths.main} made on the network of the column"
        return self._study(name, title, _plain(), columns, claims, first="Tested on")

    def cw(self, name: str) -> Study | None:
        """Tables 11 and 12."""
        spec = attack_spec("cw", settings=self.budget.cw)
        columns = (
            Column("L2 distance", Attacked(spec, "l2")),
            Column("success", Attacked(spec, "success")),
        )
        claims = (
            Claim("CCN+LS above CCN above SM", "L2 distance", ranking("CCN+LS", "CCN", "SM")),
        )
        return self._study(name, "C&W: mean L2 distance, success (%)", _plain(), columns, claims)

    def layers(self) -> Study | None:
        """Table 13."""
        spec = attack_spec("fgsm", self.strengths.main)
        *others, last = _ARCHITECTURE["mnist"].weighted_layers()
        rows = {
            "none": System("sm"),
            **{layer: System("sm", compact=(layer,)) for layer in others},
            last: System("l2sm"),
        }
        head = f"FGSM {self.strengths.main}"
        columns = (self._clean(), Column(head, Attacked(spec)))
        claims = tuple(
            Claim(f"{layer} alone above none", head, ranking(layer, "none"))
            for layer in ("fc3", "fc2")
        )
        title = "Accuracy (%) with one compact layer"
        return self._study("table13", title, rows, columns, claims, first="Compact layer")

    def _study(
        self,
        name: str,
        title: str,
        rows: Mapping[str, System],
        columns: tuple[Column, ...],
        claims: tuple[Claim, ...] = (),
        *,
        first: str = "Network",
    ) -> Study | None:
        numbers: Numbers | None = PAPER[name].get(self.family)
        if numbers is None:
            return None
        return Study(name, title, rows, (*columns, *self._audit()), numbers, claims, first)

    def _clean(self) -> Column:
        return Column("clean", Attacked(attack_spec("fgsm", self.strengths.fgsm[0]), "clean"))

    def _fgsm(self) -> tuple[Column, ...]:
        return tuple(
            Column(f"FGSM {text}", Attacked(attack_spec("fgsm", text)))
            for text in self.strengths.fgsm
        )

    def _audit(self) -> tuple[Column, ...]:
        """Return what every table ends with: the worst case that we know of."""
        return tuple(
            Column(f"audit {text}", Attacked(attack_spec("audit", text)), extra=True)
            for text in self.strengths.audit[-self.budget.audits :]
        )


def _plain() -> dict[str, System]:
    """Return the six networks that most tables are about."""
    return _systems(("sm", "ls", "brelu", "l2sm", "ccn", "ccn+ls"))


def _adversarial(family: Family) -> dict[str, System]:
    """Return the same, trained on FGSM's images as well, and two that are not the paper's."""
    recipe = "pgd-mnist" if family == "mnist" else None
    paper = {title: replace(s, adversarial="fgsm") for title, s in _plain().items()}
    return {
        **paper,
        "SM, PGD": System("sm", adversarial="pgd", recipe=recipe),
        "SM, TRADES": System("sm", adversarial="trades", recipe=recipe),
    }


def _normalised() -> dict[str, System]:
    return _systems(("sm", "bn", "lrn", "ccn", "ccn+ls"))


def _systems(defenses: Sequence[str]) -> dict[str, System]:
    return {DEFENSES[name].title: System(name) for name in defenses}


def _number(text: str) -> float:
    """Read an epsilon as it is printed: also ``"0.1/255"``, which options do not take."""
    upper, _, lower = text.partition("/")
    return float(upper) / float(lower or 1)


def attack_spec(
    name: str,
    epsilon: str | None = None,
    *,
    clip: bool = True,
    settings: Mapping[str, Setting] | None = None,
) -> AttackSpec:
    """Return an attack of the paper, its epsilon as it is printed, such as ``"8/255"``."""
    epsilons = () if epsilon is None else (_number(epsilon),)
    found = suite([name], epsilons, settings={name: settings or {}})
    return next(spec for spec in found if spec.clip == clip)


def architecture(family: Family) -> StudyRecord | None:
    """Return table 10 for a family: our network layer by layer beside the paper's."""
    published = LAYERS.get(family)
    if published is None:
        return None
    ours = _layers(_ARCHITECTURE[family])
    cells = [
        CellRecord(row=f"{place}", column=head, text=text)
        for head, texts in (("ours", ours), ("paper", published))
        for place, text in enumerate(texts, 1)
    ]
    return StudyRecord(
        name="table10",
        title="The network, layer by layer",
        first="Layer",
        rows=tuple(f"{place}" for place in range(1, len(ours) + 1)),
        columns=tuple(ColumnRecord(head=h, question="architecture") for h in ("ours", "paper")),
        cells=tuple(cells),
        claims=(ClaimRecord(text="The same layers", column="ours", holds=ours == published),),
    )


def _layers(network: Architecture) -> tuple[str, ...]:
    """Return the layers as table 10 calls them."""
    features = ("2x2 max-pool" if f == POOL else f"{f} filters (3x3)" for f in network.features)
    units = (f"{count} units" for count in (*network.hidden, network.classes))
    return (*features, *units)


FIGURES = ("figure1", "figure2", "figure3", "figure5", "figure6")
"""The figures that are made; figure 4 is a diagram of the module."""

ALL = "all"

INTRO = """# Reproduction

Every table of the paper that can be filled on these data, by `ccn-deploy reproduce all`: our number
on the deployed runtime, the paper's, and the difference. No number here is the paper's own
experiment unless the data set, the epochs and the images are: each table says what it rests on. The
columns of the audit are ours.
"""


def asked(names: Sequence[str], family: Family) -> tuple[str, ...]:
    """Return the tables and figures that names stand for, in the paper's order.

    Raises:
        UsageError: An unknown name; or one that is about other data.
    """
    tables_here = [name for name in PAPER if family in PAPER[name]]
    if family in LAYERS:
        tables_here.append("table10")
    tables_here.sort(key=lambda name: int(name.removeprefix("table")))
    figures = FIGURES if family == "mnist" else ()
    here = (*tables_here, *figures)
    everywhere = {name: name for name in (*PAPER, "table10", *FIGURES, ALL)}
    lowered = [named("table or figure", name.lower(), everywhere) for name in names]
    if ALL in lowered:
        return here
    for name in lowered:
        if name not in here:
            others = [f for f in get_args(Family) if f in PAPER.get(name, {})]
            raise UsageError(
                f"{name} is not about such images.",
                f"It is about those of {' or '.join(others or ['mnist'])}: give such a --dataset.",
            )
    return tuple(name for name in here if name in lowered)
