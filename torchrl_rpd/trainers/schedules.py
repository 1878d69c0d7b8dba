# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Schedules of the distillation coefficient."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from tensordict import NestedKey, TensorDictBase
from torchrl.trainers import Trainer, TrainerHookBase

from torchrl_rpd.objectives import DistillPPOLoss
from torchrl_rpd.trainers._scores import EpisodeScores
from torchrl_rpd.transforms import TeacherActionTransform

FrameScheduleKind = Literal["constant", "linear", "cosine"]
ScheduleKind = Literal["constant", "linear", "cosine", "return_ratio"]


def distill_coeff_at(
    frames: int,
    *,
    kind: FrameScheduleKind,
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


def return_ratio_coeff(
    student: float, teacher: float, *, init: float = 1.0, end: float = 0.0
) -> float:
    """The coefficient of a student that is so much as good as its teacher.

    ``end + (init - end) * max(1 - student / teacher, 0)``: with the defaults the weaning
    of QDagger (Agarwal et al., "Reincarnating Reinforcement Learning", NeurIPS 2022,
    arXiv 2206.01626) as CleanRL's ``qdagger_dqn_atari_impalacnn.py`` computes it,
    ``max(1 - mean(episodic_returns) / mean(teacher_episodic_returns), 0)``. Never over
    ``init``, also for a student whose score is negative.

    Args:
        student (float): its mean score: return, or success rate.
        teacher (float): the teacher's, over 0.

    Keyword Args:
        init (float): for a student that scores nothing. Default: ``1.0``.
        end (float): for a student that scores as much as the teacher, or more. Default:
            ``0.0``.

    Examples:
        >>> from torchrl_rpd.trainers import return_ratio_coeff
        >>> [return_ratio_coeff(s, 8.0) for s in (0.0, 2.0, 8.0, 9.0)]
        [1.0, 0.75, 0.0, 0.0]
        >>> return_ratio_coeff(4.0, 8.0, init=5.0, end=1.0)
        3.0
    """
    left = min(max(1 - student / teacher, 0.0), 1.0)
    return end + (init - end) * left


class DistillCoeffSchedule(TrainerHookBase):
    """Sets ``loss.distill_coeff`` before the updates of each batch.

    The kinds ``"constant"``, ``"linear"`` and ``"cosine"`` (the released code) are
    functions of the collected frames, see :func:`distill_coeff_at`; ``"return_ratio"``
    (QDagger) falls as the student comes up to its teacher, see
    :func:`return_ratio_coeff`. With every kind, ``floor`` keeps the coefficient up, and
    ``switch_off_score`` ends distillation for good once the student's score has stopped
    falling at a height that is enough (the idea of VLAJS, Moroncelli et al., arXiv
    2604.13733; the rule here is our reading of reports about it).

    Where the coefficient is 0 for good, the teacher is switched off, too: it is asked no
    more. A ``"return_ratio"`` of 0 is not for good, since a student that gets worse is
    helped again: give ``switch_off_score`` to end its queries.

    How good the student is comes from the episodes that it collects, with sampled
    actions: each measurement is the mean over the episodes since the one before, at
    least ``score_episodes`` of them. Measurements and the switch are part of the
    ``state_dict``: a resumed run goes on where it was. Logged: ``schedule/distill_coeff``
    and, where it is measured, ``schedule/score``.

    Args:
        loss (DistillPPOLoss): the loss whose coefficient is set.

    Keyword Args:
        kind (str): ``"constant"``, ``"linear"``, ``"cosine"`` or ``"return_ratio"``.
            Default: ``"constant"``.
        init (float): the first value.
        end (float): the last value; with ``"return_ratio"`` that of a student as good as
            its teacher. Default: ``0.0``.
        start_frames (int): frames with the first value. Default: ``0``.
        end_frames (int, optional): frames after which the last value of ``"linear"`` and
            ``"cosine"`` holds.
        floor (float): the coefficient is never under it, until it is switched off.
            Default: ``0.0``.
        teacher_score (float, optional): the teacher's mean score, over 0, for
            ``"return_ratio"``: :func:`~torchrl_rpd.evaluation.evaluate` measures it.
        switch_off_score (float, optional): the student's score from which distillation
            may be switched off. Default: ``None``, never.
        switch_off_rises (int): how often in a row a measurement must not be under the
            one before. Default: ``3``.
        score_key (NestedKey): the score of an episode, ``[*B, T, 1]`` under ``"next"``,
            read where the episode ends. Default: ``"episode_reward"``, the return
            that :class:`~torchrl.envs.RewardSum` writes. Prefer ``"success"`` where
            success ends an episode and every step is rewarded: there, a better student
            collects less.
        score_episodes (int): the least number of episodes of a measurement (CleanRL's
            QDagger takes the last 10). Default: ``50``.
        transform (TeacherActionTransform, optional): switched off at 0.

    Raises:
        ValueError: for an unknown kind, negative coefficients, a floor over ``init``, and
            where what the kind needs is missing.
        KeyError: if the batch does not hold the score.

    Examples:
        >>> from torchrl_rpd.objectives import DistillPPOLoss
        >>> from torchrl_rpd.students import mlp_actor_critic
        >>> from torchrl_rpd.trainers import DistillCoeffSchedule
        >>> student = mlp_actor_critic(4, 2)
        >>> loss = DistillPPOLoss(student.actor, student.critic)
        >>> schedule = DistillCoeffSchedule(
        ...     loss, kind="linear", init=2.0, end=0.5, end_frames=1000, floor=0.75
        ... )
        >>> schedule.set(500)
        >>> float(loss.distill_coeff)
        1.25
        >>> schedule.set(1000)
        >>> float(loss.distill_coeff)
        0.75

        Off for good once the success rate has not fallen twice and is 0.6 or more:

        >>> import torch
        >>> from tensordict import TensorDict
        >>> schedule = DistillCoeffSchedule(
        ...     loss, init=1.0, switch_off_score=0.6, switch_off_rises=2,
        ...     score_key="success", score_episodes=2,
        ... )
        >>> for successes in ([0, 1], [0, 1], [1, 1], [0, 0]):
        ...     after = {"success": torch.tensor(successes).view(2, 1, 1),
        ...              "done": torch.ones(2, 1, 1).bool()}
        ...     schedule.observe(TensorDict({"next": after}, batch_size=[2, 1]))
        ...     schedule.set(0)
        ...     print(float(loss.distill_coeff))
        1.0
        1.0
        0.0
        0.0
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
        floor: float = 0.0,
        teacher_score: float | None = None,
        switch_off_score: float | None = None,
        switch_off_rises: int = 3,
        score_key: NestedKey = "episode_reward",
        score_episodes: int = 50,
        transform: TeacherActionTransform | None = None,
    ) -> None:
        if kind not in get_args(ScheduleKind):
            raise ValueError(f"kind is one of {get_args(ScheduleKind)}, got {kind!r}.")
        if init < 0 or end < 0 or floor < 0:
            raise ValueError(
                "Coefficients are not negative, got "
                f"init={init}, end={end}, floor={floor}."
            )
        if floor > init:
            raise ValueError(f"floor={floor} is over the first value, init={init}.")
        if kind in ("linear", "cosine") and (
            end_frames is None or end_frames <= start_frames
        ):
            raise ValueError(
                f"kind={kind!r} needs end_frames > start_frames, got end_frames="
                f"{end_frames} and start_frames={start_frames}."
            )
        if kind == "return_ratio" and (teacher_score is None or teacher_score <= 0):
            raise ValueError(
                "kind='return_ratio' needs teacher_score, over 0 and in the unit of "
                f"score_key={score_key!r}, got {teacher_score}. Measure it with "
                "torchrl_rpd.evaluation.evaluate(env, teacher, episodes=...)."
            )
        if switch_off_rises < 1 or score_episodes < 1:
            raise ValueError(
                "switch_off_rises and score_episodes are at least 1, got "
                f"{switch_off_rises} and {score_episodes}."
            )
        self.loss = loss
        self.transform = transform
        self.kind = kind
        self.init = init
        self.end = end
        self.start_frames = start_frames
        self.end_frames = start_frames if end_frames is None else end_frames
        self.floor = floor
        self.teacher_score = teacher_score
        self.switch_off_score = switch_off_score
        self.off = False
        self._scores: EpisodeScores | None = None
        if kind == "return_ratio" or switch_off_score is not None:
            self._scores = EpisodeScores(
                score_key, episodes=score_episodes, keep=switch_off_rises + 1
            )

    def coefficient(self, frames: int) -> float:
        """The coefficient after ``frames`` and the episodes that were observed."""
        if self.off:
            return 0.0
        if self.kind != "return_ratio":
            value = distill_coeff_at(
                frames,
                kind=self.kind,
                init=self.init,
                end=self.end,
                start_frames=self.start_frames,
                end_frames=self.end_frames,
            )
        else:
            value = self._by_score(frames)
        return max(value, self.floor)

    def _by_score(self, frames: int) -> float:
        student = None if self._scores is None else self._scores.latest
        if student is None or self.teacher_score is None or frames < self.start_frames:
            return self.init
        return return_ratio_coeff(
            student, self.teacher_score, init=self.init, end=self.end
        )

    def _zero_for_good(self, frames: int) -> bool:
        if self.coefficient(frames) != 0:
            return False
        past = self.kind in ("linear", "cosine") and frames >= self.end_frames
        never = self.init == 0 and (self.kind == "constant" or self.end == 0)
        return self.off or past or never

    def set(self, frames: int) -> None:
        """Sets the coefficient (and the teacher's switch) for ``frames``."""
        # A number is copied into the loss's buffer.
        self.loss.distill_coeff = self.coefficient(frames)  # type: ignore[assignment]
        if (
            self.transform is not None
            and self.transform.enabled
            and self._zero_for_good(frames)
        ):
            self.transform.enabled = False

    def observe(self, batch: TensorDictBase) -> None:
        """Takes note of the episodes that end in ``[*B, T]`` frames.

        A training loop of your own calls it before :meth:`set`; the trainer does so by
        itself.
        """
        if self._scores is None or self.off:
            return
        self._scores.add(batch)
        if self.switch_off_score is not None:
            self.off = self._scores.holds(self.switch_off_score)

    def _observe_and_log(self, batch: TensorDictBase) -> dict[str, Any]:
        self.observe(batch)
        coefficient = self.coefficient(self._trainer.collected_frames)
        out: dict[str, Any] = {"schedule/distill_coeff": coefficient}
        if self._scores is not None and self._scores.latest is not None:
            out["schedule/score"] = self._scores.latest
        return out

    def __call__(self) -> None:
        """Sets the coefficient for the trainer's frames."""
        self.set(self._trainer.collected_frames)

    def register(self, trainer: Trainer, name: str = "distill_coeff_schedule") -> None:
        """Registers at ``pre_steps_log`` and ``pre_optim_steps``, and sets at once."""
        self._trainer = trainer
        self.set(trainer.collected_frames)
        trainer.register_op("pre_steps_log", self._observe_and_log)
        trainer.register_op("pre_optim_steps", self)
        trainer.register_module(name, self)

    def state_dict(self) -> dict[str, Any]:
        """The switch and the measurements."""
        scores = {} if self._scores is None else self._scores.state_dict()
        return {"off": self.off, "scores": scores}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self.off = state_dict["off"]
        if self._scores is not None:
            self._scores.load_state_dict(state_dict["scores"])
