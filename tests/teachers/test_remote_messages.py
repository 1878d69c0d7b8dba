# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Messages and metadata of remote teachers: what is written, and what is read of it."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
import remote_servers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from torchrl_rpd.teachers.remote import (
    MessageError,
    TeacherInfo,
    TeacherMismatch,
    pack,
    unpack,
)
from torchrl_rpd.teachers.remote._info import key_of, wire_name
from torchrl_rpd.teachers.remote._messages import pack_parts

DTYPES = ["?", "i1", "i2", "<i4", "<i8", "u1", "u2", "u4", "u8", "<f2", "<f4", "<f8"]
ARRAYS = npst.arrays(
    dtype=st.sampled_from([np.dtype(name) for name in DTYPES]),
    shape=npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
)
PLAIN = st.one_of(
    *(st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.binary()),
    *(st.floats(allow_nan=False), st.text()),
)
TREES = st.recursive(
    st.one_of(PLAIN, ARRAYS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)
    ),
    max_leaves=12,
)


def same(one, other) -> bool:
    if isinstance(one, np.ndarray):
        return (
            isinstance(other, np.ndarray)
            and one.dtype == other.dtype
            and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
            and one.shape == other.shape
        )
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return type(one) is type(other) and one == other


@settings(max_examples=25, deadline=None)
@given(TREES)
def test_messages_are_those_of_openpi_in_both_directions(tree):
    # remote_servers writes and reads by msgpack alone, as openpi-client does.
    assert same(unpack(remote_servers.pack(tree)), tree)
    assert same(remote_servers.unpack(pack(tree)), tree)
    assert same(unpack(pack(tree)), tree)


def test_long_arrays_are_not_copied():
    image = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    parts = pack_parts({"image": image, "prompt": "push"})
    views = [part for part in parts if isinstance(part, memoryview)]
    assert len(views) == 1 and np.shares_memory(np.asarray(views[0]), image)
    # Reading a short message makes one copy (msgpack's), and a view of that.
    read = unpack(b"".join(parts))["image"]
    assert np.array_equal(read, image) and not read.flags.owndata


def test_strided_arrays_and_big_endian_ones_are_written_as_their_values():
    wide = np.arange(24, dtype=np.int32).reshape(4, 6)
    for array in (wide[:, ::2], wide.T, wide.astype(">i4"), np.asfortranarray(wide)):
        assert np.array_equal(unpack(pack(array)), array)


def test_scalars_of_numpy():
    message = pack([np.float32(1.5), np.int64(-3), np.bool_(True)])
    values = unpack(message)
    assert values == [1.5, -3, True]
    assert [type(v) for v in values] == [np.float32, np.int64, np.bool_]


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {1: 2},
        {1, 2},
        np.array(["text"]),
        np.array([object()]),
        np.zeros(2, np.complex64),
        np.zeros(2, "datetime64[s]"),
        np.zeros((1,) * 9),
        2**70,
    ],
)
def test_what_cannot_be_sent(value):
    with pytest.raises(MessageError):
        pack({"value": value})


def array(**changes) -> bytes:
    entries = {
        b"__ndarray__": True,
        b"data": b"\0" * 8,
        b"dtype": "<f4",
        b"shape": [2],
    }
    entries.update({name.encode(): value for name, value in changes.items()})
    return msgpack.packb({k: v for k, v in entries.items() if v is not ...})


@pytest.mark.parametrize(
    ("message", "match"),
    [
        (b"", "no msgpack"),
        (b"\xc1", "no msgpack"),
        (pack({"a": np.zeros(9)})[:-1], "no msgpack"),
        (pack([1]) + b"\0", "extra data"),
        (b"\x91" * 3_000, "no msgpack"),
        (b"\xdd\xff\xff\xff\xff", "no msgpack"),
        (b"\xdf\xff\xff\xff\xff", "no msgpack"),
        (b"\xa2\xff\xfe", "no msgpack"),
        (msgpack.packb({1: 2}), "no msgpack"),
        (msgpack.packb(msgpack.ExtType(5, b"x")), "extension"),
        (msgpack.packb(msgpack.Timestamp(1)), "extension"),
        (msgpack.packb({"a": [msgpack.Timestamp(1)]}), "extension"),
        (msgpack.packb({"a": b"\0" * 70_000, "b": msgpack.Timestamp(1)}), "extension"),
        (array(dtype="|O"), "dtype"),
        (array(dtype="<M8[s]"), "dtype"),
        (array(dtype=">f4"), "dtype"),
        (array(dtype=["<f4"]), "dtype"),
        (array(dtype=...), "dtype"),
        (array(shape=[3]), "takes 12 bytes; this one has 8"),
        (array(shape=[-2]), "shape"),
        (array(shape=[True, 2]), "shape"),
        (array(shape=[1] * 9), "shape"),
        (array(shape=2), "shape"),
        (array(shape=...), "shape"),
        (array(shape=[2**31, 2**31, 2**31]), "takes"),
        (array(data="\0" * 8), "not bytes"),
        (array(data=...), "not bytes"),
        (array(data=b"\2\0", dtype="|b1"), "bool"),
        (msgpack.packb({b"__npgeneric__": 1, b"dtype": "|u1", b"data": 300}), "300"),
        (msgpack.packb({b"__npgeneric__": 1, b"dtype": "<f4", b"data": "1"}), "number"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_no_message(message, match):
    with pytest.raises(MessageError, match=match):
        unpack(message)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64), st.integers(0, 200), st.integers(0, 255))
def test_whatever_arrives_is_read_or_refused(noise, place, byte):
    good = bytearray(pack({"a": np.arange(9.0), "b": [1, "x"], "c": {"d": None}}))
    good[place % len(good)] = byte
    for message in (noise, bytes(good), bytes(good[:place])):
        try:
            unpack(message)
        except MessageError as error:
            assert str(error)


# ---------------------------------------------------------------------- metadata
def test_names_on_the_wire():
    names = {
        ("observation", "image"): "observation/image",
        "observation": "observation",
        "language_instruction": "prompt",
        ("a", "b", "c"): "a/b/c",
    }
    for key, name in names.items():
        assert wire_name(key) == name and key_of(name) == key
    assert wire_name((("observation",), "image")) == "observation/image"
    with pytest.raises(ValueError, match="'/'"):
        wire_name("observation/image")


def test_metadata_there_and_back():
    info = TeacherInfo(
        protocol="torchrl_rpd/1",
        model="octo",
        action_dim=7,
        image_size=(256, 320),
        image_layouts=("HWC", "CHW"),
        batch=True,
        request_keys=("observation/image", "prompt"),
        deterministic=False,
    )
    sent = unpack(pack(info.to_metadata()))
    assert sent["image_size"] == [256, 320] and "action_horizon" not in sent
    assert TeacherInfo.from_metadata(sent) == info


def test_metadata_of_other_servers():
    plain = TeacherInfo.from_metadata({})
    assert plain == TeacherInfo() and not plain.batch and plain.action_dim is None
    # what examples/servers/octo_jax_server.py sends
    octo = TeacherInfo.from_metadata(
        {
            "server": "octo_jax_server/1",
            "model": "hf://rail-berkeley/octo-small-1.5",
            "action_dim": 7,
            "action_horizon": 4,
            "action_convention": "un-normalised, gripper as the model gives it",
            "image_size": 256,
            "batch": True,
            "something": "else",
        }
    )
    assert octo.image_size == (256, 256) and octo.batch and octo.protocol is None


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ([1], "sent list"),
        ({"protocol": "torchrl_rpd/2"}, "torchrl_rpd/2.*torchrl_rpd/1"),
        ({"protocol": 1}, "torchrl_rpd/1"),
        ({"action_dim": "7"}, "action_dim='7'; expected a number"),
        ({"action_dim": True}, "action_dim"),
        ({"action_horizon": 0}, "action_horizon"),
        ({"model": 3}, "model='3'; expected text"),
        ({"image_size": [1, 2, 3]}, "image_size"),
        ({"image_size": [224, "x"]}, "image_size"),
        ({"image_layouts": ["CHW"]}, "image_layouts"),
        ({"image_layouts": "HWC"}, "image_layouts"),
        ({"batch": 1}, "batch='1'; expected True or False"),
        ({"request_keys": [1]}, "request_keys"),
        ({"history_window": -1}, "history_window"),
    ],
    ids=str,
)
def test_metadata_that_are_none(metadata, match):
    with pytest.raises(TeacherMismatch, match=match):
        TeacherInfo.from_metadata(metadata)


if __name__ == "__main__":
    pytest.main([__file__])
