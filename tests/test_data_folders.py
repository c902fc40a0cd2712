from __future__ import annotations

import functools
import os
import pickle
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ccn_deploy.data import DataOptions, Dataset, ModelInput, load_dataset, match_classes
from ccn_deploy.data.decode import MAX_PIXELS, Geometry, read_image
from ccn_deploy.errors import (
    CcnDeployError,
    DatasetNotFoundError,
    ExitCode,
    InputError,
    UsageError,
)

Image = pytest.importorskip("PIL.Image")

GREY = ModelInput((1, 8, 8))
COLOUR = ModelInput((3, 8, 8))


def refused(kind: type[CcnDeployError], load: Callable[[], object]) -> CcnDeployError:
    with pytest.raises(kind) as caught:
        load()
    assert caught.value.exit_code == ExitCode.USAGE
    assert len(str(caught.value).splitlines()) == 2
    str(caught.value).encode()  # can be printed anywhere
    return caught.value


def save(path: Path, pixels: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels))
    image.save(path, **options)
    return path


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def tree(root: Path, *names: str, images: int = 2) -> Path:
    for number, name in enumerate(names):
        for at in range(images):
            save(root / name / f"{at}.png", noise(8, 8, 3, seed=10 * number + at))
    return root


def load(root: Path, like: ModelInput | None = COLOUR, **options: Any) -> Dataset:
    return load_dataset(root, "test", options=DataOptions(**options), like=like)


def only(path: Path, channels: int = 1, **options: Any) -> NDArray[np.float32]:
    """Return one image at its own size."""
    with Image.open(path) as image:
        shape = (channels, image.height, image.width)
    return read_image(str(path), Geometry.of(DataOptions(**options), shape))


# Where the images are taken from.


def test_a_directory_of_class_folders_is_a_data_set(tmp_path: Path) -> None:
    data = load(tree(tmp_path / "pets", "dog", "cat"))
    assert (data.name, data.split, data.class_names) == ("pets/", "test", ("cat", "dog"))
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(
        data.images([2])[0], (noise(8, 8, 3) / 255).astype(np.float32).transpose(2, 0, 1)
    )
    assert data.whole
    assert any("both splits" in note for note in data.notes)
    assert len(load_dataset(str(tmp_path / "pets"), "train", like=COLOUR)) == 4
    assert pickle.loads(pickle.dumps(data)).images([0]).shape == (1, 3, 8, 8)


def test_name_and_digest_do_not_depend_on_how_the_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(tree(tmp_path / "pets", "dog", "cat"))
    monkeypatch.chdir(tmp_path / "pets")
    for path in (".", "../pets/", "dog/.."):
        data = load_dataset(path, "test", like=COLOUR)
        assert (data.name, data.digest) == ("pets/", first.digest)
    monkeypatch.chdir(tmp_path)
    assert data.images([0]).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("test", ["test", "val", "Validation", "testing"])
def test_the_split_is_taken_from_folders_of_its_name(tmp_path: Path, test: str) -> None:
    tree(tmp_path / "train", "a", "b", images=3)
    tree(tmp_path / test, "a", "b", images=1)
    (tmp_path / ".git").mkdir()
    train, other = (load_dataset(tmp_path, split, like=COLOUR) for split in ("train", "test"))
    assert (len(train), len(other)) == (6, 2)
    assert not train.whole
    assert not other.whole
    assert train.digest != other.digest


def test_test_goes_before_val_and_it_is_said(tmp_path: Path) -> None:
    for folder, count in (("train", 1), ("val", 2), ("test", 3)):
        tree(tmp_path / folder, "a", images=count)
    data = load(tmp_path)
    assert len(data) == 3
    assert any("val not used" in note for note in data.notes)


def test_a_class_that_is_named_train_is_a_class(tmp_path: Path) -> None:
    assert load(tree(tmp_path, "bus", "train")).class_names == ("bus", "train")


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    tree(tmp_path / "train", "a")
    assert "no test folder" in refused(DatasetNotFoundError, lambda: load(tmp_path)).what


def test_splits_of_different_classes_are_refused_unless_the_network_names_them(
    tmp_path: Path,
) -> None:
    tree(tmp_path / "train", "a", "b", "c")
    tree(tmp_path / "test", "b", "c")
    what = refused(InputError, lambda: load(tmp_path)).what
    assert "the class a is in train and not in test" in what
    data = load(tmp_path, ModelInput((3, 8, 8), ("c", "b", "a")))
    assert data.labels.tolist() == [1, 1, 0, 0]


def test_folders_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    assert load(tree(tmp_path, "10", "9", "0", images=1)).class_names == ("0", "9", "10")


def test_a_name_of_a_data_set_is_a_path_if_it_is_written_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tree(tmp_path / "mnist", "a")
    assert load_dataset("./mnist", "test", like=COLOUR).class_names == ("a",)
    with pytest.raises(DatasetNotFoundError):
        load_dataset("mnist", "test", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "kind", "part"),
    [
        ("nowhere/", DatasetNotFoundError, "nowhere"),
        ("file.txt", UsageError, "neither a directory nor an .npz file"),
        ("petz", UsageError, "Unknown data set"),
        ("", UsageError, "Unknown data set"),
        ("x" * 5000, UsageError, "cannot be opened"),
        ("a\0b", UsageError, "a"),
    ],
)
def test_a_path_that_is_no_data_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: Any, part: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").touch()
    error = refused(kind, lambda: load_dataset(name, "test"))
    assert part in error.what
    assert len(str(error)) < 1000


def test_a_path_takes_no_directory_and_no_download(tmp_path: Path) -> None:
    tree(tmp_path, "a")
    one = functools.partial(load_dataset, tmp_path, "test", tmp_path)
    two = functools.partial(load_dataset, tmp_path, "test", download=True)
    assert "--data-dir" in refused(UsageError, one).what
    assert "--download" in refused(UsageError, two).what


# What is skipped, and what is refused.


def test_hidden_and_system_entries_are_no_classes_and_are_counted(tmp_path: Path) -> None:
    tree(tmp_path, "a", "b", images=1)
    for folder in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        tree(tmp_path, folder, images=1)
        tree(tmp_path / "a", folder, images=1)
    for name in ("._0.png", "Thumbs.db", ".DS_Store", "readme.txt", "list.CSV", "plain"):
        (tmp_path / "a" / name).write_bytes(b"x")
    tree(tmp_path / "b", "nested")
    save(tmp_path / "loose.png", noise(8, 8))
    data = load(tmp_path)
    assert data.class_names == ("a", "b")
    assert len(data) == 2
    notes = "\n".join(data.notes)
    assert "9 hidden or system entries" in notes
    assert "._*" in notes
    assert "3 files that are no images were skipped" in notes
    assert all(part in notes for part in (".txt", ".csv", "no ending"))
    assert "1 folders inside class folders" in notes
    assert "1 images that are in no class folder" in notes


@pytest.mark.parametrize(
    "ending",
    ["png", "jpg", "JPEG", "jpe", "jfif", "bmp", "gif", "tif", "TIFF", "webp", "ppm", "pgm", "jp2"],
)
def test_every_usual_ending_is_read(tmp_path: Path, ending: str) -> None:
    lossless = ending in ("png", "bmp", "tif", "TIFF", "ppm")
    pixels = noise(8, 8, 3)
    mode = "L" if ending == "pgm" else "RGB"
    path = tmp_path / "a" / f"x.{ending}"
    save(path, Image.fromarray(pixels).convert(mode))
    image = load(tmp_path).images([0])[0]
    assert image.shape == (3, 8, 8)
    if lossless:
        assert np.array_equal(np.rint(image.transpose(1, 2, 0) * 255), pixels)


def test_an_empty_class_is_a_note_in_the_test_split_and_an_error_in_training(
    tmp_path: Path,
) -> None:
    tree(tmp_path, "a", "c")
    (tmp_path / "b").mkdir()
    data = load(tmp_path)
    assert data.class_names == ("a", "b", "c")
    assert data.labels.tolist() == [0, 0, 2, 2]
    assert any("no images: b" in note for note in data.notes)
    training = functools.partial(load_dataset, tmp_path, "train", like=COLOUR)
    assert str(tmp_path / "b") in refused(InputError, training).what


@pytest.mark.parametrize("kind", ["empty", "only empty classes", "not sorted", "no images"])
def test_a_directory_without_images_of_classes_is_explained(tmp_path: Path, kind: str) -> None:
    if kind != "empty":
        (tmp_path / "a").mkdir()
    if kind == "not sorted":
        save(tmp_path / "x.png", noise(8, 8))
    if kind == "no images":
        (tmp_path / "a" / "x.heic").touch()
    error = refused(DatasetNotFoundError, lambda: load(tmp_path))
    assert {"not sorted": "folder per class", "no images": ".heic"}.get(kind, "no image") in (
        error.what
    )


@pytest.mark.parametrize("where", ["class", "image"])
@pytest.mark.parametrize("kind", ["dangling", "loop"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, where: str, kind: str) -> None:
    tree(tmp_path, "a")
    link = tmp_path / "b" if where == "class" else tmp_path / "a" / "z.png"
    link.symlink_to(link if kind == "loop" else tmp_path / "gone")
    error = refused(InputError, lambda: load(tmp_path))
    assert str(link) in error.what


def test_links_to_folders_and_images_are_followed(tmp_path: Path) -> None:
    tree(tmp_path / "store", "a")
    root = tmp_path / "linked"
    root.mkdir()
    (root / "a").symlink_to(tmp_path / "store" / "a")
    (tmp_path / "store" / "a" / "loop").symlink_to(tmp_path)
    save(tmp_path / "elsewhere.png", noise(8, 8))
    (tmp_path / "store" / "a" / "z.png").symlink_to(tmp_path / "elsewhere.png")
    assert len(load(root)) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8")
@pytest.mark.parametrize("where", ["class", "image", "root"])
def test_a_name_that_is_no_utf8_is_an_error_that_can_be_printed(tmp_path: Path, where: str) -> None:
    root = tree(tmp_path / "data", "a")
    bad = b"caf\xe9"
    if where == "root":
        root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + bad))
        (tmp_path / "data").rename(root)
    elif where == "class":
        Path(os.fsdecode(os.fsencode(root) + b"/" + bad)).mkdir()
    else:
        Path(os.fsdecode(os.fsencode(root) + b"/a/" + bad + b".png")).touch()
    error = refused(InputError, lambda: load(root))
    assert r"caf\udce9" in error.what


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes")
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    tree(tmp_path, "a")
    os.mkfifo(tmp_path / "a" / "z.png")
    assert "z.png" in refused(InputError, lambda: load(tmp_path)).what


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes")
def test_a_pipe_that_takes_the_place_of_an_image_does_not_hang(tmp_path: Path) -> None:
    data = load(tree(tmp_path, "a"))
    (tmp_path / "a" / "0.png").unlink()
    os.mkfifo(tmp_path / "a" / "0.png")
    assert "no regular file" in refused(InputError, lambda: data.images([0])).what


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    tree(tmp_path, "a")
    (tmp_path / "a" / "1.png").chmod(0)
    assert "1.png" in refused(InputError, lambda: load(tmp_path)).what


def test_a_folder_with_control_characters_is_no_class(tmp_path: Path) -> None:
    tree(tmp_path, "a\x1b[31m")
    refused(InputError, lambda: load(tmp_path))


@pytest.mark.parametrize("content", [b"", b"x", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(30)])
def test_a_file_that_is_no_image_is_named_when_it_is_read(tmp_path: Path, content: bytes) -> None:
    data = load(tree(tmp_path, "a"))
    (tmp_path / "a" / "1.png").write_bytes(content)
    assert "1.png" in refused(InputError, lambda: data.images([0, 1])).what


@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it repaired
@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "tif", "bmp", "webp", "jp2"])
def test_damaged_images_end_in_one_error_or_in_pixels(tmp_path: Path, kind: str) -> None:
    path = save(tmp_path / f"x.{kind}", noise(9, 7, 3))
    whole = path.read_bytes()
    random = np.random.default_rng(1)
    for _ in range(60):
        data = bytearray(whole[: random.integers(1, len(whole) + 1)])
        for at in random.integers(0, len(data), random.integers(0, 6)):
            data[at] = random.integers(256)
        path.write_bytes(data)
        try:
            image = read_image(str(path), Geometry((3, 8, 8)))
        except InputError as error:
            assert path.name in error.what
        else:
            assert ((image >= 0) & (image <= 1)).all()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "height", [1000, 1500, 5000]
)  # Pillow warns from 1334 on, raises from 2667
def test_a_pixel_bomb_is_refused_before_it_is_decoded(tmp_path: Path, height: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(MAX_PIXELS // 1000 + 1, height))
    error = refused(InputError, lambda: read_image(str(path), Geometry((3, 8, 8))))
    assert f"{MAX_PIXELS:,}" in error.what
    assert error.hint == "Make the image smaller, or remove it."


def test_a_very_long_image_takes_little_memory(tmp_path: Path) -> None:
    path = save(tmp_path / "long.png", np.full((60000, 3, 3), 51, np.uint8))
    code = (
        "import resource; from ccn_deploy.data.decode import Geometry, read_image\n"
        "from PIL import Image; Image.init()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"image = read_image({str(path)!r}, Geometry((3, 224, 224), 'shortest', 256))\n"
        "assert abs(image - 0.2).max() < 1e-6\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 50_000  # KiB


# From a file to pixels.


@pytest.mark.parametrize("method", ["nearest", "bilinear", "bicubic", "lanczos", "box"])
@pytest.mark.parametrize("size", [(40, 30), (30, 40), (17, 90), (8, 8), (5, 6)])
def test_shortest_and_center_are_resizing_then_cropping(
    tmp_path: Path, size: tuple[int, int], method: str
) -> None:
    pixels = noise(*size, 3)
    path = save(tmp_path / "x.png", pixels)
    found = read_image(str(path), Geometry((3, 8, 8), "shortest", 12, True, method))
    high, wide = (max(12, round(side * 12 / min(size))) for side in size)
    whole = Image.fromarray(pixels).resize((wide, high), Image.Resampling[method.upper()])
    left, top = (wide - 8) // 2, (high - 8) // 2
    expected = np.asarray(whole.crop((left, top, left + 8, top + 8))).transpose(2, 0, 1)
    assert np.array_equal(np.rint(found * 255), expected)


def test_a_very_long_image_is_resized_and_cropped_like_its_middle(tmp_path: Path) -> None:
    pixels = noise(60000, 3, 3)
    path = save(tmp_path / "x.png", pixels)
    found = read_image(str(path), Geometry((3, 224, 224), "shortest", 256)) * 255
    middle = Image.fromarray(pixels[29985:30015]).resize((256, 2560), Image.Resampling.BILINEAR)
    expected = np.asarray(middle.crop((16, 1168, 240, 1392))).transpose(2, 0, 1)
    assert abs(found - expected).max() <= 1.01


def test_shortest_covers_a_size_that_is_no_square(tmp_path: Path) -> None:
    pixels = np.zeros((20, 40), np.uint8)
    pixels[:, 15:25] = 255  # what 1:2 keeps of 2:1
    path = save(tmp_path / "x.png", pixels)
    image = read_image(str(path), Geometry((1, 16, 8), interpolation="box"))
    assert image.shape == (1, 16, 8)
    assert image.mean() == 1.0


def test_stretch_keeps_all_of_the_image(tmp_path: Path) -> None:
    pixels = np.zeros((8, 32), np.uint8)
    pixels[:, :16] = 255
    path = save(tmp_path / "x.png", pixels)
    image = read_image(str(path), Geometry((1, 8, 8), "stretch", interpolation="box"))
    assert image[0, :, :4].min() == 1.0
    assert image[0, :, 4:].max() == 0.0


def test_an_image_of_the_right_size_is_not_touched(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", noise(8, 8))
    for mode in ("shortest", "stretch", "none"):
        image = only(path, resize=mode, interpolation="lanczos")
        assert np.array_equal(np.rint(image[0] * 255), noise(8, 8))


def test_none_takes_the_middle_or_refuses(tmp_path: Path) -> None:
    path = str(save(tmp_path / "x.png", noise(10, 12)))
    image = read_image(path, Geometry.of(DataOptions(resize="none"), (1, 8, 8)))
    assert np.array_equal(np.rint(image[0] * 255), noise(10, 12)[1:9, 2:10])
    for options, shape in (({"crop": "none"}, (1, 8, 8)), ({}, (1, 16, 8))):
        geometry = Geometry.of(DataOptions(resize="none", **options), shape)
        assert "12x10 pixels" in refused(InputError, lambda g=geometry: read_image(path, g)).what


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:, :8, 0] = 255
    stored = Image.fromarray(np.rot90(upright).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    path = save(tmp_path / "a" / "x.png", stored, exif=exif)
    image = read_image(str(path), Geometry((3, 8, 16)))
    assert np.array_equal(np.rint(image * 255), upright.transpose(2, 0, 1))
    assert load(tmp_path, None).input_shape == (3, 8, 16)


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_grey_is_scaled_and_never_white(
    tmp_path: Path, ending: str, channels: int
) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    path = save(tmp_path / f"x.{ending}", values)
    image = only(path, channels)
    expected = np.broadcast_to((values / 65535).astype(np.float32), (channels, 8, 8))
    np.testing.assert_allclose(image, expected, atol=1e-7)


def test_sixteen_bit_grey_is_resized_without_losing_bits(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", np.full((20, 30), 1000, np.uint16))
    image = read_image(str(path), Geometry((1, 8, 8), interpolation="lanczos"))
    np.testing.assert_allclose(image, 1000 / 65535, rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "part"),
    [
        (np.full((8, 8), 70000, np.int32), "32-bit integers"),
        (np.full((8, 8), 200.0, np.float32), "floats outside"),
        (np.full((8, 8), np.nan, np.float32), "floats outside"),
    ],
)
def test_numbers_without_a_known_white_are_refused(
    tmp_path: Path, values: NDArray[Any], part: str
) -> None:
    path = save(tmp_path / "x.tif", values)
    assert part in refused(InputError, lambda: only(path)).what


def test_floats_in_the_unit_interval_are_taken_as_they_are(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    path = save(tmp_path / "x.tif", values)
    assert np.array_equal(only(path)[0], values)


def test_modes_become_grey_or_colour_as_the_network_takes_them(tmp_path: Path) -> None:
    colour = Image.fromarray(np.full((8, 8, 3), (204, 102, 51), np.uint8))  # in the web palette
    for mode, ending in (("P", "gif"), ("CMYK", "tif"), ("RGB", "png")):
        path = save(tmp_path / f"{mode}.{ending}", colour.convert(mode))
        image = only(path, 3) * 255
        red, green, blue = image[:, 4, 4]
        np.testing.assert_allclose((red, green, blue), (204, 102, 51), atol=1)
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        np.testing.assert_allclose(only(path) * 255, luma, atol=1)
    two = save(tmp_path / "1.png", Image.fromarray(noise(8, 8) > 127))
    assert set(np.unique(only(two))) == {0.0, 1.0}
    grey = save(tmp_path / "L.png", noise(8, 8))
    image = only(grey, 3)
    assert (image == image[:1]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_refused_and_opaque_alpha_is_dropped(
    tmp_path: Path, mode: str
) -> None:
    pixels = noise(8, 8, 4)
    pixels[..., 3] = 255
    if mode == "P":
        flat = Image.fromarray(pixels[..., :3]).convert("P")
        opaque = save(tmp_path / "opaque.png", flat)
        hollow = save(tmp_path / "hollow.png", flat, transparency=flat.getpixel((3, 3)))
    else:
        opaque = save(tmp_path / "opaque.png", Image.fromarray(pixels).convert(mode))
        pixels[3, 3, 3] = 254
        hollow = save(tmp_path / "hollow.png", Image.fromarray(pixels).convert(mode))
    assert only(opaque, 3).shape == (3, 8, 8)
    assert "transparent" in refused(InputError, lambda: only(hollow, 3)).what


def test_of_an_animation_the_first_image_is_read(tmp_path: Path) -> None:
    first, second = (Image.fromarray(np.full((8, 8), value, np.uint8)) for value in (0, 255))
    path = save(tmp_path / "x.gif", first, save_all=True, append_images=[second])
    assert only(path).max() == 0.0


def test_without_a_network_the_first_image_decides(tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.png", noise(10, 12))
    save(tmp_path / "a" / "1.png", noise(33, 44, 3))
    data = load(tmp_path, None)
    assert data.input_shape == (1, 10, 12)
    assert data.images([0, 1]).shape == (2, 1, 10, 12)
    assert any("12x10, grey" in note for note in data.notes)


def test_a_network_of_other_channels_than_images_have_is_refused(tmp_path: Path) -> None:
    tree(tmp_path, "a")
    assert "4 channels" in refused(InputError, lambda: load(tmp_path, ModelInput((4, 8, 8)))).what


@pytest.mark.parametrize(
    "options",
    [
        {"resize": "longest"},
        {"resize": "shortest:0"},
        {"resize": "shortest:"},
        {"resize": "shortest:99999999999999999999"},
        {"resize": "stretch:3"},
        {"crop": "random"},
        {"interpolation": "cubic"},
        {"layout": "chwn"},
        {"size": (0, 3)},
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any]) -> None:
    refused(UsageError, lambda: DataOptions(**options))


def test_options_are_refused_where_they_would_be_ignored(tmp_path: Path) -> None:
    tree(tmp_path, "a")
    assert "--layout" in refused(UsageError, lambda: load(tmp_path, layout="nchw")).what
    named = functools.partial(
        load_dataset, "mnist5k", "test", options=DataOptions(resize="stretch")
    )
    assert "--resize" in refused(UsageError, named).what


# Identity.


def test_the_digest_is_of_names_contents_classes_and_options(tmp_path: Path) -> None:
    tree(tmp_path, "a", "b")
    first = load(tmp_path)
    assert load(tmp_path).digest == first.digest
    digests = {first.digest}
    for options in ({"interpolation": "box"}, {"resize": "stretch"}, {"crop": "none"}):
        digests.add(load(tmp_path, **options).digest)
    digests.add(load(tmp_path, ModelInput((1, 8, 8))).digest)
    path = tmp_path / "a" / "0.png"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1  # the same name and size
    path.write_bytes(content)
    digests.add(load(tmp_path).digest)
    path.rename(tmp_path / "a" / "2.png")
    digests.add(load(tmp_path).digest)
    (tmp_path / "b").rename(tmp_path / "c")
    digests.add(load(tmp_path).digest)
    assert len(digests) == 8


def test_how_images_are_made_is_written_down(tmp_path: Path) -> None:
    data = load(tree(tmp_path, "a"), resize="shortest:9", interpolation="bicubic")
    assert data.identity == {
        "name": data.name,
        "split": "test",
        "digest": data.digest,
        "shape": "3x8x8",
        "resize": "shortest:9",
        "crop": "center",
        "interpolation": "bicubic",
        "images": "the same for both splits",
    }


def test_imagenet_keeps_its_crop_in_proportion(tmp_path: Path) -> None:
    tree(tmp_path / "val", "n01")
    small = load_dataset("imagenet", "test", tmp_path, like=ModelInput((3, 21, 21)))
    assert small.described["resize"] == "shortest:24"
    assert load_dataset("imagenet", "test", tmp_path).described["resize"] == "shortest:256"
    assert small.name == "imagenet"


def test_many_files_are_listed_and_hashed_quickly(tmp_path: Path) -> None:
    content = save(tmp_path / "x.png", noise(8, 8)).read_bytes()
    for name in "abcde":
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(1000):
            (tmp_path / "data" / name / f"{number}.png").write_bytes(content)
    start = time.perf_counter()
    assert len(load(tmp_path / "data", GREY)) == 5000
    assert time.perf_counter() - start < 5


# Classes by name.


def test_classes_in_another_order_are_mapped(tmp_path: Path) -> None:
    data = load(tree(tmp_path, "cat", "dog", "hen"))
    mapped = match_classes(data, ["dog", "hen", "cat"])
    assert mapped.class_names == ("dog", "hen", "cat")
    assert mapped.labels.tolist() == [2, 2, 0, 0, 1, 1]
    assert [mapped.class_names[i] for i in mapped.labels] == [
        data.class_names[i] for i in data.labels
    ]
    assert mapped.described["classes"] == "by name, another order"
    assert mapped.digest != data.digest
    assert match_classes(data, data.class_names) is data


def test_a_subset_of_classes_is_mapped(tmp_path: Path) -> None:
    data = load(tree(tmp_path, "3", "7"), ModelInput((3, 8, 8), tuple("0123456789")))
    assert data.labels.tolist() == [3, 3, 7, 7]
    assert data.class_names == tuple("0123456789")
    assert data.described["classes"] == "by name, 2 of 10"


def test_an_unknown_class_is_named_with_the_nearest(tmp_path: Path) -> None:
    data = load(tree(tmp_path, "cat", "dogs"))
    error = refused(UsageError, lambda: match_classes(data, ["cat", "dog", "hen"]))
    assert "'dogs'" in error.what
    assert "Did you mean 'dog'?" in error.hint


def test_names_are_not_matched_with_bare_numbers(tmp_path: Path) -> None:
    data = load(tree(tmp_path, "cat", "dog"))
    error = refused(UsageError, lambda: match_classes(data, ["0", "1"]))
    assert "only numbered" in error.hint


def test_more_classes_than_the_network_has_are_refused(tmp_path: Path) -> None:
    data = load(tree(tmp_path, *"abcdefgh"))
    error = refused(UsageError, lambda: match_classes(data, ["a", "b"]))
    assert "6 of 8 classes" in error.what
    assert "and 3 more" in error.what


def test_a_name_that_the_network_has_twice_is_refused(tmp_path: Path) -> None:
    data = load(tree(tmp_path, "crane", "hen"))
    error = refused(UsageError, lambda: match_classes(data, ["crane", "hen", "crane"]))
    assert "'crane'" in error.what


def test_accents_are_matched_however_they_are_written(tmp_path: Path) -> None:
    data = load(tree(tmp_path, "cafe\u0301"))
    assert match_classes(data, ["bar", "caf\u00e9"]).labels.tolist() == [1, 1]


def test_images_of_another_shape_are_refused_before_classes() -> None:
    like = ModelInput((3, 8, 8), ("cat", "dog"))
    error = refused(UsageError, lambda: load_dataset("mnist5k", "test", like=like))
    assert "[1, 28, 28]; the network takes [3, 8, 8]" in error.what
