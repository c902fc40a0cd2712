"""Documents: what is written can be read, and hostile bytes end in one line, at once."""

import json
import time
import tracemalloc
from typing import Annotated, Any

import msgspec
import numpy as np
import pytest

from ccn_deploy.bundle.card import ModelCard, Source
from ccn_deploy.bundle.preprocessing import Preprocessing, from_images, to_images
from ccn_deploy.errors import ExitCode, InputError, IntegrityError, UsageError
from ccn_deploy.records import (
    DEEPEST,
    LARGEST,
    Record,
    decode,
    decode_line,
    decode_sealed,
    encode,
    encode_line,
    encode_sealed,
)
from ccn_deploy.storage import canonical_json, sha256

CARD = ModelCard(
    name="digits",
    input_shape=(1, 28, 28),
    class_names=("zero", "ñ"),
    training={"seed": 3, "history": [{"loss": 0.1}]},
    source=Source(kind="onnx", sha256="0" * 64, preprocessing=Preprocessing(mean=(0.5,))),
)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


class Measured(Record, frozen=True, kw_only=True):
    schema: str = "test/1"
    x: float
    n: Annotated[int, msgspec.Meta(ge=0)]
    more: dict[str, Any] = msgspec.field(default_factory=dict)


def read(data: bytes) -> ModelCard:
    return decode(data, ModelCard, "card.json", "Write it again.")


def changed(**fields: Any) -> bytes:
    return canonical_json({**json.loads(encode(CARD)), **fields})


def test_a_record_comes_back_as_it_was_in_the_canonical_form() -> None:
    data = encode(CARD)
    assert read(data) == CARD
    assert data == canonical_json(json.loads(data))
    line = encode_line(Measured(x=1, n=2))
    assert line == b'{"more": {}, "n": 2, "schema": "test/1", "x": 1.0}\n'
    assert decode_line(line, Measured, "a line", "") == Measured(x=1.0, n=2)


def test_a_seal_is_of_everything_else() -> None:
    sealed = encode_sealed(CARD)
    digest = sha256(encode(CARD))
    assert json.loads(sealed)["digest"] == digest
    assert decode_sealed(sealed, ModelCard, "card.json", "") == CARD

    def resealed(**fields: Any) -> bytes:
        plain = {**json.loads(encode(CARD)), **fields}
        return canonical_json({**plain, "digest": sha256(canonical_json(plain))})

    assert resealed() == sealed
    for damaged in (
        sealed.replace(b"digits", b"digitz"),
        sealed.replace(digest.encode(), b"0" * 64),
        encode(CARD),
        sealed + b"\n",
        resealed(unknown=1),
        resealed(input_shape=[1, 28, 28.0]),
        resealed(source={**json.loads(encode(CARD))["source"], "agreement": {"a": 1}}),
        b"[" * 100_000,
    ):
        with pytest.raises(IntegrityError, match=r"^card\.json "):
            decode_sealed(damaged, ModelCard, "card.json", "")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[1]",
        b"NaN",
        b"[" * 100_000,
        b'{"training":' * 100_000,
        b'{"training": "' + b'\\"' * 1_000_000,
        b"[]" * 1_000_000,
        b" " * (LARGEST + 1),
        changed(unknown=1),
        changed(name=3),
        changed(name="x" * 5000),
        changed(input_shape=[1.0, 28, 28]),
        changed(input_shape=[True, 28, 28]),
        changed(input_shape=[0, 28, 28]),
        changed(input_shape=[1, 28, 10**30]),
        changed(class_names=[]),
        changed(class_names=["a", "a"]),
        changed(training=[]),
        changed(source={"kind": "onnx", "sha256": "X" * 64}),
        changed(source={"kind": "file", "sha256": "0" * 64}),
        encode(CARD).replace(b'"seed": 3', b'"seed": NaN'),
        encode(CARD).replace(b'"seed": 3', b'"seed": 1e999'),
        encode(CARD).replace(b'"seed": 3', b'"seed": ' + b"9" * 5000),
        encode(CARD).replace(b'"seed": 3', b'"seed": 3, "seed": 3'),
        encode(CARD).replace(b"0.5", b"0.50"),
        encode(CARD).replace(b'"digits"', b'"\\ud800"'),
        encode(CARD).replace(b'"std": []', b'"std": [\n        0.0\n      ]'),
        encode(CARD)[:-1],
        b" " + encode(CARD),
    ],
)
def test_a_damaged_document_is_one_line_at_once(data: bytes) -> None:
    tracemalloc.start()
    begin = time.monotonic()
    with pytest.raises(IntegrityError, match=r"^card\.json ") as caught:
        read(data)
    assert time.monotonic() - begin < 2
    assert tracemalloc.get_traced_memory()[1] < 10 * LARGEST
    tracemalloc.stop()
    assert caught.value.exit_code == ExitCode.INTEGRITY
    assert "\n" not in caught.value.what and len(caught.value.what) < 300
    assert caught.value.hint == "Write it again."


def test_brackets_in_strings_are_no_levels_and_the_deepest_allowed_is_read() -> None:
    name = '\\"[' * 200 + "\\"
    assert read(changed(name=name)).name == name
    deepest = nested(DEEPEST - 2)  # the card and its training are two
    assert read(changed(training={"a": deepest})).training == {"a": deepest}
    with pytest.raises(IntegrityError, match="levels"):
        read(changed(training={"a": [deepest]}))


@pytest.mark.parametrize(
    "fields",
    [
        {"x": float("nan")},
        {"x": float("inf")},
        {"x": "1"},
        {"n": -1},
        {"n": 1.5},
        {"more": {"a": float("nan")}},
        {"more": {"a": "\ud800"}},
        {"more": {"a": nested(DEEPEST)}},
        {"more": {"a": "x" * LARGEST}},
        {"more": {"a": object()}},
    ],
    ids=range(10),
)
def test_what_could_not_be_read_is_not_written(fields: dict[str, Any]) -> None:
    record = Measured(**{"x": 1.0, "n": 2, **fields})
    for write in (encode, encode_line):
        with pytest.raises((TypeError, ValueError)):
            write(record)


FORMATS = [
    Preprocessing(),
    Preprocessing("nhwc", "bgr", (0.0, 255.0), (103.9, 116.8, 123.7), (58.4, 57.1, 57.4)),
    Preprocessing(range=(-1.0, 1.0)),
    Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
]


@pytest.mark.parametrize("preprocessing", FORMATS)
def test_images_come_back_from_the_format_of_the_source(preprocessing: Preprocessing) -> None:
    images = np.random.default_rng(0).random((2, 3, 4, 5), dtype=np.float32)
    images[0, :, 0, 0], images[0, :, 0, 1] = 0.0, 1.0
    source = from_images(images, preprocessing)
    assert source.dtype == np.float32
    back = to_images(source, preprocessing)
    assert back.dtype == np.float32 and back.shape == images.shape
    np.testing.assert_allclose(back, images, atol=2e-6)
    assert back.min() >= 0 and back.max() <= 1


def test_one_pixel_by_the_formula() -> None:
    red = np.zeros((1, 3, 1, 1), dtype=np.float32)
    red[0, 0] = 1.0
    caffe = Preprocessing("nhwc", "bgr", (0.0, 255.0), (104.0, 117.0, 123.0), (1.0, 1.0, 2.0))
    assert from_images(red, caffe).tolist() == [[[[-104.0, -117.0, 66.0]]]]
    assert to_images(np.array([[[[0, 0, 255]]]], np.uint8), Preprocessing("nhwc", "bgr", (0, 255)))[
        0, :, 0, 0
    ].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"std": (0.0, 1.0, 1.0)}, "std must be above 0"),
        ({"range": (1.0, 1.0)}, "no width"),
        ({"mean": (float("nan"),)}, "finite"),
        ({"layout": "hwc"}, "hwc"),
    ],
)
def test_an_impossible_format_is_refused(fields: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        Preprocessing(**fields)


def test_a_format_must_have_the_channels_of_the_images() -> None:
    grey = np.zeros((1, 1, 2, 2), dtype=np.float32)
    with pytest.raises(UsageError, match="mean has 3 values and images have 1 channels"):
        from_images(grey, FORMATS[3])
    with pytest.raises(UsageError, match="not BGR"):
        to_images(grey, Preprocessing(channel_order="bgr"))
    with pytest.raises(UsageError, match="mean"):
        ModelCard(
            name="",
            input_shape=(1, 8, 8),
            class_names=("a", "b"),
            source=Source(kind="onnx", sha256="0" * 64, preprocessing=FORMATS[3]),
        )
    with pytest.raises(InputError, match="outside"):
        to_images(grey + 200, Preprocessing())
    with pytest.raises(InputError, match="outside"):
        to_images(grey * np.nan, Preprocessing())
    with pytest.raises(InputError, match="four axes"):
        from_images(grey[0], Preprocessing())
