"""The program ``ccn-deploy``: its commands, and how errors leave it."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from ccn_deploy.cli import key, policy
from ccn_deploy.cli.bench import bench
from ccn_deploy.cli.certify import certify
from ccn_deploy.cli.doctor import doctor
from ccn_deploy.cli.export import export
from ccn_deploy.cli.inspect import inspect
from ccn_deploy.cli.quickstart import quickstart
from ccn_deploy.cli.reproduce import reproduce
from ccn_deploy.cli.study import study
from ccn_deploy.cli.train import train
from ccn_deploy.cli.verify import verify
from ccn_deploy.cli.verify_parity import verify_parity
from ccn_deploy.cli.verify_robustness import verify_robustness
from ccn_deploy.errors import CcnDeployError

BUG = 70
"""Exit code of an error nobody foresaw (EX_SOFTWARE); its traceback is shown."""

app = typer.Typer(
    name="ccn-deploy",
    help="Deploy image classifiers on ONNX Runtime and TensorRT, and measure the robustness of "
    "what is deployed.",
    epilog="Exit codes: 0 pass, 1 a gate failed, 2 usage, 3 environment, 4 inconclusive, "
    "5 integrity.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from ccn_deploy import __version__

        typer.echo(f"ccn-deploy {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and exit."
    ),
) -> None:
    pass


app.command("train")(train)
app.command("export")(export)
app.command("verify-parity")(verify_parity)
app.command("verify-robustness")(verify_robustness)
app.command("verify")(verify)
app.add_typer(key.app, name="key")
app.add_typer(policy.app)
app.command("certify")(certify)
app.command("bench")(bench)
app.command("inspect")(inspect)
app.command("doctor")(doctor)
app.command("quickstart")(quickstart)
app.command("reproduce")(reproduce)
app.command("study")(study)


def main() -> NoReturn:
    """Run the program; every foreseen error becomes one or two lines and an exit code."""
    # Threads of torch that wait for one another by spinning take the core from the very thread they
    # wait for, whenever something else runs on the machine: three times slower, measured.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except CcnDeployError as error:
        from ccn_deploy.cli.console import print_error

        print_error(error)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output went away, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception:
        import traceback

        traceback.print_exc()
        print(
            "This is a bug in ccn-deploy; please report it with the lines above.", file=sys.stderr
        )
        sys.exit(BUG)
    sys.exit(0)


if __name__ == "__main__":
    main()
