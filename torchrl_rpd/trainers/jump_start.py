# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What PPO needs when the teacher acts in a part of the frames."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torchrl.trainers import Trainer

from torchrl_rpd.trainers._stateless import StatelessHook
from torchrl_rpd.transforms import JumpStartTransform


class OwnStepsAdvantage:
    """GAE whose advantages are zero where the teacher acted.

    There the student's action, which is in the rollout, was not executed: its advantage
    is unknown, and zero takes the frame out of PPO's policy loss (out of its gradient;
    it still counts in the mean). The advantages of the other frames are normalised to
    mean 0 and standard deviation 1 over the whole batch: use
    ``normalize_advantage=False`` in the loss, whose own normalisation would count the
    zeros. Value targets are left as they are.

    Args:
        gae: writes ``advantage`` and ``value_target``, e.g.
            :class:`~torchrl_rpd.objectives.FiniteHorizonGAE`.

    Keyword Args:
        jump_start_key (NestedKey): bool ``[*B, 1]``, True where the teacher led; see
            :class:`~torchrl_rpd.transforms.JumpStartTransform`. Default:
            ``"jump_start"``.
        teacher_mask_key (NestedKey): bool ``[*B, 1]``, True where it had a label, and so
            acted if it led. Default: ``"teacher_mask"``.
        advantage_key (NestedKey): float ``[*B, 1]``. Default: ``"advantage"``.

    Raises:
        KeyError: if the frames have neither of the two.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.trainers import OwnStepsAdvantage
        >>> advantage = torch.tensor([[9.0], [1.0], [3.0]])
        >>> teachers = torch.tensor([[True], [False], [False]])
        >>> frames = TensorDict(
        ...     advantage=advantage,
        ...     jump_start=teachers,
        ...     teacher_mask=torch.ones(3, 1, dtype=torch.bool),
        ...     batch_size=[3],
        ... )
        >>> gae = OwnStepsAdvantage(lambda td: td)  # the advantages are there already
        >>> gae(frames)["advantage"].flatten()
        tensor([ 0., -1.,  1.])
    """

    def __init__(
        self,
        gae: Callable[[TensorDictBase], TensorDictBase],
        *,
        jump_start_key: NestedKey = "jump_start",
        teacher_mask_key: NestedKey = "teacher_mask",
        advantage_key: NestedKey = "advantage",
    ) -> None:
        self.gae = gae
        self.jump_start_key = jump_start_key
        self.teacher_mask_key = teacher_mask_key
        self.advantage_key = advantage_key

    def __call__(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes the advantages of ``[*B, T]`` frames."""
        tensordict = self.gae(tensordict)
        led = tensordict.get(self.jump_start_key, None)
        labelled = tensordict.get(self.teacher_mask_key, None)
        if led is None or labelled is None:
            raise KeyError(
                f"OwnStepsAdvantage reads {self.jump_start_key!r} and "
                f"{self.teacher_mask_key!r}, which are not both there: put a "
                "JumpStartTransform and a TeacherActionTransform in the collector's env."
            )
        advantage = tensordict.get(self.advantage_key)
        own = (~(led & labelled)).to(advantage.dtype)
        count = own.sum().clamp_min(1.0)
        centred = (advantage - (advantage * own).sum() / count) * own
        scale = (centred.square().sum() / count).sqrt().clamp_min(1e-6)
        return tensordict.set(self.advantage_key, centred / scale)


class JumpStartSchedule(StatelessHook):
    """Lowers the share of episodes that the teacher leads into, linearly to 0.

    A function of the collected frames, for the episodes that start later.

    Args:
        transform (JumpStartTransform): its ``fraction`` is set.

    Keyword Args:
        start_frames (int): frames with the fraction that the transform has now.
        end_frames (int): frames after which it is 0.

    Raises:
        ValueError: unless ``0 <= start_frames < end_frames``.

    Examples:
        >>> from torchrl_rpd.trainers import JumpStartSchedule
        >>> from torchrl_rpd.transforms import JumpStartTransform
        >>> transform = JumpStartTransform(fraction=0.5)
        >>> hook = JumpStartSchedule(transform, start_frames=1000, end_frames=3000)
        >>> hook.set(2500)
        >>> transform.fraction
        0.125
    """

    def __init__(
        self, transform: JumpStartTransform, *, start_frames: int, end_frames: int
    ) -> None:
        if not 0 <= start_frames < end_frames:
            raise ValueError(
                "Expected 0 <= start_frames < end_frames, got "
                f"start_frames={start_frames} and end_frames={end_frames}."
            )
        self.transform = transform
        self.fraction = transform.fraction
        self.start_frames = start_frames
        self.end_frames = end_frames

    def set(self, frames: int) -> None:
        """Sets the fraction for ``frames``."""
        passed = (frames - self.start_frames) / (self.end_frames - self.start_frames)
        self.transform.fraction = self.fraction * (1.0 - min(max(passed, 0.0), 1.0))

    def __call__(self, batch: TensorDictBase) -> dict[str, float]:
        """Sets it for the trainer's frames; logs the share of frames it came to."""
        self.set(self._trainer.collected_frames)
        shown = batch.get(self.transform.jump_start_key).to(torch.float32)
        return {"train/jump_start": shown.mean().item()}

    def register(self, trainer: Trainer, name: str = "jump_start_schedule") -> None:
        """Registers at ``pre_steps_log``."""
        self._trainer = trainer
        self.set(trainer.collected_frames)
        trainer.register_op("pre_steps_log", self)
        trainer.register_module(name, self)
