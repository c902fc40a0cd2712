"""What an evaluation gives away about how far to trust its numbers.

Each check is a function from a judged measurement to findings. Thresholds stand beside what they
were set by: honest networks of every defense and precision show nothing above them, with room.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
import numpy as np

from ccn_deploy.attacks.spec import ATTACKS
from ccn_deploy.records import Record, Text
from ccn_deploy.robustness.attack_session import REFERENCE
from ccn_deploy.robustness.collect import Measurement, Pair
from ccn_deploy.robustness.diagnostics import Diagnostics
from ccn_deploy.robustness.evidence import NO_LABEL
from ccn_deploy.robustness.non_inferiority import Mask
from ccn_deploy.robustness.outcomes import invalid, right, robust
from ccn_deploy.robustness.rows import AccuracyRow, FixedEpsilonResult, MinimizationResult
from ccn_deploy.statistics import clopper_pearson, sign_test

Code = Literal[
    "black-box-below-white-box",
    "bounded-above-minimum-norm",
    "chance-accuracy",
    "clean-labels-differ",
    "constant-background-gradients",
    "duplicates-in-data",
    "exploding-gradients",
    "fgsm-above-apgd",
    "gain",
    "gradients-disagree",
    "gradients-of-two-kinds",
    "large-epsilon-not-chance",
    "larger-epsilon-weaker",
    "margin-below-cross-entropy",
    "more-steps-weaker",
    "no-legal-image",
    "nothing-right",
    "one-attack-only",
    "planted-not-found",
    "random-answers",
    "reference-accuracy",
    "reference-itself",
    "saturated-logits",
    "training-data-overlap",
    "transfer-below-native",
    "zero-gradients",
]


class SanityFinding(Record, frozen=True):
    """Something that a reader of the numbers should know.

    Attributes:
        code: What kind of thing it is.
        undermines: Whether no pass may rest on the numbers.
        sentence: For people; names the figures.
        figures: What the sentence rests on, by name.
    """

    code: Code
    undermines: bool
    sentence: Text
    figures: dict[str, float | int | str] = msgspec.field(default_factory=dict)

    @property
    def word(self) -> str:
        """How grave it is: a doubt stands in the way of a pass, a note does not."""
        return "doubt" if self.undermines else "note"


SURE = 0.01
"""Level of the exact tests: a fair coin gives a false alarm once in a hundred."""

BORROWED = 0.05
"""Gain of a runtime without gradients of its own that says nothing. Honest int8: 3 in 100."""

FLATTERY = 0.1
"""FGSM's accuracy this far above a stronger attack's is worth saying."""

SLACK = 0.01
"""Part of the images that may contradict an order between attacks without a word."""

SCALE_FREE = ("pgd-margin", "apgd-dlr", "apgd-t", "square")
"""What the names of attacks on margins begin with."""

FEW = 2
"""Images that an attack on few of them may add without a word; one is no sign."""

BLINDED = 0.1
"""Part of the images that only the margin may lead astray. Honest: none of 32, at half of the
usual scale 3; squashed, tiny or scaled by the image: 4 to 7."""

CONTRADICTIONS = 0.05
"""Part of the images that a bounded attack may miss though a smaller perturbation is known."""

ODD_SLOPES = 0.05
"""Part of the points without a usable slope; of honest networks none was seen."""

COSINE = 0.9
"""Mean cosine of native and reference gradients. Honest: 0.999 in fp32, 0.998 in fp16, 0.99 of
deep networks; that of another network trained on the same images: 0.78 to 0.86."""

NORMS = 2.0
"""Factor between their norms. Honest: 1.00 in fp32 and fp16."""

FAR = 1e3
"""Largest over median norm of slopes that no softmax scales. Honest: below 10."""

NOISE = 1e-3
"""Part of the range of logits by which repeated answers differ; rounding gives 1e-6."""

BATCH_NOISE = 0.05
"""The same between batch sizes, where a grid of int8 may turn a step of it."""

FOUND = 0.75
"""Share of planted images that the attack must find. Honest: 16 of 16, always."""

WORSE_THAN_RECORDED = 0.1
"""Accuracy this far below what training recorded, and surely so, is of another network or data."""

SKILL = 0.1
"""Cohen's kappa of labels given and true; a network that knows nothing has 0."""

REPEATED = 0.05
"""Part of the images that may repeat others: the exact bounds rest on independent images."""

BACKGROUND = 0.5
"""Share of the gradient on pixels that no image uses. Honest: 0.03 to 0.15 of digits."""


@dataclass(frozen=True)
class _Judged:
    """What all checks look at."""

    measurement: Measurement
    clean: FixedEpsilonResult
    bounded: Sequence[FixedEpsilonResult]
    minimal: Sequence[MinimizationResult]
    max_drop: float

    @property
    def rows(self) -> Iterator[AccuracyRow]:
        """Everything that is judged."""
        yield from (row.row for row in (self.clean, *self.bounded))
        yield from (row for attack in self.minimal for row in attack.rows)

    @property
    def pairs(self) -> Iterator[Pair]:
        """Attacks with an epsilon."""
        yield from (pair for pair in self.measurement.pairs if pair.spec.epsilon)

    @property
    def scale_free(self) -> bool:
        """Whether an attack was run that no scale of the logits misleads."""
        names = {stage.name for pair in self.pairs for stage in (pair.spec, *pair.spec.stages)}
        return any(name.startswith(SCALE_FREE) for name in names)

    def strongest(self, norm: str, epsilon: float) -> Mask | None:
        """Which images hold under every attack of more than one step; None if none was run."""
        masks = [
            robust(pair.runtime)
            for pair in self.pairs
            if (pair.spec.norm, pair.spec.epsilon) == (norm, epsilon) and pair.spec.name != "fgsm"
        ]
        return np.asarray(np.all(masks, axis=0)) if masks else None


def sanity_findings(
    measurement: Measurement,
    clean: FixedEpsilonResult,
    bounded: Sequence[FixedEpsilonResult],
    minimal: Sequence[MinimizationResult],
    max_drop: float,
) -> list[SanityFinding]:
    """Return what the numbers, and a look at the target, give away.

    Args:
        measurement: What was judged.
        clean: Its row without an attack.
        bounded: Its rows of attacks with an epsilon.
        minimal: Its rows of attacks without.
        max_drop: By how much the runtime's accuracy may be below the reference's.
    """
    judged = _Judged(measurement, clean, bounded, minimal, max_drop)
    found = [finding for check in _OF_ROWS for finding in check(judged)]
    diagnostics = measurement.diagnostics
    if diagnostics is not None:
        found += [finding for look in _OF_TARGET for finding in look(diagnostics, judged)]
    return sorted(found, key=lambda finding: not finding.undermines)


def _note(code: Code, sentence: str, **figures: float | int | str) -> SanityFinding:
    return SanityFinding(code=code, undermines=False, sentence=sentence, figures=figures)


def _doubt(code: Code, sentence: str, **figures: float | int | str) -> SanityFinding:
    return SanityFinding(code=code, undermines=True, sentence=sentence, figures=figures)


def _clearly(more: int, fewer: int, n: int, allowed: float = SLACK) -> bool:
    """Whether images of one kind outnumber the other's by more than is allowed, and than chance."""
    return more - fewer > allowed * n and sign_test(more, fewer) < SURE


def _against(first: Mask, second: Mask) -> tuple[int, int]:
    """Return how many are in the first only, and in the second only."""
    return int((first & ~second).sum()), int((second & ~first).sum())


# Of the rows


def _nothing_compared(judged: _Judged) -> Iterator[SanityFinding]:
    if judged.measurement.target == str(REFERENCE):
        yield _note("reference-itself", "The runtime is the reference itself: nothing is compared.")


def _clean_rows(judged: _Judged) -> Iterator[SanityFinding]:
    clean = judged.clean
    if clean.runtime.count == 0:
        yield _doubt(
            "nothing-right",
            "Every image is wrong before any attack: no robustness was measured.",
            n=clean.runtime.n,
        )
    if clean.flips > SLACK * clean.runtime.n:
        yield _note(
            "clean-labels-differ",
            f"Runtime and reference give {clean.flips} clean images different verdicts: gradients "
            "of the reference may mislead an attack on the runtime. See `verify-parity`.",
            images=clean.flips,
            n=clean.runtime.n,
        )


def _skill(judged: _Judged) -> Iterator[SanityFinding]:
    # Cohen's kappa: accuracy above that of the same answers dealt out at random. A constant answer
    # has none however common its class is; with one true class only, nobody can show any.
    evidence = judged.measurement.pairs[0].runtime
    given, true = evidence.clean_runtime, evidence.label
    classes = range(int(max(given.max(), true.max())) + 1)
    chance = float(sum((given == k).mean() * (true == k).mean() for k in classes))
    accuracy = float(right(evidence).mean())
    if len(set(true.tolist())) > 1 and accuracy - chance < SKILL * (1 - chance):
        yield _doubt(
            "chance-accuracy",
            f"Without an attack {100 * accuracy:.1f} % of the images are right, where the same "
            f"answers dealt out at random have {100 * chance:.1f} %: labels, colours, orientation "
            "or class order are not those that the network knows.",
            accuracy=accuracy,
            chance=chance,
        )


def _gain(judged: _Judged) -> Iterator[SanityFinding]:
    native = judged.measurement.gradient == "native"
    # Slopes of the reference lead a little astray on a grid of int8.
    allowed = judged.max_drop if native else max(judged.max_drop, BORROWED)
    gains = [
        (row.gate.gained - row.gate.lost, row)
        for row in judged.rows
        if _clearly(row.gate.gained, row.gate.lost, row.gate.n, allowed)
    ]
    if gains:
        gain, row = max(gains, key=lambda pair: pair[0])
        points = 100 * gain / row.gate.n
        yield SanityFinding(
            code="gain",
            # Images that are only passed on may well do less here than where they were made.
            undermines=judged.measurement.gradient != "transfer",
            sentence=f"The runtime looks more robust than its reference in {len(gains)} rows, by "
            f"{points:.1f} points for {row.name}: the attack is blind on one of the two.",
            figures={"rows": len(gains), "attack": row.label, "gain": gain / row.gate.n},
        )


def _illegal(judged: _Judged) -> Iterator[SanityFinding]:
    counts = {
        pair.spec.label: invalid(pair.runtime) + invalid(pair.reference)
        for pair in judged.measurement.pairs
        if pair.spec.clip
    }
    worst = max(counts, key=lambda label: counts[label], default="")
    if worst and counts[worst]:
        yield _doubt(
            "no-legal-image",
            f"{worst} returned {counts[worst]} images that are no legal ones: it had no slope to "
            "walk along there, and showed nothing.",
            attack=worst,
            images=counts[worst],
        )


def _one_step(judged: _Judged) -> Iterator[SanityFinding]:
    for pair in judged.pairs:
        epsilon = float(pair.spec.epsilon or 0)
        strong = judged.strongest(pair.spec.norm, epsilon)
        if pair.spec.name != "fgsm" or strong is None:
            continue
        weak = robust(pair.runtime)
        n, at = len(weak), f"at epsilon {epsilon:g}"
        only_strong, only_weak = _against(strong, weak)
        figures = {"epsilon": epsilon, "fgsm": weak.mean(), "strongest": strong.mean()}
        compared = f"{100 * weak.mean():.1f} % against {100 * strong.mean():.1f} %"
        if weak.mean() - strong.mean() > FLATTERY:
            yield _note(
                "fgsm-above-apgd",
                f"FGSM flatters this network {at}: {compared} under attacks of more steps. Quote "
                "those.",
                **{name: float(value) for name, value in figures.items()},
            )
        elif _clearly(only_strong, only_weak, n):
            yield _doubt(
                "more-steps-weaker",
                f"Many steps find less than one {at}: FGSM leaves {compared}. Gradients mislead, "
                "and neither number is a bound.",
                **{name: float(value) for name, value in figures.items()},
            )
    names = {pair.spec.name for pair in judged.pairs}
    if names == {"fgsm"}:
        yield _note(
            "one-attack-only", "Only FGSM was run: alone it flatters networks like these. Run PGD."
        )


def _larger_epsilon(judged: _Judged) -> Iterator[SanityFinding]:
    pairs = list(judged.pairs)
    for name in dict.fromkeys(pair.spec.name for pair in pairs):
        same = [pair for pair in pairs if pair.spec.name == name]
        same.sort(key=lambda pair: pair.spec.epsilon or 0)
        for weak, strong in itertools.pairwise(same):
            more, fewer = _against(robust(strong.runtime), robust(weak.runtime))
            if _clearly(more, fewer, len(weak.runtime)):
                yield _doubt(
                    "larger-epsilon-weaker",
                    f"{strong.spec.title} at epsilon {strong.spec.epsilon:g} leaves {more} images "
                    f"right that fall at {weak.spec.epsilon:g}, and {fewer} the other way round: "
                    "it does not find what is there.",
                    attack=name,
                    smaller=float(weak.spec.epsilon or 0),
                    larger=float(strong.spec.epsilon or 0),
                    only_larger=more,
                    only_smaller=fewer,
                )


def _contradictions(judged: _Judged) -> Iterator[SanityFinding]:
    # An image that another attack made lies inside the ball in which the bounded one found none.
    smallest = [p for p in judged.measurement.pairs if not p.spec.epsilon and p.spec.clip]
    seen = set()
    for pair in judged.pairs:
        norm, epsilon = pair.spec.norm, float(pair.spec.epsilon or 0)
        held = judged.strongest(norm, epsilon)
        if held is None or (norm, epsilon) in seen:
            continue
        seen.add((norm, epsilon))
        missed = np.zeros_like(held)
        for other in smallest:
            evidence = other.runtime
            size = evidence.linf if norm == "linf" else evidence.l2
            missed |= held & (evidence.status == "fooled") & (size <= epsilon)
        if missed.sum() > CONTRADICTIONS * len(held):
            yield _doubt(
                "bounded-above-minimum-norm",
                f"{int(missed.sum())} images hold under every bounded attack at epsilon "
                f"{epsilon:g} ({norm}), and an attack without a bound fools them within it: the "
                "bounded ones are blind.",
                norm=norm,
                epsilon=epsilon,
                images=int(missed.sum()),
                n=len(held),
            )


def _transfer(judged: _Judged) -> Iterator[SanityFinding]:
    for pair in judged.pairs:
        label = pair.runtime.transferred
        if judged.measurement.gradient == "transfer":
            continue
        given = (label != NO_LABEL) & right(pair.runtime)
        passed = given & (label != pair.runtime.label)
        own = given & (pair.runtime.status == "fooled")
        yield from _passed_on(passed, own, pair.spec.label, len(given))


def _passed_on(passed: Mask, own: Mask, what: str, n: int) -> Iterator[SanityFinding]:
    only_passed, only_own = _against(passed, own)
    if _clearly(only_passed, only_own, n):
        yield _doubt(
            "transfer-below-native",
            f"Images made on the reference fool the runtime where its own attack does not "
            f"({what}): {only_passed} images against {only_own} the other way round. Its gradients "
            "mislead.",
            attack=what,
            only_transferred=only_passed,
            only_native=only_own,
            n=n,
        )


def _black_box(judged: _Judged) -> Iterator[SanityFinding]:
    for pair in judged.pairs:
        for stage in pair.spec.stages:
            if stage.name in ATTACKS and ATTACKS[stage.name].knowledge == "gradients":
                continue
            tried = pair.runtime.stage[: stage.part]
            added = int((tried == stage.name).sum())
            # On the twenty images of a label-only attack a single one is no sign.
            if added > max(2 * SLACK * len(tried), FEW):
                yield _doubt(
                    "black-box-below-white-box",
                    f"{pair.spec.label}: {stage.name} fools {added} of {len(tried)} images that "
                    "attacks along gradients left right: gradients mislead.",
                    attack=pair.spec.label,
                    stage=stage.name,
                    images=added,
                    n=len(tried),
                )


_OF_ROWS: tuple[Callable[[_Judged], Iterator[SanityFinding]], ...] = (
    _nothing_compared,
    _clean_rows,
    _skill,
    _gain,
    _illegal,
    _one_step,
    _larger_epsilon,
    _contradictions,
    _transfer,
    _black_box,
)


# Of the target


def _slopes(look: Diagnostics, _: _Judged) -> Iterator[SanityFinding]:
    points = look.clean.n + look.attacked.n
    odd = look.clean.zero + look.clean.non_finite + look.attacked.zero + look.attacked.non_finite
    missing = sum(look.held.usual) and look.attacked.n == 0
    if odd > ODD_SLOPES * points or missing:
        yield _doubt(
            "zero-gradients",
            f"At {odd} of {points} points the loss has no slope (all zero, or not finite): an "
            "attack along gradients shows nothing there.",
            points=points,
            zero=look.clean.zero + look.attacked.zero,
            non_finite=look.clean.non_finite + look.attacked.non_finite,
        )


def _saturated(look: Diagnostics, _: _Judged) -> Iterator[SanityFinding]:
    if look.saturated > ODD_SLOPES:
        yield _doubt(
            "saturated-logits",
            f"The softmax of {100 * look.saturated:.0f} % of the images is one and zeros in "
            f"float32 (median gap between two logits {look.gap_median:.3g}): the cross-entropy has "
            "no slope that an attack could climb.",
            share=look.saturated,
            gap_median=look.gap_median,
        )


def _disagreement(look: Diagnostics, judged: _Judged) -> Iterator[SanityFinding]:
    native = look.native
    if native is None or judged.measurement.gradient != "native":
        return
    places = {
        "clean images": native.agreement.clean,
        "images attacked along its own": native.agreement.adversarial,
        "images attacked on the reference": native.crafted,
    }
    for where, one in places.items():
        if one is not None and (one.cosine_mean < COSINE or one.vanished > ODD_SLOPES * one.n):
            yield _doubt(
                "gradients-disagree",
                f"The runtime's gradients are not those of its reference at {where}: mean cosine "
                f"{one.cosine_mean:.3f}, {one.vanished} of {one.n} gone.",
                where=where,
                cosine_mean=one.cosine_mean,
                vanished=one.vanished,
                n=one.n,
            )
            return
    if not 1 / NORMS <= native.norm_ratio <= NORMS:
        yield _doubt(
            "gradients-disagree",
            f"The runtime's gradients are {native.norm_ratio:.3g} times as long as its "
            "reference's: distances that an attack takes from them are wrong.",
            norm_ratio=native.norm_ratio,
        )


def _exploding(look: Diagnostics, _: _Judged) -> Iterator[SanityFinding]:
    largest, usual = look.attacked.norm_max, look.attacked.norm_median
    if usual and largest > FAR * usual:
        yield _doubt(
            "exploding-gradients",
            f"One gradient is {largest / usual:.3g} times as long as half of them are: steps "
            "along it are rounding.",
            norm_max=largest,
            norm_median=usual,
        )


def _random(look: Diagnostics, _: _Judged) -> Iterator[SanityFinding]:
    if look.repeats > NOISE or look.batches > BATCH_NOISE:
        yield _doubt(
            "random-answers",
            f"The same images get other answers: by {look.repeats:.3g} of their range when asked "
            f"again, by {look.batches:.3g} in other batches.",
            repeats=look.repeats,
            batches=look.batches,
        )


def _orders(look: Diagnostics, _: _Judged) -> Iterator[SanityFinding]:
    held, n = look.held, len(look.held.usual)
    few, usual, half = (np.array(c, dtype=bool) for c in (held.few_steps, held.usual, held.half))
    pairs: tuple[tuple[Code, Mask, str], ...] = (
        ("more-steps-weaker", few, "a quarter of the steps"),
        ("larger-epsilon-weaker", half, "half of the epsilon"),
    )
    for code, weak, what in pairs:
        more, fewer = _against(usual, weak)
        if _clearly(more, fewer, n):
            yield _doubt(
                code,
                f"PGD at epsilon {look.epsilon:g} leaves {more} of {n} images right that {what} "
                f"took, and {fewer} the other way round.",
                epsilon=look.epsilon,
                only_usual=more,
                only_weaker=fewer,
            )
    left = sum(held.everywhere)
    # Any image is within epsilon 1, and an image of another class among them.
    if left > ODD_SLOPES * n + 1:
        yield _doubt(
            "large-epsilon-not-chance",
            f"PGD leaves {left} of {n} images right though every image is allowed (epsilon 1): it "
            "does not find what is surely there.",
            images=left,
            n=n,
        )


def _small_transfer(look: Diagnostics, judged: _Judged) -> Iterator[SanityFinding]:
    held = look.held
    if held.transferred and judged.measurement.gradient != "transfer":
        passed, own = (~np.array(column, dtype=bool) for column in (held.transferred, held.usual))
        yield from _passed_on(passed, own, f"PGD at epsilon {look.epsilon:g}", len(own))


def _blind_loss(look: Diagnostics, judged: _Judged) -> Iterator[SanityFinding]:
    # Where logits are tiny, squashed or scaled by the image, the cross-entropy climbs away from the
    # label towards no class at all, or only makes the network unsure. The margin does not mind.
    usual, margin = (~np.array(c, dtype=bool) for c in (look.held.usual, look.held.margin))
    only_margin, only_usual = _against(margin, usual)
    if only_margin - only_usual > BLINDED * len(usual):
        yield SanityFinding(
            code="margin-below-cross-entropy",
            undermines=not judged.scale_free,
            sentence=f"Of {len(usual)} images PGD on the margin fools {only_margin} that PGD on "
            f"the cross-entropy at epsilon {look.epsilon:g} does not, and {only_usual} the other "
            "way round: the logits hide their slopes from the loss. Run the audit.",
            figures={
                "epsilon": look.epsilon,
                "only_margin": only_margin,
                "only_cross_entropy": only_usual,
                "n": len(usual),
            },
        )


def _scores(look: Diagnostics, _: _Judged) -> Iterator[SanityFinding]:
    # Slopes may be true and lead nowhere: no step along them gets over waves on the pixels.
    usual, n = sum(look.held.usual), len(look.held.usual)
    added = usual - sum(look.held.scores)
    if added > max(BLINDED * usual, FEW):
        yield _doubt(
            "black-box-below-white-box",
            f"Of {n} images Square, which asks for no gradients, fools {added} that PGD at epsilon "
            f"{look.epsilon:g} leaves right: gradients mislead.",
            epsilon=look.epsilon,
            images=added,
            n=n,
        )


def _planted(look: Diagnostics, _: _Judged) -> Iterator[SanityFinding]:
    n, found = look.planted.n, look.planted.found
    if found < FOUND * n:
        yield _doubt(
            "planted-not-found",
            f"Of {n} adversarial images that were planted inside the ball of epsilon "
            f"{look.epsilon:g}, PGD found {found}: it does not find what is there.",
            planted=n,
            found=found,
        )


def _background(look: Diagnostics, _: _Judged) -> Iterator[SanityFinding]:
    if look.background > BACKGROUND:
        yield _note(
            "constant-background-gradients",
            f"{100 * look.background:.0f} % of the gradient lies on pixels that are the same in "
            "all images.",
            share=look.background,
        )


def _data(look: Diagnostics, judged: _Judged) -> Iterator[SanityFinding]:
    data = look.data
    repeated = data.n - data.distinct
    if repeated > REPEATED * data.n:
        yield _doubt(
            "duplicates-in-data",
            f"{repeated} of {data.n} images repeat others: bounds speak of as many images as are "
            "distinct.",
            images=repeated,
            n=data.n,
        )
    if data.trained_on or judged.measurement.dataset["split"] == "train":
        count = data.trained_on if data.trained_on is not None else data.n
        yield SanityFinding(
            code="training-data-overlap",
            undermines=count > SLACK * data.n,
            sentence=f"The network was trained on {count} of the {data.n} images, or they are of a "
            "training split: accuracy on them says little of others.",
            figures={"images": count, "n": data.n},
        )
    reference = right(judged.measurement.pairs[0].reference)
    count, n = int(reference.sum()), len(reference)
    if data.recorded is not None and n:
        # The two-sided interval at 0.998 leaves one in a thousand above.
        upper = clopper_pearson(count, n, 1 - 0.002)[1]
        if upper < data.recorded - WORSE_THAN_RECORDED:
            yield _doubt(
                "reference-accuracy",
                f"The reference has {count} of {n} images right where training recorded "
                f"{100 * data.recorded:.1f} %: network, labels, colours, orientation or class "
                "order are others.",
                accuracy=count / n,
                recorded=data.recorded,
            )


_OF_TARGET: tuple[Callable[[Diagnostics, _Judged], Iterator[SanityFinding]], ...] = (
    _slopes,
    _saturated,
    _disagreement,
    _exploding,
    _random,
    _orders,
    _small_transfer,
    _blind_loss,
    _scores,
    _planted,
    _background,
    _data,
)
