"""Data sets as they are published: file names, layouts and the oddities of their files."""

from __future__ import annotations

import functools
import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ccn_deploy.data import Dataset, ModelInput, load_dataset
from ccn_deploy.data.decode import Geometry, read_image
from ccn_deploy.errors import DatasetNotFoundError, InputError, UsageError

Image = pytest.importorskip("PIL.Image")

WNIDS = ("n01440764", "n01443537", "n02105855")
VAL = [f"ILSVRC2012_val_{number:08d}" for number in (1, 2, 3, 4)]
TRUTH = dict(zip(VAL, (WNIDS[2], WNIDS[0], WNIDS[2], WNIDS[1]), strict=True))


def save(path: Path, image: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def plain(seed: int, size: tuple[int, int] = (50, 40)) -> Any:
    """A colour image without edges, which JPEG hardly changes."""
    colour = np.random.default_rng(seed).integers(0, 256, 3)
    return Image.new("RGB", size, tuple(map(int, colour)))


# ImageNet.


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    """Three classes to train on, and the validation images in one folder as published."""
    for number, wnid in enumerate(WNIDS):
        for at in (7, 12):
            save(tmp_path / "train" / wnid / f"{wnid}_{at}.JPEG", plain(10 * number + at))
    for number, name in enumerate(VAL):
        save(tmp_path / "val" / f"{name}.JPEG", plain(100 + number))
    return tmp_path


def devkit(place: Path, lines: str = "233\n1\n233\n449\n") -> Path:
    """Write the two files of the development kit; its numbers are not in order of the classes."""
    scipy_io = pytest.importorskip("scipy.io")
    place.mkdir(parents=True, exist_ok=True)
    kinds = [
        *(("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O")),
        *(("num_children", "O"), ("children", "O"), ("wordnet_height", "O")),
    ]
    rows = [
        (1, WNIDS[0], "tench, Tinca tinca", "a fish", 0, [], 0),
        (233, WNIDS[2], "Shetland sheepdog", "a dog", 0, [], 0),
        (449, WNIDS[1], "goldfish", "another fish", 0, [], 0),
        (1001, "n00001740", "entity", "that which is", 1, [1], 19),
    ]
    synsets = np.array(rows, dtype=kinds).reshape(-1, 1)
    scipy_io.savemat(place / "meta.mat", {"synsets": synsets}, do_compression=True)
    (place / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)
    return place


def solution(place: Path) -> Path:
    """Write the file of the challenge on Kaggle, whose rows are in no order."""
    boxes = {VAL[2]: f"1 2 3 4 {WNIDS[2]} 5 6 7 8"}
    rows = [f"{n},{TRUTH[n]} {boxes.get(n, '85 1 499 272')} " for n in reversed(VAL)]
    text = "\n".join(["ImageId,PredictionString", *rows, ""])
    (place / "LOC_val_solution.csv").write_text(text)
    return place


def in_folders(root: Path) -> Path:
    """Sort the validation images into class folders, as most people do."""
    for name in VAL:
        old, new = root / "val" / f"{name}.JPEG", root / "val" / TRUTH[name] / f"{name}.JPEG"
        new.parent.mkdir(exist_ok=True)
        old.rename(new)
    return root


def load(root: Path) -> tuple[Dataset, Dataset]:
    """Load both splits as training does."""
    train = load_dataset("imagenet", "train", root)
    like = ModelInput(train.input_shape, train.class_names)
    return train, load_dataset("imagenet", "test", root, like=like)


@pytest.mark.parametrize(
    "listed",
    [
        solution,
        devkit,
        lambda root: devkit(root / "ILSVRC2012_devkit_t12" / "data"),
    ],
    ids=["Kaggle", "kit beside val", "kit unpacked"],
)
def test_validation_images_in_one_folder_are_classed_by_the_published_list(
    imagenet: Path, listed: Callable[[Path], Path]
) -> None:
    listed(imagenet)
    train, test = load(imagenet)
    assert train.class_names == test.class_names == WNIDS
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert test.labels.tolist() == [0, 1, 2, 2]
    by_class = [VAL[1], VAL[3], VAL[0], VAL[2]]
    for image, name in zip(test.images(range(4)), by_class, strict=True):
        colour = np.array(plain(100 + VAL.index(name)).getpixel((0, 0))) / 255
        np.testing.assert_allclose(image.mean(axis=(1, 2)), colour, atol=0.02)


def test_one_folder_and_class_folders_are_the_same_data(imagenet: Path) -> None:
    solution(imagenet)
    flat = [(data.digest, data.images(range(len(data)))) for data in load(imagenet)]
    for (digest, images), data in zip(flat, load(in_folders(imagenet)), strict=True):
        assert data.digest == digest
        assert np.array_equal(data.images(range(len(data))), images)


def test_the_layout_of_the_kaggle_archive_is_found(imagenet: Path, tmp_path: Path) -> None:
    inside = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    inside.mkdir(parents=True)
    for folder in ("train", "val"):
        (tmp_path / folder).rename(inside / folder)
    solution(tmp_path)
    assert [len(data) for data in load(tmp_path)] == [6, 4]


def test_without_a_list_the_error_says_which_files_would_do(imagenet: Path) -> None:
    with pytest.raises(DatasetNotFoundError) as caught:
        load_dataset("imagenet", "test", imagenet)
    for part in ("LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt", "meta.mat"):
        assert part in caught.value.what


def test_an_image_that_the_list_lacks_is_named(imagenet: Path) -> None:
    devkit(imagenet, "233\n1\n")
    with pytest.raises(InputError, match=r"ILSVRC2012_val_00000003\.JPEG is in no class"):
        load_dataset("imagenet", "test", imagenet)


def test_a_class_that_was_not_trained_on_is_refused(imagenet: Path) -> None:
    solution(imagenet)
    for image in (imagenet / "train" / WNIDS[2]).iterdir():
        image.unlink()
    (imagenet / "train" / WNIDS[2]).rmdir()
    with pytest.raises(UsageError, match=WNIDS[2]):
        load(imagenet)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("LOC_val_solution.csv", b""),
        ("LOC_val_solution.csv", b"image,label\na,n01440764\n"),
        ("LOC_val_solution.csv", b"ImageId,PredictionString\nILSVRC2012_val_00000001,233\n"),
        ("LOC_val_solution.csv", b"ImageId,PredictionString\nILSVRC2012_val_00000001\n"),
        ("ILSVRC2012_validation_ground_truth.txt", b"233\n2\n233\n"),
        ("ILSVRC2012_validation_ground_truth.txt", b"233\n-1\n"),
        ("ILSVRC2012_validation_ground_truth.txt", b"\xff\xfe"),
        ("meta.mat", b""),
        ("meta.mat", b"no MATLAB file" * 40),
        ("meta.mat", bytes(300)),
    ],
)
def test_a_list_that_is_not_what_its_name_says_is_named(
    imagenet: Path, name: str, content: bytes
) -> None:
    if name != "LOC_val_solution.csv":
        devkit(imagenet)
    (imagenet / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_dataset("imagenet", "test", imagenet)
    assert name in caught.value.what
    assert len(str(caught.value).splitlines()) == 2


def test_the_oddities_of_imagenets_files_are_read(tmp_path: Path) -> None:
    """It has grey and CMYK JPEGs, a PNG that is named .JPEG, and orientations in EXIF data."""
    colour = (200, 120, 40)
    square = Image.new("RGB", (64, 64), colour)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "colour": save(tmp_path / "colour.JPEG", square, quality=95),
        "grey": save(tmp_path / "grey.JPEG", square.convert("L"), quality=95),
        "cmyk": save(tmp_path / "cmyk.JPEG", square.convert("CMYK"), quality=95),
        "png": save(tmp_path / "png.JPEG", square, format="PNG"),
        "progressive": save(tmp_path / "p.JPEG", square, progressive=True, quality=95),
    }
    with Image.open(files["png"]) as image:
        assert image.format == "PNG"
    with Image.open(files["cmyk"]) as image:
        assert image.mode == "CMYK"
    luma = 0.299 * 200 + 0.587 * 120 + 0.114 * 40
    for kind, path in files.items():
        found = read_image(str(path), Geometry((3, 32, 32))) * 255
        expected = [luma] * 3 if kind == "grey" else colour
        np.testing.assert_allclose(found.mean(axis=(1, 2)), expected, atol=2.5, err_msg=kind)

    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, :32] = 255  # stored with its left bright; seen upright, its top
    turned = save(tmp_path / "turned.JPEG", Image.fromarray(halves), exif=exif, quality=95)
    image = read_image(str(turned), Geometry((3, 64, 64)))
    assert image[:, :30].min() > 0.9
    assert image[:, 34:].max() < 0.1


# MNIST and Fashion-MNIST.


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gz"])
def test_the_four_published_files_are_read_by_their_names(
    tmp_path: Path, name: str, zipped: bool
) -> None:
    random = np.random.default_rng(0)
    made: dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = {}
    for split, stem, count in (("train", "train", 6), ("test", "t10k", 4)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        made[split] = images, labels
        for file, magic, array in (
            (f"{stem}-images-idx3-ubyte", 2051, images),
            (f"{stem}-labels-idx1-ubyte", 2049, labels),
        ):
            header = struct.pack(f">{1 + array.ndim}i", magic, *array.shape)
            content = header + array.tobytes()
            path = tmp_path / (f"{file}.gz" if zipped else file)
            path.write_bytes(gzip.compress(content) if zipped else content)
    for split, (images, labels) in made.items():
        data = load_dataset(name, split, tmp_path)  # type: ignore[arg-type]
        assert data.labels.tolist() == labels.tolist()
        found = np.rint(data.images(range(len(data)))[:, 0] * 255)
        assert np.array_equal(found, images)


# CIFAR-10.


def test_cifar10_binary_is_read_record_by_record(tmp_path: Path) -> None:
    """By its definition: a label, then 1024 red, 1024 green, 1024 blue bytes, row by row."""
    directory = tmp_path / "cifar-10-batches-bin"
    directory.mkdir()
    records = np.random.default_rng(3).integers(0, 256, (10_000, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    (directory / "test_batch.bin").write_bytes(records.tobytes())
    (directory / "batches.meta.txt").write_text("airplane\n")
    data = load_dataset("cifar10", "test", tmp_path)
    assert data.labels.tolist() == records[:, 0].tolist()
    for index in (0, 4321, 9999):
        image = data.images([index])[0]
        for plane, row, column in ((0, 0, 0), (1, 3, 31), (2, 31, 30)):
            byte = int(records[index, 1 + 1024 * plane + 32 * row + column])
            assert image[plane, row, column] == np.float32(byte / 255)


def test_half_of_the_batches_is_not_enough(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(bytes(10_000 * 3073))
    load = functools.partial(load_dataset, "cifar10", "train", tmp_path)
    with pytest.raises(DatasetNotFoundError, match=r"data_batch_5\.bin"):
        load()
