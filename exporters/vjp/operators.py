"""The page ``docs/operators.md``, made from the table of rules.

``python -m ccn_deploy.exporters.vjp.operators > docs/operators.md`` writes it anew.
"""

from __future__ import annotations

from ccn_deploy.exporters.vjp import RULES
from ccn_deploy.exporters.vjp.engine import FLAT
from ccn_deploy.graph.ops import OPERATORS

NO_FLOATS = frozenset(
    {
        *("And", "ArgMax", "ArgMin", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr"),
        *("BitwiseXor", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less"),
        *("LessOrEqual", "NonZero", "Not", "Or", "Shape", "Size", "Xor"),
    }
)
"""Ops that give integers or truth values: what they decide counts as fixed, as in PyTorch."""

NO_IMAGES = frozenset({"Constant", "ConstantOfShape", "EyeLike", "OneHot", "Range"})
"""Ops whose floats come from constants and integers."""

RAISED = {"Upsample": "Resize"}
"""Ops of old opsets, which the canonical graph has under another name."""

REASONS = {
    "ReduceProd": "divides by zero at zeros",
    "Mod": "jumps at every multiple",
    "TopK": "positions that are computed",
    "GatherElements": "positions that may be computed",
    "GatherND": "positions that may be computed",
    "ScatterElements": "positions that may be computed",
    "ScatterND": "positions that may be computed",
    "GridSample": "positions that are computed",
    "QuantizeLinear": "a staircase: its derivative says nothing",
    "DequantizeLinear": "belongs to a staircase: its derivative says nothing",
}
"""Why no rule was written, where that can be said in a few words."""

HEAD = """\
# Operators

Which operators a forward graph may have, and which of them a gradient graph can be made of. This
page is made from the table of rules (`python -m ccn_deploy.exporters.vjp.operators`).

* **evaluated**: the reference can compute it, so the network can be exported, compared with
  runtimes, served, and attacked by scores and by labels.
* **gradient**: the gradient graph has a rule for it, so the deployed network can be attacked by
  gradients too. "0" is an operator whose slope is 0 wherever it has one; "not needed" one that
  gives integers or truth values, which count as fixed, or that sees no image.

A network with an operator without a rule between its images and its logits can only be exported
without a gradient graph; the message names the operator and its node.

| operator | evaluated | gradient | limits of the rule |
|---|---|---|---|
"""


def operators_page() -> str:
    """Return the page."""
    return HEAD + "".join(f"{_row(op)}\n" for op in sorted({*OPERATORS, *RULES}))


def _row(op: str) -> str:
    gradient, remark = _gradient(op)
    return f"| {op} | {'yes' if op in OPERATORS else 'no'} | {gradient} | {remark} |"


def _gradient(op: str) -> tuple[str, str]:
    if op in RULES:
        return "rule", RULES[op].limits
    if op in RAISED:
        return "rule", f"becomes {RAISED[op]}"
    if op in FLAT:
        return "0", ""
    if op in NO_FLOATS or op in NO_IMAGES:
        return "not needed", ""
    return "none", REASONS.get(op, "no rule was written")


if __name__ == "__main__":
    print(operators_page(), end="")
