# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One websocket to a server, from the handshake to its end."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from torchrl_rpd.teachers._hub import require
from torchrl_rpd.teachers.remote._errors import TeacherMismatch
from torchrl_rpd.teachers.remote._info import TeacherInfo
from torchrl_rpd.teachers.remote._messages import MessageError, unpack

__all__ = ["Connection", "Refused", "check_address", "transient_errors"]

Message = Sequence[bytes | memoryview]

# What a server may send at once. Answers are small: 4096 chunks of 50 actions of 32
# entries are 26 MB.
_MAX_ANSWER_BYTES = 2**26
_CLOSE_TIMEOUT = 1.0
# What websockets masks, copies and sends at once. Pieces of this size stay in the
# processor's cache, and the server reads one while the next is being masked: 128
# pictures take a third of the time of a single frame (benchmarks/remote_teacher.py).
_FRAGMENT_BYTES = 2**19


class Refused(ConnectionError):
    """The server answered the handshake, with no: asking again does not help."""


def check_address(address: str) -> str:
    """The address, if it is one of a websocket.

    Raises:
        ValueError: if it is not.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("ws", "wss") or not parts.hostname:
        raise ValueError(
            f"{address!r} is no address of a websocket; expected 'ws://host:port', or "
            "'wss://host:port' for an encrypted one."
        )
    return address


def transient_errors() -> tuple[type[Exception], ...]:
    """What a lost, slow or absent server causes."""
    _client()
    from websockets.exceptions import WebSocketException

    return OSError, EOFError, WebSocketException


def _client() -> Any:
    return require("websockets.sync.client", extra="remote")


class Connection:
    """A connection whose server has said what it serves.

    Args:
        address (str): ``"ws://host:port"``.

    Keyword Args:
        token (str, optional): sent as ``Authorization: Bearer``.
        connect_timeout (float): seconds for the connection, and again for the metadata.
        timeout (float): seconds for each answer.

    Raises:
        Refused: if the server answers with an HTTP error of the client (4xx).
        TeacherMismatch: if what it says first is no metadata.
    """

    def __init__(
        self, address: str, *, token: str | None, connect_timeout: float, timeout: float
    ) -> None:
        from websockets.exceptions import InvalidStatus

        # A proxy that is set for the outside does not know this machine.
        proxy: dict[str, Any] = {"proxy": None} if _is_loopback(address) else {}
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            self._socket = _client().connect(
                address,
                additional_headers=headers,
                # Pixels and floats hardly shrink, and take long to.
                compression=None,
                max_size=_MAX_ANSWER_BYTES,
                open_timeout=connect_timeout,
                close_timeout=_CLOSE_TIMEOUT,
                # Plain OpenPI servers answer no pings while the model computes; a
                # server that hangs is noticed by the timeout of the request.
                ping_interval=None,
                **proxy,
            )
        except InvalidStatus as error:
            status = error.response.status_code
            if status in (401, 403):
                raise Refused(
                    f"it refuses {'the token' if token else 'a client without token='} "
                    f"(HTTP {status})"
                ) from error
            if 400 <= status < 500:
                raise Refused(f"it answers HTTP {status} to a websocket") from error
            raise
        # (needed by websockets from 17.1 on, harmless before)
        self._socket.__enter__()
        self._timeout = timeout
        try:
            # Sending may block as well, on a server that does not read.
            self._socket.socket.settimeout(timeout)
            self.info = self._read_metadata(connect_timeout)
        except BaseException:
            self.drop()
            raise

    def _read_metadata(self, timeout: float) -> TeacherInfo:
        first = self._receive(timeout, "metadata")
        if isinstance(first, str):
            raise TeacherMismatch(
                "A server says first what it serves, in a binary message; this one "
                f"sent the text {first[:200]!r}."
            )
        try:
            metadata = unpack(first)
        except MessageError as error:
            raise TeacherMismatch(
                f"What the server sent first is no metadata of a teacher: {error}"
            ) from error
        return TeacherInfo.from_metadata(metadata)

    @property
    def alive(self) -> bool:
        """Whether nothing is known to have ended it."""
        from websockets.protocol import State

        return self._socket.protocol.state is State.OPEN

    def exchange(self, messages: Sequence[Message], *, depth: int) -> Iterator[Any]:
        """Sends requests, at most ``depth`` ahead, and yields their answers in order.

        A generator that is not exhausted leaves answers on their way: the connection is
        then to be dropped.

        Raises:
            TimeoutError: if an answer does not come in time, counted from the answer
                before it (servers work on one request after another).
        """
        from websockets.exceptions import ConnectionClosed

        sent = 0
        for received in range(len(messages)):
            while sent < min(len(messages), received + depth):
                try:
                    self._socket.send(_fragments(messages[sent]))
                except ConnectionClosed:
                    # What the server answered before it left is here: it is read
                    # first, and what comes after that raises.
                    depth = 0
                    break
                sent += 1
            yield self._receive(self._timeout, "answer")

    def _receive(self, timeout: float, what: str) -> str | bytes:
        try:
            message: str | bytes = self._socket.recv(timeout)
        except TimeoutError as error:
            raise TimeoutError(f"no {what} within {timeout:g} s") from error
        return message

    def close(self) -> None:
        """Says goodbye."""
        with contextlib.suppress(Exception):
            self._socket.close()

    def drop(self) -> None:
        """Ends it at once, whatever the server does."""
        with contextlib.suppress(OSError):
            self._socket.socket.shutdown(socket.SHUT_RDWR)
        self.close()


def _fragments(message: Message) -> bytes | Iterator[memoryview]:
    """What to send a message as: pictures are not copied to be joined."""
    if sum(len(part) for part in message) <= _FRAGMENT_BYTES:
        return b"".join(message)
    return (
        memoryview(part)[start : start + _FRAGMENT_BYTES]
        for part in message
        for start in range(0, len(part), _FRAGMENT_BYTES)
    )


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
