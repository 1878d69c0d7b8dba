# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Serves a teacher over OpenPI's websocket protocol, with a batch dimension."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tensordict import TensorDictBase
from torchrl._utils import logger as torchrl_logger

from torchrl_rpd.teachers._hub import require
from torchrl_rpd.teachers.remote._batcher import (
    Answer,
    Batcher,
    Busy,
    ShuttingDown,
    TeacherRaised,
)
from torchrl_rpd.teachers.remote._gate import Gate, is_loopback
from torchrl_rpd.teachers.remote._info import TeacherInfo, wire_name
from torchrl_rpd.teachers.remote._messages import pack
from torchrl_rpd.teachers.remote._questions import BadRequest, Question, QuestionReader
from torchrl_rpd.teachers.remote._served import ServedTeacher

__all__ = ["TeacherServer"]

# Requests of one connection that are not answered yet. A client that sends more is not
# read from, which fills its own buffers and not ours.
_IN_FLIGHT = 256
_GOING_AWAY = 1001
_MAX_REASON = 1_000  # characters of an error
# Connections that break in the handshake are everyday on a network and not worth a
# traceback each; our own errors are logged where they are caught.
_quiet = logging.getLogger(f"{__name__}.websockets")
_quiet.setLevel(logging.CRITICAL)


class _Asked(NamedTuple):
    """A request that was accepted."""

    question: Question
    answer: asyncio.Future[Answer]


class TeacherServer:
    """Answers questions to a teacher, of many clients at once.

    Speaks OpenPI's websocket policy protocol with a batch dimension, as
    ``docs/remote_protocol.md`` describes; clients are
    :class:`~torchrl_rpd.teachers.remote.RemoteTeacher` and plain ``openpi-client``. The
    rows of all clients are put together into batches for the teacher, which is called
    in one thread of its own. A request that is malformed, or that the teacher raises on,
    is answered with an error that says why; the others and the server live on.

    Nothing of a message is executed: no pickle. ``GET /healthz`` answers ``OK``, ``GET
    /health`` counters as JSON, on the same port.

    Args:
        teacher (callable): any teacher of this package, or another TensorDict module
            that writes ``("vla_action", "chunk")`` ``[n, H, A]`` or has a single out key
            ``[n, A]``; or a function of a tensordict that returns ``[n, A]``. It is
            frozen and put in eval mode.

    Keyword Args:
        host (str): where to listen. Defaults to ``"127.0.0.1"``: this machine only.
        port (int): 0 chooses a free one, see :attr:`port`. Defaults to ``8000``.
        max_batch (int): the most rows in one call of the teacher. Defaults to ``32``.
        max_wait (float): how long, in seconds, a request waits for those of other
            clients while the teacher is idle; nobody waits when every connected client
            has asked. Defaults to ``0.005``.
        max_queue (int): the most rows waiting; a request beyond them is answered with
            ``Busy``. Defaults to ``4096``.
        max_message_bytes (int): of a request; a longer one ends its connection (code
            1009). The queue holds at most four times as much. Defaults to 256 MiB.
        token (str, optional): what clients must send as ``Authorization: Bearer`` (or
            ``Api-Key``). Defaults to ``None``: everybody who can connect may ask.
        model (str, optional): the teacher's name. Defaults to what it calls itself.
        action_dim (int, optional): entries of an action. Defaults to the teacher's
            attribute ``action_dim``.
        action_horizon (int, optional): actions of a chunk. Defaults to the teacher's
            attribute ``chunk_size``.
        action_convention (str, optional): free text, for people.

    Attributes:
        info: the :class:`~torchrl_rpd.teachers.remote.TeacherInfo` that clients get.

    Raises:
        ImportError: if websockets or msgpack are missing.
        OSError: in :meth:`start`, if the port is taken.
        ValueError: for limits below 1, a negative ``max_wait`` or an empty token.

    Examples:
        >>> from torchrl_rpd.teachers import ScriptedTeacher
        >>> from torchrl_rpd.teachers.remote import TeacherServer
        >>> server = TeacherServer(ScriptedTeacher("PickCube-v1"), port=0)
        >>> server.info.request_keys, server.info.action_dim
        (('observation',), 7)
        >>> with server.running():  # in a thread; a process of its own: teachers.serve
        ...     server.address.startswith("ws://127.0.0.1:")
        True
    """

    def __init__(
        self,
        teacher: Callable[[TensorDictBase], Any],
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        max_batch: int = 32,
        max_wait: float = 0.005,
        max_queue: int = 4096,
        max_message_bytes: int = 256 * 2**20,
        token: str | None = None,
        model: str | None = None,
        action_dim: int | None = None,
        action_horizon: int | None = None,
        action_convention: str | None = None,
    ) -> None:
        for package in ("msgpack", "websockets"):
            require(package, extra="remote")
        limits = {
            "max_batch": max_batch,
            "max_queue": max_queue,
            "max_message_bytes": max_message_bytes,
        }
        for name, limit in limits.items():
            if limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}.")
        if max_wait < 0:
            raise ValueError(f"max_wait must be at least 0 seconds, got {max_wait}.")
        self.host = host
        self._port = port
        self._errors: Counter[str] = Counter()
        self._gate = Gate(token, self.health, self._errors)
        self._limits = limits
        self._max_wait = max_wait
        self._teacher = ServedTeacher(
            teacher,
            model=model,
            action_dim=action_dim,
            action_horizon=action_horizon,
            action_convention=action_convention,
        )
        self.info: TeacherInfo = self._teacher.info(
            max_batch=max_batch, max_message_bytes=max_message_bytes
        )
        self._reader = QuestionReader(
            self.info,
            max_rows=max_queue,
            image_names=[wire_name(key) for key in self._teacher.image_keys],
        )
        self._metadata = pack(self.info.to_metadata())
        self._counts: Counter[str] = Counter()
        self._logged: set[tuple[str, ...]] = set()
        self._reading: dict[asyncio.Task[None], Any] = {}  # and its connection
        self._stopping = False
        self._server: Any = None
        self._batcher: Batcher | None = None

    @property
    def port(self) -> int:
        """Where it listens, once started."""
        if self._server is not None and self._server.sockets:
            self._port = self._server.sockets[0].getsockname()[1]
        return self._port

    @property
    def address(self) -> str:
        """What to give a client on this machine."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ws://{host}:{self.port}"

    def health(self) -> dict[str, Any]:
        """What ``GET /health`` answers: the model and counters since the start.

        ``connections`` are those open now, ``requests`` those accepted, ``rows`` and
        ``batches`` those the teacher answered, ``queue_rows`` those that wait, and
        ``errors`` the error answers by class.
        """
        batcher = self._batcher
        rows, batches = (batcher.rows, batcher.batches) if batcher else (0, 0)
        return {
            "model": self.info.model,
            "uptime_s": round(time.monotonic() - self._started, 3) if batcher else 0.0,
            "connections": self._counts["connections"],
            "requests": self._counts["requests"],
            "rows": rows,
            "batches": batches,
            "mean_batch_rows": rows / batches if batches else 0.0,
            "queue_rows": batcher.queue_rows if batcher else 0,
            "errors": dict(self._errors),
        }

    # ------------------------------------------------------------------ life
    async def start(self) -> None:
        """Listens; returns when clients can connect."""
        if self._batcher is not None:
            raise RuntimeError("A TeacherServer is started once; make another one.")
        if self._gate.open and not is_loopback(self.host):
            torchrl_logger.warning(
                f"Serving a teacher on {self.host} without a token: everybody who can "
                "reach this machine can use it. Give token= (--token-file), or listen "
                "on 127.0.0.1."
            )
        serve = require("websockets.asyncio.server", extra="remote").serve
        limit = self._limits["max_message_bytes"]
        self._started = time.monotonic()
        self._batcher = Batcher(
            self._teacher.answer,
            max_batch=self._limits["max_batch"],
            max_wait=self._max_wait,
            max_rows=self._limits["max_queue"],
            max_bytes=4 * limit,
        )
        try:
            self._server = await serve(
                self._connected,
                self.host,
                self._port,
                process_request=self._gate,
                origins=[None],  # no web page of a browser on this machine
                compression=None,
                max_size=limit,
                max_queue=4,  # messages received but not read, each up to the limit
                ping_timeout=60,
                close_timeout=5,
                logger=_quiet,
            )
        except BaseException:
            self._batcher.close(0.0)
            self._batcher = None
            raise

    async def stop(self, timeout: float = 30.0) -> bool:
        """Stops accepting, answers what was accepted, closes connections (code 1001).

        Args:
            timeout (float): seconds after which requests that the teacher has not
                answered get an error instead. Defaults to ``30``.

        Returns:
            whether everything was answered.
        """
        if self._batcher is None:
            return True
        self._stopping = True
        self._server.close(close_connections=False)
        for task in self._reading:
            task.cancel()
        closed = asyncio.ensure_future(self._server.wait_closed())
        await asyncio.wait([closed], timeout=timeout)
        answered = closed.done()
        await asyncio.to_thread(self._batcher.close, 1.0 if answered else 0.0)
        await asyncio.wait([closed], timeout=1.0)  # for the errors to be sent
        for socket in self._reading.values():
            socket.transport.abort()  # it does not read what it is sent
        await closed
        return answered

    async def serve_forever(
        self, *, ready: Callable[[], None] | None = None, timeout: float = 30.0
    ) -> bool:
        """Serves until SIGTERM or SIGINT, then stops.

        Keyword Args:
            ready (callable, optional): called when clients can connect.
            timeout (float): see :meth:`stop`.

        Returns:
            whether everything was answered.
        """
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, stop.set)
        await self.start()
        if ready is not None:
            ready()
        await stop.wait()
        for number in signals:  # the second one ends the process at once
            loop.remove_signal_handler(number)
        return await self.stop(timeout)

    @contextlib.contextmanager
    def running(self, timeout: float = 30.0) -> Iterator[TeacherServer]:
        """Serves from a thread of this process, as long as the context lasts.

        Args:
            timeout (float): see :meth:`stop`.
        """
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever, name="server", daemon=True)
        thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self.start(), loop).result()
            try:
                yield self
            finally:
                asyncio.run_coroutine_threadsafe(self.stop(timeout), loop).result()
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    # ------------------------------------------------------------------ connections
    async def _connected(self, socket: Any) -> None:
        """Serves one client until it leaves or the server stops."""
        self._count_connection(1)
        asked: asyncio.Queue[_Asked | str | None] = asyncio.Queue()
        # Slots are taken before a request is read: a reader that is cancelled has not
        # taken anything from the client that will not be answered.
        slots = asyncio.Semaphore(_IN_FLIGHT)
        tasks = [
            asyncio.create_task(self._read(socket, asked, slots)),
            asyncio.create_task(self._write(socket, asked, slots)),
        ]
        reading, writing = tasks
        self._reading[reading] = socket
        try:
            if self._stopping:
                reading.cancel()
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if reading.cancelled():  # the server stops
                asked.put_nowait(None)
                await asyncio.wait([writing])
                await socket.close(_GOING_AWAY, "the server is shutting down")
        finally:
            del self._reading[reading]
            for task in tasks:
                task.cancel()
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(error, Exception):
                    self._log("A connection failed", error)
            while not asked.empty():
                if isinstance(left := asked.get_nowait(), _Asked):
                    left.answer.cancel()
            self._count_connection(-1)

    def _count_connection(self, change: int) -> None:
        assert self._batcher is not None
        self._counts["connections"] += change
        self._batcher.sources = max(1, self._counts["connections"])
        self._batcher.poke()

    async def _read(self, socket: Any, asked: asyncio.Queue[Any], slots: Any) -> None:
        from websockets.exceptions import ConnectionClosed

        with contextlib.suppress(ConnectionClosed):
            while True:
                await slots.acquire()
                message = await socket.recv()
                asked.put_nowait(self._accept(message, socket))

    async def _write(self, socket: Any, asked: asyncio.Queue[Any], slots: Any) -> None:
        from websockets.exceptions import ConnectionClosed

        with contextlib.suppress(ConnectionClosed):
            await socket.send(self._metadata)
            while (item := await asked.get()) is not None:
                await socket.send(await self._reply(item))
                slots.release()

    def _accept(self, message: bytes | str, socket: Any) -> _Asked | str:
        """Queues a request; the reason where it is refused."""
        assert self._batcher is not None
        try:
            question = self._reader.read(message)
            future = self._batcher.submit(
                question.entries, question.rows, source=id(socket)
            )
        except (BadRequest, Busy, ShuttingDown) as error:
            return self._refusal(error)
        except Exception as error:  # ours: it is answered all the same
            self._log("Reading a request failed", error)
            return self._refusal(error)
        self._counts["requests"] += 1
        return _Asked(question, asyncio.wrap_future(future))

    async def _reply(self, item: _Asked | str) -> bytes | str:
        if isinstance(item, str):
            return item
        question = item.question
        try:
            answer = await item.answer
        except asyncio.CancelledError:
            item.answer.cancel()
            raise
        except TeacherRaised as error:
            self._log("The teacher raised on a request", error.error)
            return self._refusal(error.error, "TeacherError")
        except ShuttingDown as error:
            return self._refusal(error)
        rows = slice(None) if question.batched else 0
        message = {
            "actions": answer.chunk[rows],
            "server_timing": {
                "infer_ms": 1e3 * answer.infer_s,
                "queue_ms": 1e3 * answer.queue_s,
                "batch_rows": answer.batch_rows,
            },
        }
        if answer.std is not None:
            message["std"] = answer.std[rows]
        if question.request_id is not None:
            message["request_id"] = question.request_id
        return pack(message)

    def _refusal(self, error: BaseException, name: str | None = None) -> str:
        name = name or type(error).__name__
        self._errors[name] += 1
        # (KeyError's text has quotes around it)
        quoted = isinstance(error, KeyError) and error.args
        reason = str(error.args[0] if quoted else error)
        if name == "TeacherError":
            reason = f"{type(error).__name__}: {reason}"
        return f"{name}: {reason[:_MAX_REASON]}"

    def _log(self, what: str, error: BaseException) -> None:
        """The traceback of an error, once for each place that raises it."""
        place = [
            f"{frame.filename}:{frame.lineno}"
            for frame in traceback.extract_tb(error.__traceback__)
        ]
        where = (type(error).__name__, *place[-1:])
        if where not in self._logged:
            self._logged.add(where)
            torchrl_logger.error(
                f"{what}; its client was told, the server lives on (logged once).",
                exc_info=error,
            )
