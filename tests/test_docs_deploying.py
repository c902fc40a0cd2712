"""`docs/deploying.md`, followed from top to bottom: every command is run, every output compared.

A block is ``console`` (commands after ``$ ``, and what they print), ``console background`` (one
command that goes on running, and its first line), ``console gpu`` (needs an NVIDIA GPU: without one
the commands must be refused as the page says) or ``python``. What a run of its own decides is not
compared: numbers, digests, and lines that the page leaves out with ``...``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from ccn_deploy.errors import ExitCode
from ccn_deploy.machine import this_machine

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "deploying.md"
PORT = "8080"


@dataclass(frozen=True)
class Block:
    """A fenced block of the page: its language, words after it, and its text."""

    language: str
    kind: str
    text: str

    def commands(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each command with the lines that it prints."""
        lines = self.text.replace("\\\n", "").splitlines()
        starts = [at for at, line in enumerate(lines) if line.startswith("$ ")]
        assert starts[0] == 0, f"a console block that does not begin with a command: {lines[0]}"
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
            yield lines[start][2:], lines[start + 1 : end]


def blocks() -> list[Block]:
    fences = re.findall(r"^```(\w*) *(\w*)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    return [Block(*fence) for fence in fences]


def stable(line: str) -> str:
    """Return what of a line is the same in every run."""
    line = re.sub(r"\b[0-9a-f]{12,}\b", "DIGEST", line)
    line = re.sub(r"[-+]?\d[\d,.]*(e[-+]\d+)?", "N", line)
    line = re.sub(r"[─━]+", "-", line)
    return " ".join(line.split())


def assert_printed(shown: list[str], printed: str, command: str) -> None:
    """Every line that the page shows was printed, in this order."""
    rest = iter([stable(line) for line in printed.splitlines()])
    for line in shown:
        if line.strip() not in ("", "..."):
            assert stable(line) in rest, f"not printed by {command}:\n{line}\nbut:\n{printed}"


@dataclass(frozen=True)
class Reader:
    """Someone who does what the page says, in an empty directory."""

    directory: Path
    port: str

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.directory / 'bin'}{os.pathsep}{os.environ['PATH']}"
        settings = {"COLUMNS": "100", "NO_COLOR": "1", "OMP_NUM_THREADS": "1", "PATH": path}
        return {**os.environ, **settings, "PYTHONPATH": str(ROOT)}

    def arguments(self, command: str) -> list[str]:
        return ["bash", "-c", command.replace(PORT, self.port)]

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.arguments(command),
            capture_output=True,
            text=True,
            cwd=self.directory,
            env=self.environment,
            check=False,
        )

    def start(self, command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.arguments(f"exec {command}"),
            stdout=subprocess.PIPE,
            text=True,
            cwd=self.directory,
            env=self.environment,
        )


@pytest.fixture(scope="module")
def reader(trained_run: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Reader:
    directory = tmp_path_factory.mktemp("deploying")
    for defense in ("ccn", "sm"):
        shutil.copytree(trained_run(defense), directory / "runs" / defense)
    shutil.copytree(ROOT / "examples", directory / "examples")
    bin = directory / "bin"
    bin.mkdir()
    for name, program in (("python", ""), ("ccn-deploy", "-m ccn_deploy.cli.main ")):
        script = bin / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {program}"$@"\n')
        script.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Reader(directory, str(free.getsockname()[1]))


@pytest.mark.timeout(900)
@pytest.mark.skipif("tensorrt-rtx" not in this_machine().packages, reason="no tensorrt-rtx")
def test_the_page_holds_when_it_is_followed(reader: Reader) -> None:
    with ExitStack() as stack:
        for block in blocks():
            if block.language == "python":
                run_python(reader, block)
                continue
            for command, shown in block.commands():
                if block.kind == "background":
                    stack.callback(stop, start(reader, command, shown))
                elif block.kind == "gpu" and not this_machine().gpus:
                    refuse(reader, command)
                else:
                    done = reader.run(command)
                    printed = done.stdout + done.stderr
                    assert done.returncode == ExitCode.PASS, f"{command}\n{printed}"
                    assert_printed(shown, printed, command)


def start(reader: Reader, command: str, shown: list[str]) -> subprocess.Popen[str]:
    """Start a program that goes on running, and wait for its first line."""
    process = reader.start(command)
    assert process.stdout is not None
    assert_printed(shown, process.stdout.readline(), command)
    return process


def run_python(reader: Reader, block: Block) -> None:
    """Run a program; ``# prints: ...`` in it says what it prints."""
    (reader.directory / "block.py").write_text(block.text)
    done = reader.run("python block.py")
    assert done.returncode == 0, f"{block.text}\n{done.stderr}"
    assert_printed(re.findall(r"# prints: (.*)", block.text), done.stdout, block.text)


def refuse(reader: Reader, command: str) -> None:
    """A command that needs a GPU parses, and is refused for want of one, in one or two lines."""
    done = reader.run(command)
    assert done.returncode == ExitCode.ENVIRONMENT, f"{command}\n{done.stdout}{done.stderr}"
    message = done.stderr[done.stderr.index("error:") :].strip().splitlines()
    assert len(message) <= 2
    assert re.search("GPU|is not installed", " ".join(message)), message


def stop(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_every_block_is_one_that_is_run() -> None:
    for block in blocks():
        known = block.language in ("console", "python") and block.kind in ("", "background", "gpu")
        assert known, f"nothing runs ```{block.language} {block.kind}"


def test_every_runtime_and_precision_of_the_page_exists() -> None:
    from ccn_deploy.targets import RUNTIMES

    named = re.findall(r"--runtime (\S+)", PAGE.read_text())
    assert set(named) <= set(RUNTIMES)


def test_every_link_leads_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGE.read_text()):
        assert (PAGE.parent / link).exists(), link
