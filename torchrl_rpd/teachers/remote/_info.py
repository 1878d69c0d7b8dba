# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How a served teacher describes itself, and what its entries are called on the wire."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tensordict import unravel_key
from tensordict.utils import NestedKey

from torchrl_rpd.teachers.remote._errors import TeacherMismatch

__all__ = ["PROMPT", "PROTOCOL", "TeacherInfo", "key_of", "wire_name"]

PROTOCOL = "torchrl_rpd/1"
# OpenPI's name of the instruction, and ours.
PROMPT = "prompt"
_INSTRUCTION = "language_instruction"
IMAGE_LAYOUTS = ("HWC", "CHW")


def wire_name(key: NestedKey) -> str:
    """What an entry of a tensordict is called in a message.

    Examples:
        >>> wire_name(("observation", "image")), wire_name("language_instruction")
        ('observation/image', 'prompt')
    """
    key = unravel_key(key)
    parts = (key,) if isinstance(key, str) else key
    if any("/" in part for part in parts):
        raise ValueError(f"The key {key!r} holds a '/', which joins keys in a message.")
    return PROMPT if key == _INSTRUCTION else "/".join(parts)


def key_of(name: str) -> NestedKey:
    """The inverse of :func:`wire_name`.

    Examples:
        >>> key_of("observation/image"), key_of("prompt"), key_of("observation")
        (('observation', 'image'), 'language_instruction', 'observation')
    """
    if name == PROMPT:
        return _INSTRUCTION
    return unravel_key(tuple(name.split("/")))


@dataclasses.dataclass(frozen=True)
class TeacherInfo:
    """The metadata that a server sends on connection.

    None where the server does not say: a plain OpenPI server may send an empty map.

    Attributes:
        protocol: ``"torchrl_rpd/1"`` from our server.
        server: its name and version.
        model: what answers, for people and for telling two servers apart.
        action_dim: ``A``, entries of an action.
        action_horizon: ``H``, actions of a chunk.
        action_convention: free text, e.g. ``"un-normalised, gripper in [0, 1]"``.
        image_size: height and width that images must have; None for any.
        image_layouts: ``"HWC"``, and ``"CHW"`` where images may be sent like that.
        batch: whether a request may hold several rows.
        max_batch: the most of them.
        request_keys: wire names that a request must hold.
        history_window: how many observations a row holds.
        history_keys: wire names of which it is so.
        writes_std: whether answers hold a standard deviation.
        deterministic: whether the same question has the same answer.
        max_message_bytes: the longest message that the server takes.

    Examples:
        >>> info = TeacherInfo.from_metadata({"model": "octo", "image_size": 256})
        >>> info.image_size, info.batch
        ((256, 256), False)
        >>> TeacherInfo.from_metadata(info.to_metadata()) == info
        True
    """

    protocol: str | None = None
    server: str | None = None
    model: str | None = None
    action_dim: int | None = None
    action_horizon: int | None = None
    action_convention: str | None = None
    image_size: tuple[int, int] | None = None
    image_layouts: tuple[str, ...] = ("HWC",)
    batch: bool = False
    max_batch: int | None = None
    request_keys: tuple[str, ...] | None = None
    history_window: int = 1
    history_keys: tuple[str, ...] = ()
    writes_std: bool = False
    deterministic: bool | None = None
    max_message_bytes: int | None = None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> TeacherInfo:
        """Reads the map of a server; entries of other names are passed over.

        Raises:
            TeacherMismatch: if it speaks another version of the protocol, or if an entry
                is not what its name promises.
        """
        if not isinstance(metadata, Mapping):
            raise TeacherMismatch(
                "A server says what it serves in a map; this one sent "
                f"{type(metadata).__name__}."
            )
        protocol = metadata.get("protocol")
        if protocol is not None and protocol != PROTOCOL:
            raise TeacherMismatch(
                f"The server speaks {protocol!r}, this client {PROTOCOL!r}: install "
                "the same version of torchrl_rpd on both sides."
            )
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value = metadata.get(field.name)
            if value is not None:
                values[field.name] = _READERS[field.name](field.name, value)
        return cls(**values)

    def to_metadata(self) -> dict[str, Any]:
        """The map to send; None is left out."""
        out = {}
        for name, value in vars(self).items():
            if value is not None:
                out[name] = list(value) if isinstance(value, tuple) else value
        return out


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "text", value)
    return value


def _count(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise _wrong(name, "a number of at least 1", value)
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, "True or False", value)
    return value


def _names(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(
        isinstance(v, str) for v in value
    ):
        raise _wrong(name, "a list of texts", value)
    return tuple(value)


def _layouts(name: str, value: Any) -> tuple[str, ...]:
    layouts = _names(name, value)
    if "HWC" not in layouts:
        raise _wrong(name, "a list with 'HWC' and perhaps 'CHW'", value)
    return tuple(layout for layout in IMAGE_LAYOUTS if layout in layouts)


def _size(name: str, value: Any) -> tuple[int, int]:
    sizes = [value, value] if type(value) is int else value
    if not isinstance(sizes, list | tuple) or len(sizes) != 2:
        raise _wrong(name, "[height, width] or one number", value)
    return _count(name, sizes[0]), _count(name, sizes[1])


def _wrong(name: str, expected: str, value: Any) -> TeacherMismatch:
    return TeacherMismatch(
        f"The server's metadata have {name}={str(value)[:80]!r}; expected {expected}."
    )


_READERS = {
    "protocol": _text,
    "server": _text,
    "model": _text,
    "action_dim": _count,
    "action_horizon": _count,
    "action_convention": _text,
    "image_size": _size,
    "image_layouts": _layouts,
    "batch": _flag,
    "max_batch": _count,
    "request_keys": _names,
    "history_window": _count,
    "history_keys": _names,
    "writes_std": _flag,
    "deterministic": _flag,
    "max_message_bytes": _count,
}
