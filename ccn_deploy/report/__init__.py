"""The report: what the evidence says, as one page that a browser opens without network."""

from ccn_deploy.report.examples import Attacked, Example, examples_of
from ccn_deploy.report.html import REPORT, write_report

__all__ = ["REPORT", "Attacked", "Example", "examples_of", "write_report"]
