# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The task table against ManiSkill itself."""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter

import pytest

from torchrl_rpd.envs import TASKS, ManiSkillEnv, Task


def test_the_tasks_of_the_paper():
    assert all(name == task.task_id for name, task in TASKS.items())
    assert Counter(task.split for task in TASKS.values()) == {
        "trained": 6,
        "hold-out": 2,
        "re-interpreted": 2,
        "not in training": 2,
        "not stated": 1,
    }
    for task in TASKS.values():
        assert task.instruction[0].islower() and not task.instruction.endswith(".")


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TASKS["PickCube-v1"].instruction = "do something else"


@pytest.mark.maniskill
@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.task_id)
def test_against_mani_skill(task: Task):
    env = ManiSkillEnv(task.task_id, reward_mode=task.reward_modes[0])
    base = env._env[0]
    registration = importlib.import_module("mani_skill.utils.registration")
    registered = registration.REGISTERED_ENVS[task.task_id]
    assert registered.max_episode_steps == task.max_episode_steps
    assert env._max_episode_steps == task.max_episode_steps
    assert set(registered.cls.SUPPORTED_REWARD_MODES) == set(task.reward_modes)
    assert env.action_spec.shape == (1, task.action_dim)
    assert env.observation_spec["observation"].shape == (1, task.state_dim)
    # The cameras as ManiSkill would set them up, which needs no renderer.
    sensor = importlib.import_module("mani_skill.sensors.camera")
    cameras = [
        *sensor.parse_camera_configs(base._default_sensor_configs),
        *sensor.parse_camera_configs(base.agent._sensor_configs),
    ]
    assert tuple(cameras) == task.cameras
    env.close()


if __name__ == "__main__":
    pytest.main([__file__])
