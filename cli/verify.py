"""`ccn-deploy verify`: whether a certificate holds for a bundle, here and now."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ccn_deploy.cli.options import JsonOption
from ccn_deploy.cli.text import line, plain
from ccn_deploy.errors import UsageError
from ccn_deploy.targets import Target

if TYPE_CHECKING:
    from ccn_deploy.certificates.statement import CertifiedTarget, PolicyFacts
    from ccn_deploy.certificates.verify import Checked


def verify(
    certificate: Annotated[
        Path,
        typer.Argument(metavar="CERTIFICATE", help="File written by `ccn-deploy certify`."),
    ],
    *,
    bundle: Annotated[Path, typer.Option("--bundle", help="The bundle that it is to be of.")],
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            metavar="KEY.pub",
            help="Public key of who is to have signed it.",
            show_default=False,
        ),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            "--runtime",
            help="Ask about this runtime only.",
            show_default="all that are certified",
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="And in this precision.", show_default="fp32")
    ] = None,
    no_evidence: Annotated[
        bool, typer.Option("--no-evidence", help="Leave the files of evidence unread.")
    ] = False,
    any_machine: Annotated[
        bool,
        typer.Option(
            "--any-machine", help="Accept another machine than the certified one, and say so."
        ),
    ] = False,
    unsigned: Annotated[
        bool, typer.Option("--unsigned", help="Accept that nobody vouches for it; without --key.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check a certificate: who signed it, for which bundle, on what machine, and until when.

    Nothing is measured, and neither torch nor onnx is needed. Exits with 0 if it holds, 1 if the
    certificate says fail or nothing of the target, 3 on another machine, 4 if it has ended or says
    inconclusive, 5 if anything was changed.
    """
    if (key is None) is not unsigned:
        raise UsageError(
            "--key and --unsigned exclude each other."
            if unsigned
            else "Without a key it cannot be said who vouches for the certificate.",
            "Give --key KEY.pub of who signs, or --unsigned if nobody needs to.",
        )
    if precision is not None and runtime is None:
        raise UsageError("A --precision needs a --runtime.", "Name both, or neither.")
    target = None if runtime is None else Target(runtime, precision or "fp32")

    from ccn_deploy.certificates.verify import check
    from ccn_deploy.cli import console

    checked = check(
        certificate,
        bundle,
        key,
        target=target,
        evidence=not no_evidence,
        anywhere=any_machine,
    )
    if as_json:
        console.print_json(checked.document())
    else:
        _show(checked)
    raise typer.Exit(checked.verdict.exit_code)


def _show(checked: Checked) -> None:
    """Print what was certified and by whom, and the verdict on the last line."""
    from ccn_deploy.cli.tables import show_verdict

    certificate = checked.certificate
    line(plain(certificate.claim))
    by = f"Signed with the key {checked.signer}" if checked.signer else "Not signed"
    measured = f", measured by {certificate.tester}" if certificate.tester else ""
    line(plain(f"{by}{measured}, issued {certificate.issued}."))
    for target in checked.targets:
        _show_target(target)
    line(plain(_policy(certificate.policy)))
    for note in checked.notes:
        line(f"[dim]note:[/] {plain(note)}")
    which = ", ".join(str(target.target) for target in checked.targets)
    show_verdict(checked.verdict, plain(f"{which}, bundle {certificate.bundle}"))


def _show_target(target: CertifiedTarget) -> None:
    from ccn_deploy.certificates.wording import told

    on = target.hardware
    machine = f"{on.system} {on.architecture}, {on.gpu or on.processor}"
    line(
        plain(f"{target.target}: {target.library} {target.library_version} on {machine}")
        + f": {target.verdict}"
    )
    if target.worst is not None:
        line(plain(f"Worst case left: {told(target.worst)}, {target.worst_attack}."))


def _policy(policy: PolicyFacts) -> str:
    when = f"committed {policy.committed}" if policy.committed else "never committed"
    before = "before" if policy.before_results else "not before"
    return f"Policy {policy.name}: {when}, {before} the results."
