# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A connection that is made again when it breaks, and what is done until then."""

from __future__ import annotations

import collections
import dataclasses
import os
import random
import threading
import time
from collections.abc import Sequence
from typing import Any

from torchrl._utils import logger

from torchrl_rpd.teachers.remote._connection import (
    Connection,
    Message,
    Refused,
    check_address,
    transient_errors,
)
from torchrl_rpd.teachers.remote._errors import TeacherMismatch, TeacherUnavailable
from torchrl_rpd.teachers.remote._info import TeacherInfo

__all__ = ["Channel"]

_LONGEST_BACKOFF = 30.0
# What may change when a server comes back: nothing that an answer depends on.
_MAY_CHANGE = {"server", "max_batch", "max_message_bytes"}
# Errors of a server of ours that is not gone for good: asking again may help.
_LATER = ("Busy:", "ShuttingDown:")


@dataclasses.dataclass
class Channel:
    """Asks one server; each process (forked, unpickled) has a connection of its own.

    Attributes:
        address: ``"ws://host:port"``.
        token: sent as ``Authorization: Bearer``.
        timeout: seconds for one answer.
        connect_timeout: seconds for a connection, and again for its metadata.
        retries: how often a request without an answer is sent again.
        backoff: seconds before the second retry (the first one after an answer comes at
            once), doubled each time, of which a random half is left out.
        cooldown: seconds in which nothing is sent after all retries failed; None for
            none. Then one attempt is made at a time, until one succeeds.
        pipeline: how many requests are sent ahead of their answers.
        info: what the server says; None before the first connection.
        counts: ``requests`` answered, ``retries``, ``connections``, and whatever
            :meth:`count` was told.
    """

    address: str
    token: str | None = dataclasses.field(repr=False)
    timeout: float
    connect_timeout: float
    retries: int
    backoff: float
    cooldown: float | None
    pipeline: int
    info: TeacherInfo | None = None
    counts: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )

    def __post_init__(self) -> None:
        check_address(self.address)
        for name in ("timeout", "connect_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ("retries", "backoff", "cooldown"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(
                    f"{name} must be at least 0, got {self.__dict__[name]}."
                )
        if self.pipeline < 1:
            raise ValueError(f"pipeline must be at least 1, got {self.pipeline}.")
        self._begin()

    def _begin(self) -> None:
        """The state of one process."""
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._next_id = 0
        # Its own generator, seeded by the system: processes that lost the same server
        # shall not come back at the same instant, and no other draws are moved.
        self._random = random.Random()
        self._failed = False
        self._rest_until = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in _FIELDS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, counts=collections.Counter())
        self._begin()

    def _enter(self) -> threading.Lock:
        if self._process != os.getpid():
            # Forked: the socket is the parent's. It is let go without a word, which
            # the server would take for the parent's.
            self._begin()
            self.counts.clear()
        return self._lock

    # ------------------------------------------------------------------ questions
    def connect(self) -> TeacherInfo:
        """The handshake, as often as a request is tried.

        Raises:
            TeacherMismatch: if the server is not what it was, or no teacher's.
            TeacherUnavailable: if there is none.
        """
        failure = self.ask([])[1]
        if failure is not None:
            raise failure
        assert self.info is not None
        return self.info

    def ask(
        self, messages: Sequence[Message], *, stop_at_error: bool = False
    ) -> tuple[list[bytes | str | None], TeacherUnavailable | None]:
        """Sends requests and waits for all answers, each of which belongs to its request.

        Args:
            messages (sequence of sequence of bytes): the requests.

        Keyword Args:
            stop_at_error (bool): whether an error (a text) ends it.

        Returns:
            the answers, None where there is none, and the reason for that.

        Raises:
            TeacherMismatch: if another teacher answers at this address.
        """
        with self._enter():
            answers: list[bytes | str | None] = [None] * len(messages)
            start = time.monotonic()
            if start < self._rest_until:
                return answers, self._resting(self._rest_until - start)
            waiting = collections.deque(range(len(messages)))
            failures = attempts = 0
            while True:
                attempts += 1
                progress = len(waiting)
                try:
                    connection = self._connected()
                    todo = [messages[index] for index in waiting]
                    for answer in connection.exchange(todo, depth=self.pipeline):
                        if isinstance(answer, str) and answer.startswith(_LATER):
                            raise ConnectionError(answer.strip())
                        answers[waiting.popleft()] = answer
                        self.counts["requests"] += 1
                        if stop_at_error and isinstance(answer, str) and waiting:
                            self._drop()
                            return answers, None
                    self._recovered()
                    return answers, None
                except transient_errors() as error:
                    self._drop()
                    progressed = len(waiting) < progress
                    failures = 1 if progressed else failures + 1
                    allowed = 1 if self._failed else 1 + self.retries
                    if failures >= allowed or isinstance(error, Refused):
                        return answers, self._give_up(attempts, start, error)
                    self.counts["retries"] += 1
                    if not progressed:
                        time.sleep(self._delay(failures))
                except BaseException:
                    # Answers may be on their way: nobody shall take them for others.
                    self._drop()
                    raise

    def take_ids(self, number: int) -> int:
        """The first of so many ids of requests that were never used here."""
        with self._enter():
            self._next_id += number
            return self._next_id - number

    def count(self, **numbers: int) -> None:
        """Adds to the counts."""
        with self._enter():
            self.counts.update(numbers)

    def drop(self) -> None:
        """Ends the connection; the next question makes another."""
        with self._enter():
            self._drop()

    def close(self) -> None:
        """Ends the connection politely; the next question makes another."""
        with self._enter():
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    # ------------------------------------------------------------------ connections
    def _connected(self) -> Connection:
        if self._connection is not None and not self._connection.alive:
            self._drop()
        if self._connection is None:
            connection = Connection(
                self.address,
                token=self.token,
                connect_timeout=self.connect_timeout,
                timeout=self.timeout,
            )
            try:
                self._check_same(connection.info)
            except TeacherMismatch:
                connection.close()
                raise
            self._connection = connection
            self.info = connection.info
            self.counts["connections"] += 1
        return self._connection

    def _check_same(self, info: TeacherInfo) -> None:
        if self.info is None:
            return
        changes = [
            f"{name}: {before!r} before, {vars(info)[name]!r} now"
            for name, before in vars(self.info).items()
            if before != vars(info)[name] and name not in _MAY_CHANGE
        ]
        if changes:
            raise TeacherMismatch(
                f"Another teacher answers at {self.address} ({'; '.join(changes)}). "
                "Labels of two teachers are not mixed: start the one of before again."
            )

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.drop()
            self._connection = None

    # ------------------------------------------------------------------ failures
    def _delay(self, failures: int) -> float:
        longest = min(self.backoff * 2 ** (failures - 1), _LONGEST_BACKOFF)
        return longest * self._random.uniform(0.5, 1.0)

    def _give_up(
        self, attempts: int, start: float, error: Exception
    ) -> TeacherUnavailable:
        seconds = time.monotonic() - start
        times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        cause = str(error) or type(error).__name__
        failure = TeacherUnavailable(
            f"No answer from the teacher at {self.address} after {times} in "
            f"{seconds:.1f} s; the last one: {type(error).__name__}: {cause}"
        )
        failure.__cause__ = error
        if self.cooldown is not None:
            # As long as it took, at least: half of a run's time is the most it costs.
            rest = max(self.cooldown, seconds)
            self._rest_until = time.monotonic() + rest
            self._cause = failure
            if not self._failed:
                logger.warning(
                    f"{failure}. Its rows stay without labels; it is asked again in "
                    f"{rest:.1f} s."
                )
            self._failed = True
        return failure

    def _resting(self, seconds: float) -> TeacherUnavailable:
        failure = TeacherUnavailable(
            f"The teacher at {self.address} is not asked for another {seconds:.1f} s: "
            f"{self._cause}"
        )
        failure.__cause__ = self._cause
        return failure

    def _recovered(self) -> None:
        if self._failed:
            logger.info(f"The teacher at {self.address} answers again.")
        self._failed = False


_FIELDS = dataclasses.fields(Channel)
