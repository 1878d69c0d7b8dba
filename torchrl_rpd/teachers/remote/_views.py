# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Reads a long message whose arrays stay where they are.

msgpack copies every piece of bytes out of a message. For pictures, that is the largest
cost of reading: new memory has to come from the system each time. Here the few maps
around them are read step by step, msgpack reads whatever else is in them, and the
arrays' bytes become views of the message.
"""

from __future__ import annotations

from typing import Any

__all__ = ["LONG", "read_long"]

# From which length of a message on it is worth the steps (each some microseconds).
LONG = 2**19
_ARRAY, _DATA = b"__ndarray__", b"data"
# A message is a map of entries, of which arrays are maps; deeper, msgpack reads on.
_LEVELS = 2
_SMALL = 4_096


def read_long(message: bytes | memoryview, msgpack: Any, **reading: Any) -> Any:
    """The content of a message, as msgpack reads it, but for the arrays' bytes.

    Args:
        message (bytes or memoryview): one msgpack object.
        msgpack (module): the package.
        **reading: options of :class:`msgpack.Unpacker`; its ``object_hook`` finds a
            memoryview under ``b"data"`` of long maps with an entry ``b"__ndarray__"``.

    Raises:
        Exception: of various kinds, if it is no such message.

    Examples:
        >>> import msgpack
        >>> image = {b"__ndarray__": True, b"data": bytes(70000)}
        >>> message = msgpack.packb({"image": image})
        >>> read = read_long(message, msgpack, object_hook=lambda entries: entries)
        >>> type(read["image"][b"data"]).__name__
        'memoryview'
    """
    reader = _Reader(memoryview(message), msgpack, reading)
    content = reader.read(_LEVELS)
    reader.finish()
    return content


class _Reader:
    def __init__(self, view: memoryview, msgpack: Any, reading: dict[str, Any]) -> None:
        self._view, self._at = view, 0
        self._msgpack, self._reading = msgpack, reading

    def finish(self) -> None:
        if self._at != len(self._view):
            raise ValueError(f"{len(self._view) - self._at} bytes too many.")

    def read(self, levels: int) -> Any:
        head = self._view[self._at]
        if not levels or not 0x80 <= head <= 0x8F:  # a map of at most 15 entries
            return self._other()
        self._at += 1
        entries: dict[Any, Any] = {}
        for _ in range(head & 0x0F):
            key = self._other()
            if not isinstance(key, str | bytes):
                raise ValueError(f"A map's key that is {type(key).__name__}.")
            if key == _DATA and self._view[self._at] == 0xC6:  # bytes, 2**32 at most
                entries[key] = self._bytes()
            else:
                entries[key] = self.read(levels - 1)
        if _ARRAY not in entries and isinstance(entries.get(_DATA), memoryview):
            entries[_DATA] = bytes(entries[_DATA])
        return self._reading["object_hook"](entries)

    def _bytes(self) -> memoryview:
        start = self._at + 5
        stop = start + int.from_bytes(self._view[self._at + 1 : start], "big")
        if stop > len(self._view):
            raise ValueError("It ends too early.")
        self._at = stop
        return self._view[start:stop]

    def _other(self) -> Any:
        """Whatever comes next; long only where it is no array."""
        rest = len(self._view) - self._at
        for size in (min(_SMALL, rest), rest):
            unpacker = self._msgpack.Unpacker(
                read_size=_SMALL,  # is allocated at once
                max_buffer_size=max(_SMALL, size),
                **self._reading,
            )
            unpacker.feed(self._view[self._at : self._at + size])
            try:
                content = unpacker.unpack()
            except self._msgpack.OutOfData:
                continue
            self._at += unpacker.tell()
            return content
        raise ValueError("It ends too early.")
