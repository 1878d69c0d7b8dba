# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Configuration of the teacher's lead into episodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING
from torchrl.trainers import TrainerHookBase
from torchrl.trainers.algorithms.configs.hooks import HookConfig
from torchrl.trainers.algorithms.configs.transforms import TransformConfig

from torchrl_rpd.configs._late import LateHook, find_transform
from torchrl_rpd.configs._plain import with_keys
from torchrl_rpd.trainers import JumpStartSchedule
from torchrl_rpd.transforms import JumpStartTransform


@dataclass
class JumpStartTransformConfig(TransformConfig):
    """Hydra configuration for :class:`~torchrl_rpd.transforms.JumpStartTransform`.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import JumpStartTransformConfig
        >>> instantiate(JumpStartTransformConfig(fraction=0.3)).max_steps
        30
    """

    fraction: float = 0.5
    max_steps: int = 30
    jump_start_key: Any = "jump_start"
    action_key: Any = "action"
    teacher_action_key: Any = "teacher_action"
    teacher_mask_key: Any = "teacher_mask"
    seed: int = 0
    _target_: str = "torchrl_rpd.configs.jump_start.make_jump_start"
    _convert_: str = "all"


def make_jump_start(**kwargs: Any) -> JumpStartTransform:
    """Builds the transform of a :class:`JumpStartTransformConfig`."""
    keys = ("jump_start_key", "action_key", "teacher_action_key", "teacher_mask_key")
    return JumpStartTransform(**with_keys(kwargs, single=keys))


@dataclass
class JumpStartScheduleConfig(HookConfig):
    """Hydra configuration for :class:`~torchrl_rpd.trainers.JumpStartSchedule`.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import JumpStartScheduleConfig
        >>> config = JumpStartScheduleConfig(start_frames=0, end_frames=100)
        >>> instantiate(config).hook is None  # finds the transform later
        True
    """

    transform: Any = None
    start_frames: int = MISSING
    end_frames: int = MISSING
    _target_: str = "torchrl_rpd.configs.jump_start.make_jump_start_schedule"


def make_jump_start_schedule(
    *, transform: JumpStartTransform | None = None, **kwargs: Any
) -> TrainerHookBase:
    """Builds the hook of a :class:`JumpStartScheduleConfig`."""
    if transform is not None:
        return JumpStartSchedule(transform, **kwargs)
    return LateHook(
        lambda trainer: JumpStartSchedule(
            find_transform(trainer, JumpStartTransform), **kwargs
        )
    )
