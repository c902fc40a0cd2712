"""`ccn-deploy key`: keys to sign certificates with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ccn_deploy.cli.text import line, plain

app = typer.Typer(
    name="key", help="Make the keys that certificates are signed with.", no_args_is_help=True
)


@app.command("new")
def new(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="Where to write the private key; the public one goes to PATH.pub."
        ),
    ],
    passphrase: Annotated[
        bool,
        typer.Option(
            "--passphrase",
            help="Encrypt the private key; asks, or takes CCN_DEPLOY_KEY_PASSPHRASE.",
        ),
    ] = False,
) -> None:
    """Make a pair of Ed25519 keys: one to sign with, one to check with.

    The private key can be read by its owner only. Neither is ever written over a file.
    """
    from ccn_deploy.certificates.keys import new_key, public_path

    made = new_key(path, _passphrase() if passphrase else None)
    line(f"Wrote {plain(str(path))}, to sign with. Keep it secret.")
    line(f"Wrote {plain(str(public_path(path)))}, to check with. Give it to who relies on you.")
    line(f"Key {made}")


def _passphrase() -> str:
    """Return the passphrase to encrypt with; one that is typed is typed twice."""
    import os

    from ccn_deploy.certificates.keys import PASSPHRASE, ask_passphrase
    from ccn_deploy.errors import UsageError

    typed = ask_passphrase("Passphrase of the new key: ")
    if PASSPHRASE not in os.environ and ask_passphrase("Once more: ") != typed:
        raise UsageError("The two passphrases differ.", "Type the same one twice.")
    return typed
