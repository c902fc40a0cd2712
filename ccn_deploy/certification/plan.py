"""What a policy takes before anything is measured: images, minutes, and whether it can pass."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ccn_deploy.attacks.spec import AttackSpec
from ccn_deploy.bundle import Bundle
from ccn_deploy.certification.policy import Policy
from ccn_deploy.evaluation import check_fits, evaluation_data
from ccn_deploy.robustness.attack_session import REFERENCE
from ccn_deploy.robustness.thresholds import parse_max_drop
from ccn_deploy.runtimes import RuntimeOptions, open_runtime
from ccn_deploy.statistics import samples_needed, trials_needed
from ccn_deploy.targets import Target
from ccn_deploy.verdict import Verdict

_IMAGES = 32
"""Images of which a gradient is timed."""


@dataclass(frozen=True)
class Demand:
    """One threshold, and the fewest images that can show it.

    Attributes:
        what: For people.
        needed: Images if all goes well: none lost, or none fooled.
        there: Images that the policy has attacked.
    """

    what: str
    needed: int
    there: int

    @property
    def verdict(self) -> Verdict:
        """Pass if it can be shown at all."""
        return Verdict.PASS if self.there >= self.needed else Verdict.INCONCLUSIVE


@dataclass(frozen=True)
class Cost:
    """One attack on one target, its reference included.

    Attributes:
        target: Runtime and precision.
        attack: Its label.
        gradients: So many an image at most, a mean over all.
        minutes: All images take so long at most, here.
    """

    target: Target
    attack: str
    gradients: float
    minutes: float


@dataclass(frozen=True)
class Plan:
    """What a policy takes.

    Attributes:
        images: That are attacked.
        demands: Thresholds.
        costs: Attacks.
    """

    images: int
    demands: tuple[Demand, ...]
    costs: tuple[Cost, ...]

    @property
    def verdict(self) -> Verdict:
        """Whether the policy can pass at all."""
        return Verdict.all_of(demand.verdict for demand in self.demands)

    @property
    def minutes(self) -> float:
        """Of all attacks together, at most."""
        return sum(cost.minutes for cost in self.costs)

    def document(self) -> dict[str, Any]:
        """Return this as JSON."""
        return {
            "schema": "ccn-deploy/policy-check/1",
            "verdict": self.verdict.value,
            "images": self.images,
            "minutes_at_most": round(self.minutes, 2),
            "demands": [
                {"what": d.what, "needed": d.needed, "there": d.there, "verdict": d.verdict.value}
                for d in self.demands
            ],
            "attacks": [
                {
                    "target": str(cost.target),
                    "attack": cost.attack,
                    "gradients_per_image": cost.gradients,
                    "minutes_at_most": round(cost.minutes, 2),
                }
                for cost in self.costs
            ],
        }


def plan(
    bundle: Bundle, policy: Policy, *, data_dir: Path | None = None, threads: int | None = None
) -> Plan:
    """Work out what a policy takes on this machine, timing a gradient of each program.

    Args:
        bundle: An open bundle.
        policy: Checked already.
        data_dir: Where the files of a named data set are.
        threads: CPU threads; the runtime's own choice if None.

    Raises:
        UsageError: Data that do not fit the bundle.
        RuntimeUnavailableError: A target cannot be had here.
    """
    options = policy.options(bundle.path, policy.targets[0], data_dir=data_dir)
    data = evaluation_data(bundle, options.dataset, options.data_dir, options.data)
    check_fits(bundle, data)
    images = min(options.samples, len(data))
    drop = parse_max_drop(policy.thresholds.max_drop)
    demands = [
        Demand(
            f"no worse than the reference by more than {100 * drop:g} points",
            samples_needed(drop),
            images,
        ),
        *(
            Demand(
                f"at least {100 * limit.share:g} % under {limit.where}",
                trials_needed(images, images, limit.share) or images + 1,
                images,
            )
            for limit in policy.limits
        ),
    ]
    costs = []
    reference = _seconds(bundle, REFERENCE, threads)
    for target in policy.targets:
        both = reference + _seconds(bundle, target, threads)
        costs += [
            Cost(target, spec.label, asked / images, asked * both / 60)
            for spec in policy.options(bundle.path, target).suite
            for asked in [_gradients(spec, images)]
        ]
    return Plan(images, tuple(demands), tuple(costs))


def _gradients(spec: AttackSpec, images: int) -> float:
    """Return roughly how many gradients an attack takes at most: no image falls before the end."""
    return sum(stage.cost * min(stage.part or images, images) for stage in (spec.stages or (spec,)))


def _seconds(bundle: Bundle, target: Target, threads: int | None) -> float:
    """Return what a gradient of one image takes, or an answer where there are no gradients."""
    shape, classes = bundle.card.input_shape, bundle.card.classes
    images = np.random.default_rng(0).random((_IMAGES, *shape), dtype=np.float32)
    cotangents = np.full((_IMAGES, 1, classes), 1.0 / classes, np.float32)
    options = RuntimeOptions(threads=threads)
    with open_runtime(bundle, target.runtime, target.precision, options) as runtime:
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            if runtime.differentiable:
                runtime.vjp(images, cotangents)
            else:
                runtime.logits(images)
            taken.append(time.perf_counter() - started)
    return min(taken) / _IMAGES
