"""Policies: what is demanded of a release, written down before it is measured.

A policy is a TOML file of schema ``ccn-deploy/policy/1``; ``policy.schema.json`` beside this
module is its JSON Schema, generated from the types here.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from ccn_deploy.attacks.spec import number
from ccn_deploy.bundle import Bundle
from ccn_deploy.certification.session import Options
from ccn_deploy.data import DataOptions
from ccn_deploy.errors import (
    CcnDeployError,
    EnvironmentUnfitError,
    UsageError,
    one_line,
    unknown,
)
from ccn_deploy.extras import require
from ccn_deploy.records import Count, Record, Text, encode
from ccn_deploy.robustness.options import AttackOptions
from ccn_deploy.robustness.thresholds import Threshold, parse_max_drop, thresholds_of
from ccn_deploy.storage import read_regular, sha256
from ccn_deploy.targets import DEPLOYED_PRECISIONS, DEPLOYED_RUNTIMES, Role, Target

T = TypeVar("T")

SCHEMA = "ccn-deploy/policy/1"
LARGEST = 1 << 20
"""Bytes of the largest policy that is parsed."""

NEVER_WAIVED = ("intact[", "derived[")
"""What the names of claims begin with that nobody can let go."""

Positive = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
Words = Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


class TargetPolicy(Record, frozen=True, rename="kebab"):
    """What is deployed.

    Attributes:
        runtime: A name in :data:`ccn_deploy.targets.DEPLOYED_RUNTIMES`.
        precision: Of the deployed graph or engine.
    """

    runtime: Text
    precision: Text = "fp32"


class DataPolicy(Record, frozen=True, rename="kebab"):
    """What it is measured on; options are those of the commands.

    Attributes:
        dataset: Name, directory or .npz file; the data set the network was trained on if unset.
        samples: Images to attack.
        parity_samples: Images of each kind to compare with the reference.
        parity_layers: Whether to compare every layer, too, for the certificate's page.
    """

    dataset: Text | msgspec.UnsetType = msgspec.UNSET
    samples: Positive = 500
    parity_samples: Positive | msgspec.UnsetType = msgspec.UNSET
    parity_layers: bool = False
    resize: Text | msgspec.UnsetType = msgspec.UNSET
    crop: Text | msgspec.UnsetType = msgspec.UNSET
    interpolation: Text | msgspec.UnsetType = msgspec.UNSET
    layout: Text | msgspec.UnsetType = msgspec.UNSET
    npz_images: Text | msgspec.UnsetType = msgspec.UNSET
    npz_labels: Text | msgspec.UnsetType = msgspec.UNSET


class AttackPolicy(Record, frozen=True, rename="kebab"):
    """What it is attacked with, as ``ccn-deploy verify-robustness`` takes it.

    Attributes:
        names: Attacks.
        epsilons: Strengths in Linf, ``["8/255", 0.1]``.
        epsilons_l2: Strengths in L2.
        steps: Of PGD and APGD; step_size and restarts likewise.
    """

    names: Annotated[tuple[Text, ...], msgspec.Meta(min_length=1)] = ("audit",)
    epsilons: tuple[float | Text, ...] | msgspec.UnsetType = msgspec.UNSET
    epsilons_l2: tuple[float | Text, ...] | msgspec.UnsetType = msgspec.UNSET
    steps: Positive | msgspec.UnsetType = msgspec.UNSET
    step_size: float | msgspec.UnsetType = msgspec.UNSET
    restarts: Positive | msgspec.UnsetType = msgspec.UNSET


class ThresholdPolicy(Record, frozen=True, rename="kebab"):
    """What must hold.

    Attributes:
        max_drop: How far accuracy may be below the reference's, ``"1%"``.
        min_accuracy: What accuracy must be without an attack.
        min_robust: What must be left under attacks, ``["audit@0.1=55%"]``.
    """

    max_drop: Text = "1%"
    min_accuracy: Text | msgspec.UnsetType = msgspec.UNSET
    min_robust: tuple[Text, ...] = ()


class Waiver(Record, frozen=True, rename="kebab"):
    """A claim that need not hold, until a day.

    Attributes:
        claim: Its name, as ``certify`` prints it.
        reason: Why it need not.
        owner: Who answers for that.
        expires: The last day on which it counts.
        target: Runtime and precision that it is about, ``"onnxruntime-cpu-int8"``; all if unset.
    """

    claim: Words
    reason: Words
    owner: Words
    expires: datetime.date
    target: Text | msgspec.UnsetType = msgspec.UNSET

    def covers(self, target: Target) -> bool:
        """Whether it is about a target."""
        return self.target in (msgspec.UNSET, str(target))

    def check(self, today: datetime.date, targets: Sequence[Target]) -> None:
        """Refuse a waiver that has ended or that nothing can rest on.

        Raises:
            UsageError: It has, or cannot be given.
        """
        if self.expires < today:
            raise UsageError(
                f"The waiver of {self.claim!r} ended on {self.expires}.",
                f"Ask {self.owner} for another day, or remove it: the claim must then hold.",
            )
        if self.claim.startswith(NEVER_WAIVED):
            raise UsageError(
                f"{self.claim!r} cannot be waived: a bundle that is not what it says is no bundle.",
                "Export it again.",
            )
        if not any(self.covers(target) for target in targets):
            raise UsageError(
                f"The waiver of {self.claim!r} is for {self.target!r}, which is no target.",
                f"Targets are: {', '.join(map(str, targets))}.",
            )


class Policy(Record, frozen=True, rename="kebab"):
    """What is demanded of a release.

    Attributes:
        name: For people.
        intended_use: What the network is for; who relies on the certificate reads it there.
        fallback: What happens where the network fails or is not sure.
        monitoring: How it is watched once it is deployed.
        owner: Who set the thresholds.
        valid_days: How long a certificate is good for.
        target: What is deployed, one table each.
        data: What it is measured on.
        attacks: What it is attacked with.
        thresholds: What must hold.
        waiver: What need not, one table each.
    """

    schema: Literal["ccn-deploy/policy/1"]
    name: Words
    intended_use: Words
    target: Annotated[tuple[TargetPolicy, ...], msgspec.Meta(min_length=1)]
    fallback: Text = ""
    monitoring: Text = ""
    owner: Text = ""
    valid_days: Annotated[int, msgspec.Meta(ge=1, le=3650)] = 90
    seed: Count = 0
    data: DataPolicy = DataPolicy()
    attacks: AttackPolicy = AttackPolicy()
    thresholds: ThresholdPolicy = ThresholdPolicy()
    waiver: tuple[Waiver, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical form: comments and layout of the file do not change it."""
        return sha256(encode(self))

    @property
    def targets(self) -> tuple[Target, ...]:
        """What is deployed.

        Raises:
            UsageError: An unknown runtime or precision.
        """
        return tuple(Target(found.runtime, found.precision) for found in self.target)

    def options(
        self,
        bundle: Path,
        target: Target,
        *,
        data_dir: Path | None = None,
        threads: int | None = None,
        recheck: str | None = None,
    ) -> Options:
        """Return what the claims about one target are judged by.

        Args:
            bundle: Path of the bundle.
            target: One of :attr:`targets`.
            data_dir: Where the files of a named data set are on this machine.
            threads: CPU threads.
            recheck: How many images of evidence that was read to ask again about.

        Raises:
            UsageError: Something in the policy means nothing.
        """
        data, limits = self.data, self.thresholds
        return Options(
            bundle=bundle,
            runtime=target.runtime,
            precision=target.precision,
            max_drop=limits.max_drop,
            min_robust=limits.min_robust,
            min_accuracy=_given(limits.min_accuracy),
            recheck=recheck,
            samples=data.samples,
            parity_samples=_given(data.parity_samples),
            parity_layers=data.parity_layers,
            seed=self.seed,
            attack=AttackOptions(
                attacks=self.attacks.names,
                epsilons=_list(self.attacks.epsilons),
                epsilons_l2=_list(self.attacks.epsilons_l2),
                steps=_given(self.attacks.steps),
                step_size=_given(self.attacks.step_size),
                restarts=_given(self.attacks.restarts),
            ),
            dataset=_given(data.dataset),
            data_dir=data_dir,
            data=DataOptions(
                resize=_given(data.resize),
                crop=_given(data.crop),
                interpolation=_given(data.interpolation),
                layout=_given(data.layout),
                images_key=_given(data.npz_images),
                labels_key=_given(data.npz_labels),
            ),
            threads=threads,
        )

    @property
    def limits(self) -> tuple[Threshold, ...]:
        """What must be left whatever the reference leaves."""
        found = self.thresholds
        return thresholds_of(found.min_robust, _given(found.min_accuracy), _LIMITS)

    def waiver_for(self, claim: str, target: Target) -> Waiver | None:
        """Return the waiver of a claim about a target, if there is one."""
        return next((w for w in self.waiver if w.claim == claim and w.covers(target)), None)

    def check(self, today: datetime.date) -> None:
        """Refuse a policy that means nothing, or rests on what has ended, before anything runs.

        Raises:
            UsageError: The first thing that is wrong, by its key.
        """
        if len(set(self.targets)) < len(self.target):
            raise UsageError("The policy has a target twice.", "Name each once under [[target]].")
        for target in self.targets:
            if target.is_reference:
                raise UsageError(
                    f"The policy's target {target} is the reference, which is not deployed.",
                    f"Name one of: {', '.join(DEPLOYED_RUNTIMES)}.",
                )
        parse_max_drop(self.thresholds.max_drop, f"{_LIMITS}max-drop")
        _ = self.limits, self.options(Path(), self.targets[0])
        for waiver in self.waiver:
            waiver.check(today, self.targets)


def read_policy(path: Path) -> Policy:
    """Read a policy.

    Raises:
        UsageError: No such file, not TOML, or a key that is unknown, missing or of another type.
        EnvironmentUnfitError: It is of a newer schema.
    """
    data = read_regular(path, LARGEST + 1)
    if data is None:
        raise UsageError(
            f"{path} is not there.", "Write one with: ccn-deploy policy init BUNDLE -o policy.toml"
        )
    if len(data) > LARGEST:
        raise UsageError(f"{path} has more than {LARGEST:,} bytes.", _FORM)
    toml = _toml()
    try:
        plain: dict[str, Any] = toml.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no TOML: {one_line(error).rstrip('.')}.", _FORM) from error
    found = plain.get("schema")
    if found != SCHEMA:
        newer = isinstance(found, str) and found.startswith("ccn-deploy/policy/")
        if newer:
            raise EnvironmentUnfitError(
                f"{path} has schema {found!r}; this version reads {SCHEMA!r}.",
                "Upgrade with: pip install --upgrade ccn-deploy",
            )
        raise UsageError(f"{path} does not say its schema.", f'Begin it with: schema = "{SCHEMA}"')
    _check_keys(plain, Policy, "")
    try:
        return msgspec.convert(plain, Policy)
    except (msgspec.ValidationError, CcnDeployError) as error:
        what = error.what if isinstance(error, CcnDeployError) else str(error)
        raise UsageError(f"{path}: {what.rstrip('.')}.", _FORM) from error


def template(bundle: Bundle) -> str:
    """Return a policy for a bundle, commented, for its owner to edit."""
    card = bundle.card
    targets = _deployable(bundle)
    colours = card.input_shape[0] > 1
    strengths = '["2/255", "4/255", "8/255"]' if colours else "[0.1, 0.2]"
    strongest = "8/255" if colours else "0.2"
    tables = "\n".join(
        f"{'' if at == 0 else '# '}[[target]]\n"
        f'{"" if at == 0 else "# "}runtime = "{target.runtime}"\n'
        f'{"" if at == 0 else "# "}precision = "{target.precision}"\n'
        for at, target in enumerate(targets)
    )
    return f"""\
# What a release of this network must keep to. Fix it before anything is measured:
#   ccn-deploy policy check BUNDLE policy.toml     what it takes, and whether it can pass
#   ccn-deploy policy commit BUNDLE policy.toml    from now on evidence says that it stood
#   ccn-deploy certify BUNDLE --policy policy.toml --sign KEY
schema = "{SCHEMA}"
name = {_quoted(f"Release of {card.title}")}
intended-use = "Say here what the network is for, and on which images."
fallback = ""    # what happens where it fails or is not sure
monitoring = ""  # how it is watched once it is deployed
owner = ""       # who set these thresholds
valid-days = 90  # how long a certificate is good for
# seed = 0       # of the selection of images, and of the attacks

# One table for each runtime and precision that is shipped.
{tables}
[data]
# dataset = "DIR"  # a name, class folders or an .npz; without it the one it was trained on
samples = 500      # images to attack: fewer than 299 cannot show a drop of at most 1 %
# parity-samples = 256
# parity-layers = true  # compare every layer, too, for the page; takes longer

[attacks]
names = ["audit"]  # the recommended set; or fgsm, pgd, apgd, deepfool, cw, square, ...
epsilons = {strengths}
# epsilons-l2 = [0.5, 1.0]
# steps = 40
# restarts = 1

[thresholds]
max-drop = "1%"      # how far accuracy may be below the PyTorch reference's, in every row
min-accuracy = "95%" # without an attack
# What must be left, shown at 95 % confidence. Without it nothing is claimed but that what is
# deployed is no worse than the reference.
min-robust = ["audit@{strongest}=50%"]

# A claim that need not hold, until a day. Claims are named as certify prints them.
# [[waiver]]
# claim = "no-worse[linf-{_size(strongest)}-audit]"
# reason = "Why it need not."
# owner = "Who answers for that."
# expires = 2027-01-31
# target = "{targets[0]}"
"""


def _deployable(bundle: Bundle) -> list[Target]:
    """Return the targets that a bundle has files for, ONNX Runtime on the CPU first."""
    found: dict[Target, None] = {}
    for file in bundle.manifest.files:
        if file.role is Role.ENGINE:
            found[Target(file.runtime, file.precision)] = None
        elif file.role is Role.FORWARD and file.runtime in ("", "onnxruntime-cpu"):
            found[Target("onnxruntime-cpu", file.precision)] = None
    order = list(DEPLOYED_PRECISIONS)
    return sorted(found, key=lambda t: (t.on_gpu, t.runtime, order.index(t.precision)))


def _quoted(text: str) -> str:
    """Return text as a string of TOML: that of JSON is one."""
    return json.dumps(text)


def _size(text: str) -> str:
    return f"{number(text) or 0.0:g}"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of policies, generated from the types."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Policy of ccn-deploy",
        **msgspec.json.schema(Policy),
    }


def shipped_schema() -> str:
    """Return the JSON Schema as it is shipped."""
    return resources.files(__package__).joinpath("policy.schema.json").read_text("utf-8")


_LIMITS = "thresholds."
_FORM = "docs/certification.md describes every key; ccn-deploy policy init writes a policy."


def _check_keys(plain: Mapping[str, Any], record: type[Record], at: str) -> None:
    """Refuse a key that is unknown, suggesting the nearest: msgspec only says that it is."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(record)}
    for key, value in plain.items():
        if key not in fields:
            raise unknown("key of the policy", f"{at}{key}", [f"{at}{name}" for name in fields])
        kind = fields[key].type
        inner = next(iter(getattr(kind, "__args__", ())), kind)  # of a tuple of records
        inner = next(iter(getattr(inner, "__args__", ())), inner)  # of an annotated one
        if isinstance(inner, type) and issubclass(inner, Record):
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, dict):
                    _check_keys(one, inner, f"{at}{key}.")


def _toml() -> Any:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    return require("tomli", "certify", "to read a policy")


def _given(value: T | msgspec.UnsetType) -> T | None:
    return None if isinstance(value, msgspec.UnsetType) else value


def _list(values: tuple[float | str, ...] | msgspec.UnsetType) -> str | None:
    return None if isinstance(values, msgspec.UnsetType) else ",".join(map(str, values))
