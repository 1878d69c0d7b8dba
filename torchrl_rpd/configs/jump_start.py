# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Configuration of what the teacher does itself, and of what is learned from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING
from torchrl.trainers import TrainerHookBase
from torchrl.trainers.algorithms.configs.hooks import HookConfig
from torchrl.trainers.algorithms.configs.transforms import TransformConfig

from torchrl_rpd.configs._late import LateHook, find_transform
from torchrl_rpd.configs._plain import with_keys
from torchrl_rpd.trainers import CompetenceMask, JumpStartSchedule
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
    whole_episodes: int = 0
    jump_start_key: Any = "jump_start"
    teacher_episode_key: Any = "teacher_episode"
    action_key: Any = "action"
    teacher_action_key: Any = "teacher_action"
    teacher_mask_key: Any = "teacher_mask"
    seed: int = 0
    _target_: str = "torchrl_rpd.configs.jump_start.make_jump_start"
    _convert_: str = "all"


def make_jump_start(**kwargs: Any) -> JumpStartTransform:
    """Builds the transform of a :class:`JumpStartTransformConfig`."""
    keys = [name for name in kwargs if name.endswith("_key")]
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


@dataclass
class CompetenceMaskConfig(HookConfig):
    """Hydra configuration for :class:`~torchrl_rpd.trainers.CompetenceMask`.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import CompetenceMaskConfig
        >>> mask = instantiate(CompetenceMaskConfig(min_ratio=0.3), _partial_=True)
        >>> mask(gae=lambda td: td).min_ratio
        0.3
    """

    gae: Any = MISSING
    min_ratio: float = 0.5
    network: Any = None
    observation_key: Any = "observation"
    success_key: Any = "success"
    done_key: Any = "done"
    step_count_key: Any = "step_count"
    teacher_episode_key: Any = "teacher_episode"
    teacher_mask_key: Any = "teacher_mask"
    seed: int = 0
    _partial_: bool = False
    _target_: str = "torchrl_rpd.configs.jump_start.make_competence_mask"
    _convert_: str = "all"


def make_competence_mask(**kwargs: Any) -> CompetenceMask:
    """Builds the mask of a :class:`CompetenceMaskConfig`."""
    keys = [name for name in kwargs if name.endswith("_key")]
    return CompetenceMask(**with_keys(kwargs, single=keys))
