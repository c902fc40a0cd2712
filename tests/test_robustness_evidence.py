"""Evidence files: what is read is what was written, or it is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccn_deploy.errors import IntegrityError, StorageError
from ccn_deploy.records import json_line
from ccn_deploy.robustness import Sample
from ccn_deploy.robustness.evidence import (
    SCHEMA,
    EvidenceWriter,
    Picture,
    read_evidence,
    writing,
)
from ccn_deploy.storage import sha256

HEADER = {"schema": SCHEMA, "target": {"runtime": "torch", "precision": "fp32"}, "batch": 2}

labels = st.integers(0, 9)
maybe = st.none() | labels
sizes = st.none() | st.floats(0, 1e6, allow_nan=False)
statuses = st.sampled_from(["already-wrong", "fooled", "held", "invalid"])
samples_strategy = st.builds(
    Sample,
    index=st.integers(0, 10**6),
    label=labels,
    clean=st.tuples(maybe, maybe),
    adversarial=st.tuples(maybe, maybe),
    status=statuses,
    linf=sizes,
    l2=sizes,
    rho=sizes,
    queries=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
)


def some(n: int, start: int = 0) -> list[Sample]:
    image = np.arange(4, dtype=np.uint8).reshape(1, 2, 2)
    return [
        Sample(
            index=100 + k,
            label=k % 10,
            clean=(k % 10, k % 10),
            adversarial=(None, 3),
            status="fooled",
            linf=0.1,
            l2=0.5 + k,
            rho=0.1 * k,
            image=Picture.of(image) if k == 0 else None,
        )
        for k in range(start, start + n)
    ]


def written(path: Path, *batches: list[Sample]) -> Path:
    with writing(path, HEADER) as writer:
        for batch in batches:
            writer.append(batch, seconds=1.0)
    return path


@given(batches=st.lists(st.lists(samples_strategy, min_size=1, max_size=4), max_size=4))
@settings(deadline=None, max_examples=30)
def test_samples_come_back(batches: list[list[Sample]], tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    path = written(tmp_path_factory.mktemp("evidence") / "e.jsonl", *batches)
    everything = [sample for batch in batches for sample in batch]
    evidence = read_evidence(path, HEADER)
    assert evidence.index.tolist() == [s.index for s in everything]
    assert evidence.status.tolist() == [s.status for s in everything]
    for column, at in ((evidence.clean_runtime, 0), (evidence.clean_reference, 1)):
        assert column.tolist() == [-1 if s.clean[at] is None else s.clean[at] for s in everything]
    for column, at in ((evidence.forward, 0), (evidence.backward, 1)):
        assert column.tolist() == [s.queries[at] for s in everything]
    for name in ("linf", "l2", "rho"):
        expected = [np.nan if getattr(s, name) is None else getattr(s, name) for s in everything]
        np.testing.assert_array_equal(getattr(evidence, name), expected)
    assert evidence.seconds == pytest.approx(len(batches))


def test_kept_images_come_back_at_their_place(tmp_path: Path) -> None:
    evidence = read_evidence(written(tmp_path / "e.jsonl", some(2)), HEADER)
    assert list(evidence.images) == [0]
    np.testing.assert_array_equal(evidence.images[0], [[[0, 1], [2, 3]]])


def test_a_limit_reads_the_first(tmp_path: Path) -> None:
    path = written(tmp_path / "e.jsonl", some(3), some(3, 3))
    evidence = read_evidence(path, HEADER, limit=4)
    assert evidence.index.tolist() == [100, 101, 102, 103]
    assert len(read_evidence(path, HEADER, limit=0)) == 0


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    path = written(tmp_path / "e.jsonl", some(2), some(1, 2))
    data = path.read_bytes()
    for at in range(len(data)):
        for flip in (0x01, 0x20, 0xFF):
            spoilt = bytearray(data)
            spoilt[at] ^= flip
            path.write_bytes(spoilt)
            with pytest.raises(IntegrityError):
                read_evidence(path, HEADER)


@pytest.mark.parametrize("drop", ["header", "sample", "seal", "batch"])
def test_a_missing_line_is_found(tmp_path: Path, drop: str) -> None:
    path = written(tmp_path / "e.jsonl", some(2), some(2, 2))
    lines = path.read_bytes().splitlines(keepends=True)
    gone = {"header": slice(0, 1), "sample": slice(1, 2), "seal": slice(3, 4), "batch": slice(1, 4)}
    del lines[gone[drop]]
    path.write_bytes(b"".join(lines))
    with pytest.raises(IntegrityError):
        read_evidence(path, HEADER)


def test_a_file_cut_anywhere_is_continued_to_the_same_bytes(tmp_path: Path) -> None:
    batches = [some(2), some(2, 2), some(1, 4)]
    whole = written(tmp_path / "whole.jsonl", *batches).read_bytes()
    path = tmp_path / "cut.jsonl"
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        before = len(read_evidence(path, HEADER))
        assert before in (0, 2, 4)
        with writing(path, HEADER) as writer:
            assert writer.count == before
            for batch in batches[before // 2 :]:
                writer.append(batch, seconds=1.0)
        assert path.read_bytes() == whole


def resealed(path: Path, **fields: object) -> None:
    """Change the first sample and compute the seal again, as anybody can."""
    header, first, *_ = path.read_bytes().splitlines(keepends=True)
    changed = json_line({**json.loads(first), **fields})
    digest = sha256(header + changed + json_line({"sealed": 1, "seconds": 1.0}))
    seal = json_line({"sealed": 1, "seconds": 1.0, "sha256": digest})
    path.write_bytes(header + changed + seal)


@pytest.mark.parametrize(
    "fields",
    [
        {"index": -1},
        {"index": 1.0},
        {"index": 10**30},
        {"label": -1},
        {"label": None},
        {"clean": [3]},
        {"clean": [3, -1]},
        {"adversarial": {"runtime": 3, "reference": 3}},
        {"status": "unknown"},
        {"linf": -0.5},
        {"l2": "0.5"},
        {"rho": -1.0},
        {"queries": [0, -1]},
        {"image": {"shape": [1, 2, 2], "uint8": "AAAA"}},
        {"image": {"shape": [1, 1, 3], "uint8": "no base64"}},
        {"unknown": 1},
        {"image": [[[[[]]]]]},
    ],
)
def test_a_row_that_is_none_is_refused_though_its_seal_is_right(
    tmp_path: Path, fields: dict[str, object]
) -> None:
    path = written(tmp_path / "e.jsonl", some(1, 1))
    resealed(path)
    assert len(read_evidence(path, HEADER)) == 1
    resealed(path, **fields)
    with pytest.raises(IntegrityError):
        read_evidence(path, HEADER)


@pytest.mark.parametrize("text", [b"[1]", b"[" * 100_000, b"NaN", b"null", b'{"a": ' * 50_000])
def test_a_line_that_is_no_row_is_refused_at_once(tmp_path: Path, text: bytes) -> None:
    path = written(tmp_path / "e.jsonl", some(1))
    for data in (path.read_bytes() + text + b"\n", text + b"\n" + path.read_bytes()):
        path.write_bytes(data)
        with pytest.raises(IntegrityError):
            read_evidence(path, HEADER)


@pytest.mark.parametrize("what", ["link", "directory", "pipe"])
def test_something_else_than_a_file_is_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "e.jsonl"
    if what == "link":
        path.symlink_to(written(tmp_path / "other.jsonl", some(1)))
    elif what == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(IntegrityError, match="no regular file"):
        read_evidence(path, HEADER)
    with pytest.raises((IntegrityError, StorageError)), writing(path, HEADER):
        pass


def test_evidence_of_something_else_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "e.jsonl", some(1))
    with pytest.raises(IntegrityError, match="header"):
        read_evidence(path, {**HEADER, "batch": 3})


def test_evidence_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    path.write_text(json.dumps({**HEADER, "schema": "ccn-deploy/robustness-evidence/1"}) + "\n")
    with pytest.raises(IntegrityError, match=r"robustness-evidence/1.*this version reads"):
        read_evidence(path, HEADER)


def test_a_writer_that_died_before_writing_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "e.jsonl"
    with pytest.raises(KeyError), writing(path, HEADER):
        raise KeyError("died")
    assert list(path.parent.iterdir()) == []
    assert len(read_evidence(path, HEADER)) == 0


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    # A limit on the size of files is a full disk that needs no privileges.
    path = written(tmp_path / "e.jsonl", some(2))
    before = path.read_bytes()
    code = f"""
import resource
from pathlib import Path
from ccn_deploy.errors import StorageError
from ccn_deploy.robustness.evidence import writing
from tests_robustness_evidence import HEADER, some
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 300}, {len(before) + 300}))
with writing(Path({str(path)!r}), HEADER) as writer:
    try:
        writer.append(some(5, 2), seconds=1.0)
    except StorageError as error:
        print(error.what)
"""
    (tmp_path / "tests_robustness_evidence.py").write_text(Path(__file__).read_text())
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "Could not write" in result.stdout
    assert path.read_bytes() == before


def test_a_directory_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "robustness").write_text("")
    with pytest.raises(StorageError), writing(tmp_path / "robustness" / "e.jsonl", HEADER):
        pass


def test_a_second_writer_waits_and_finds_the_work_done(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    counts: list[int] = []

    def second() -> None:
        with writing(path, HEADER) as writer:
            counts.append(writer.count)

    thread = threading.Thread(target=second)
    with writing(path, HEADER) as writer:
        assert isinstance(writer, EvidenceWriter)
        thread.start()
        writer.append(some(2), seconds=1.0)
        thread.join(timeout=0.2)
        assert thread.is_alive()
    thread.join()
    assert counts == [2]
