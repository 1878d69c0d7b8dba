# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The grasp query of one simulated robot, short where nothing is touched.

``Panda.is_grasping`` costs a quarter of a simulation step: it asks for all contacts twice
and computes angles from forces that are zero in most steps. Where a finger does not touch
the object its force is exactly zero, which is below any threshold, and the answer is
known. Only where both fingers touch it does the stock method decide.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mani_skill.envs.sapien_env import BaseEnv


def use_fast_grasp(env: BaseEnv) -> None:
    """Shortens the grasp query of one CPU environment; its answers stay the same.

    Robots without two fingers are left alone. It stays in place when ManiSkill rebuilds
    the robot.
    """
    _install(env.agent)
    if getattr(env._load_agent, "installs_fast_grasp", False):
        return
    load_agent = env._load_agent

    @functools.wraps(load_agent)
    def load_and_install(*args: Any, **kwargs: Any) -> None:
        load_agent(*args, **kwargs)
        _install(env.agent)

    load_and_install.installs_fast_grasp = True  # type: ignore[attr-defined]
    env._load_agent = load_and_install


def _install(agent: Any) -> None:
    fingers = [getattr(agent, name, None) for name in ("finger1_link", "finger2_link")]
    if None in fingers or agent.scene.gpu_sim_enabled:
        return
    stock = type(agent).is_grasping

    def is_grasping(
        object: Any, min_force: float = 0.5, max_angle: float = 85
    ) -> torch.Tensor:
        if min_force <= 0:
            return stock(agent, object, min_force, max_angle)
        target = object._bodies[0].entity
        bodies = [finger._bodies[0].entity for finger in fingers]
        touched = set()
        for contact in agent.scene.px.get_contacts():
            first, second = (body.entity for body in contact.bodies)
            if second == target:
                first, second = second, first
            if first == target and second in bodies:
                touched.add(bodies.index(second))
                if len(touched) == len(bodies):
                    return stock(agent, object, min_force, max_angle)
        return torch.zeros(1, dtype=torch.bool)

    agent.is_grasping = is_grasping
