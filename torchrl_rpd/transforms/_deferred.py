# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Labels that are made in the background, and fetched by the numbers of their rows."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, thread, wait
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase

# A step of the envs, each with at most one reset: 500 steps of a batch at the least.
OUTSTANDING = 1000


class Step(NamedTuple):
    """The labels of one step of the envs: tickets ``first`` to ``first + n - 1``.

    ``fetched`` is shared by the steps of the same ``n`` envs: the highest ticket of each
    that was fetched, int64 ``[n]``.
    """

    first: int
    labels: Future[TensorDictBase]
    fetched: torch.Tensor

    @property
    def end(self) -> int:
        """The ticket after the last one."""
        return self.first + self.fetched.numel()


class LabelQueue:
    """One background thread, in which labels are made in the order they are asked for.

    Every row of every step has a ticket, a number above 0 that is never given twice;
    nor do two queues give the same one, in whatever process: they start at random.

    Args:
        limit (int): how many steps may be outstanding, made or not, before somebody must
            have forgotten to fetch them.

    Raises:
        RuntimeError: in another process than the one that made it.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> queue = LabelQueue()
        >>> fetched = torch.zeros(2, dtype=torch.int64)
        >>> for step in (1.0, 2.0):
        ...     labels = TensorDict({"label": torch.tensor([step, -step])}, [2])
        ...     tickets = queue.submit(lambda labels=labels: labels, fetched)
        >>> queue.fetch(tickets.flip(0))["label"]
        tensor([-2.,  2.])
        >>> len(queue)  # the first step's are older than what every env has fetched
        1
    """

    def __init__(self, limit: int = OUTSTANDING) -> None:
        self.limit = limit
        self._process: int | None = os.getpid()
        self._next = 1 + secrets.randbits(61)
        self._submitted = 0
        self._failure: tuple[int, BaseException] | None = None
        self._steps: list[Step] = []
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[TensorDictBase] | None = None
        self._stream: Any = None

    def __len__(self) -> int:
        return len(self._steps)

    def submit(
        self,
        work: Callable[[], TensorDictBase],
        fetched: torch.Tensor,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """Has the labels of one step made.

        Args:
            work (callable): returns them, ``[n]``; called in the background.
            fetched (torch.Tensor): see :class:`Step`; the same object for every step of
                the same envs.
            device (torch.device, optional): of what ``work`` reads.

        Returns:
            the tickets, int64 ``[n]``, on the CPU.

        Raises:
            RuntimeError: if too much is outstanding.
        """
        self._check_process()
        if len(self._steps) >= self.limit:
            raise RuntimeError(
                f"The labels of {len(self._steps)} steps were asked for with "
                "deferred=True and not fetched: frames without them have teacher_mask "
                "False. Give the transform to the collector as well, "
                "Collector(TransformedEnv(env, transform), ..., postproc=transform), or "
                "call it on every batch. If one batch holds so many steps, set "
                "transform.max_outstanding higher."
            )
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="teacher")
        self._submitted += 1
        event = None
        if device is not None and device.type == "cuda":
            event = torch.cuda.current_stream(device).record_event()
        self._last = self._thread.submit(
            self._make, work, self._submitted, device, event
        )
        step = Step(self._next, self._last, fetched)
        self._next = step.end
        self._steps.append(step)
        return torch.arange(step.first, step.end)

    def fetch(self, tickets: torch.Tensor) -> TensorDictBase:
        """Waits for labels.

        What is older than the newest that was fetched of every env is then forgotten:
        later batches begin where this one ended.

        Args:
            tickets (torch.Tensor): of frames in any order, int64 ``[F]``, on the CPU.

        Returns:
            their labels, ``[F]``, on the CPU.

        Raises:
            RuntimeError: for tickets of another queue or of labels that are forgotten,
                and if the teacher failed (with its error as the cause).
        """
        self._check_process()
        steps = self._steps
        firsts = torch.tensor([step.first for step in steps], dtype=torch.int64)
        ends = torch.tensor([step.end for step in steps], dtype=torch.int64)
        at = torch.searchsorted(firsts, tickets, right=True) - 1
        known = (at >= 0) & (tickets < ends[at]) if steps else torch.zeros_like(at) > 0
        if not bool(known.all()):
            raise RuntimeError(
                f"{int((~known).sum())} of {known.numel()} frames wait for labels that "
                "this transform does not know: it is not the one in their env (a copy, "
                "or the env is in another process: see deferred=), a later batch was "
                "fetched before, or the frames are of a run before this one: reset the "
                "env."
            )
        used, place = at.unique(return_inverse=True)
        wanted = [steps[i] for i in used.tolist()]
        table = torch.cat([self._result(step) for step in wanted])
        sizes = torch.tensor([step.fetched.numel() for step in wanted])
        rows = tickets - firsts[at]
        labels = table[(sizes.cumsum(0) - sizes)[place] + rows]
        self._forget(wanted, place, rows, tickets)
        return labels

    def _forget(
        self,
        wanted: list[Step],
        place: torch.Tensor,
        rows: torch.Tensor,
        tickets: torch.Tensor,
    ) -> None:
        envs = {id(step.fetched): step.fetched for step in wanted}
        for fetched in envs.values():
            theirs = torch.tensor([step.fetched is fetched for step in wanted])[place]
            fetched.scatter_reduce_(0, rows[theirs], tickets[theirs], "amax")
        oldest = {key: int(fetched.min()) for key, fetched in envs.items()}
        self._steps = [
            step for step in self._steps if step.end > oldest.get(id(step.fetched), 0)
        ]

    def drain(self) -> None:
        """Waits until nothing is under way; errors are told by :meth:`fetch`."""
        if self._last is not None and self._process == os.getpid():
            wait([self._last])

    def forgive(self) -> None:
        """Makes labels again, after the teacher has failed."""
        self._failure = None

    def _make(
        self,
        work: Callable[[], TensorDictBase],
        number: int,
        device: torch.device | None,
        event: Any,
    ) -> TensorDictBase:
        if self._failure is not None:  # what is remembered of the envs has a gap
            raise self._failure[1]
        # Executors work off all they were given before Python may exit.
        if getattr(thread, "_shutdown", False):
            raise RuntimeError("Python is shutting down.")
        try:
            with torch.no_grad(), self._beside(device, event):
                labels: TensorDictBase = work().cpu()
                return labels
        except BaseException as error:
            self._failure = (number, error)
            raise

    @contextlib.contextmanager
    def _beside(self, device: torch.device | None, event: Any) -> Any:
        """On an accelerator, work of its own beside that of whoever submitted it."""
        if event is None:
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            yield
        # What was read may be freed now, for the use of other streams.
        self._stream.synchronize()

    def _result(self, step: Step) -> TensorDictBase:
        try:
            return step.labels.result()
        except Exception as error:
            number = self._failure[0] if self._failure is not None else "an earlier one"
            raise RuntimeError(
                f"The teacher failed in the background, at submission {number} of "
                f"{self._submitted}: {type(error).__name__}: {error}"
            ) from error

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise RuntimeError(
                "TeacherActionTransform(..., deferred=True) was sent to another process, "
                "where its labels could not be fetched. Have env and transform in the "
                "process that gets the batches: Collector(TransformedEnv(ParallelEnv(N, "
                "make_env), transform), ..., postproc=transform)."
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> LabelQueue:
        return LabelQueue(self.limit)

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (self.limit,)


def _arrived(limit: int) -> LabelQueue:
    queue = LabelQueue(limit)
    queue._process = None
    return queue
