# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where ManiSkill's flat ``state`` observation holds what the controllers need."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BASE_X", "LAYOUTS", "Scene", "StateLayout"]


class Scene(NamedTuple):
    """What a controller sees: positions in metres, world frame, ``[*B, k]`` float64."""

    tcp: Tensor  # [*B, 3] tool centre point, between the finger tips
    fingers: Tensor  # [*B, 2] opening of each finger, 0 to 0.04
    cube: Tensor  # [*B, 3] centre of the object: cube, peg or ball
    goal: Tensor  # [*B, 3]: where the object's centre shall be
    grasped: Tensor | None = None  # [*B, 1], 1.0 or 0.0, where the task says it
    axis: Tensor | None = None  # [*B, 3] the peg's long axis, a unit vector
    velocity: Tensor | None = None  # [*B, 3] of the ball, m/s
    hand: Tensor | None = None  # [*B, 4] how the hand is turned, quaternion, w first


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """Columns of one task's flat state (``qpos`` 0:9 and ``qvel`` 9:18 come first).

    ``tcp``, ``cube`` (the object: cube, peg or ball) and ``goal`` are the first columns
    of positions, ``quaternion`` is the peg's and ``hand`` the hand's. ``goal`` is None
    where the state does not hold it. Then it lies at the object, plus the vector in
    ``cube_to_goal`` if there is one, led back to ``goal_radius`` metres from the robot's
    base if there is one, ``goal_height`` above the table. Source: the tasks'
    ``_get_obs_extra`` in ManiSkill 3.0.1.
    """

    size: int
    names: str
    tcp: int
    cube: int
    goal: int | None
    goal_height: float = 0.0
    grasped: int | None = None
    quaternion: int | None = None
    velocity: int | None = None
    hand: int | None = None
    cube_to_goal: int | None = None
    goal_radius: float | None = None

    def scene(self, observation: Tensor) -> Scene:
        """Cut ``[*B, size]`` into a :class:`Scene`."""

        def cut(start: int, width: int) -> Tensor:
            return observation[..., start : start + width]

        def find(start: int | None, width: int) -> Tensor | None:
            return None if start is None else cut(start, width)

        cube = cut(self.cube, 3)
        goal = (
            cut(self.goal, 3)
            if self.goal is not None
            else self._from_cube(cube, find(self.cube_to_goal, 3))
        )
        quaternion = find(self.quaternion, 4)
        return Scene(
            tcp=cut(self.tcp, 3),
            fingers=cut(7, 2),
            cube=cube,
            goal=goal + goal.new_tensor((0.0, 0.0, self.goal_height)),
            grasped=find(self.grasped, 1),
            axis=None if quaternion is None else _x_axis(quaternion),
            velocity=find(self.velocity, 3),
            hand=find(self.hand, 4),
        )

    def _from_cube(self, cube: Tensor, to_goal: Tensor | None) -> Tensor:
        """The goal on the table where the state does not hold it."""
        place = cube if to_goal is None else cube + to_goal
        if self.goal_radius is not None:
            base = place.new_tensor((BASE_X, 0.0, 0.0))
            way = (place - base) * place.new_tensor((1.0, 1.0, 0.0))
            far = way.square().sum(-1, keepdim=True).sqrt().clamp_min(1e-6)
            place = base + way * (self.goal_radius / far)
        return place * place.new_tensor((1.0, 1.0, 0.0))


def _x_axis(quaternion: Tensor) -> Tensor:
    """Where a rotation (unit quaternions, w first) takes the x axis."""
    w, x, y, z = quaternion.unbind(-1)
    return torch.stack(
        [1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y + w * z), 2.0 * (x * z - w * y)], -1
    )


# Where the robot stands on the x axis (not in RollBall), metres.
BASE_X = -0.615
_CUBE_HALF = 0.02
_JOINTS = "qpos 0:9, qvel 9:18, "
_PUSH = StateLayout(
    size=35,
    names=_JOINTS + "tcp_pose 18:25, goal_pos 25:28, obj_pose 28:35",
    tcp=18,
    cube=28,
    goal=25,
)
LAYOUTS: dict[str, StateLayout] = {
    "PushCube-v1": _PUSH,
    "PullCube-v1": _PUSH,
    "PickCube-v1": StateLayout(
        size=42,
        names=_JOINTS + "is_grasped 18, tcp_pose 19:26, goal_pos 26:29, "
        "obj_pose 29:36, tcp_to_obj_pos 36:39, obj_to_goal_pos 39:42",
        tcp=19,
        cube=29,
        goal=26,
        grasped=18,
    ),
    "StackCube-v1": StateLayout(
        size=48,
        names=_JOINTS + "tcp_pose 18:25, cubeA_pose 25:32, cubeB_pose 32:39, "
        "tcp_to_cubeA_pos 39:42, tcp_to_cubeB_pos 42:45, cubeA_to_cubeB_pos 45:48",
        tcp=18,
        cube=25,
        # cube A's place is one cube (2 x 20 mm) above cube B
        goal=32,
        goal_height=0.04,
    ),
    "LiftPegUpright-v1": StateLayout(
        size=32,
        names=_JOINTS + "tcp_pose 18:25, obj_pose 25:32",
        tcp=18,
        cube=25,
        quaternion=28,
        goal=None,
        # upright on the table: half the peg's length
        goal_height=0.12,
    ),
    "RollBall-v1": StateLayout(
        size=44,
        names=_JOINTS + "tcp_pose 18:25, goal_pos 25:28, ball_pose 28:35, "
        "ball_vel 35:38, tcp_to_ball_pos 38:41, ball_to_goal_pos 41:44",
        tcp=18,
        cube=28,
        goal=25,
        velocity=35,
    ),
    "PokeCubeDistractor-v1": StateLayout(
        size=54,
        # "goal_pos" is ManiSkill's name for what is the peg's position
        names=_JOINTS + "tcp_pose 18:25, cube_pose 25:32, peg_pose 32:39, "
        "goal_pos 39:42, tcp_to_peg_pos 42:45, peg_to_cube_pos 45:48, "
        "cube_to_goal_pos 48:51, peghead_to_cube_pos 51:54",
        tcp=18,
        hand=21,
        cube=25,
        cube_to_goal=48,
        goal=None,
        goal_height=_CUBE_HALF,
    ),
    "PullCubeToolDistractor-v1": StateLayout(
        size=39,
        names=_JOINTS + "tcp_pose 18:25, cube_pose 25:32, tool_pose 32:39",
        tcp=18,
        hand=21,
        cube=25,
        # straight towards the robot; the goal region ends 0.6 m from its base
        goal=None,
        goal_radius=0.53,
        goal_height=_CUBE_HALF,
    ),
}
