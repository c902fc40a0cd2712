"""Evidence files: what is read is what was written, or it is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ccn_deploy.errors import IntegrityError, StorageError
from ccn_deploy.records import json_line
from ccn_deploy.robustness import Sample
from ccn_deploy.robustness.evidence import (
    SCHEMA,
    EvidenceWriter,
    read_evidence,
    writing,
)
from ccn_deploy.storage import sha256

HEADER = {
    "schema": SCHEMA,
    "target": {"runtime": "torch", "precision": "fp32"},
    "batch": 2,
    "shape": [1, 2, 2],
}

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
    stage=st.none() | st.sampled_from(["apgd", "square"]),
    stages=st.just(((3, 2), (0, 1))),
    transferred=maybe,
)


def some(n: int, start: int = 0) -> list[Sample]:
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
        )
        for k in range(start, start + n)
    ]


def drawn(samples: list[Sample]) -> NDArray[np.float32]:
    """Return an image of each sample: its index in a corner, random elsewhere."""
    images = [np.random.default_rng(s.index).random((1, 2, 2), np.float32) for s in samples]
    for image, sample in zip(images, samples, strict=True):
        image[0, 0, 0] = sample.index
    return np.stack(images)


def written(path: Path, *batches: list[Sample]) -> Path:
    with writing(path, HEADER) as writer:
        for batch in batches:
            writer.append(batch, drawn(batch), seconds=1.0)
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
    assert evidence.stage.tolist() == [s.stage or "" for s in everything]
    assert evidence.stage_queries.tolist() == [[[3, 2], [0, 1]] for _ in everything]
    transferred = [-1 if s.transferred is None else s.transferred for s in everything]
    assert evidence.transferred.tolist() == transferred


def test_kept_images_come_back_in_any_order(tmp_path: Path) -> None:
    batches = [some(3), some(2, 3), some(4, 5)]
    evidence = read_evidence(written(tmp_path / "e.jsonl", *batches), HEADER)
    whole = drawn([sample for batch in batches for sample in batch])
    for rows in ([8], [0, 1], [4, 0, 8, 4], [], range(9), [5]):
        chosen = np.array(list(rows), dtype=np.int64)
        np.testing.assert_array_equal(evidence.adversarial(chosen), whole[chosen])
    mask = evidence.index % 2 == 0
    np.testing.assert_array_equal(evidence.adversarial(mask), whole[mask])
    with pytest.raises(IndexError):
        read_evidence(tmp_path / "e.jsonl", HEADER, limit=3).adversarial(np.array([3]))


def test_images_that_are_missing_stay_so(tmp_path: Path) -> None:
    nothing = np.full((2, 1, 2, 2), np.nan, np.float32)
    with writing(tmp_path / "e.jsonl", HEADER) as writer:
        writer.append(some(2), nothing, seconds=1.0)
        with pytest.raises(ValueError, match="images of shape"):
            writer.append(some(2, 2), nothing[:1], seconds=1.0)
    kept = read_evidence(tmp_path / "e.jsonl", HEADER).adversarial(np.arange(2))
    assert np.isnan(kept).all()


def test_any_flipped_byte_of_an_image_is_found_when_it_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "e.jsonl", some(2), some(1, 2))
    images = tmp_path / "e.images"
    data = images.read_bytes()
    for at in range(len(data)):
        spoilt = bytearray(data)
        spoilt[at] ^= 0x10
        images.write_bytes(spoilt)
        evidence = read_evidence(path, HEADER)
        with pytest.raises(IntegrityError, match=r"e\.images .* digest"):
            evidence.adversarial(np.arange(3))
        with pytest.raises(IntegrityError), writing(path, HEADER):
            pass


@pytest.mark.parametrize("what", ["gone", "short", "link", "directory", "pipe"])
def test_images_that_are_not_there_are_found_at_once(tmp_path: Path, what: str) -> None:
    path = written(tmp_path / "e.jsonl", some(2))
    images = tmp_path / "e.images"
    data = images.read_bytes()
    images.unlink()
    if what == "short":
        images.write_bytes(data[:-1])
    elif what == "link":
        (tmp_path / "other").write_bytes(data)
        images.symlink_to(tmp_path / "other")
    elif what == "directory":
        images.mkdir()
    elif what == "pipe":
        os.mkfifo(images)
    with pytest.raises(IntegrityError, match=r"e\.images"):
        read_evidence(path, HEADER)
    with pytest.raises(IntegrityError, match=r"e\.images"), writing(path, HEADER):
        pass


def test_a_block_that_unpacks_to_more_is_cut_short(tmp_path: Path) -> None:
    # A seal computed anew over a bomb: 64 MiB of zeros in 64 KiB.
    bomb = zlib.compress(bytes(64 << 20), 9)[:1000]
    for block in (zlib.compress(bytes(33)), zlib.compress(bytes(31)), bomb, b"", b"no zlib"):
        path = written(tmp_path / "e.jsonl", some(2))
        (tmp_path / "e.images").write_bytes(block)
        lines = path.read_bytes().splitlines(keepends=True)
        fields = {**json.loads(lines[-1]), "images": len(block), "images_sha256": sha256(block)}
        above = b"".join(lines[:-1])
        fields["sha256"] = sha256(above + json_line({**fields, "sha256": "0" * 64}))
        path.write_bytes(above + json_line(fields))
        evidence = read_evidence(path, HEADER)
        with pytest.raises(IntegrityError):
            evidence.adversarial(np.arange(2))
        path.unlink()


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
        shutil.copy(tmp_path / "whole.images", tmp_path / "cut.images")
        before = len(read_evidence(path, HEADER))
        assert before in (0, 2, 4)
        with writing(path, HEADER) as writer:
            assert writer.count == before
            for batch in batches[before // 2 :]:
                writer.append(batch, drawn(batch), seconds=1.0)
        assert path.read_bytes() == whole
        assert (tmp_path / "cut.images").read_bytes() == (tmp_path / "whole.images").read_bytes()


def resealed(path: Path, **fields: object) -> None:
    """Change the first sample and compute the seal again, as anybody can."""
    header, first, *_, seal = path.read_bytes().splitlines(keepends=True)
    changed = json_line({**json.loads(first), **fields})
    sealed = {**json.loads(seal), "sealed": 1, "seconds": 1.0, "sha256": "0" * 64}
    sealed["sha256"] = sha256(header + changed + json_line(sealed))
    path.write_bytes(header + changed + json_line(sealed))


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
        {"unknown": 1},
        {"stage": 3},
        {"stage": "a" * 5000},
        {"stages": [[1, 2, 3]]},
        {"stages": [[[[[]]]]]},
        {"transferred": -1},
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
    before, images = path.read_bytes(), (tmp_path / "e.images").read_bytes()
    code = f"""
import resource
from pathlib import Path
from ccn_deploy.errors import StorageError
from ccn_deploy.robustness.evidence import writing
from tests_robustness_evidence import HEADER, drawn, some
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 300}, {len(before) + 300}))
with writing(Path({str(path)!r}), HEADER) as writer:
    try:
        writer.append(some(5, 2), drawn(some(5, 2)), seconds=1.0)
    except StorageError as error:
        print(error.what)
"""
    (tmp_path / "tests_robustness_evidence.py").write_text(Path(__file__).read_text())
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "Could not write" in result.stdout
    assert path.read_bytes() == before
    assert (tmp_path / "e.images").read_bytes() == images


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
        writer.append(some(2), drawn(some(2)), seconds=1.0)
        thread.join(timeout=0.2)
        assert thread.is_alive()
    thread.join()
    assert counts == [2]
