# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where ManiSkill's flat ``state`` observation holds what the controllers need."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from torch import Tensor

__all__ = ["LAYOUTS", "Scene", "StateLayout"]


class Scene(NamedTuple):
    """What a controller sees: positions in metres, world frame, ``[*B, k]`` float64."""

    tcp: Tensor  # [*B, 3] tool centre point, between the finger tips
    fingers: Tensor  # [*B, 2] opening of each finger, 0 to 0.04
    cube: Tensor  # [*B, 3]
    goal: Tensor  # [*B, 3]: where the cube's centre shall be
    grasped: Tensor | None  # [*B, 1], 1.0 or 0.0; None where the task does not say


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """Columns of one task's flat state (``qpos`` 0:9 and ``qvel`` 9:18 come first).

    ``tcp``, ``cube`` and ``goal`` are the first columns of positions. Source: the
    tasks' ``_get_obs_extra`` in ManiSkill 3.0.1.
    """

    size: int
    names: str
    tcp: int
    cube: int
    goal: int
    goal_height: float = 0.0
    grasped: int | None = None

    def scene(self, observation: Tensor) -> Scene:
        """Cut ``[*B, size]`` into a :class:`Scene`."""

        def cut(start: int, width: int) -> Tensor:
            return observation[..., start : start + width]

        goal = cut(self.goal, 3)
        if self.goal_height:
            goal = goal + goal.new_tensor((0.0, 0.0, self.goal_height))
        return Scene(
            tcp=cut(self.tcp, 3),
            fingers=cut(7, 2),
            cube=cut(self.cube, 3),
            goal=goal,
            grasped=None if self.grasped is None else cut(self.grasped, 1),
        )


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
}
