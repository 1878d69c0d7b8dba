# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""TFRecord files of ``tf.train.Example``, without TensorFlow.

A record is framed as its length (8 bytes, little endian), a masked CRC-32C of that
(4 bytes), the data, and a masked CRC-32C of the data; see TensorFlow's
``core/lib/io/record_writer.h`` and ``core/example/feature.proto``. TensorFlow itself
would be half a gigabyte for these lines; the checksum and the messages are
google-crc32c's and protobuf's work.
"""

from __future__ import annotations

import functools
import importlib
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from torchrl_rpd.data._hdf5 import BrokenEpisode

_LENGTH = struct.Struct("<Q")
_CRC = struct.Struct("<I")
# No episode comes near it; a damaged length must not ask for all the memory.
_LONGEST_RECORD = 2**31 - 1

Values = np.ndarray | list[bytes]


def require(name: str) -> Any:
    """A module of the extra ``rlds``, or an error that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(
            f"RLDS data sets need {name.replace('_', '-')}: "
            "pip install 'torchrl_rpd[rlds]'"
        ) from None


def masked_crc(data: bytes) -> int:
    """TensorFlow's masked CRC-32C."""
    crc: int = require("google_crc32c").value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def write_record(file: BinaryIO, data: bytes) -> None:
    """Appends one record."""
    length = _LENGTH.pack(len(data))
    file.write(length + _CRC.pack(masked_crc(length)))
    file.write(data + _CRC.pack(masked_crc(data)))


def read_records(path: Path) -> Iterator[bytes | BrokenEpisode]:
    """The records of a file.

    A record whose data are damaged is reported and the next one follows; where a length
    is damaged or the file ends too early, the rest is lost, which is reported once.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        while head := file.read(12):
            if len(head) < 12:
                yield BrokenEpisode("truncated shard", path.name)
                return
            (length,) = _LENGTH.unpack(head[:8])
            if _CRC.unpack(head[8:])[0] != masked_crc(head[:8]):
                yield BrokenEpisode("damaged shard", f"{path.name}: a record's length")
                return
            if length > min(_LONGEST_RECORD, size - file.tell() - 4):
                yield BrokenEpisode("truncated shard", path.name)
                return
            data = file.read(length)
            if _CRC.unpack(file.read(4))[0] != masked_crc(data):
                yield BrokenEpisode("damaged record", f"{path.name}: its checksum")
                continue
            yield data


@functools.cache
def _example_class() -> Any:
    """``tf.train.Example``: named lists of bytes, floats or integers."""
    require("google.protobuf")
    descriptor = importlib.import_module("google.protobuf.descriptor_pb2")
    pool = importlib.import_module("google.protobuf.descriptor_pool")
    factory = importlib.import_module("google.protobuf.message_factory")
    field = descriptor.FieldDescriptorProto
    file = descriptor.FileDescriptorProto(
        name="torchrl_rpd/example.proto", package="torchrl_rpd", syntax="proto3"
    )

    def message(name: str, *fields: tuple[Any, ...], parent: Any = file) -> Any:
        lists = parent.message_type if parent is file else parent.nested_type
        new = lists.add(name=name)
        for number, (label, kind, entry, type_name) in enumerate(fields, 1):
            new.field.add(
                name=entry,
                number=number,
                label=label,
                type=kind,
                type_name=type_name and f".torchrl_rpd.{type_name}",
            )
        return new

    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    inner = field.TYPE_MESSAGE
    message("BytesList", (many, field.TYPE_BYTES, "value", None))
    message("FloatList", (many, field.TYPE_FLOAT, "value", None))
    message("Int64List", (many, field.TYPE_INT64, "value", None))
    feature = message(
        "Feature",
        (one, inner, "bytes_list", "BytesList"),
        (one, inner, "float_list", "FloatList"),
        (one, inner, "int64_list", "Int64List"),
    )
    feature.oneof_decl.add(name="kind")
    for entry in feature.field:
        entry.oneof_index = 0
    features = message("Features", (many, inner, "feature", "Features.FeatureEntry"))
    pair = message(
        "FeatureEntry",
        (one, field.TYPE_STRING, "key", None),
        (one, inner, "value", "Feature"),
        parent=features,
    )
    pair.options.map_entry = True
    message("Example", (one, inner, "features", "Features"))
    found = pool.DescriptorPool()
    found.Add(file)
    return factory.GetMessageClass(found.FindMessageTypeByName("torchrl_rpd.Example"))


def encode_example(values: Mapping[str, Values]) -> bytes:
    """A serialized ``tf.train.Example``: floats, integers (bools too) or bytes by name."""
    example = _example_class()()
    for name, value in values.items():
        feature = example.features.feature[name]
        if isinstance(value, list):
            feature.bytes_list.value.extend(value)
        elif value.dtype.kind == "f":
            feature.float_list.value.extend(value.ravel().tolist())
        else:
            feature.int64_list.value.extend(value.ravel().astype(np.int64).tolist())
    data: bytes = example.SerializeToString(deterministic=True)
    return data


def decode_example(data: bytes) -> dict[str, Values]:
    """What :func:`encode_example` was given, arrays flat."""
    message = importlib.import_module("google.protobuf.message")
    example = _example_class()()
    try:
        example.ParseFromString(data)
    except message.DecodeError as error:
        raise BrokenEpisode("no Example", str(error)) from None
    out: dict[str, Values] = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        if kind == "bytes_list":
            out[name] = list(feature.bytes_list.value)
        elif kind == "float_list":
            out[name] = np.array(feature.float_list.value, np.float32)
        elif kind == "int64_list":
            out[name] = np.array(feature.int64_list.value, np.int64)
    return out
