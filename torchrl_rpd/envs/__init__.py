# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""ManiSkill3 environments for TorchRL."""

from torchrl_rpd.envs.cameras import CAMERA_VIEWS, CameraView
from torchrl_rpd.envs.maniskill import ManiSkillEnv
from torchrl_rpd.envs.tasks import TASKS, Task
from torchrl_rpd.envs.wrapper import ManiSkillWrapper

__all__ = [
    "CAMERA_VIEWS",
    "TASKS",
    "CameraView",
    "ManiSkillEnv",
    "ManiSkillWrapper",
    "Task",
]
