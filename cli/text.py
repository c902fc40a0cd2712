"""Lines of results. Loads no library before a line is printed."""

from __future__ import annotations


def plain(text: str) -> str:
    """Return text as it is to be read: no markup, and nothing that steers a terminal."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in text))


def line(text: str) -> None:
    """Print one line of results that is not wrapped, so that what is in it can be copied."""
    from ccn_deploy.cli.console import out

    out.print(text, soft_wrap=True)
