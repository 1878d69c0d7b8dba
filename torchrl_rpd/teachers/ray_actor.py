# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One teacher in a Ray actor, shared by collectors on several machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torchrl.modules.inference_server import InferenceServer

from torchrl_rpd.teachers._elsewhere import STD_KEYS, OnError, TeacherElsewhere
from torchrl_rpd.teachers.inference import InferenceTeacher, ServableTeacher
from torchrl_rpd.teachers.remote import TeacherUnavailable

__all__ = ["RayTeacher", "TeacherActor"]


class TeacherActor:
    """A teacher that answers several askers at once, to be made a Ray actor.

    In the actor, TorchRL's ``InferenceServer`` batches the rows of all that ask at the
    same time; ``max_concurrency`` is how many may. The resources are the actor's:
    ``ray.remote(num_gpus=1, max_concurrency=8, max_restarts=-1,
    max_task_retries=-1)(TeacherActor).remote(make_teacher, device="cuda")``. With the
    last two options Ray starts it again when it has died, and asks again.

    Args:
        teacher_factory (callable): takes no argument and returns the teacher; called in
            the actor.

    Keyword Args:
        device (torch.device or str, optional): where the teacher is to live. Defaults to
            ``None``: where the factory put it.
        timeout (float): how long the answers to one question may take, in seconds.
            Defaults to ``600.0``.
        max_wait (float, optional): for how long the server waits until
            ``min_batch_size`` rows are there, in seconds. Defaults to ``None``: as
            TorchRL does (0.01).
        **server_kwargs: of ``InferenceServer``, e.g. ``max_batch_size`` (64) and
            ``min_batch_size`` (1).

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.teachers import ScriptedTeacher
        >>> from torchrl_rpd.teachers.ray_actor import TeacherActor
        >>> actor = TeacherActor(lambda: ScriptedTeacher("PushCube-v1"))  # without Ray
        >>> answer = actor.ask(TensorDict({"observation": torch.zeros(3, 35)}, [3]))
        >>> answer["vla_action", "chunk"].shape
        torch.Size([3, 1, 7])
        >>> actor.stats()["requests"]  # rows
        3
        >>> actor.shutdown()
    """

    def __init__(
        self,
        teacher_factory: Callable[[], Callable[[TensorDictBase], Any]],
        *,
        device: torch.device | str | None = None,
        timeout: float = 600.0,
        max_wait: float | None = None,
        **server_kwargs: Any,
    ) -> None:
        self._server = InferenceServer(
            ServableTeacher(teacher_factory),
            timeout=max_wait,
            policy_device=device,
            output_device=None if device is None else "cpu",
            policy_version_key=None,
            **server_kwargs,
        ).start()
        self._timeout = timeout

    def ask(self, rows: TensorDictBase) -> TensorDictBase:
        """Answers rows ``[n]``; called by several threads at once."""
        # One per question: what is late for one asker is no concern of another.
        teacher = InferenceTeacher(self._server.client(), timeout=self._timeout)
        answer = teacher(rows.copy())
        return answer.select(*teacher.out_keys, *STD_KEYS, strict=False)

    def stats(self) -> dict[str, float | int]:
        """The counters of the server: ``requests`` (rows), ``batches`` and so on."""
        return self._server.stats()

    def shutdown(self) -> None:
        """Ends the server."""
        self._server.shutdown()


class RayTeacher(TeacherElsewhere):
    """A teacher that lives in a Ray actor; see :class:`TeacherActor`.

    All rows of a question travel in one message. Cheap, and goes wherever Ray takes the
    handle of the actor: ``TeacherActionTransform(teacher_factory=functools.partial(
    RayTeacher, actor))``.

    Args:
        actor (ray.actor.ActorHandle): the handle.

    Keyword Args:
        in_keys (sequence of NestedKey, optional): what is sent. Defaults to ``None``:
            everything that the teacher is given.
        timeout (float): how long an answer may take, in seconds; where Ray restarts the
            actor, the time until the teacher is loaded again included. Defaults to
            ``60.0``.
        on_error ("raise" or "mask"): what becomes of rows when the actor has died (and
            is not restarted) or does not answer in time; as for
            :class:`~torchrl_rpd.teachers.inference.InferenceTeacher`. Defaults to
            ``"raise"``.
        action_dim (int, optional): ``A`` of the chunks ``[n, H, A]``; needed by
            ``"mask"`` until a first answer has told it. Defaults to ``None``.
        chunk_size (int): ``H``, likewise. Defaults to ``1``.

    Raises:
        ImportError: in the call, naming the extra to install.
        ValueError: for arguments out of range.
        TeacherUnavailable: in the call; see ``on_error``.

    Examples:
        >>> from torchrl_rpd.teachers.ray_actor import RayTeacher
        >>> teacher = RayTeacher(actor=None, on_error="mask", action_dim=7)
        >>> teacher.out_keys
        [('vla_action', 'chunk')]
    """

    def __init__(
        self,
        actor: Any,
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
        self._actor = actor

    def _ask(self, rows: TensorDictBase) -> TensorDictBase:
        ray = _import_ray()
        # A copy: pickling a view would send the whole tensor that it belongs to.
        question = self._actor.ask.remote(rows.to("cpu").clone())
        try:
            return ray.get(question, timeout=self.timeout)
        except ray.exceptions.GetTimeoutError as error:
            ray.cancel(question)  # if it still waits to be read
            raise TeacherUnavailable(
                f"No answer from the teacher's Ray actor within {self.timeout} s."
            ) from error
        except ray.exceptions.RayActorError as error:
            raise TeacherUnavailable(
                f"The teacher's Ray actor is gone: {type(error).__name__}: "
                f"{str(error).splitlines()[0]}"
            ) from error


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "RayTeacher needs Ray: pip install 'torchrl_rpd[ray]'"
        ) from error
    return ray
