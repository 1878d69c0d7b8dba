# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Teachers behind TorchRL's InferenceServer: asked in rows, answered in batches."""

from __future__ import annotations

import os
import queue
import time
import uuid
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import nn
from torchrl._comm import MailboxClient, MailboxTransportError
from torchrl.data.vla import ACTION_CHUNK_KEY

from torchrl_rpd.teachers._elsewhere import STD_KEYS, OnError, TeacherElsewhere
from torchrl_rpd.teachers.remote import TeacherUnavailable

__all__ = ["InferenceTeacher", "ServableTeacher"]

# What clients of TorchRL's transports raise when nobody is there to answer: no reply in
# time, the server's process has ended, the queue between has gone.
_GONE = (queue.Empty, OSError, EOFError, MailboxTransportError)


class ServableTeacher(TensorDictModuleBase):
    """A teacher as an :class:`~torchrl.modules.inference_server.InferenceServer` runs it.

    The server would send everything back that its model returns, the images of the
    question included. This module returns the answer alone.

    Args:
        teacher_factory (callable): takes no argument and returns a teacher that writes
            ``("vla_action", "chunk")`` of shape ``[n, H, A]``, as all teachers of this
            package do; frozen and set to eval mode here. For a server in another process
            it must be picklable: a function of a module, or a
            :func:`functools.partial` of one.

    Raises:
        TypeError: if the teacher cannot be called.
        KeyError: in the call, if the teacher wrote no chunk.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.teachers import ScriptedTeacher
        >>> from torchrl_rpd.teachers.inference import ServableTeacher
        >>> model = ServableTeacher(lambda: ScriptedTeacher("PushCube-v1"))
        >>> answer = model(TensorDict({"observation": torch.zeros(2, 35)}, [2]))
        >>> list(answer.keys(True, True))
        [('vla_action', 'chunk')]
    """

    def __init__(
        self, teacher_factory: Callable[[], Callable[[TensorDictBase], Any]]
    ) -> None:
        super().__init__()
        teacher = teacher_factory()
        if not callable(teacher):
            raise TypeError(
                "teacher_factory must return a teacher, a TensorDict module, got "
                f"{type(teacher).__name__}."
            )
        if isinstance(teacher, nn.Module):
            teacher.requires_grad_(False).eval()
        self.teacher = teacher
        self.in_keys = list(getattr(teacher, "in_keys", None) or [])
        self.out_keys = [ACTION_CHUNK_KEY]

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Answers the rows of ``tensordict``, ``[n]``."""
        # The server stacks its requests lazily.
        out = self.teacher(tensordict.contiguous())
        answer = TensorDict(batch_size=tensordict.batch_size)
        for key in (ACTION_CHUNK_KEY, *STD_KEYS):
            value = out.get(key, None) if isinstance(out, TensorDictBase) else None
            if value is not None:
                answer.set(key, value)
        if answer.is_empty():
            raise KeyError(
                f"{type(self.teacher).__name__} wrote no {ACTION_CHUNK_KEY!r}; a teacher "
                "that is served is a TensorDict module that does."
            )
        return answer


class InferenceTeacher(TeacherElsewhere):
    """A teacher behind an :class:`~torchrl.modules.inference_server.InferenceServer`.

    Sends each row as a request of its own, so that the server batches those of all its
    clients, and awaits all answers. A teacher like any other, for
    :class:`~torchrl_rpd.transforms.TeacherActionTransform` through ``teacher_factory=``.
    In the workers of a ``ParallelEnv`` or of a collector every process needs a client of
    its own: see :meth:`factories`.

    After a server process was killed and started again (``server.start()``) its clients
    go on, if the queues outlive it: ``MPTransport(use_manager=True)``. A server that
    hangs costs one ``timeout``; until its late answers have come, or as long again has
    passed, it is not asked.

    Args:
        client (object): what ``server.client()`` returned; anything with
            ``submit(row)`` that returns a future.

    Keyword Args:
        in_keys (sequence of NestedKey, optional): what is sent. Defaults to ``None``:
            everything that the teacher is given.
        timeout (float): how long all answers to one question may take together, in
            seconds. Defaults to ``60.0``.
        on_error ("raise" or "mask"): what becomes of rows when no answer comes: raise a
            :class:`~torchrl_rpd.teachers.remote.TeacherUnavailable`, or answer NaN, which
            ``TeacherActionTransform`` masks and counts (``non_finite``): the run goes on
            without labels for these rows. Errors of the teacher itself are raised in
            either case. Defaults to ``"raise"``.
        action_dim (int, optional): ``A`` of the chunks ``[n, H, A]``; needed by
            ``"mask"`` until a first answer has told it. Defaults to ``None``.
        chunk_size (int): ``H``, likewise. Defaults to ``1``.

    Raises:
        ValueError: for arguments out of range.
        TeacherUnavailable: in the call; see ``on_error``.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.modules.inference_server import InferenceServer
        >>> from torchrl_rpd.teachers import ScriptedTeacher
        >>> from torchrl_rpd.teachers.inference import ServableTeacher, InferenceTeacher
        >>> expert = ScriptedTeacher("PushCube-v1")
        >>> rows = TensorDict({"observation": torch.zeros(3, 35)}, [3])
        >>> with InferenceServer(ServableTeacher(lambda: expert)) as server:
        ...     teacher = InferenceTeacher(server.client(), in_keys=["observation"])
        ...     served = teacher(rows.copy())["vla_action", "chunk"]
        >>> bool((served == expert(rows)["vla_action", "chunk"]).all())
        True
    """

    def __init__(
        self,
        client: Any,
        *,
        in_keys: Sequence[NestedKey] | None = None,
        timeout: float = 60.0,
        on_error: OnError = "raise",
        action_dim: int | None = None,
        chunk_size: int = 1,
    ) -> None:
        super().__init__(
            in_keys=in_keys,
            timeout=timeout,
            on_error=on_error,
            action_dim=action_dim,
            chunk_size=chunk_size,
        )
        self._client = client
        # Requests without an answer in time, and until when one may still come.
        self._late: list[tuple[float, Any]] = []

    @classmethod
    def factories(
        cls, server: Any, number: int, **kwargs: Any
    ) -> list[Callable[[], InferenceTeacher]]:
        """One ``teacher_factory`` for each of ``number`` processes.

        Call it before the processes start. Two processes with one client would take each
        other's answers; the second one is refused.

        Args:
            server (InferenceServer or ProcessInferenceServer): the server.
            number (int): how many processes.
            **kwargs: of :class:`InferenceTeacher`.

        Returns:
            a list of callables that can be sent to processes as they are started.
        """
        return [_ForOneProcess(client, kwargs) for client in server.clients(number)]

    def _ask(self, rows: TensorDictBase) -> TensorDictBase:
        start = time.monotonic()
        self._late = [
            (end, late) for end, late in self._late if start < end and not _over(late)
        ]
        if self._late:
            raise TeacherUnavailable(
                f"The InferenceServer has not answered {len(self._late)} rows of an "
                "earlier question yet."
            )
        deadline = start + self.timeout
        pending: list[Any] = []
        answers: list[TensorDictBase] = []
        try:
            for row in self._own(rows).unbind(0):
                pending.append(self._client.submit(row))
            while pending:
                left = max(0.0, deadline - time.monotonic())
                answers.append(pending[0].result(timeout=left))
                del pending[0]
        except Exception as error:
            late = deadline + self.timeout
            self._late = [(late, future) for future in pending if not _over(future)]
            reason = self._why_gone(error)
            if reason is None:
                raise
            raise TeacherUnavailable(
                f"No answer from the InferenceServer to {len(rows) - len(answers)} of "
                f"{len(rows)} rows: {reason}"
            ) from error
        return _stack(answers)

    def _own(self, rows: TensorDictBase) -> TensorDictBase:
        """A copy where sending would move the memory of the caller to shared memory."""
        return rows.clone() if isinstance(self._client, MailboxClient) else rows

    def _why_gone(self, error: Exception) -> str | None:
        """What to tell about a server that is gone; None if the teacher itself failed."""
        if isinstance(error, (queue.Empty, TimeoutError)):
            return (
                f"none came within {self.timeout} s. Is it started, and the timeout long "
                "enough for its batches?"
            )
        # TorchRL has no class of its own for requests that are open on a shutdown.
        if isinstance(error, _GONE) or "InferenceServer is shutting down" in str(error):
            return f"{type(error).__name__}: {error}"
        return None


class _ForOneProcess:
    """Makes a teacher from a client that one process alone may use.

    Args:
        client (object): the client.
        kwargs (dict): the other arguments of :class:`InferenceTeacher`.
    """

    # Clients that this process has taken, by name: (process, client).
    _taken: dict[str, tuple[int, Any]] = {}  # noqa: RUF012

    def __init__(self, client: Any, kwargs: dict[str, Any]) -> None:
        self._client = client
        self._kwargs = kwargs
        self._name = uuid.uuid4().hex
        # The first process to acquire it keeps it.
        self._right = get_context("spawn").Lock()

    def __call__(self) -> InferenceTeacher:
        process, client = self._taken.get(self._name, (None, None))
        if process != os.getpid():
            if not self._right.acquire(block=False):
                raise RuntimeError(
                    "Two processes use the same client of an InferenceServer and would "
                    "take each other's answers. Give each its own: "
                    "ParallelEnv(N, [partial(make_env, factory) for factory in "
                    "InferenceTeacher.factories(server, N)])."
                )
            client = self._client
            self._taken[self._name] = (os.getpid(), client)
        # The first copy of the client that arrived here counts the requests.
        return InferenceTeacher(client, **self._kwargs)


def _over(future: Any) -> bool:
    """Whether nothing is awaited any more; takes the answer if there is one."""
    try:
        future.result(timeout=0)
    except (queue.Empty, TimeoutError):
        return False
    except Exception:
        return True
    return True


def _stack(answers: Sequence[TensorDictBase]) -> TensorDictBase:
    out = TensorDict(batch_size=[len(answers)])
    for key in (ACTION_CHUNK_KEY, *STD_KEYS):
        values = [answer.get(key, None) for answer in answers]
        if all(value is not None for value in values):
            out.set(key, torch.stack(values))
    return out
