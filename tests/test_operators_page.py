from __future__ import annotations

from pathlib import Path

from ccn_deploy.exporters.vjp import RULES
from ccn_deploy.exporters.vjp.engine import FLAT
from ccn_deploy.exporters.vjp.operators import NO_FLOATS, NO_IMAGES, operators_page
from ccn_deploy.graph.ops import OPERATORS

PAGE = Path(__file__).parent.parent / "docs" / "operators.md"


def test_the_page_is_what_the_tables_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == operators_page(), (
        "write it anew: python -m ccn_deploy.exporters.vjp.operators > docs/operators.md"
    )


def test_every_rule_is_of_an_op_that_the_reference_evaluates() -> None:
    assert set(RULES) <= set(OPERATORS)


def test_no_op_is_in_two_tables() -> None:
    tables = [set(RULES), set(FLAT), set(NO_FLOATS), set(NO_IMAGES)]
    assert sum(map(len, tables)) == len(set().union(*tables))
