from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccn_deploy.errors import ExitCode, StorageError, UsageError
from ccn_deploy.storage import atomic_directory, canonical_json, sha256, sha256_file, write_atomic

LIMIT = 64 * 1024
"""Bytes a file may have in the child that plays the full disk."""


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def in_child(script: str, *arguments: object, limit: int | None = None) -> str:
    """Run Python in a child whose files may not grow beyond ``limit`` bytes; return stdout."""

    def restrict() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        preexec_fn=restrict,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sha256_of_the_published_test_vector(tmp_path: Path) -> None:
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(b"abc") == expected
    assert sha256_file(tmp_path / "abc") == expected


def test_sha256_of_a_file_longer_than_one_block(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "long").write_bytes(data)
    assert sha256_file(tmp_path / "long") == sha256(data)


json_documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(json_documents)
def test_canonical_json_keeps_the_document_and_is_one_form(document: object) -> None:
    data = canonical_json(document)
    assert json.loads(data) == document
    assert canonical_json(json.loads(data)) == data
    assert data.isascii()


def test_canonical_json_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_json({"b": 1, "a": 2}) == canonical_json({"a": 2, "b": 1})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_canonical_json_refuses_what_json_cannot_say(number: float) -> None:
    with pytest.raises(ValueError):
        canonical_json({"x": number})


def test_write_atomic_makes_parents_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file"]


def test_write_atomic_gives_the_mode_that_any_new_file_has(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    write_atomic(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_write_atomic_onto_a_directory_leaves_it_and_no_litter(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError):
        write_atomic(tmp_path / "taken", b"data")
    assert names(tmp_path) == ["taken"]


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_a_parent_that_is_a_file_is_a_storage_error(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(StorageError), atomic_directory(tmp_path / below / "output"):
        raise AssertionError("must not be reached")
    with pytest.raises(StorageError):
        write_atomic(tmp_path / below / "output", b"data")
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert names(tmp_path) == ["file"]


def test_a_name_too_long_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError), atomic_directory(tmp_path / ("x" * 300)):
        raise AssertionError("must not be reached")
    assert names(tmp_path) == []


def test_atomic_directory_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "output"
    with atomic_directory(target) as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_bytes(b"data")
        assert not target.exists()
        assert directory.parent == target.parent  # same file system, so that rename is atomic
    assert (target / "sub" / "file").read_bytes() == b"data"
    assert names(target.parent) == ["output"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [False, True])
def test_atomic_directory_leaves_nothing_on_error(
    tmp_path: Path, failure: type[BaseException], before: bool
) -> None:
    target = tmp_path / "output"
    if before:
        target.mkdir()
        (target / "old").write_bytes(b"old")
    with pytest.raises(failure), atomic_directory(target, overwrite=before) as directory:
        (directory / "half").write_bytes(b"half")
        raise failure
    assert names(tmp_path) == (["output"] if before else [])
    if before:
        assert names(target) == ["old"]


def test_atomic_directory_refuses_what_exists_and_names_the_option(tmp_path: Path) -> None:
    target = tmp_path / "output"
    target.mkdir()
    with pytest.raises(UsageError, match="--overwrite") as caught, atomic_directory(target):
        raise AssertionError("must not be reached")
    assert caught.value.exit_code == ExitCode.USAGE
    assert names(tmp_path) == ["output"]


def test_atomic_directory_refuses_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "output").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError), atomic_directory(tmp_path / "output"):
        raise AssertionError("must not be reached")


def test_overwrite_replaces_every_file(tmp_path: Path) -> None:
    target = tmp_path / "output"
    for name in ("first", "second"):
        with atomic_directory(target, overwrite=True) as directory:
            (directory / name).write_bytes(name.encode())
    assert names(target) == ["second"]
    assert names(tmp_path) == ["output"]


def test_overwrite_through_a_link_replaces_the_link_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"mine")
    (tmp_path / "output").symlink_to(tmp_path / "precious")
    with atomic_directory(tmp_path / "output", overwrite=True) as directory:
        (directory / "new").write_bytes(b"new")
    assert not (tmp_path / "output").is_symlink()
    assert (tmp_path / "precious" / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_the_old_directory_returns_when_the_last_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    target = tmp_path / "output"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    real: Callable[[Path, Path], Path] = Path.rename

    def rename(source: Path, to: Path) -> Path:
        if (source / "new").exists():  # the new directory on its way to the target
            raise failure
        return real(source, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(failure), atomic_directory(target, overwrite=True) as directory:
        (directory / "new").write_bytes(b"new")
    assert names(tmp_path) == ["output"]
    assert names(target) == ["old"]


def test_an_error_that_is_not_about_the_disk_is_not_called_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_directory(tmp_path / "output"):
        (tmp_path / "nowhere").read_bytes()


def test_a_disk_that_fills_up_in_a_file_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    said = in_child(
        """
        import sys
        from pathlib import Path
        from ccn_deploy.errors import StorageError
        from ccn_deploy.storage import write_atomic
        try:
            write_atomic(Path(sys.argv[1]), bytes(1 << 20))
        except StorageError as error:
            print(int(error.exit_code), error)
        """,
        path,
        limit=LIMIT,
    )
    assert said.startswith("3 Could not write") and str(path) in said
    assert names(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


BUNDLE_ON_A_FULL_DISK = """
    import sys
    from pathlib import Path
    from ccn_deploy.bundle import ModelCard, NewFile, Source, write_bundle
    from ccn_deploy.errors import StorageError
    from ccn_deploy.targets import Role
    try:
        source = Source(kind="run", sha256="0" * 64)
        card = ModelCard(name="", input_shape=(1, 28, 28), class_names=("0", "1"), source=source)
        write_bundle(
            Path(sys.argv[1]), card=card, overwrite=True,
            files=[
                NewFile("small", b"fits", Role.WEIGHTS),
                NewFile("big", bytes(1 << 22), Role.FORWARD, "fp32"),
            ],
        )
    except StorageError as error:
        print(int(error.exit_code), error)
"""


def test_a_disk_that_fills_up_in_a_bundle_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "manifest.json").write_bytes(b"old")
    said = in_child(BUNDLE_ON_A_FULL_DISK, target, limit=LIMIT)
    assert said.startswith("3 Could not write")
    assert len(said.strip().splitlines()) == 2
    assert names(tmp_path) == ["bundle"]
    assert (target / "manifest.json").read_bytes() == b"old"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Path:
    """Mount a file system of 512 KiB, in a name space of its own if need be, or skip."""
    ours = ["unshare", "--mount", "--map-root-user", "true"]
    if not shutil.which(ours[0]) or subprocess.run(ours, capture_output=True).returncode != 0:
        pytest.skip("this machine lets us mount nothing; the file size limit is tested above")
    return tmp_path


def test_a_real_full_disk_leaves_nothing(tiny_disk: Path) -> None:
    mount = tiny_disk / "disk"
    mount.mkdir()
    script = (
        'mount -t tmpfs -o size=512k tmpfs "$1" || exit 77; '
        '"$2" -c "$3" "$1/bundle"; ls -A "$1" | sed s/^/left:/'
    )
    code = textwrap.dedent(BUNDLE_ON_A_FULL_DISK)
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh"]
    done = subprocess.run(
        [*command, str(mount), sys.executable, code], capture_output=True, text=True, check=False
    )
    if done.returncode == 77:
        pytest.skip(f"tmpfs cannot be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 Could not write"), done.stdout + done.stderr
    assert "No space left" in done.stdout
    assert "left:" not in done.stdout


def test_a_kill_in_the_middle_leaves_the_target_as_it_was(tmp_path: Path) -> None:
    target = tmp_path / "output"
    target.mkdir()
    (target / "old").write_bytes(b"old")
    script = """
        import sys, time
        from pathlib import Path
        from ccn_deploy.storage import atomic_directory
        with atomic_directory(Path(sys.argv[1]), overwrite=True) as directory:
            (directory / "half").write_bytes(bytes(1000))
            print("writing", flush=True)
            time.sleep(600)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(target)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    child.kill()
    assert child.wait() == -signal.SIGKILL
    child.stdout.close()
    assert names(target) == ["old"]
    assert (target / "old").read_bytes() == b"old"
    with atomic_directory(target, overwrite=True) as directory:  # what it left is in no one's way
        (directory / "new").write_bytes(b"new")
    assert names(target) == ["new"]
