# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A stand-in for ManiSkill's GPU simulation: one environment, many scenes.

Made of as many CPU environments, it keeps to what the adapter reads of ``BaseEnv``. As on
a GPU, all scenes are stepped at once, pictures are views of one buffer that the next
picture overwrites, counters are counted in place, and a reset takes the seeds of all
scenes together with the indices of those to reset.
"""

from __future__ import annotations

from types import SimpleNamespace

import gymnasium as gym
import torch
from mani_skill.envs.sapien_env import BaseEnv
from mani_skill.envs.utils.observations import parse_obs_mode_to_struct

from torchrl_rpd.envs import _vulkan

SIDE = 4


def picture(state: torch.Tensor) -> torch.Tensor:
    """``[N, SIDE, SIDE, 3]`` uint8 that tells one state ``[N, D]`` from another."""
    numbers = state[:, : SIDE * SIDE * 3 // 2].repeat(1, 3)[:, : SIDE * SIDE * 3]
    return (numbers * 1000).long().remainder(256).byte().reshape(-1, SIDE, SIDE, 3)


class BatchedManiSkill(BaseEnv):
    """``num_envs`` scenes of one task with the interface of GPU simulation."""

    def __init__(self, task_id, num_envs, *, obs_mode="rgb+state", picture_device=None):
        if not _vulkan.has_render_device():
            _vulkan.use_without_vulkan()
        self._scenes = [
            gym.make(
                task_id,
                obs_mode="state",
                control_mode="pd_ee_delta_pose",
                render_backend="none",
            ).unwrapped
            for _ in range(num_envs)
        ]
        first = self._scenes[0]
        self.num_envs = num_envs
        self.device = torch.device("cpu")
        self.agent = first.agent
        self.single_action_space = first.single_action_space
        self.spec = gym.spec(task_id)
        self.backend = SimpleNamespace(render_backend="sapien_cuda")
        self.reconfiguration_freq = 0
        self._obs_mode = obs_mode
        self.obs_mode_struct = parse_obs_mode_to_struct(obs_mode)
        self._reward_mode = first.reward_mode
        self._sensors = {"base_camera": None}
        self._agent_sensor_configs = {}
        self._human_render_cameras = {}
        self._elapsed_steps = torch.zeros(num_envs, dtype=torch.int32)
        self._buffer = torch.zeros(
            num_envs, SIDE, SIDE, 3, dtype=torch.uint8, device=picture_device
        )
        self._states = torch.cat([s._last_obs for s in self._scenes])
        self._infos = [s.get_info() for s in self._scenes]
        self.resets = []
        self._last_obs = self._observe()

    def _observe(self):
        if not self.obs_mode_struct.visual.rgb:
            return self._states
        if self._buffer.device.type == "cpu":
            self._buffer.copy_(picture(self._states))
        return {
            "state": self._states,
            "sensor_data": {"base_camera": {"rgb": self._buffer}},
        }

    def get_info(self):
        return {
            "elapsed_steps": self._elapsed_steps,
            "success": torch.cat([info["success"] for info in self._infos]),
        }

    def reset(self, seed=None, options=None):
        rows = (options or {}).get("env_idx", torch.arange(self.num_envs))
        assert len(seed) == self.num_envs
        self.resets.append((list(seed), rows.tolist()))
        for row in rows.tolist():
            obs, self._infos[row] = self._scenes[row].reset(seed=seed[row])
            self._states[row] = obs[0]
        self._elapsed_steps[rows] = 0
        return self._observe(), self.get_info()

    def step(self, action):
        assert action.shape[0] == self.num_envs
        rewards = []
        for row, scene in enumerate(self._scenes):
            obs, reward, _, _, self._infos[row] = scene.step(action[row : row + 1])
            self._states[row] = obs[0]
            rewards.append(reward)
        self._elapsed_steps += 1
        info = self.get_info()
        never = torch.zeros(self.num_envs, dtype=torch.bool)
        terminated = info["success"].clone()
        return self._observe(), torch.cat(rewards), terminated, never, info

    def close(self):
        for scene in self._scenes:
            scene.close()
