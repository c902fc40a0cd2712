"""Writing the page."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from ccn_deploy.bundle import Bundle
from ccn_deploy.extras import require
from ccn_deploy.report.examples import Example, data_uri
from ccn_deploy.report.figures import draw
from ccn_deploy.report.page import page_of
from ccn_deploy.report.view import Page
from ccn_deploy.robustness import PrecisionsResult, RobustnessResult
from ccn_deploy.storage import write_atomic

REPORT = "report.html"


def write_report(
    bundle: Bundle,
    result: RobustnessResult | PrecisionsResult,
    examples: Sequence[Example],
    command: str,
    parity: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``BUNDLE/report.html`` and return its path.

    The page is complete in itself and runs no script. The same judgement gives the same bytes.

    Args:
        bundle: What was measured.
        result: Its judgement, or those of several precisions.
        examples: Images to show, from :func:`~ccn_deploy.report.examples.examples_of`; of the
            precision judged first.
        command: What the user typed.
        parity: A document of schema ``ccn-deploy/parity/2``, if parity was measured too.

    Raises:
        MissingExtraError: jinja2 or matplotlib is not installed.
        StorageError: The page cannot be written; one that was there before is as it was.
    """
    path = bundle.path / REPORT
    write_atomic(path, render(page_of(bundle, result, examples, command, parity)).encode())
    return path


def render(page: Page, template: str = "report.html.j2") -> str:
    """Return the page as HTML, everything in it escaped but the style and our own figures."""
    number = itertools.count(1)
    figures = [
        [
            {"title": curve.title, "svg": trusted(draw(curve, f"figure-{next(number)}"))}
            for curve in target.curves
        ]
        for target in page.targets
    ]
    attacks = dict.fromkeys(name for example in page.examples for name in example.attacked)
    return render_template(
        template,
        page=page,
        figures=figures,
        attacks=list(attacks),
        class_name=partial(_class_name, page.class_names),
        data_uri=data_uri,
    )


def render_template(name: str, **values: Any) -> str:
    """Return one of this package's templates as HTML, with the style that all have in common.

    Args:
        name: Of the file.
        values: What it shows; escaped, unless it is :func:`trusted`.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    jinja2 = require("jinja2", "train", "to write a report")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ccn_deploy.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    style = resources.files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    return str(environment.get_template(name).render(css=trusted(style), **values))


def trusted(html: str) -> Any:
    """Mark what we made ourselves, so that a template does not escape it."""
    return require("markupsafe", "train", "to write a report").Markup(html)


def _class_name(names: Sequence[str], label: int) -> str:
    return names[label] if 0 <= label < len(names) else "no answer"
