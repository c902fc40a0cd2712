from __future__ import annotations

import functools
import gzip
import io
import os
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ccn_deploy.data import (
    DataOptions,
    Dataset,
    ModelInput,
    dataset_from_arrays,
    load_dataset,
    match_classes,
)
from ccn_deploy.data.idx import MOST, read_idx
from ccn_deploy.errors import (
    CcnDeployError,
    DatasetNotFoundError,
    ExitCode,
    InputError,
    UsageError,
)

COLOUR = ModelInput((3, 8, 8))


def refused(kind: type[CcnDeployError], load: Callable[[], object]) -> CcnDeployError:
    with pytest.raises(kind) as caught:
        load()
    assert caught.value.exit_code == ExitCode.USAGE
    assert len(str(caught.value).splitlines()) == 2
    return caught.value


def pixels(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, **arrays: Any) -> Path:
    np.savez_compressed(path, **arrays)
    return path


def load(path: Path, split: Any = "test", like: Any = COLOUR, **options: Any) -> Dataset:
    return load_dataset(path, split, options=DataOptions(**options), like=like)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "own.npz"


LABELS = np.array([0, 2, 1, 2])
NAMES = np.array(["cat", "dog", "hen"])


def test_images_labels_and_names_are_read(path: Path) -> None:
    images = pixels(4, 3, 8, 8)
    save(path, images=images, labels=LABELS, class_names=NAMES)
    data = load(path)
    assert (data.name, data.split, data.class_names) == ("own.npz", "test", tuple(NAMES))
    assert data.labels.tolist() == LABELS.tolist()
    assert np.array_equal(data.images(range(4)), (images / 255).astype(np.float32))
    assert data.whole
    assert not data.numbered
    assert load_dataset(str(path), "train").digest == data.digest


@pytest.mark.parametrize(
    ("images", "labels"),
    [("x", "y"), ("X", "Y"), ("images", "targets"), ("data", "label"), ("arr_0", "arr_1")],
)
def test_usual_keys_are_known(path: Path, images: str, labels: str) -> None:
    save(path, **{images: pixels(4, 3, 8, 8), labels: LABELS})
    assert len(load(path)) == 4


@pytest.mark.parametrize(
    ("image_key", "label_key"),
    [("x_{}", "y_{}"), ("X_{}", "Y_{}"), ("{}_images", "{}_labels"), ("{}_x", "{}_y")],
)
@pytest.mark.parametrize("test", ["test", "val"])
def test_splits_are_taken_by_name(path: Path, image_key: str, label_key: str, test: str) -> None:
    train, other = pixels(5, 3, 8, 8), pixels(3, 3, 8, 8, seed=1)
    save(
        path,
        **{
            image_key.format("train"): train,
            label_key.format("train"): np.array([[0], [1], [2], [3], [4]]),  # as MedMNIST has them
            image_key.format(test): other,
            label_key.format(test): np.array([[2], [1], [0]]),
        },
    )
    data = load(path)
    assert np.array_equal(np.rint(data.images(range(3)) * 255), other)
    assert data.labels.tolist() == [2, 1, 0]
    assert data.class_names == tuple("01234")  # as many as both splits have
    assert len(load(path, "train")) == 5
    assert not data.whole


def test_a_split_that_is_not_in_the_file_is_named(path: Path) -> None:
    save(path, x_train=pixels(4, 3, 8, 8), y_train=LABELS)
    assert "x_test" in refused(UsageError, lambda: load(path)).hint


def test_keys_are_asked_for_only_if_they_are_ambiguous(path: Path) -> None:
    one, two = pixels(4, 3, 8, 8), pixels(4, 3, 8, 8, seed=1)
    save(path, clean=one, noisy=two, fine=LABELS, coarse=LABELS % 2)
    assert "--npz-images" in refused(UsageError, lambda: load(path)).hint
    half = functools.partial(load, path, images_key="noisy")
    assert "--npz-labels" in refused(UsageError, half).hint
    data = load(path, images_key="noisy", labels_key="coarse")
    assert np.array_equal(np.rint(data.images(range(4)) * 255), two)
    assert data.labels.tolist() == [0, 0, 1, 0]
    wrong = functools.partial(load, path, images_key="nosy")
    assert "noisy" in refused(UsageError, wrong).hint


# Layout and values.


def test_channels_are_told_by_the_network(path: Path) -> None:
    images = pixels(4, 3, 8, 8)
    save(path, images=images.transpose(0, 2, 3, 1), labels=LABELS)
    data = load(path)
    assert np.array_equal(np.rint(data.images(range(4)) * 255), images)
    assert data.digest == load(save(path, images=images, labels=LABELS)).digest
    save(path, images=images[:, 0], labels=LABELS)
    assert load(path, like=ModelInput((1, 8, 8))).input_shape == (1, 8, 8)
    assert load(path, like=None).input_shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("shape", "like"), [((4, 3, 3, 3), ModelInput((3, 3, 3))), ((4, 3, 8, 1), None)]
)
def test_a_layout_that_cannot_be_told_is_asked_for(path: Path, shape: Any, like: Any) -> None:
    images = pixels(*shape)
    save(path, images=images, labels=LABELS)
    assert "--layout" in refused(UsageError, lambda: load(path, like=like)).hint
    data = load(path, like=like, layout="nhwc")
    assert np.array_equal(np.rint(data.images([0])[0] * 255), images[0].transpose(2, 0, 1))
    assert np.array_equal(
        np.rint(load(path, like=like, layout="nchw").images([0])[0] * 255), images[0]
    )


def test_a_whole_shape_goes_before_a_channel_axis(path: Path) -> None:
    save(path, images=pixels(4, 3, 8, 3), labels=LABELS)
    assert load(path, like=ModelInput((3, 3, 8))).input_shape == (3, 3, 8)  # only NHWC gives it


def test_images_of_another_size_or_number_of_channels_are_refused(path: Path) -> None:
    save(path, images=pixels(4, 3, 9, 9), labels=LABELS)
    assert "[3, 9, 9]; the network takes [3, 8, 8]" in refused(UsageError, lambda: load(path)).what
    save(path, images=pixels(4, 8, 8, 4), labels=LABELS)
    assert "3 channels" in refused(InputError, lambda: load(path)).what


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_floats_in_the_unit_interval_are_converted_exactly(path: Path, dtype: Any) -> None:
    images = (pixels(4, 3, 8, 8) / 255).astype(dtype)
    data = load(save(path, images=images, labels=LABELS))
    assert np.array_equal(data.images(range(4)), images.astype(np.float32))
    assert not any("clipped" in note for note in data.notes)


@pytest.mark.parametrize("excess", [2.4e-7, 1e-5 * 0.99])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_interpolation_leaves_outside_is_clipped_and_told(
    path: Path, excess: float, dtype: Any
) -> None:
    images = np.zeros((4, 3, 8, 8), dtype)
    images[0], images[1] = 1 + excess, -excess
    data = load(save(path, images=images, labels=LABELS))
    found = data.images(range(4))
    assert (found.min(), found.max()) == (0.0, 1.0)
    assert any("outside [0, 1] were clipped" in note for note in data.notes)


@pytest.mark.parametrize(
    ("low", "high", "part"),
    [
        (0.0, 255.0, "divide them by 255"),
        (0.0, 65535.0, "divide them by 65535"),
        (-2.1, 2.6, "images * std + mean"),
        (0.0, 1.0001, "clip"),
        (0.0, np.nan, "where they come from"),
        (-np.inf, 1.0, "where they come from"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_advice_is_for_the_values_that_are_there(
    path: Path, low: float, high: float, part: str, dtype: Any
) -> None:
    images = np.zeros((4, 3, 8, 8), dtype)
    images[2, 0, 0, :2] = low, high
    error = refused(InputError, lambda: load(save(path, images=images, labels=LABELS)))
    assert part in error.hint
    assert "image 2" in error.what
    in_memory = functools.partial(dataset_from_arrays, "own", images, LABELS, list(NAMES))
    assert part in refused(InputError, in_memory).hint


def test_doubles_in_the_unit_interval_are_never_told_to_divide() -> None:
    images = np.random.default_rng(0).random((4, 1, 8, 8))
    data = dataset_from_arrays("own", images, LABELS, list(NAMES))
    assert np.array_equal(data.images(range(4)), images.astype(np.float32))


@pytest.mark.parametrize(
    "dtype", [np.int64, np.int8, np.uint16, bool, complex, "U3", "V4", "M8[s]"]
)
def test_images_of_another_type_are_refused(path: Path, dtype: Any) -> None:
    save(path, images=np.zeros((4, 3, 8, 8), dtype), labels=LABELS)
    assert "images must be uint8" in refused(InputError, lambda: load(path)).what


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        (np.eye(3)[LABELS], "one-hot"),
        (np.eye(3, dtype=np.int64)[LABELS], "one-hot"),
        (LABELS.astype(float), "integers"),
        (NAMES[LABELS], "integers"),
        (LABELS[:3], "belong together"),
        (np.int64(3), "empty"),
        (LABELS - 1, "label -1"),
        (LABELS * 2**40, "class"),
    ],
    ids=range(8),
)
def test_labels_that_are_no_classes_are_refused(path: Path, labels: Any, part: str) -> None:
    save(path, images=pixels(4, 3, 8, 8), labels=labels)
    error = refused(InputError, lambda: load(path))
    assert part in error.what
    if part == "one-hot":
        assert "argmax" in error.hint


def test_no_image_is_refused(path: Path) -> None:
    save(path, images=pixels(0, 3, 8, 8), labels=LABELS[:0])
    assert "empty" in refused(InputError, lambda: load(path)).what
    empty = functools.partial(
        dataset_from_arrays, "own", pixels(0, 3, 8, 8), LABELS[:0], list(NAMES)
    )
    refused(InputError, empty)


# Classes.


def test_names_are_matched_with_the_networks(path: Path) -> None:
    save(path, images=pixels(4, 3, 8, 8), labels=LABELS, class_names=NAMES)
    data = load(path, like=ModelInput((3, 8, 8), ("hen", "ox", "cat", "dog")))
    assert data.labels.tolist() == [2, 0, 3, 0]
    assert data.identity["classes"] == "by name, 3 of 4"
    wrong = functools.partial(load, path, like=ModelInput((3, 8, 8), ("hen", "ox", "cats")))
    assert "Did you mean 'cats'?" in refused(UsageError, wrong).hint


def test_without_names_labels_are_numbers_and_it_is_recorded(path: Path) -> None:
    save(path, images=pixels(4, 3, 8, 8), labels=LABELS)
    data = load(path, like=ModelInput((3, 8, 8), ("hen", "ox", "cat", "dog")))
    assert data.numbered
    assert data.labels.tolist() == LABELS.tolist()
    assert data.class_names == ("hen", "ox", "cat", "dog")
    assert data.identity["classes"] == "numbered"
    assert any("No class_names" in note for note in data.notes)
    few = functools.partial(load, path, like=ModelInput((3, 8, 8), ("hen", "ox")))
    assert "label 2" in refused(UsageError, few).what


def test_names_in_memory_are_matched_by_name_too() -> None:
    data = dataset_from_arrays("own", pixels(4, 3, 8, 8), LABELS, list(NAMES))
    assert match_classes(data, ["hen", "dog", "cat"]).labels.tolist() == [2, 0, 1, 0]


@pytest.mark.parametrize(
    "names", [np.array([1, 2, 3]), np.array([["a", "b", "c"]]), np.array("abc"), NAMES[:2]], ids=str
)
def test_names_that_are_no_names_of_the_classes_are_refused(path: Path, names: Any) -> None:
    save(path, images=pixels(4, 3, 8, 8), labels=LABELS, class_names=names)
    refused(InputError, lambda: load(path))


# Hostile files.


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("key", ["images", "labels", "class_names"])
def test_objects_are_refused_in_one_line_and_never_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.chdir(path.parent)
    arrays = {"images": pixels(4, 3, 8, 8), "labels": LABELS, "class_names": NAMES}
    bombs = np.empty(4, object)
    bombs[:] = [Bomb() for _ in range(4)]
    save(path, **{**arrays, key: bombs})
    error = refused(InputError, lambda: load(path))
    assert f"{key} is an array of objects" in error.what
    assert not (path.parent / "exploded").exists()


def member(shape: tuple[int, ...], dtype: str = "|u1", data: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + data


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return path


def test_a_zip_bomb_is_refused_by_its_header(path: Path) -> None:
    count = 1 << 36
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("labels.npy", member((count,), "|u1"))
        file.writestr("images.npy", member((count, 1, 8, 8)))
    error = refused(InputError, lambda: load(path, like=ModelInput((1, 8, 8))))
    assert "no whole .npz file" in error.what  # the header says more than the archive


@pytest.mark.parametrize("honest", [True, False])
def test_more_than_the_memory_is_not_decompressed(
    path: Path, monkeypatch: pytest.MonkeyPatch, honest: bool
) -> None:
    monkeypatch.setattr("ccn_deploy.data.npz.MAX_BYTES", 1 << 16)
    save(path, images=np.zeros((2000, 1, 8, 8), np.uint8), labels=np.zeros(2000, np.uint8))
    if not honest:  # the directory of the archive says a smaller size
        data = path.read_bytes()
        size = struct.pack("<I", 2000 * 64 + 128)
        assert data.count(size) >= 1
        path.write_bytes(data.replace(size, struct.pack("<I", 1000)))
    error = refused(InputError, lambda: load(path, like=ModelInput((1, 8, 8))))
    assert ("when decompressed" in error.what) == honest


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x05\x06" + bytes(18),
        b"x" * 100,
        gzip.compress(b"x"),
    ],
    ids=["empty", "no member", "text", "gzip"],
)
def test_a_file_that_is_no_archive_is_refused(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    refused(UsageError, lambda: load(path))


@pytest.mark.parametrize(
    "data",
    [
        b"\x93NUMPY\x03\x00" + struct.pack("<I", 4) + b"{}  ",
        b"\x93NUMPY\x09\x00" + bytes(100),
        b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
        b"\x93NUMPY\x01\x00\x10\x00" + b"[" * 16,
        member((-1, 3, 8, 8)),
        member((2**70, 3, 8, 8)),
        member((4, 3, 8, 8), data=bytes(10)),
        member((4, 3, 8, 8), data=bytes(4 * 192 + 1)),
        member((10**12, 1, 1), "|V0"),
        b"garbage",
        b"",
    ],
    ids=range(11),
)
def test_a_damaged_array_is_refused(path: Path, data: bytes) -> None:
    archive(path, images=data, labels=member((4,), data=bytes(4)))
    refused(UsageError, lambda: load(path))


def test_too_many_arrays_and_arrays_of_one_name_are_refused(path: Path) -> None:
    archive(path, **{f"a{number}": member((0,)) for number in range(300)})
    assert "300 arrays" in refused(InputError, lambda: load(path)).what
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("images.npy", member((0,)))
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr("images.npy", member((0,)))
    assert "two arrays" in refused(InputError, lambda: load(path)).what


def test_mutated_files_end_in_one_error_or_in_data(path: Path) -> None:
    save(path, images=pixels(4, 3, 8, 8), labels=LABELS, class_names=NAMES)
    whole = path.read_bytes()
    random = np.random.default_rng(2)
    for _ in range(300):
        data = bytearray(whole[: random.integers(len(whole) // 2, len(whole) + 1)])
        for at in random.integers(0, len(data), random.integers(0, 8)):
            data[at] = random.integers(256)
        path.write_bytes(data)
        try:
            load(path)
        except UsageError as error:
            assert len(str(error).splitlines()) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes")
def test_a_pipe_is_refused_at_once(path: Path) -> None:
    os.mkfifo(path)
    assert "no regular file" in refused(InputError, lambda: load(path)).what


def test_links_are_followed_and_loops_are_errors(path: Path) -> None:
    save(path.parent / "real.npz", images=pixels(4, 3, 8, 8), labels=LABELS)
    path.symlink_to(path.parent / "real.npz")
    assert len(load(path)) == 4
    path.unlink()
    path.symlink_to(path)
    refused(UsageError, lambda: load(path))


def test_options_of_folders_are_refused(path: Path) -> None:
    save(path, images=pixels(4, 3, 8, 8), labels=LABELS)
    for option in ({"resize": "stretch"}, {"crop": "none"}, {"interpolation": "box"}):
        assert (
            f"--{next(iter(option))}"
            in refused(UsageError, functools.partial(load, path, **option)).what
        )


# idx files.


def idx(count: int, body: bytes, *sides: int) -> bytes:
    shape = (count, *sides)
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + body


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(idx(2**32 - 1, bytes(1 << 20), 28, 28))
    assert "4,294,967,295 items" in refused(InputError, lambda: read_idx(path, 3)).what
    assert MOST * 28 * 28 < 1 << 28
    with gzip.open(path, "wb", compresslevel=1) as file:  # an honest header, and more behind it
        file.write(idx(1, bytes(1 << 24), 28, 28))
    assert "more bytes" in refused(InputError, lambda: read_idx(path, 3)).what


def test_an_idx_file_without_items_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    path.write_bytes(idx(0, b""))
    assert "0 items" in refused(InputError, lambda: read_idx(path, 1)).what


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "t10k-{}-idx{}-ubyte",
        "t10k-{}-idx{}-ubyte.gz",
        "t10k-{}.idx{}-ubyte",
        "t10k-{}.idx{}-ubyte.gz",
        "t10k-{0}-idx{1}-ubyte/t10k-{0}-idx{1}-ubyte",
    ],
)
def test_names_that_others_give_idx_files_are_known(
    tmp_path: Path, name: str, zipped: bool
) -> None:
    bodies = {"images": idx(3, bytes(3 * 784), 28, 28), "labels": idx(3, bytes([1, 2, 3]))}
    for kind, dimensions in (("images", 3), ("labels", 1)):
        path = tmp_path / name.format(kind, dimensions)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(bodies[kind]) if zipped else bodies[kind])
        (path.parent / f"._{path.name}").write_bytes(b"x")
    assert load_dataset("mnist", "test", tmp_path).labels.tolist() == [1, 2, 3]


@pytest.mark.skipif(
    not hasattr(os, "fork") or os.geteuid() != 0, reason="only root becomes another user"
)
def test_a_user_without_home_is_told_to_name_a_directory() -> None:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.environ.pop("HOME", None)
            os.environ.pop("CCN_DEPLOY_DATA", None)
            os.setuid(54321)
            load_dataset("mnist", "test")
        except DatasetNotFoundError as error:
            code = 0 if "--data-dir" in error.hint and "home" in error.what else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_pillow_is_not_imported_for_arrays() -> None:
    import subprocess

    code = "import sys, ccn_deploy.data; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
