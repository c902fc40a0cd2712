"""Hugging Face's and timm's files, and files of class names, as their owners have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ccn_deploy.bundle.preprocessing import from_images
from ccn_deploy.errors import UsageError
from ccn_deploy.exporters.sources.class_names import read_class_names
from ccn_deploy.exporters.sources.intake import Intake, parse_numbers, parse_size
from ccn_deploy.exporters.sources.preprocessing_config import (
    SourcePreprocessing,
    read_preprocessing,
)

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def read(tmp_path: Path, document: Any) -> SourcePreprocessing:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document))
    return read_preprocessing(path)


# What Transformers writes for networks that it has; each as its processor computes.
VIT = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "ViTImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}
RESNET = {
    "crop_pct": 0.875,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": MEAN,
    "image_std": STD,
    "resample": 3,
    "size": 224,
}
CONVNEXT_384 = {**RESNET, "size": {"shortest_edge": 384}}
MOBILENET = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}
MOBILEVIT = {
    "crop_size": 256,
    "do_center_crop": True,
    "do_flip_channel_order": True,
    "do_normalize": False,
    "do_resize": True,
    "resample": 3,
    "size": 288,
}
EFFICIENTNET = {
    "do_center_crop": False,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": MEAN,
    "image_std": STD,
    "rescale_factor": 1 / 127.5,
    "rescale_offset": True,
    "resample": 0,
    "size": {"height": 380, "width": 380},
}
UNSCALED = {"do_rescale": False, "do_normalize": False, "size": [32, 48]}
TIMM = {
    "architecture": "resnet18",
    "num_classes": 1000,
    "pretrained_cfg": {
        "tag": "a1_in1k",
        "input_size": [3, 224, 224],
        "test_input_size": [3, 288, 288],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "crop_mode": "center",
        "mean": MEAN,
        "std": STD,
    },
}


@pytest.mark.parametrize(
    ("document", "black", "white", "facts"),
    [
        (VIT, [-1, -1, -1], [1, 1, 1], {"resize": [224, 224], "interpolation": "bilinear"}),
        (
            RESNET,
            [-m / s for m, s in zip(MEAN, STD, strict=True)],
            [(1 - m) / s for m, s in zip(MEAN, STD, strict=True)],
            {"resize": 256, "crop": [224, 224], "interpolation": "bicubic"},
        ),
        (
            CONVNEXT_384,
            [-m / s for m, s in zip(MEAN, STD, strict=True)],
            [(1 - m) / s for m, s in zip(MEAN, STD, strict=True)],
            {"resize": [384, 384], "interpolation": "bicubic"},
        ),
        (
            MOBILENET,
            [-1, -1, -1],
            [1, 1, 1],
            {"resize": 256, "crop": [224, 224], "interpolation": "bilinear"},
        ),
        (
            MOBILEVIT,
            [0, 0, 0],
            [1, 1, 1],
            {"resize": 288, "crop": [256, 256], "interpolation": "bicubic"},
        ),
        (
            EFFICIENTNET,
            [(-1 - m) / s for m, s in zip(MEAN, STD, strict=True)],
            [(1 - m) / s for m, s in zip(MEAN, STD, strict=True)],
            {"resize": [380, 380], "interpolation": "nearest"},
        ),
        (UNSCALED, [0, 0, 0], [255, 255, 255], {"resize": [32, 48]}),
        (
            TIMM,
            [-m / s for m, s in zip(MEAN, STD, strict=True)],
            [(1 - m) / s for m, s in zip(MEAN, STD, strict=True)],
            {"resize": 235, "crop": [224, 224], "interpolation": "bicubic"},
        ),
        (
            TIMM["pretrained_cfg"],
            [-m / s for m, s in zip(MEAN, STD, strict=True)],
            [(1 - m) / s for m, s in zip(MEAN, STD, strict=True)],
            {"resize": 235, "crop": [224, 224], "interpolation": "bicubic"},
        ),
    ],
)
def test_black_and_white_are_fed_as_the_processor_feeds_them(
    tmp_path: Path, document: Any, black: list[float], white: list[float], facts: dict[str, Any]
) -> None:
    found = read(tmp_path, document)
    images = np.stack([np.zeros((3, 2, 2)), np.ones((3, 2, 2))]).astype(np.float32)
    fed = from_images(images, found.intake.preprocessing("nchw", 3))
    np.testing.assert_allclose(fed[0, :, 0, 0], black, rtol=1e-6)
    np.testing.assert_allclose(fed[1, :, 0, 0], white, rtol=1e-6)
    assert found.facts() == facts
    crop = facts.get("crop", facts["resize"])
    assert list(found.intake.input_size or ()) == crop
    assert found.intake.channel_order == ("bgr" if document is MOBILEVIT else "rgb")


def test_a_shorter_side_alone_is_no_input_size(tmp_path: Path) -> None:
    found = read(tmp_path, {**VIT, "size": {"shortest_edge": 224}})
    assert found.intake.input_size is None
    assert found.facts()["resize"] == 224


def test_options_beat_the_file(tmp_path: Path) -> None:
    intake = read(tmp_path, VIT).intake.replaced(mean=(0.1,), std=None, input_layout="nhwc")
    assert intake.mean == (0.1,)
    assert intake.std == (0.5, 0.5, 0.5)
    assert intake.input_layout == "nhwc"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "no JSON object"),
        ('{"width": 3}', "it has width"),
        ("{}", "it has nothing"),
        (json.dumps({**VIT, "image_mean": ["a"]}), "image_mean"),
        (json.dumps({**VIT, "image_mean": [0.5, 0.5]}), ""),
        (json.dumps({**VIT, "image_std": [0, 0, 0]}), "std"),
        (json.dumps({**VIT, "resample": 9}), "'9'"),
        (json.dumps({**VIT, "size": {"longest_edge": 3}}), "'size'"),
        (json.dumps({**VIT, "size": [1, 2, 3]}), "size"),
        (json.dumps({**VIT, "size": {"height": 1 << 40, "width": 1}}), "pixels"),
        (json.dumps({**RESNET, "crop_pct": 0}), "crop_pct"),
        (json.dumps({**RESNET, "crop_pct": 1e-300}), "crop_pct"),
        (json.dumps({"mean": MEAN, "std": STD, "input_size": [224, 224]}), "input_size"),
        (json.dumps({"mean": MEAN, "std": STD, "interpolation": "psychic"}), "psychic"),
        (" " * (1 << 20) + "{}", "more than"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "preprocessor_config.json"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        read_preprocessing(path).intake.preprocessing("nchw", 3)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("café".encode("latin-1"))
    for name, words in (("nothing", "cannot be read"), (".", "cannot be read"), ("latin", "UTF-8")):
        with pytest.raises(UsageError, match=words):
            read_preprocessing(tmp_path / name)


# ----------------------------------------------------------------------------- class names

CATS = ("cat", "dog", "a third")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("names.txt", "cat\ndog\na third\n\n"),
        ("names.txt", "\ufeffcat \r\n dog\r\na third"),
        ("names.json", '["cat", "dog", "a third"]'),
        ("names.json", '{"0": "cat", "2": "a third", "1": "dog"}'),
        ("names.json", '{"cat": 0, "a third": 2, "dog": 1}'),
        ("config.json", '{"x": 1, "id2label": {"0": "cat", "1": "dog", "2": "a third"}}'),
    ],
)
def test_class_names(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_class_names(tmp_path / name, 3) == CATS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("names.txt", "cat\ndog\n", "2 names and the network 3 logits"),
        ("names.txt", "cat\n\ndog\n", "Name 1"),
        ("names.txt", "cat\ndog\ncat\n", "two classes 'cat'"),
        ("names.txt", "", "0 names"),
        ("names.json", "[1, 2, 3]", "no class names"),
        ("names.json", '"cat"', "no class names"),
        ("names.json", '{"0": "cat", "1": "dog", "3": "a third"}', "not 0 to 2"),
        ("names.json", '{"0": "cat", "1": "dog", "01": "a third"}', "not 0 to 2"),
        ("names.json", '{"0": "cat", "1": ["dog"], "2": "a third"}', "no class names"),
        ("names.json", '{"a": "cat", "b": "dog", "c": "a third"}', "no class names"),
        ("names.json", '{"id2label": 3}', "no class names"),
        ("names.json", "{", "no JSON"),
    ],
)
def test_files_that_name_no_classes(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError) as caught:
        read_class_names(tmp_path / name, 3)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


# --------------------------------------------------------------------------------- options


def test_numbers_and_sizes() -> None:
    assert parse_numbers("0,255", "--input-range", 2) == (0, 255)
    assert parse_numbers("0.5", "--mean") == (0.5,)
    assert parse_size("48x192") == (48, 192)
    for text, count in (("", None), ("a", None), ("1,,2", None), ("nan", None), ("1,2,3", 2)):
        with pytest.raises(UsageError, match="--mean takes"):
            parse_numbers(text, "--mean", count)
    for text in ("224", "224x", "224x-1", "axb", "2.5x3"):
        with pytest.raises(UsageError, match="HEIGHTxWIDTH"):
            parse_size(text)
    with pytest.raises(UsageError, match="0x4"):
        Intake(input_size=(0, 4))
