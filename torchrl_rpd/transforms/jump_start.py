# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The teacher acts for the first steps of some episodes."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase, unravel_key
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.data.tensor_specs import Categorical, Composite, TensorSpec
from torchrl.envs.transforms import Transform


class JumpStartTransform(Transform):
    r"""Lets the teacher act for the first steps of some episodes, then the student.

    With sparse reward, a student that never succeeds has nothing to refine: a teacher
    whose error is drawn anew in each episode averages to labels that never grasp. Here
    the teacher itself leads into a part of the episodes, far enough to succeed now and
    then, and the student takes over where it stands: it learns the end of the task
    first, and what comes before it as it is let in earlier. That is jump-start
    reinforcement learning with a random length (JSRL-Random: Uchendu et al.,
    https://arxiv.org/abs/2204.02372); what the teacher does is its label.

    At a reset, each row draws with probability ``fraction`` for how many steps the
    teacher leads, uniformly from 1 to ``max_steps``; else 0. Which frames it leads in is
    written beside them. It acts there if there is a label (``teacher_mask``); else the
    student does. The rollout keeps the student's own action and its log-probability,
    sampled where it is; the replacement happens on the way to the env only. The
    advantage of the frames in which the teacher acted says nothing about the student's
    action: wrap GAE in :class:`~torchrl_rpd.trainers.OwnStepsAdvantage`, which takes
    them out of the policy loss. The critic and the distillation term learn from them as
    well. As the teacher comes first and never again in an episode, the returns of the
    other frames are the student's own.

    Place it before :class:`~torchrl_rpd.transforms.TeacherActionTransform`, which then
    asks the teacher wherever it leads, however few other frames are labelled:
    ``Compose(StepCounter(), JumpStartTransform(), TeacherActionTransform(teacher,
    query_fraction=0.1, always_query_key="jump_start"))``.

    Keyword Args:
        fraction (float): probability in ``[0, 1]`` that the teacher leads into an
            episode. It can be changed at any time, for the episodes that start later;
            see :class:`~torchrl_rpd.trainers.JumpStartSchedule`. Defaults to ``0.5``.
        max_steps (int): for at most how many steps, at least 1: about as many as the
            teacher needs for the task. Defaults to ``30``.
        jump_start_key (NestedKey): ``[*B, 1]`` bool, True where the teacher leads.
            Defaults to ``"jump_start"``.
        action_key (NestedKey): Defaults to ``"action"``.
        teacher_action_key (NestedKey): Defaults to ``"teacher_action"``.
        teacher_mask_key (NestedKey): Defaults to ``"teacher_mask"``.
        seed (int): of the generator that is drawn from; torch's global one is left
            alone. Defaults to ``0``.

    Raises:
        ValueError: for a ``fraction`` or ``max_steps`` out of range.
        KeyError: on stepping an env without the teacher's entries.

    Examples:
        >>> import torch
        >>> from torchrl.envs import Compose, TransformedEnv
        >>> from torchrl_rpd.envs import ManiSkillEnv
        >>> from torchrl_rpd.teachers import ScriptedTeacher
        >>> from torchrl_rpd.transforms import JumpStartTransform, TeacherActionTransform
        >>> env = TransformedEnv(
        ...     ManiSkillEnv("PushCube-v1"),
        ...     Compose(
        ...         JumpStartTransform(fraction=1.0, max_steps=1),
        ...         TeacherActionTransform(ScriptedTeacher("PushCube-v1")),
        ...     ),
        ... )
        >>> env.rollout(3)["jump_start"].flatten()  # the first step is the teacher's
        tensor([ True, False, False])
    """

    def __init__(
        self,
        *,
        fraction: float = 0.5,
        max_steps: int = 30,
        jump_start_key: NestedKey = "jump_start",
        action_key: NestedKey = "action",
        teacher_action_key: NestedKey = "teacher_action",
        teacher_mask_key: NestedKey = "teacher_mask",
        seed: int = 0,
    ) -> None:
        if max_steps < 1:
            raise ValueError(f"max_steps must be at least 1, got {max_steps}.")
        self.jump_start_key = unravel_key(jump_start_key)
        self.action_key = unravel_key(action_key)
        self.teacher_action_key = unravel_key(teacher_action_key)
        self.teacher_mask_key = unravel_key(teacher_mask_key)
        super().__init__(out_keys=[self.jump_start_key])
        self.fraction = fraction
        self.max_steps = max_steps
        self._generator = torch.Generator().manual_seed(seed)
        # How many steps of the episode are still the teacher's, int64 [*B].
        self._left: Tensor | None = None

    @property
    def fraction(self) -> float:
        """Probability that the teacher leads into an episode that starts from now on."""
        return self._fraction

    @fraction.setter
    def fraction(self, value: float) -> None:
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"fraction must lie in [0, 1], got {value}.")
        self._fraction = float(value)

    # ------------------------------------------------------------------ in an env
    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        batch_size = tensordict_reset.batch_size
        lead = torch.rand(batch_size, generator=self._generator) < self.fraction
        steps = torch.randint(
            1, self.max_steps + 1, batch_size, generator=self._generator
        )
        drawn = torch.where(lead, steps, 0)
        reset = tensordict.get("_reset", None)
        if self._left is None or reset is None:
            self._left = drawn
        else:
            rows = reset.reshape(batch_size).cpu()
            self._left = torch.where(rows, drawn, self._left)
        return self._write(tensordict_reset)

    def _step(
        self, tensordict: TensorDictBase, next_tensordict: TensorDictBase
    ) -> TensorDictBase:
        if self._left is None:
            raise RuntimeError("JumpStartTransform was stepped before its env's reset.")
        left = (self._left - 1).clamp_min(0)
        stepped = tensordict.get("_step", None)
        if stepped is not None:  # rows that stand still
            left = torch.where(stepped.reshape(left.shape).cpu(), left, self._left)
        self._left = left
        return self._write(next_tensordict)

    def _write(self, tensordict: TensorDictBase) -> TensorDictBase:
        assert self._left is not None
        leads = (self._left > 0).unsqueeze(-1)
        return tensordict.set(self.jump_start_key, leads.to(tensordict.device))

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        if self.parent is None:  # in a replay buffer: nothing acts
            return tensordict
        leads = tensordict.get(self.jump_start_key, None)
        if leads is None:
            raise KeyError(
                f"JumpStartTransform finds no {self.jump_start_key!r} beside the action: "
                "step the env with the tensordict that its reset or step returned."
            )
        label = tensordict.get(self.teacher_action_key, None)
        mask = tensordict.get(self.teacher_mask_key, None)
        if label is None or mask is None:
            raise KeyError(
                f"JumpStartTransform finds no {self.teacher_action_key!r} and "
                f"{self.teacher_mask_key!r} beside the action: have a "
                "TeacherActionTransform in the same env."
            )
        action = tensordict.get(self.action_key)
        acts = leads & mask
        taken = torch.where(acts, label.to(action.dtype), action)
        return tensordict.set(self.action_key, taken)

    def transform_observation_spec(self, observation_spec: TensorSpec) -> TensorSpec:
        """Adds the flag."""
        assert isinstance(observation_spec, Composite)
        observation_spec[self.jump_start_key] = Categorical(
            2,
            shape=(*observation_spec.shape, 1),
            dtype=torch.bool,
            device=observation_spec.device,
        )
        return observation_spec

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Outside of an env there is nobody to lead: returns the frames as they are."""
        return tensordict

    # ------------------------------------------------------------------ state
    def get_extra_state(self) -> dict[str, Any]:
        """Generator, probability and running episodes, for the ``state_dict``."""
        return {
            "generator": self._generator.get_state(),
            "fraction": self.fraction,
            "left": self._left,
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`get_extra_state` returned."""
        self._generator.set_state(state["generator"].cpu())
        self.fraction = state["fraction"]
        self._left = state["left"]
