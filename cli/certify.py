"""`ccn-deploy certify`."""

from __future__ import annotations

import contextlib
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ccn_deploy.cli.options import BundleArgument, DataDirOption, JsonOption, ThreadsOption
from ccn_deploy.cli.text import line, plain

if TYPE_CHECKING:
    from ccn_deploy.bundle import Bundle
    from ccn_deploy.certificates.statement import Certificate
    from ccn_deploy.certification.certify import Certified
    from ccn_deploy.runtimes.base import Array, Runtime

CERTIFICATE = "certificate.json"

PolicyOption = Annotated[
    Path,
    typer.Option(
        "--policy",
        metavar="FILE.toml",
        help="What is demanded; `ccn-deploy policy init` writes one.",
    ),
]


def certify(
    bundle: BundleArgument,
    *,
    policy: PolicyOption,
    sign: Annotated[
        str | None,
        typer.Option(
            "--sign",
            metavar="KEY|env:NAME",
            help="Private key to sign with, from `ccn-deploy key new`, or the environment variable "
            "that holds it.",
            show_default="not signed",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The certificate.", show_default=f"BUNDLE/{CERTIFICATE}"
        ),
    ] = None,
    output_format: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help="What to write beside the certificate: report (a page, certificate.html), "
            "model-card (Markdown for Hugging Face, model-card.md); give it again for both.",
            show_default="report",
        ),
    ] = None,
    tester: Annotated[
        str, typer.Option("--tester", help="Who measures, for the certificate.")
    ] = "",
    recheck: Annotated[
        str | None,
        typer.Option(
            "--recheck",
            metavar="all|N",
            help="Ask runtime and attack again about so many images of evidence that was read.",
            show_default="a tenth",
        ),
    ] = None,
    data_dir: DataDirOption = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            min=1,
            help="Processes that collect evidence; what is measured does not depend on it.",
            show_default="one a core; one where a target is on a GPU",
        ),
    ] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge a bundle by a policy, and write a certificate of what was shown.

    Evidence that is kept is judged, what is missing is collected. A certificate is written whatever
    the verdict is.
    """
    from datetime import datetime, timezone

    from ccn_deploy.bundle import open_bundle
    from ccn_deploy.certificates.envelope import seal
    from ccn_deploy.certificates.keys import load_private
    from ccn_deploy.certification.certify import certify as judge
    from ccn_deploy.certification.policy import read_policy
    from ccn_deploy.cli import console
    from ccn_deploy.storage import write_atomic

    formats = _formats(output_format)
    demanded = read_policy(policy)
    key = None if sign is None else load_private(sign)  # before hours of measuring
    opened = open_bundle(bundle)
    with console.resumable("from the last whole batch"), console.Bar() as bar:
        certified = judge(
            opened,
            demanded,
            now=lambda: datetime.now(timezone.utc),
            tester=tester,
            data_dir=data_dir,
            threads=threads,
            recheck=recheck,
            jobs=jobs,
            progress=bar,
        )
    path = output or bundle / CERTIFICATE
    written = [path]
    write_atomic(path, seal(certified.statement, key))
    command = shlex.join(["ccn-deploy", *sys.argv[1:]])
    if "model-card" in formats:
        from ccn_deploy.certificates.model_card import model_card

        written.append(path.with_name("model-card.md"))
        write_atomic(written[-1], model_card(certified.statement).encode())
    if "report" in formats:
        written.append(path.with_suffix(".html"))
        page = _page(opened, certified, command, path.name, threads)
        write_atomic(written[-1], page.encode())
    if as_json:
        from ccn_deploy.records import document

        console.print_json(document(certified.statement))
    else:
        _show(certified.certificate)
        for file in written:
            line(f"Wrote {plain(str(file))}")
        if key is None:
            line("The certificate is not signed: nobody vouches for it (--sign KEY).")
    raise typer.Exit(certified.certificate.outcome.exit_code)


def _page(
    bundle: Bundle, certified: Certified, command: str, name: str, threads: int | None
) -> str:
    """Return the certificate's page; what image files would hold is asked of every target."""
    from ccn_deploy.report import certificate_page, hardest_examples
    from ccn_deploy.runtimes import RuntimeOptions, open_runtime

    first = certified.results[0].measurement
    with contextlib.ExitStack() as stack:
        answers = {}
        for target in (one.target for one in certified.certificate.targets):
            options = RuntimeOptions(threads=threads)
            runtime = stack.enter_context(
                open_runtime(bundle, target.runtime, target.precision, options)
            )
            answers[str(target)] = partial(_labels, runtime)
        return certificate_page(
            bundle,
            certified.statement,
            certified.results,
            [parity.document() for parity in certified.parities],
            hardest_examples(first, certified.dataset),
            command=command,
            answers=answers,
            certificate=name,
        )


def _labels(runtime: Runtime, images: Array) -> Array:
    labels: Array = runtime.logits(images).argmax(axis=1)
    return labels


def _formats(asked: list[str] | None) -> set[str]:
    from ccn_deploy.errors import unknown

    known = ("report", "model-card")
    for name in asked or ():
        if name not in known:
            raise unknown("format", name, known)
    return set(asked or ("report",))


def _show(certificate: Certificate) -> None:
    """Print what was judged, what rests on waivers, and the verdict on the last line."""
    from ccn_deploy.certificates.wording import told
    from ccn_deploy.cli.tables import show, show_verdict
    from ccn_deploy.tables import Mark, Row, Table, texts

    for target in certificate.targets:
        rows = []
        for claim in target.claims:
            mark = None if claim.verdict == "void" else Mark(claim.verdict, claim.verdict)
            rows.append(Row(claim.name, texts("waived" if claim.waived else ""), mark))
        show(Table(f"{target.target}: what was demanded", ("claim", ""), rows))
        for claim in target.claims:
            if claim.verdict in ("fail", "inconclusive"):
                line(
                    f"{plain(claim.name)}: {plain(claim.measured)}. Demanded: {plain(claim.bound)}."
                )
        for note in target.findings:
            line(f"{note.word}: {plain(note.sentence)}")
        if target.worst is not None:
            line(
                f"Worst case over all attacks on {target.target}: {told(target.worst)} stay right: "
                f"{plain(target.worst_attack)}."
            )
    for waiver in certificate.waivers:
        state = "used" if waiver.used else "not needed"
        line(
            f"Waiver, {state}: {plain(waiver.claim)}, by {plain(waiver.owner)} until "
            f"{waiver.expires}: {plain(waiver.reason)}"
        )
    policy = certificate.policy
    line(
        f"Policy {plain(policy.name)} was committed {policy.committed}, "
        + (
            "before any result was measured."
            if policy.before_results
            else "and some of the evidence was there before it: thresholds were not fixed before "
            "the results."
        )
    )
    show_verdict(certificate.outcome, plain(certificate.claim))
