# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The grasp query of one simulated robot without small tensor operations.

``Panda.is_grasping`` costs a quarter of a simulation step of PickCube: it asks for all
contacts twice, and computes forces and angles with batched torch operations on three
numbers. Here the contacts are read once and the arithmetic is done in plain numbers, in
double precision: the answer can differ only where a force or an angle lies within
rounding (1e-6) of its threshold.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchrl_rpd.envs._agent import keep_installed

if TYPE_CHECKING:
    from mani_skill.envs.sapien_env import BaseEnv


def use_fast_grasp(env: BaseEnv) -> None:
    """Shortens the grasp query of one CPU environment.

    Robots other than the Panda are left alone. It stays in place when ManiSkill rebuilds
    the robot.
    """
    keep_installed(env, _install)


def _install(agent: Any) -> None:
    from mani_skill.agents.robots import Panda

    if type(agent).is_grasping is not Panda.is_grasping or agent.scene.gpu_sim_enabled:
        return
    # Each finger, and the sign of its y axis that points to where the gripper opens.
    fingers = [
        (agent.finger1_link._objs[0], 1.0),
        (agent.finger2_link._objs[0], -1.0),
    ]

    def is_grasping(
        object: Any, min_force: float = 0.5, max_angle: float = 85
    ) -> torch.Tensor:
        impulses = _impulses(
            agent.scene.px.get_contacts(),
            [link.entity for link, _ in fingers],
            object._bodies[0].entity,
        )
        holds = all(
            _presses(
                impulse / agent.scene.px.timestep,
                sign * _y_axis(link.entity_pose.q),
                min_force,
                max_angle,
            )
            for (link, sign), impulse in zip(fingers, impulses, strict=True)
        )
        return torch.tensor([holds])

    agent.is_grasping = is_grasping


def _impulses(contacts: list[Any], fingers: list[Any], target: Any) -> list[np.ndarray]:
    """The impulse of the target on each finger, in newton seconds."""
    totals = [np.zeros(3) for _ in fingers]
    for contact in contacts:
        first, second = (body.entity for body in contact.bodies)
        for total, finger in zip(totals, fingers, strict=True):
            if first == finger and second == target:
                sign = 1.0
            elif first == target and second == finger:
                sign = -1.0
            else:
                continue
            for point in contact.points:
                total += sign * point.impulse
    return totals


def _y_axis(q: np.ndarray) -> np.ndarray:
    """Second column of the rotation matrix of a unit quaternion (real part first)."""
    w, x, y, z = q.tolist()
    return np.array([2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)])


def _presses(
    force: np.ndarray, direction: np.ndarray, min_force: float, max_angle: float
) -> bool:
    """Is the force large enough, and along the direction in which the gripper opens?"""
    fx, fy, fz = force.tolist()
    size = math.sqrt(fx * fx + fy * fy + fz * fz)
    if size < min_force or size == 0:
        return False
    cosine = float(direction @ force) / size
    return math.degrees(math.acos(min(1.0, max(-1.0, cosine)))) <= max_angle
