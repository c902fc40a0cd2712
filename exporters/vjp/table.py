"""The table of rules: one an op, that leads from the gradient at a node's output to its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ccn_deploy.exporters.vjp.tape import Gradient, Site

Backward = Callable[[Site, Gradient], Sequence[Gradient | None]]
"""From the gradient at the first output to one an input; None where none is needed or owed.
Inputs after the last one returned get none."""


@dataclass(frozen=True)
class Rule:
    """How an op is gone back through.

    Attributes:
        backward: The rule.
        limits: What it refuses, one clause, for the table of operators; "" for nothing.
    """

    backward: Backward
    limits: str = ""


RULES: dict[str, Rule] = {}
"""By op. An op without a rule on the way from the logits to the images has no gradient graph."""


def rule(*ops: str, limits: str = "") -> Callable[[Backward], Backward]:
    """Enter a function into the table for one or more ops."""

    def enter(backward: Backward) -> Backward:
        for op in ops:
            assert op not in RULES, op
            RULES[op] = Rule(backward, limits)
        return backward

    return enter


Slope = Callable[[Site], str]
"""Adds an elementwise function's derivative at the node's input; returns its name."""


def slope(*ops: str) -> Callable[[Slope], Slope]:
    """Enter the derivative of elementwise functions of one input into the table."""

    def enter(derivative: Slope) -> Slope:
        def backward(at: Site, g: Gradient) -> Sequence[Gradient | None]:
            return [at.scaled(g, derivative(at))]

        rule(*ops)(backward)
        return derivative

    return enter
