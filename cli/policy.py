"""`ccn-deploy policy`: what is demanded of a release, written down before it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ccn_deploy.cli.options import BundleArgument, DataDirOption, JsonOption, ThreadsOption
from ccn_deploy.cli.text import line, plain

app = typer.Typer(
    name="policy",
    help="Write down what a release must keep to, check that it can be shown, commit to it.",
    no_args_is_help=True,
)

PolicyArgument = Annotated[
    Path, typer.Argument(metavar="FILE.toml", help="Written by `ccn-deploy policy init`.")
]


@app.command("init")
def init(
    bundle: BundleArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write it; never over a file.")
    ] = Path("policy.toml"),
) -> None:
    """Write a commented policy for a bundle, to be edited."""
    from ccn_deploy.bundle import open_bundle
    from ccn_deploy.certification.policy import template
    from ccn_deploy.errors import UsageError
    from ccn_deploy.storage import write_atomic

    text = template(open_bundle(bundle))
    if output.exists() or output.is_symlink():
        raise UsageError(f"{output} exists already.", "Choose another --output, or move it away.")
    write_atomic(output, text.encode())
    line(f"Wrote {plain(str(output))}. Edit its thresholds, then: ccn-deploy policy check")


@app.command("check")
def check(
    bundle: BundleArgument,
    policy: PolicyArgument,
    data_dir: DataDirOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a policy takes in images and minutes, and whether it can pass at all."""
    from datetime import datetime, timezone

    from ccn_deploy.bundle import open_bundle
    from ccn_deploy.certification.certify import sessions_of
    from ccn_deploy.certification.plan import plan
    from ccn_deploy.certification.policy import read_policy
    from ccn_deploy.cli import console
    from ccn_deploy.cli.tables import show, show_verdict
    from ccn_deploy.tables import Mark, Row, Table, texts

    demanded = read_policy(policy)
    demanded.check(datetime.now(timezone.utc).date())
    opened = open_bundle(bundle)
    sessions_of(demanded, bundle)  # which refuses waivers of claims that nobody makes
    found = plan(opened, demanded, data_dir=data_dir, threads=threads)
    if as_json:
        console.print_json(found.document())
        raise typer.Exit(found.verdict.exit_code)
    show(
        Table(
            f"What {found.images} images can show at 95 % confidence",
            ("demand", "needs"),
            [Row(d.what, texts(d.needed), Mark.of(d.verdict)) for d in found.demands],
        )
    )
    show(
        Table(
            "What the attacks take here, on target and reference, at most",
            ("attack", "gradients", "minutes"),
            [
                Row(
                    f"{cost.attack} on {cost.target}",
                    texts(f"{cost.gradients:.0f}", f"{cost.minutes:.1f}"),
                )
                for cost in found.costs
            ],
        )
    )
    line(f"Policy digest {demanded.digest}")
    show_verdict(
        found.verdict,
        f"about {found.minutes:.1f} minutes at most; "
        + (
            "every demand can be shown"
            if found.verdict.value == "pass"
            else "these images are too few to show every demand, however good the network is"
        ),
    )
    raise typer.Exit(found.verdict.exit_code)


@app.command("commit")
def commit_policy(bundle: BundleArgument, policy: PolicyArgument) -> None:
    """Fix a policy for a bundle, before evidence is collected; certify does so, too."""
    from datetime import datetime, timezone

    from ccn_deploy.bundle import open_bundle
    from ccn_deploy.certificates.commitment import commit
    from ccn_deploy.certification.policy import read_policy

    demanded = read_policy(policy)
    now = datetime.now(timezone.utc)
    demanded.check(now.date())
    made = commit(open_bundle(bundle), demanded.digest, now)
    line(f"The bundle is committed to the policy {plain(demanded.name)} since {made.at}.")
    line(f"Policy {made.policy}, commitment {made.digest}")


@app.command("schema")
def schema() -> None:
    """Print the JSON Schema of policies, for editors and other tools."""
    from ccn_deploy.certification.policy import shipped_schema

    typer.echo(shipped_schema(), nl=False)
