# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Schedules of the distillation coefficient."""

from __future__ import annotations

import math
from typing import Literal

from torchrl.trainers import Trainer

from torchrl_rpd.objectives import DistillPPOLoss
from torchrl_rpd.trainers._stateless import StatelessHook
from torchrl_rpd.transforms import TeacherActionTransform

ScheduleKind = Literal["constant", "linear", "cosine"]


def distill_coeff_at(
    frames: int,
    *,
    kind: ScheduleKind,
    init: float,
    end: float,
    start_frames: int,
    end_frames: int,
) -> float:
    """The coefficient after ``frames`` collected frames.

    - ``"constant"``: ``init``.
    - ``"linear"`` and ``"cosine"``: ``init`` until ``start_frames``, ``end`` from
      ``end_frames`` on, and a straight line or half a cosine between.

    With ``init=1, end=0, start_frames=0`` the cosine is the released code's
    ``0.5 * cos(pi * step / max_ppd_anneal_steps) + 0.5``.

    Examples:
        >>> from torchrl_rpd.trainers import distill_coeff_at
        >>> at = dict(init=1.0, end=0.0, start_frames=0, end_frames=100)
        >>> [round(distill_coeff_at(f, kind="cosine", **at), 3) for f in (0, 50, 100)]
        [1.0, 0.5, 0.0]
        >>> distill_coeff_at(25, kind="linear", **at)
        0.75
    """
    if kind == "constant" or frames <= start_frames:
        return init
    if frames >= end_frames:
        return end
    progress = (frames - start_frames) / (end_frames - start_frames)
    left = 1 - progress
    if kind == "cosine":
        left = 0.5 * math.cos(math.pi * progress) + 0.5
    return end + (init - end) * left


class DistillCoeffSchedule(StatelessHook):
    """Sets ``loss.distill_coeff`` before the updates of each batch.

        When the coefficient reaches 0 the teacher is switched off, too: it is not asked any
        more. The coefficient is a function of the collected frames, so that a resumed run
        goes on where it was.

    Args:
        loss (DistillPPOLoss): the loss whose coefficient is set.

    Keyword Args:
        kind (str): ``"constant"``, ``"linear"`` or ``"cosine"`` (the paper's code), see
            :func:`distill_coeff_at`. Default: ``"constant"``.
        init (float): the first value.
        end (float): the last value. Default: ``0.0``.
        start_frames (int): frames with the first value. Default: ``0``.
        end_frames (int, optional): frames after which the last value holds.
        transform (TeacherActionTransform, optional): switched off at 0.

    Examples:
        >>> from torchrl_rpd.objectives import DistillPPOLoss
        >>> from torchrl_rpd.students import mlp_actor_critic
        >>> from torchrl_rpd.trainers import DistillCoeffSchedule
        >>> student = mlp_actor_critic(4, 2)
        >>> loss = DistillPPOLoss(student.actor, student.critic)
        >>> schedule = DistillCoeffSchedule(
        ...     loss, kind="linear", init=2.0, end=0.5, end_frames=1000
        ... )
        >>> schedule.set(500)
        >>> float(loss.distill_coeff)
        1.25
    """

    def __init__(
        self,
        loss: DistillPPOLoss,
        *,
        kind: ScheduleKind = "constant",
        init: float,
        end: float = 0.0,
        start_frames: int = 0,
        end_frames: int | None = None,
        transform: TeacherActionTransform | None = None,
    ) -> None:
        if kind not in ("constant", "linear", "cosine"):
            raise ValueError(f"kind is 'constant', 'linear' or 'cosine', got {kind!r}.")
        if init < 0 or end < 0:
            raise ValueError(
                f"Coefficients are not negative, got init={init}, end={end}."
            )
        if kind != "constant" and (end_frames is None or end_frames <= start_frames):
            raise ValueError(
                f"kind={kind!r} needs end_frames > start_frames, got end_frames="
                f"{end_frames} and start_frames={start_frames}."
            )
        self.loss = loss
        self.transform = transform
        self.kind = kind
        self.init = init
        self.end = end
        self.start_frames = start_frames
        self.end_frames = start_frames if end_frames is None else end_frames

    def set(self, frames: int) -> None:
        """Sets the coefficient (and the teacher's switch) for ``frames``."""
        value = distill_coeff_at(
            frames,
            kind=self.kind,
            init=self.init,
            end=self.end,
            start_frames=self.start_frames,
            end_frames=self.end_frames,
        )
        # A number is copied into the loss's buffer.
        self.loss.distill_coeff = value  # type: ignore[assignment]
        if self.transform is not None and value == 0 and self.transform.enabled:
            self.transform.enabled = False

    def __call__(self) -> None:
        """Sets the coefficient for the trainer's frames."""
        self.set(self._trainer.collected_frames)

    def register(self, trainer: Trainer, name: str = "distill_coeff_schedule") -> None:
        """Registers at ``pre_optim_steps`` and sets the coefficient at once."""
        self._trainer = trainer
        self.set(trainer.collected_frames)
        trainer.register_op("pre_optim_steps", self)
        trainer.register_module(name, self)
