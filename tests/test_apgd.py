"""Auto-PGD against the program of its authors, and what gradient attacks share."""

from __future__ import annotations

import foolbox as fb
import numpy as np
import pytest
import torch
from foolbox.models.pytorch import PyTorchModel
from hypothesis import given, settings
from hypothesis import strategies as st
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor, nn
from torch.nn import functional as F

from ccn_deploy.attacks.apgd import L2APGD, LinfAPGD
from ccn_deploy.attacks.balls import L2Ball, LinfBall
from ccn_deploy.attacks.fgsm import LinfFGSM
from ccn_deploy.attacks.losses import CROSS_ENTROPY, DLR, MARGIN, TARGETED_DLR, Loss
from ccn_deploy.attacks.passes import AutogradPass, Pass, QueryCounter
from ccn_deploy.attacks.pgd import L2PGD, LinfPGD

NORMS = {"Linf": (LinfAPGD, 0.08, 2e-6), "L2": (L2APGD, 0.25, 2e-4)}
"""Attack, epsilon, and by how much rounding may move an iterate: in L2 there is no sign to undo it,
and which of two points at the top is taken for the highest is rounding."""

BALLS = {"linf": LinfBall(), "l2": L2Ball()}


class Small(nn.Module):
    """A smooth network in float64: the sign of a slope is never a matter of rounding."""

    def __init__(self, seed: int = 0, classes: int = 6, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = (
            torch.randn(20, 16, generator=generator),
            torch.randn(classes, 20, generator=generator),
        )
        self.inner, self.outer = (nn.Parameter(w.double(), requires_grad=False) for w in draw)
        self.scale = scale
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        hidden = torch.tanh((x.double().flatten(1) - 0.5) @ self.inner.T)
        return self.scale * (hidden @ self.outer.T)


def model_of(network: nn.Module) -> PyTorchModel:
    return PyTorchModel(network.eval(), bounds=(0, 1), device=torch.device("cpu"))


def images_of(network: nn.Module, n: int = 16) -> tuple[Tensor, Tensor]:
    images = torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(7))
    return images, network(images).argmax(dim=1)


class Recorder(QueryCounter):
    """Keeps the way of every image."""

    def __init__(self, network: nn.Module, images: int) -> None:
        super().__init__(model_of(network), images)
        self.ways: list[list[Tensor]] = [[] for _ in range(images)]

    def counted_pass(
        self, images: Tensor, places: Tensor | None, labels: Tensor | None = None
    ) -> Pass:
        everything = range(len(images)) if places is None else places.tolist()
        for place, image in zip(everything, images, strict=True):
            self.ways[place].append(image.clone())
        return super().counted_pass(images, places, labels)


# The iterates of Croce and Hein's own program


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("name", "loss"), [("ce", CROSS_ENTROPY), ("dlr", DLR)])
@pytest.mark.parametrize("steps", [1, 7, 60])
def test_iterates_are_the_authors(norm: str, name: str, loss: Loss, steps: int) -> None:
    attack, epsilon, rounding = NORMS[norm]
    network = Small()
    images, labels = images_of(network)
    recorder = Recorder(network, len(images))
    found = attack(steps=steps, loss=loss).run(recorder, images, labels, epsilon=epsilon)
    starts = torch.stack([way[0] for way in recorder.ways])

    theirs = APGDAttack(network, n_iter=steps, norm=norm, eps=epsilon, loss=name, device="cpu")
    theirs.init_hyperparam(images)
    network.seen.clear()
    best, _, _, _ = theirs.attack_single_run(images, labels, x_init=starts)
    assert_same(recorder.ways, network, labels, steps, rounding, found, best)


@pytest.mark.parametrize("norm", NORMS)
def test_iterates_towards_each_target_are_the_authors(norm: str) -> None:
    attack, epsilon, rounding = NORMS[norm]
    network, steps = Small(), 30
    images, labels = images_of(network)
    recorder = Recorder(network, len(images))
    attack(steps=steps, targets=2, loss=TARGETED_DLR).run(recorder, images, labels, epsilon=epsilon)
    order = network(images).argsort(dim=1, descending=True)
    ways = [way[1:] for way in recorder.ways]  # the first look was at the image itself
    for target in (1, 2):
        left = [place for place, way in enumerate(ways) if way]
        theirs = APGDAttack_targeted(network, n_iter=steps, norm=norm, eps=epsilon, device="cpu")
        theirs.init_hyperparam(images)
        theirs.y_target = order[left, target]
        network.seen.clear()
        starts = torch.stack([ways[place][0] for place in left])
        theirs.attack_single_run(images[left], labels[left], x_init=starts)
        first = [ways[place][: steps + 1] for place in left]
        assert_same(first, network, labels[left], steps, rounding)
        ways = [way[steps + 1 :] for way in ways]
    assert any(len(way) == 1 + 2 * (steps + 1) for way in recorder.ways)


def assert_same(
    ways: list[list[Tensor]],
    network: Small,
    labels: Tensor,
    steps: int,
    rounding: float,
    found: Tensor | None = None,
    best: Tensor | None = None,
) -> None:
    theirs = torch.stack(network.seen)
    assert len(theirs) == steps + 1
    held = [place for place, way in enumerate(ways) if len(way) == steps + 1]
    assert held
    for place, way in enumerate(ways):
        same = theirs[: len(way), place]
        np.testing.assert_allclose(torch.stack(way), same, atol=rounding)
        answers = network(same).argmax(dim=1)
        assert (answers[:-1] == labels[place]).all()
        gone = answers[-1] != labels[place]
        assert gone or len(way) == steps + 1  # an image leaves when it falls, and not before
        if found is not None and best is not None:
            expected = same[-1] if gone else best[place]
            np.testing.assert_allclose(found[place], expected, atol=rounding)


def test_who_almost_fell_is_pursued_and_nobody_else() -> None:
    network = Small()
    images, labels = images_of(network, 40)
    once, pursued = (Recorder(network, len(images)) for _ in range(2))
    settings = {"steps": 4, "targets": 3, "loss": TARGETED_DLR}
    plain = LinfAPGD(**settings).run(once, images, labels, epsilon=0.08)
    found = LinfAPGD(**settings, pursuits=2).run(pursued, images, labels, epsilon=0.08)

    further = set()
    for place, (before, after) in enumerate(zip(once.ways, pursued.ways, strict=True)):
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=False))
        if len(after) > len(before):
            further.add(place)
    ranked = network(images).argsort(dim=1, descending=True)
    for place, way in enumerate(once.ways):
        if network(way[-1][None]).argmax() != labels[place]:
            assert place not in further
            continue
        label = labels[[place]].expand(len(way) - 1)
        towards = [ranked[place, 1 + at // 5] for at in range(len(way) - 1)]
        values = TARGETED_DLR.value(network(torch.stack(way[1:])), label, torch.stack(towards))
        assert (values.max() > -0.1) == (place in further)
    assert 0 < len(further) < 40
    gone = (network(found).argmax(dim=1) != labels) & (network(plain).argmax(dim=1) == labels)
    assert set(gone.nonzero()[:, 0].tolist()) <= further
    assert all(len(pursued.ways[at]) <= 1 + 3 * 5 + 2 * 101 for at in further)


# Losses


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, MARGIN, DLR, TARGETED_DLR])
@pytest.mark.parametrize("targeted", [False, True])
@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=10)
def test_slopes_are_those_of_the_equations(loss: Loss, targeted: bool, seed: int) -> None:
    network = Small(seed % 1000)
    images, _ = images_of(network, 5)
    labels, targets = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([5, 4, 3, 2, 1])
    x = images.double().requires_grad_()
    z = network(x)
    ranked = z.sort(dim=1, descending=True).values
    own = z.gather(1, labels[:, None])[:, 0]
    others = z.scatter(1, labels[:, None], -torch.inf)
    rival = z.gather(1, targets[:, None])[:, 0] if targeted else others.amax(dim=1)
    truth = {
        CROSS_ENTROPY: F.cross_entropy(z, labels, reduction="none"),
        MARGIN: rival - own,
        DLR: (rival - own) / (ranked[:, 0] - ranked[:, 2]),
        TARGETED_DLR: (rival - own) / (ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2),
    }[loss]
    (expected,) = torch.autograd.grad(truth.sum(), x)

    aim = targets if targeted else None
    here = AutogradPass(model_of(network), images.double())
    ours = loss.slope(here, torch.arange(5), labels, aim)
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-9)
    value = loss.value(z.detach(), labels, aim)
    np.testing.assert_allclose(value, truth.detach(), rtol=1e-9, atol=1e-12)


def test_cross_entropy_of_a_sure_network_is_not_rounded_to_zero() -> None:
    value = CROSS_ENTROPY.value(torch.tensor([[100.0, 0.0, 0.0]]), torch.tensor([0]), None)
    assert value.item() == pytest.approx(2 * np.exp(-100.0))


@pytest.mark.parametrize("attack", [LinfAPGD, L2APGD])
@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_are_enough_for_every_loss(attack: type, classes: int) -> None:
    network = Small(classes=classes)
    images, labels = images_of(network)
    for loss in (DLR, TARGETED_DLR):
        targets = 9 if loss is TARGETED_DLR else 0
        _, _, fooled = attack(steps=10, loss=loss, targets=targets)(
            model_of(network), images, labels, epsilons=2.0
        )
        assert fooled.all()


# Balls


@pytest.mark.parametrize("norm", BALLS)
@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_starts_are_in_the_ball_and_on_its_surface(norm: str, seed: int) -> None:
    ball, order = BALLS[norm], {"linf": np.inf, "l2": 2}[norm]
    generator = np.random.default_rng(seed)
    assert np.linalg.norm(ball.inside(generator, (3, 4, 5)).ravel(), order) <= 1
    outermost = ball.outermost(generator, (3, 4, 5)).ravel()
    assert np.linalg.norm(outermost, order) == pytest.approx(1)


def test_a_point_of_the_l2_ball_is_as_far_as_its_volume_says() -> None:
    generator = np.random.default_rng(0)
    radii = [np.linalg.norm(L2Ball().inside(generator, (1, 1, 2))) for _ in range(2000)]
    assert np.mean(np.square(radii)) == pytest.approx(0.5, abs=0.03)  # r ** 2 is uniform


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_direction_in_l2_has_no_scale(scale: float) -> None:
    gradients = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    gradients[1] = 0
    direction = L2Ball().direction(scale * gradients)
    expected = gradients / gradients.flatten(1).norm(dim=1).clamp(min=1e-9).view(-1, 1, 1, 1)
    np.testing.assert_allclose(direction, expected, rtol=1e-5)


# PGD


def test_pgd_in_l2_takes_foolbox_steps() -> None:
    network = Small()
    images, labels = images_of(network)
    settings = {"steps": 12, "rel_stepsize": 0.2, "random_start": False}
    _, ours, fooled = L2PGD(**settings)(model_of(network), images, labels, epsilons=0.4)
    foolbox = fb.attacks.L2ProjectedGradientDescentAttack(**settings)
    single = model_of(nn.Sequential(network, AsFloat()))
    _, theirs, fooled_too = foolbox(single, images, labels, epsilons=0.4)
    assert (fooled | ~fooled_too).all()
    assert (~fooled).any()
    np.testing.assert_allclose(ours[~fooled], theirs[~fooled], atol=1e-4)


class AsFloat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


@pytest.mark.parametrize("decay", [False, True])
def test_steps_are_as_long_as_they_say(decay: bool) -> None:
    network = Small()
    images, labels = images_of(network, 4)
    recorder = Recorder(network, 4)
    attack = LinfPGD(steps=5, rel_stepsize=0.25, decay=decay, random_start=False)
    attack.run(recorder, images, labels, epsilon=1e-4)
    lengths = [0.25 * (1 - t / 5) + 0.01 if decay else 0.25 for t in range(4)]
    for image, way in zip(images, recorder.ways, strict=True):
        for length, before, after in zip(lengths, way, way[1:], strict=False):
            moved = (after - before).abs()
            room = 1e-4 - (before - image).abs()  # a step ends where the box does
            free = moved[(room > length * 1e-4) & (before > 1e-4) & (before < 1 - 1e-4)]
            np.testing.assert_allclose(free, length * 1e-4, atol=2e-7)


def test_targets_share_the_steps_and_are_taken_in_turn() -> None:
    network = Small()
    images, labels = images_of(network)
    counter = QueryCounter(model_of(network), len(images))
    LinfPGD(steps=40, targets=4, loss=MARGIN).run(counter, images, labels, epsilon=1e-6)
    assert counter.queries.backward.tolist() == [40] * len(images)

    aimed: list[list[int]] = []

    class Noted:
        climbs_cross_entropy = False
        value = MARGIN.value

        def slope(self, here: Pass, rows: Tensor, y: Tensor, aim: Tensor | None) -> Tensor:
            assert aim is not None
            aimed.append(aim.tolist())
            return MARGIN.slope(here, rows, y, aim)

    LinfPGD(steps=6, targets=3, loss=Noted()).run(model_of(network), images, labels, epsilon=1e-6)
    ranked = network(images).argsort(dim=1, descending=True)
    assert aimed == [ranked[:, k].tolist() for k in (1, 1, 2, 2, 3, 3)]


# What all of them share


ATTACKS = [
    LinfFGSM(),
    LinfPGD(steps=5),
    LinfPGD(steps=5, restarts=3),
    L2PGD(steps=5),
    LinfAPGD(steps=5),
    L2APGD(steps=5, restarts=2),
]


class Blind(nn.Module):
    """Hides the slope of some images: behind zeros, or behind NaN."""

    def __init__(self, network: nn.Module, factor: float) -> None:
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x)
        hidden = x.flatten(1)[:, :1] > 0.5
        if logits.requires_grad:
            logits.register_hook(lambda g: torch.where(hidden, g * self.factor, g))
        return logits


@pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: type(a).__name__)
def test_an_image_without_a_slope_is_not_one_that_held(
    attack: fb.attacks.base.FixedEpsilonAttack, factor: float
) -> None:
    network = Small()
    images, labels = images_of(network, 12)
    images[:6, 0, 0, 0], images[6:, 0, 0, 0] = 0.9, 0.1
    labels = network(images).argmax(dim=1)
    found = attack.run(model_of(Blind(network, factor)), images, labels, epsilon=1e-3)
    assert found[:6].isnan().flatten(1).all(dim=1).all()
    assert found[6:].isfinite().all()


def test_saturated_logits_are_no_defence_against_losses_without_a_scale() -> None:
    sure = Small(scale=1e4)
    images, labels = images_of(sure)
    model = model_of(nn.Sequential(sure, AsFloat()))
    blind = LinfAPGD(steps=20).run(model, images, labels, epsilon=0.3)
    assert blind.isnan().flatten(1).any(dim=1).sum() >= len(images) / 2
    for attack in (LinfAPGD(steps=20, loss=DLR), LinfPGD(steps=20, loss=MARGIN, rel_stepsize=0.1)):
        found = attack.run(model, images, labels, epsilon=0.3)
        plain = attack.run(model_of(Small()), images, labels, epsilon=0.3)
        assert torch.equal(sure(found).argmax(dim=1) == labels, sure(plain).argmax(dim=1) == labels)


@pytest.mark.parametrize("make", [LinfPGD, L2PGD, LinfAPGD, L2APGD])
@pytest.mark.parametrize("targets", [0, 2])
def test_batches_change_nothing(make: type, targets: int) -> None:
    network = Small()
    images, labels = images_of(network)
    seeds = np.stack([np.full(16, 3), np.arange(16)], axis=1)
    settings = {"steps": 8, "restarts": 2, "targets": targets, "loss": DLR}
    whole = make(seeds=seeds, **settings).run(model_of(network), images, labels, epsilon=0.1)
    for rows in ([4, 1], [9]):
        part = make(seeds=seeds[rows], **settings)
        found = part.run(model_of(network), images[rows], labels[rows], epsilon=0.1)
        np.testing.assert_allclose(found, whole[rows], atol=1e-6)


@pytest.mark.parametrize("make", [LinfPGD, LinfAPGD, L2PGD, L2APGD])
def test_what_comes_back_is_in_the_ball_and_in_the_box(make: type) -> None:
    network = Small()
    images, labels = images_of(network)
    found = make(steps=15, restarts=2).run(model_of(network), images, labels, epsilon=0.2)
    away = (found - images).flatten(1)
    size = away.abs().amax(dim=1) if make in (LinfPGD, LinfAPGD) else away.norm(dim=1)
    assert (size <= 0.2 + 1e-6).all()
    assert found.min() >= 0 and found.max() <= 1
