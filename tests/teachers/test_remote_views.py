# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Long messages: read as msgpack reads them, with the arrays where they are."""

from __future__ import annotations

import random

import numpy as np
import pytest

msgpack = pytest.importorskip("msgpack")

from torchrl_rpd.teachers.remote import MessageError, _messages, pack, unpack  # noqa: E402
from torchrl_rpd.teachers.remote._views import LONG  # noqa: E402


@pytest.fixture
def everything_is_long(monkeypatch):
    monkeypatch.setattr(_messages, "LONG", 0)


def picture(*shape):
    generator = np.random.default_rng(sum(shape))
    return generator.integers(0, 256, shape, dtype=np.uint8)


def address(array):
    return array.__array_interface__["data"][0]


def test_pictures_stay_in_the_message():
    one, two = picture(4, 300, 300, 3), picture(2, 300, 300, 3)
    message = pack({"image": one, "prompt": ["push", "pull"], "wrist": two})
    assert len(message) > LONG
    start = address(np.frombuffer(message, np.uint8))
    content = unpack(message)
    assert content["prompt"] == ["push", "pull"]
    for name, expected in (("image", one), ("wrist", two)):
        array = content[name]
        assert np.array_equal(array, expected) and array.dtype == np.uint8
        assert not array.flags.writeable
        # where the message has it, and nowhere else
        assert address(array) - start == message.index(expected.tobytes())


def test_as_openpi_client_writes_it():
    # all keys bytes, data first, in a map whose other entries come after it
    image = picture(4, 300, 300, 3)
    entries = {
        b"__ndarray__": True,
        b"data": image.tobytes(),
        b"dtype": "|u1",
        b"shape": image.shape,
    }
    content = unpack(msgpack.packb({"observation/image": entries, "prompt": "push"}))
    assert np.array_equal(content["observation/image"], image)
    assert content["prompt"] == "push"


def test_numbers_of_several_bytes_start_where_they_may():
    # float32 at an odd address would be slow at best: these are copied
    numbers = np.arange(200_000, dtype=np.float32)
    for pad in range(4):
        content = unpack(pack({"p" * (pad + 1): "", "x": numbers}))
        assert np.array_equal(content["x"], numbers)
        assert content["x"].flags.aligned


def contents(seed):
    """Messages of all kinds, small and large pieces, at several depths."""
    rng = random.Random(seed)

    def array():
        kind = rng.choice(["u1", "?", "f4", "i8"])
        shape = [rng.randrange(0, 40) for _ in range(rng.randrange(0, 4))]
        return np.ones(shape, kind)

    def value(depth):
        kinds = [
            lambda: None,
            lambda: rng.random() < 0.5,
            lambda: rng.randrange(-(2**40), 2**40),
            lambda: rng.random(),
            lambda: "ü" * rng.choice([0, 3, 40, 5000, 70_000]),
            lambda: bytes(rng.choice([0, 3, 300, 5000, 70_000])),
            lambda: np.float32(1.5),
            array,
        ]
        if depth:
            kinds += [
                lambda: [value(depth - 1) for _ in range(rng.randrange(0, 20))],
                lambda: table(depth - 1),
            ]
        return rng.choice(kinds)()

    def table(depth):
        size = rng.choice([0, 1, 3, 15, 16, 20])
        names = ["data", b"data", "x" * 5000, *map(str, range(20))]
        return {name: value(depth) for name in rng.sample(names, size)}

    return table(3)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("seed", range(40))
def test_what_msgpack_reads(seed, monkeypatch):
    message = pack(contents(seed))
    expected = unpack(message) if len(message) < LONG else None
    monkeypatch.setattr(_messages, "LONG", 0)
    content = unpack(message)
    if expected is None:
        monkeypatch.setattr(_messages, "LONG", 2**40)
        expected = unpack(message)
    assert same(content, expected)
    assert not any(isinstance(v, memoryview) for v in content.values())


@pytest.mark.parametrize("seed", range(10))
def test_damaged_messages(seed, monkeypatch):
    # either both readers take it, with the same content, or both refuse it
    rng = random.Random(seed)
    image = np.zeros((3, 5, 5), np.uint8)
    good = pack({"image": image, "prompt": ["push"] * 3, "n": {"x": [1, 2.5, None]}})
    outcomes = set()
    for _ in range(200):
        message = bytearray(good)
        kind = rng.randrange(4)
        at = rng.randrange(len(message))
        if kind == 0:
            message = message[:at]
        elif kind == 1:
            message[at] = rng.randrange(256)
        elif kind == 2:
            message[at:at] = rng.randbytes(rng.randrange(1, 9))
        else:
            del message[at : at + rng.randrange(1, 9)]
        results = []
        for long in (0, 2**40):
            monkeypatch.setattr(_messages, "LONG", long)
            try:
                results.append(unpack(bytes(message)))
            except MessageError:
                results.append(MessageError)
        refused = [result is MessageError for result in results]
        assert refused[0] == refused[1], bytes(message)
        assert refused[0] or same(*results), bytes(message)
        outcomes.add(refused[0])
    assert outcomes == {True, False}


@pytest.mark.usefixtures("everything_is_long")
class TestRefused:
    @pytest.mark.parametrize(
        "message",
        [
            b"",
            b"\x81",
            b"\x81\xa1x",
            b"\x81\xa1x\xc6",
            b"\x81\xc4\x04data\xc6\xff\xff\xff\xffabc",  # more than there is
            b"\x81\x01\x02",  # a key that is no text
            b"\x81\x90\x02",  # nor this
            pack({"x": 1}) + b"\0",  # more than one object
            b"\x81\xa1x\xc7\x01\x05a",  # an extension
            b"\x81" * 100_000,
            b"\x81\xa1x" * 100_000,
            b"\x81\xa1x\xdd\xff\xff\xff\xff",  # a list of 2**32
        ],
    )
    def test_broken(self, message):
        with pytest.raises(MessageError):
            unpack(message)

    @pytest.mark.parametrize(
        "change",
        [{b"shape": [4]}, {b"dtype": "|O"}, {b"dtype": "<f4"}, {b"dtype": "|b1"}],
    )
    def test_arrays(self, change):
        entries = {
            b"__ndarray__": True,
            b"data": bytes(range(5)) * 20_000,
            b"dtype": "|u1",
            b"shape": [100_000],
        }
        message = msgpack.packb({"x": {**entries, **change}})
        with pytest.raises(MessageError):
            unpack(message)
        assert unpack(msgpack.packb({"x": entries}))["x"].shape == (100_000,)

    def test_too_many_entries(self):
        message = pack({"x": [[0] * 10_000 for _ in range(10)]})
        with pytest.raises(MessageError, match="entries"):
            unpack(message)


if __name__ == "__main__":
    pytest.main([__file__])
