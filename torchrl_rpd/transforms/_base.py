# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What a transform with a teacher can be told, and how it is copied and saved."""

from __future__ import annotations

import copy
from typing import Any, Self

from torchrl.envs.transforms import Transform

from torchrl_rpd.transforms._deferred import LabelQueue
from torchrl_rpd.transforms._handle import TeacherHandle
from torchrl_rpd.transforms._labeller import Labeller
from torchrl_rpd.transforms._placement import enclosing_env
from torchrl_rpd.transforms._stats import TeacherStats


class LabellingTransform(Transform):
    """Switch, counters, copies and state of a transform that owns a labeller.

    Args:
        handle (TeacherHandle): the teacher.
        labeller (Labeller): what asks it.
        **kwargs: ``in_keys`` and ``out_keys`` of the transform.
    """

    def __init__(
        self, handle: TeacherHandle, labeller: Labeller, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._handle = handle
        self._labeller = labeller
        self._labels_on_extend = False

    @property
    def query_fraction(self) -> float:
        """The probability with which a frame is labelled."""
        return self._labeller.query_fraction

    @property
    def replan_interval(self) -> int:
        """For how many steps a chunk is followed."""
        return self._labeller.replan_interval

    @property
    def max_outstanding(self) -> int:
        """With ``deferred=True``, how many steps may wait for their labels.

        More is an error: they are fetched too late, or never. A step with a reset counts
        twice. 1000 unless set.

        Raises:
            RuntimeError: without ``deferred=True``.
        """
        return self._queue().limit

    @max_outstanding.setter
    def max_outstanding(self, value: int) -> None:
        self._queue().limit = value

    def _queue(self) -> LabelQueue:
        queue = self._labeller.shared.queue
        if queue is None:
            raise RuntimeError("Nothing is outstanding without deferred=True.")
        return queue

    # ------------------------------------------------------------------ switch, counts
    @property
    def enabled(self) -> bool:
        """Whether the teacher is asked; if not, labels are zeros with mask False.

        Raises:
            RuntimeError: on setting it after the transform was sent to other processes,
                where the change would not arrive.
        """
        return self._labeller.shared.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.set_enabled(value)

    def set_enabled(self, value: bool) -> None:
        """Sets :attr:`enabled`; a method, so that it can be sent to workers.

        Inside a ``ParallelEnv``: ``env.transform.set_enabled(False)``, or
        ``getattr(env.transform.transforms, "1").set_enabled(False)`` for the second
        transform of a ``Compose``. TorchRL 0.14 passes such calls on to workers with
        shared buffers only; those of ``ParallelEnv(..., use_buffers=False)`` end with
        an ``AttributeError``.
        """
        if self._handle.crossed_process:
            raise RuntimeError(
                "This TeacherActionTransform was sent to other processes; setting "
                "enabled here does not reach the copies there. Call "
                "env.transform.set_enabled(...) on the ParallelEnv instead, or put the "
                "transform outside of it."
            )
        self._labeller.shared.enabled = value

    def stats(self) -> TeacherStats:
        """The counters of this process since the start or :meth:`reset_stats`.

        Returns:
            a dictionary with ``frames`` (rows that could have been labelled),
            ``queries`` (rows that the teacher was asked about), ``calls`` (batches of
            them), ``labelled`` (rows with mask True), ``clipped`` (labelled rows of
            which an entry was clipped), ``non_finite`` and ``no_ops`` (rows masked for
            that reason),
            ``incomplete`` (rows left out because observations of their history were
            missed) and ``seconds`` (wall-clock time in the teacher; on an accelerator
            the time to launch its work). With ``deferred=True`` it waits for what is
            under way: one call, after the labels of a batch were fetched.
        """
        self._labeller.shared.finish()
        return self._labeller.shared.stats.read()

    def reset_stats(self) -> None:
        """Sets the counters to zero."""
        self._labeller.shared.finish()
        self._labeller.shared.stats.reset()

    def pop_stats(self) -> TeacherStats:
        """Returns the counters and sets them to zero."""
        stats = self.stats()
        self.reset_stats()
        return stats

    # ------------------------------------------------------------------ copies, saving
    def clone(self) -> Self:
        """A copy without parent; teacher, switch and counters are shared with it."""
        out: Self = super().clone()
        out._labeller = self._labeller.clone()
        return out

    def __getstate__(self) -> dict[str, Any]:
        # What is remembered of the envs is the background's as long as it works.
        self._labeller.shared.finish()
        state: dict[str, Any] = super().__getstate__()
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Collectors make a deep copy of their postproc and label with that: switch and
        # counters must stay those of the original. A copy of an env has its own.
        if enclosing_env(self) is None:
            memo[id(self._labeller.shared)] = self._labeller.shared
        out = type(self).__new__(type(self))
        memo[id(self)] = out
        out.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return out

    def get_extra_state(self) -> dict[str, Any]:
        """Switch, generators, counters, chunks and history, for the ``state_dict``."""
        self._labeller.shared.finish()
        teacher_rng = self._handle.get_rng_state()
        return {
            **({} if teacher_rng is None else {"teacher_rng": teacher_rng}),
            "enabled": self.enabled,
            "generator": self._labeller.shared.generator.get_state(),
            "stats": dict(self.stats()),
            "memory": self._labeller.state(),
            "labels_on_extend": self._labels_on_extend,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`get_extra_state` returned.

        Labels that are outstanding stay those of the observations they are made of.
        """
        self._labeller.shared.finish()
        if self._labeller.shared.queue is not None:
            self._labeller.shared.queue.forgive()
        if "teacher_rng" in state:
            self._handle.set_rng_state(state["teacher_rng"])
        self._labeller.shared.enabled = bool(state["enabled"])
        self._labeller.shared.generator.set_state(state["generator"].cpu())
        self._labeller.shared.stats.load(state["stats"])
        self._labeller.load(state["memory"])
        self._labels_on_extend = bool(state["labels_on_extend"])
