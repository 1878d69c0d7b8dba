# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Configuration of the environments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING
from torchrl.envs import EnvBase
from torchrl.trainers.algorithms.configs.envs import EnvConfig

from torchrl_rpd.envs import ManiSkillEnv


@dataclass
class ManiSkillEnvConfig(EnvConfig):
    """Hydra configuration for :class:`~torchrl_rpd.envs.ManiSkillEnv`.

    Every argument of the constructor is a field. ``make_kwargs`` holds what the
    constructor passes on to ``gym.make``, e.g. ``{robot_uids: panda}``.

    Examples:
        >>> from hydra.utils import instantiate
        >>> from torchrl_rpd.configs import ManiSkillEnvConfig
        >>> env = instantiate(ManiSkillEnvConfig(task_id="PushCube-v1", num_envs=2))
        >>> env.batch_size  # of ManiSkillEnv("PushCube-v1", num_envs=2)
        torch.Size([2])
    """

    task_id: str = MISSING
    num_envs: int = 1
    num_workers: int = 1
    obs_mode: str = "state"
    control_mode: str = "pd_ee_delta_pose"
    reward_mode: str = "normalized_dense"
    camera: Any = None
    image_size: Any = None
    sensor_configs: Any = None
    human_render_camera_configs: Any = None
    extra_cameras: Any = None
    teacher_camera: str | None = None
    teacher_image_size: Any = None
    from_pixels: bool = False
    language_instruction: Any = False
    ignore_terminations: bool = False
    sim_backend: str = "auto"
    render_backend: str = "auto"
    fast_controller: bool = False
    light_visuals: bool = False
    max_episode_steps: int | None = None
    make_kwargs: dict[str, Any] = field(default_factory=dict)
    _target_: str = "torchrl_rpd.configs.envs.make_maniskill_env"
    _convert_: str = "all"


def make_maniskill_env(
    *, make_kwargs: dict[str, Any] | None = None, **kwargs: Any
) -> EnvBase:
    """Builds the environment of a :class:`ManiSkillEnvConfig`."""
    return ManiSkillEnv(**kwargs, **(make_kwargs or {}))
