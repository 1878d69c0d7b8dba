# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Puts the requests of many clients together into batches for one teacher."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future, InvalidStateError
from typing import NamedTuple

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict
from tensordict.utils import NestedKey
from torch import Tensor

__all__ = ["Answer", "Batcher", "Busy", "Entries", "ShuttingDown", "TeacherRaised"]

# One request's rows: tensors [n, ...], or n texts.
Entries = Mapping[NestedKey, Tensor | list[str]]
Ask = Callable[[TensorDict], tuple[np.ndarray, np.ndarray | None]]


class Busy(RuntimeError):
    """The queue is full."""


class ShuttingDown(RuntimeError):
    """The server stops before it can answer."""


class TeacherRaised(RuntimeError):
    """Carries what a teacher raised: StopIteration and the like are not for futures."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class Answer(NamedTuple):
    """What one request gets."""

    chunk: np.ndarray  # [n, H, A] float32
    std: np.ndarray | None  # [n, A] float32
    infer_s: float  # in the teacher
    queue_s: float  # before its first row reached the teacher
    batch_rows: int  # of the largest batch that held rows of it


@dataclasses.dataclass(eq=False)
class _Job:
    """One request: its parts, as they are answered."""

    future: Future[Answer]
    since: float
    parts: int
    chunks: list[np.ndarray] = dataclasses.field(default_factory=list)
    stds: list[np.ndarray] = dataclasses.field(default_factory=list)
    infer_s: float = 0.0
    queue_s: float | None = None
    batch_rows: int = 0

    @property
    def over(self) -> bool:
        return self.future.done()  # answered, failed, or its client is gone

    def fail(self, error: Exception) -> None:
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)

    def take(self, chunk: np.ndarray, std: np.ndarray | None) -> None:
        self.chunks.append(chunk)
        if std is not None:
            self.stds.append(std)
        if len(self.chunks) < self.parts:
            return
        answer = Answer(
            _joined(self.chunks),
            _joined(self.stds) if self.stds else None,
            self.infer_s,
            self.queue_s or 0.0,
            self.batch_rows,
        )
        with contextlib.suppress(InvalidStateError):  # cancelled just now
            self.future.set_result(answer)


class _Part(NamedTuple):
    """At most ``max_batch`` rows of one request."""

    job: _Job
    entries: Entries
    rows: int
    nbytes: int
    signature: Hashable
    source: Hashable


class Batcher:
    """A queue in front of a teacher, which one thread empties batch by batch.

    A batch is made of whole requests in the order of their arrival, as many as fit and
    can be concatenated: same entries, dtypes and shapes (texts may differ). Others wait
    for the next batch; a request longer than a batch is split. A batch goes out when it
    is full, when its oldest request has waited ``max_wait``, or when every client that
    is there has something in the queue, so that waiting would bring nothing.

    A teacher that raises on a batch is asked again, request by request: one client's
    rows do not cost another its answer.

    Args:
        ask (callable): maps a tensordict ``[n]`` to actions ``[n, H, A]`` and their
            standard deviation ``[n, A]`` or None; called in the batcher's thread.

    Keyword Args:
        max_batch (int): the most rows of a batch.
        max_wait (float): seconds.
        max_rows (int): the most rows in the queue.
        max_bytes (int): the most bytes of them.

    Examples:
        >>> def ask(td):
        ...     return td["observation"][:, None].numpy(), None
        >>> batcher = Batcher(ask, max_batch=8, max_wait=0.0, max_rows=64, max_bytes=2**20)
        >>> future = batcher.submit({"observation": torch.ones(3, 2)}, 3, source=0)
        >>> future.result().chunk.shape
        (3, 1, 2)
        >>> batcher.close(timeout=1.0)
        True
    """

    def __init__(
        self,
        ask: Ask,
        *,
        max_batch: int,
        max_wait: float,
        max_rows: int,
        max_bytes: int,
    ) -> None:
        self.sources = 1  # clients that are there; the server counts them
        self.rows = 0  # answered
        self.batches = 0
        self.queue_rows = 0
        self._ask = ask
        self._max_batch, self._max_wait = max_batch, max_wait
        self._max_rows, self._max_bytes = max_rows, max_bytes
        self._queue: deque[_Part] = deque()
        self._queue_bytes = 0
        self._working: list[_Part] = []
        self._closing = False
        self._changed = threading.Condition()
        # A daemon: a teacher that hangs does not keep the process.
        self._thread = threading.Thread(target=self._work, name="teacher", daemon=True)
        self._thread.start()

    def submit(self, entries: Entries, rows: int, source: Hashable) -> Future[Answer]:
        """Queues one request; cancelling what is returned drops it.

        Args:
            entries (mapping): tensors ``[rows, ...]`` and lists of ``rows`` texts.
            rows (int): at least 1, at most the ``max_rows`` of the queue.
            source (hashable): whose request it is.

        Raises:
            Busy: if the queue is full.
            ShuttingDown: after :meth:`close`.
        """
        signature = _signature(entries)
        starts = range(0, rows, self._max_batch)
        job = _Job(Future(), time.perf_counter(), len(starts))
        parts = []
        for start in starts:
            cut = {k: v[start : start + self._max_batch] for k, v in entries.items()}
            nbytes = sum(v.nbytes for v in cut.values() if isinstance(v, Tensor))
            length = min(self._max_batch, rows - start)
            parts.append(_Part(job, cut, length, nbytes, signature, source))
        nbytes = sum(part.nbytes for part in parts)
        with self._changed:
            if self._closing:
                raise ShuttingDown("the server is shutting down; ask another one.")
            if self._full(rows, nbytes):
                self._drop([part for part in self._queue if part.job.over])
            if self._full(rows, nbytes):
                raise Busy(
                    f"{self.queue_rows} rows are waiting, of at most {self._max_rows} "
                    f"({self._queue_bytes} bytes, of {self._max_bytes}); ask again "
                    "later, or send fewer rows at once."
                )
            self._queue.extend(parts)
            self.queue_rows += rows
            self._queue_bytes += nbytes
            self._changed.notify()
        return job.future

    def poke(self) -> None:
        """Has the thread look again: ``sources`` changed, or a future was cancelled."""
        with self._changed:
            self._changed.notify()

    def close(self, timeout: float) -> bool:
        """Takes no more requests, answers those it has, and ends the thread.

        Args:
            timeout (float): seconds, after which the rest fails with ShuttingDown.

        Returns:
            whether everything was answered.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            return True
        with self._changed:
            rest = [*self._working, *self._queue]
        for part in rest:
            part.job.fail(
                ShuttingDown("the server stopped before the teacher answered.")
            )
        return False

    def _work(self) -> None:
        while batch := self._next():
            self._answer(batch)
            self._working = []

    def _next(self) -> list[_Part]:
        """The next batch, when its time has come; empty at the end."""
        with self._changed:
            while True:
                self._drop([part for part in self._queue if part.job.over])
                if self._queue:
                    batch, full = self._gather()
                    wait = self._max_wait - (time.perf_counter() - batch[0].job.since)
                    if full or wait <= 0 or self._closing or self._nobody_else():
                        self._drop(batch)
                        self._working = batch
                        return batch
                    self._changed.wait(wait)
                elif self._closing:
                    return []
                else:
                    self._changed.wait()

    def _gather(self) -> tuple[list[_Part], bool]:
        batch: list[_Part] = []
        rows = 0
        for part in self._queue:
            if part.signature != self._queue[0].signature:
                continue
            if rows + part.rows > self._max_batch:
                return batch, True
            batch.append(part)
            rows += part.rows
        return batch, rows == self._max_batch

    def _full(self, rows: int, nbytes: int) -> bool:
        return bool(self._queue) and (
            self.queue_rows + rows > self._max_rows
            or self._queue_bytes + nbytes > self._max_bytes
        )

    def _nobody_else(self) -> bool:
        return len({part.source for part in self._queue}) >= self.sources

    def _drop(self, parts: list[_Part]) -> None:
        if not parts:
            return
        gone = {id(part) for part in parts}
        self._queue = deque(part for part in self._queue if id(part) not in gone)
        self.queue_rows -= sum(part.rows for part in parts)
        self._queue_bytes -= sum(part.nbytes for part in parts)

    def _answer(self, batch: list[_Part]) -> None:
        batch = [part for part in batch if not part.job.over]
        if not batch:
            return
        rows = sum(part.rows for part in batch)
        start = time.perf_counter()
        for part in batch:
            if part.job.queue_s is None:
                part.job.queue_s = start - part.job.since
        try:
            chunk, std = self._ask(_tensordict(batch, rows))
        except BaseException as error:  # the thread outlives whatever a teacher does
            if len({id(part.job) for part in batch}) > 1:
                for part in batch:
                    self._answer([part])
            else:
                batch[0].job.fail(TeacherRaised(error))
            return
        seconds = time.perf_counter() - start
        self.batches += 1
        self.rows += rows
        at = 0
        for part in batch:
            part.job.infer_s += seconds
            part.job.batch_rows = max(part.job.batch_rows, rows)
            stop = at + part.rows
            part.job.take(chunk[at:stop], None if std is None else std[at:stop])
            at = stop


def _signature(entries: Entries) -> Hashable:
    """What two requests must share to be concatenated."""
    return frozenset(
        (key, value.dtype, value.shape[1:]) if isinstance(value, Tensor) else (key,)
        for key, value in entries.items()
    )


def _tensordict(batch: list[_Part], rows: int) -> TensorDict:
    td = TensorDict({}, [rows])
    for key in batch[0].entries:
        values = [part.entries[key] for part in batch]
        tensors = [value for value in values if isinstance(value, Tensor)]
        if tensors:
            td.set(key, tensors[0] if len(tensors) == 1 else torch.cat(tensors))
        else:
            td.set(key, _texts([text for value in values for text in value]))
    return td


def _texts(texts: list[str]) -> NonTensorData | NonTensorStack:
    if len(set(texts)) == 1:  # as environments write it, and far quicker than a stack
        return NonTensorData(texts[0], batch_size=[len(texts)])
    return NonTensorStack(*texts)


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
