# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Small servers of OpenPI's protocol that do as they are told, also what they should not.

They have nothing in common with the package: messages are written and read here by
msgpack alone. As a script (``python remote_servers.py PORT``) one that can be killed.
"""

from __future__ import annotations

import contextlib
import http
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import serve

METADATA: dict[str, Any] = {
    "protocol": "torchrl_rpd/1",
    "server": "fake 1",
    "model": "fake",
    "action_dim": 2,
    "action_horizon": 3,
    "action_convention": "metres",
    "batch": True,
    "request_keys": ["observation"],
}
# What a server may do instead of answering.
HANG, CLOSE = object(), object()


def _encode(value: Any) -> Any:
    assert isinstance(value, np.ndarray), type(value)
    return {
        b"__ndarray__": True,
        b"data": value.tobytes(),
        b"dtype": value.dtype.str,
        b"shape": value.shape,
    }


def _decode(value: dict) -> Any:
    if b"__ndarray__" not in value:
        return value
    array = np.frombuffer(value[b"data"], np.dtype(value[b"dtype"]))
    return array.reshape(value[b"shape"])


def pack(value: Any) -> bytes:
    return msgpack.packb(value, default=_encode)


def unpack(message: bytes) -> Any:
    return msgpack.unpackb(message, object_hook=_decode)


def back(request: dict) -> dict:
    """Entry ``h`` of a chunk is minus the first two observed numbers, over ``h + 1``."""
    first = -request["observation"][..., None, :2]
    steps = np.arange(1, 4, dtype=np.float32)[:, None]
    return {"actions": (first / steps).astype(np.float32)}


class FakeServer:
    """Serves from threads of this process.

    ``answer(request)`` gives an answer (its ``request_id`` is added), a text for an
    error, bytes to be sent as they are, ``HANG`` or ``CLOSE``. ``session(socket)``
    replaces the whole conversation after the metadata. ``first`` is sent instead of
    them, nothing at all for ``HANG``.
    """

    def __init__(
        self,
        answer: Callable[[dict], Any] = back,
        metadata: dict | None = None,
        *,
        session: Callable[[Any], None] | None = None,
        first: Any = None,
        token: str | None = None,
        port: int = 0,
    ) -> None:
        self.answer = answer
        self.session = session or self._converse
        self.first: Any = pack(METADATA if metadata is None else metadata)
        if first is not None:
            self.first = first
        self.token = token
        self.requests: list[dict] = []
        self.connections: list[Any] = []
        self._over = threading.Event()
        self._server = serve(
            self._connected,
            "127.0.0.1",
            port,
            compression=None,
            max_size=None,
            process_request=self._check,
        )
        self.port = self._server.socket.getsockname()[1]
        self.address = f"ws://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def _check(self, connection: Any, request: Any) -> Any:
        sent = request.headers.get("Authorization")
        if self.token is not None and sent != f"Bearer {self.token}":
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "No.\n")
        return None

    def _connected(self, connection: Any) -> None:
        self.connections.append(connection)
        with contextlib.suppress(ConnectionClosed):
            if self.first is HANG:
                self._over.wait(30)
                return
            connection.send(self.first)
            self.session(connection)

    def _converse(self, connection: Any) -> None:
        for message in connection:
            request = unpack(message)
            self.requests.append(request)
            answer = self.answer(request)
            if answer is HANG:
                self._over.wait(30)
                return
            if answer is CLOSE:
                self._cut(connection)
                return
            if isinstance(answer, dict):
                if "request_id" in request:
                    answer = {"request_id": request["request_id"], **answer}
                answer = pack(answer)
            connection.send(answer)

    @staticmethod
    def _cut(connection: Any) -> None:
        with contextlib.suppress(OSError):
            connection.socket.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """As if it had been killed: no goodbye."""
        self._over.set()
        self._server.shutdown()
        self._thread.join()
        for connection in self.connections:
            self._cut(connection)

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *args: object) -> None:
        self.stop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@contextlib.contextmanager
def server_process(port: int, *arguments: str) -> Iterator[subprocess.Popen]:
    """This file as a process, listening; ``hang`` as an argument: it never answers."""
    command = [sys.executable, __file__, str(port), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    never = len(sys.argv) > 2

    def act(request: dict) -> Any:
        if not never:
            return back(request)
        print("asked", flush=True)
        return HANG

    FakeServer(act, port=int(sys.argv[1]))
    print("ready", flush=True)
