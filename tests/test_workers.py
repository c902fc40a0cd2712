"""Worker processes: what they tell, what they raise, and how they end."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import psutil
import pytest

from ccn_deploy.errors import UsageError
from ccn_deploy.workers import Tell, Workers

ENDLESS = """
import os, threading
from ccn_deploy.workers import Workers

def piece(tell):
    tell(os.getpid())
    threading.Event().wait()

if __name__ == "__main__":
    with Workers(1) as workers:
        workers.run([piece], lambda place, pid: print(pid, flush=True))
"""


def told(number: int, tell: Tell) -> None:
    tell("half", number)
    tell("whole", number, os.getpid())


def refused(tell: Tell) -> None:
    raise UsageError("No such thing.", "Ask for another.")


def test_all_is_done_and_what_is_told_is_heard_with_its_place() -> None:
    heard: list[tuple[object, ...]] = []
    with Workers(2) as workers:
        for phase in (0, 10):
            pieces = [partial(told, phase + number) for number in range(3)]
            workers.run(pieces, lambda *said: heard.append(said))
    short = [said[:3] for said in heard]
    for phase in (0, 10):
        for place in range(3):
            here = [said for said in short if said[0] == place and said[2] == phase + place]
            assert [said[1] for said in here] == ["half", "whole"]
    assert os.getpid() not in {said[3] for said in heard if len(said) == 4}


def test_what_a_piece_raises_is_raised_here() -> None:
    with Workers(1) as workers, pytest.raises(UsageError, match="No such thing"):
        workers.run([refused], lambda *_: None)


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent, parent.stdout as lines:
        worker = psutil.Process(int(lines.readline()))
        parent.kill()
    assert not psutil.wait_procs([worker], timeout=20)[1]
