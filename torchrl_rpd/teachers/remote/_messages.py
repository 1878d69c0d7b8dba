# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The messages of OpenPI's policy protocol: msgpack with NumPy arrays, without pickle.

Written as ``openpi_client.msgpack_numpy`` writes them and read more strictly: a message
comes from the network, and whatever it holds, reading it either gives plain values and
arrays of numbers or raises a :class:`MessageError`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sized
from typing import Any

import numpy as np

from torchrl_rpd.teachers._hub import require
from torchrl_rpd.teachers.remote._views import LONG, read_long

__all__ = ["MessageError", "pack", "pack_parts", "unpack"]

_MAX_NDIM = 8
# Lists hold the prompts of a batch; nested lists that announce more than they hold would
# otherwise take many times the memory of the message.
_MAX_LIST, _MAX_MAP = 16_384, 1_024
# All entries of all lists and maps: an empty list is one byte of a message and sixty of
# memory, so that a message of a few megabytes could take gigabytes and minutes.
_MAX_ENTRIES = 65_536
_KINDS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
# "<f4" and the like: little-endian, as every machine that runs this writes them.
_DTYPES = {np.dtype(f"<{kind}").str: np.dtype(f"<{kind}") for kind in _KINDS}
# Shorter pieces are joined, longer ones are handed on as views of the arrays.
_SHORT = 4_096


class MessageError(ValueError):
    """Bytes that are no message, or an object that no message can hold.

    Examples:
        >>> from torchrl_rpd.teachers.remote import MessageError
        >>> issubclass(MessageError, ValueError)
        True
    """


def pack(obj: Any) -> bytes:
    """One message.

    Args:
        obj: None, bool, int, float, str, bytes, NumPy arrays and scalars (bool, integers
            and floats of 2 to 8 bytes), and lists, tuples and dicts with str keys of
            these.

    Raises:
        MessageError: if it holds something else.

    Examples:
        >>> import numpy as np
        >>> message = pack({"actions": np.zeros((2, 1, 7), np.float32), "prompt": "push"})
        >>> unpack(message)["actions"].shape
        (2, 1, 7)
    """
    return b"".join(pack_parts(obj))


def pack_parts(obj: Any) -> list[bytes | memoryview]:
    """:func:`pack` in pieces, of which the long ones are views of the arrays.

    Args:
        obj: see :func:`pack`. Contiguous arrays are not copied: they must not change
            before the pieces were used.

    Examples:
        >>> import numpy as np
        >>> image = np.zeros((64, 64, 3), np.uint8)
        >>> [type(part).__name__ for part in pack_parts({"image": image})]
        ['bytes', 'memoryview']
    """
    msgpack = require("msgpack", extra="remote")
    writer = _Writer(msgpack.Packer())
    try:
        writer.write(obj)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, MessageError):
            raise
        raise MessageError(f"This cannot be sent: {error}") from error
    return writer.finish()


def unpack(message: bytes | memoryview) -> Any:
    """The content of a message.

    Args:
        message (bytes): what :func:`pack` or ``openpi_client.msgpack_numpy`` wrote.

    Returns:
        plain values; arrays are read-only views of bytes, of a long message its own.

    Raises:
        MessageError: if it is no such message, whatever it is.

    Examples:
        >>> unpack(pack({"prompt": ["push", "pull"]}))
        {'prompt': ['push', 'pull']}
    """
    msgpack = require("msgpack", extra="remote")
    entries = _Entries(msgpack.Timestamp)
    reading: dict[str, Any] = {
        "object_hook": entries.read_map,
        "list_hook": entries.read_list,
        "ext_hook": _refuse_extension,
        "max_array_len": _MAX_LIST,
        "max_map_len": _MAX_MAP,
    }
    try:
        if len(message) >= LONG:
            content = read_long(message, msgpack, **reading)
        else:
            content = msgpack.unpackb(message, **reading)
        entries.check([content])
        return content
    except MessageError:
        raise
    except Exception as error:  # msgpack's own, and those of Unicode and recursion
        what = str(error) or type(error).__name__
        raise MessageError(f"This is no msgpack message: {what}") from error


class _Writer:
    def __init__(self, packer: Any) -> None:
        self._packer = packer
        self._parts: list[bytes | memoryview] = []
        self._open = bytearray()

    def finish(self) -> list[bytes | memoryview]:
        if self._open:
            self._parts.append(bytes(self._open))
            self._open = bytearray()
        return self._parts

    def write(self, obj: Any) -> None:
        if isinstance(obj, np.ndarray):
            self._write_array(obj)
        elif isinstance(obj, np.generic):
            self._check(obj.dtype)
            entries = {b"data": obj.item(), b"dtype": obj.dtype.str}
            self.write({b"__npgeneric__": True, **entries})
        elif isinstance(obj, dict):
            self._open += self._packer.pack_map_header(len(obj))
            for key, value in obj.items():
                if not isinstance(key, str | bytes):
                    raise MessageError(f"The key {key!r} is no text.")
                self._open += self._packer.pack(key)
                self.write(value)
        elif isinstance(obj, list | tuple):
            self._open += self._packer.pack_array_header(len(obj))
            for value in obj:
                self.write(value)
        else:
            self._open += self._packer.pack(obj)

    def _write_array(self, array: np.ndarray) -> None:
        self._check(array.dtype)
        if array.ndim > _MAX_NDIM:
            raise MessageError(f"An array of {array.ndim} dimensions.")
        array = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
        entries: dict[bytes, Any] = {
            b"__ndarray__": True,
            b"dtype": array.dtype.str,
            b"shape": list(array.shape),
        }
        # The data comes last, behind a header of its own: a view, not a copy.
        self._open += self._packer.pack_map_header(4)
        for key, value in entries.items():
            self._open += self._packer.pack(key)
            self._open += self._packer.pack(value)
        self._open += self._packer.pack(b"data")
        self._open += b"\xc6" + array.nbytes.to_bytes(4, "big")  # bin 32
        data = array.reshape(-1).view(np.uint8).data
        if len(data) < _SHORT:
            self._open += data
        else:
            self.finish()
            self._parts.append(data)

    @staticmethod
    def _check(dtype: np.dtype) -> None:
        if dtype.newbyteorder("<").str not in _DTYPES:
            raise MessageError(f"Arrays of {dtype} cannot be sent.")


class _Entries:
    """Looks at what a message holds while it is read, and stops when it is too much.

    Args:
        timestamp (type): msgpack's, an extension that it reads without asking.
    """

    def __init__(self, timestamp: type) -> None:
        self._left = _MAX_ENTRIES
        self._timestamp = timestamp

    def read_list(self, values: list[Any]) -> list[Any]:
        self._count(values)
        self.check(values)
        return values

    def read_map(self, values: dict[Any, Any]) -> Any:
        self._count(values)
        self.check(values.values())
        return _read(values)

    def check(self, values: Iterable[Any]) -> None:
        """Refuses time stamps."""
        if self._timestamp in map(type, values):
            _refuse_extension(-1, b"")

    def _count(self, values: Sized) -> None:
        self._left -= 1 + len(values)
        if self._left < 0:
            raise MessageError(
                f"Lists and maps of more than {_MAX_ENTRIES} entries together."
            )


def _read(entries: dict[Any, Any]) -> Any:
    if b"__ndarray__" in entries:
        return _read_array(entries)
    if b"__npgeneric__" in entries:
        return _read_scalar(entries)
    return entries


def _read_array(entries: dict[Any, Any]) -> np.ndarray:
    dtype = _read_dtype(entries)
    shape, data = entries.get(b"shape"), entries.get(b"data")
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_NDIM
        or not all(type(size) is int and 0 <= size < 2**32 for size in shape)
    ):
        raise MessageError(
            f"An array of shape {str(shape)[:80]}; expected at most {_MAX_NDIM} sizes."
        )
    if isinstance(data, memoryview) and (dtype.itemsize > 1 or dtype.kind == "b"):
        data = bytes(data)  # whose numbers may start anywhere
    if not isinstance(data, bytes | memoryview):
        raise MessageError(f"An array whose data are {type(data).__name__}, not bytes.")
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise MessageError(
            f"An array {shape} of {dtype} takes {expected} bytes; this one has "
            f"{len(data)}."
        )
    if dtype.kind == "b" and bytes(data).strip(b"\0\1"):
        raise MessageError("An array of bool holds bytes other than 0 and 1.")
    return np.frombuffer(data, dtype).reshape(shape)


def _read_scalar(entries: dict[Any, Any]) -> np.generic:
    dtype, value = _read_dtype(entries), entries.get(b"data")
    if not isinstance(value, bool | int | float):
        raise MessageError(f"A number that is {type(value).__name__}.")
    scalar: np.generic = dtype.type(value)
    return scalar


def _read_dtype(entries: dict[Any, Any]) -> np.dtype:
    name = entries.get(b"dtype")
    dtype = _DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise MessageError(
            f"An array of dtype {str(name)[:80]!r}; expected one of {list(_DTYPES)}."
        )
    return dtype


def _refuse_extension(code: int, data: bytes) -> Any:
    raise MessageError(f"A msgpack extension (type {code}), which is not used.")
