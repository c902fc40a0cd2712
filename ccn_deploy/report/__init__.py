"""The report: what the evidence says, as one page that a browser opens without network."""

from ccn_deploy.report.certificate import certificate_page
from ccn_deploy.report.examples import Attacked, Example, examples_of, hardest_examples
from ccn_deploy.report.html import REPORT, write_report

__all__ = [
    "REPORT",
    "Attacked",
    "Example",
    "certificate_page",
    "examples_of",
    "hardest_examples",
    "write_report",
]
