# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The paper's hold-outs with another reading: the tool in the scene is a distractor.

Each is a subclass of ManiSkill's task, whose scene, starts and observations it keeps. Only
what counts as success differs, and there is no dense reward: ManiSkill's pays for holding
the tool.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

# ManiSkill's margin for a cube that lies on the table (PushCube-v1), metres.
_ON_TABLE = 5e-3


@functools.cache
def register_variants() -> None:
    """Adds the variants to ManiSkill's and gymnasium's registries, once per process.

    Their base classes exist only where ManiSkill is installed, hence not at import.
    """
    from mani_skill.envs.tasks.tabletop.poke_cube import PokeCubeEnv
    from mani_skill.envs.tasks.tabletop.pull_cube_tool import PullCubeToolEnv
    from mani_skill.utils.registration import register_env

    @register_env("PokeCubeDistractor-v1", max_episode_steps=50)
    class PokeCubeDistractorEnv(PokeCubeEnv):
        """PokeCube-v1's scene with PushCube-v1's rule; the peg plays no part.

        **Success Conditions:**
        - the cube's centre is within goal_radius (0.05 m) of the target's, in the plane
        - the cube lies on the table
        """

        SUPPORTED_REWARD_MODES = ("sparse", "none")

        def evaluate(self) -> dict[str, torch.Tensor]:
            offset = self.cube.pose.p[:, :2] - self.goal_region.pose.p[:, :2]
            placed = torch.linalg.norm(offset, dim=1) < self.goal_radius
            return _cube_is(placed, self)

    @register_env("PullCubeToolDistractor-v1", max_episode_steps=100)
    class PullCubeToolDistractorEnv(PullCubeToolEnv):
        """PullCubeTool-v1's scene and goal region; the L-shaped tool plays no part.

        **Success Conditions:**
        - the cube's centre is less than 0.6 m from the robot's base, in the plane
        - the cube lies on the table
        """

        SUPPORTED_REWARD_MODES = ("sparse", "none")

        # ManiSkill's own rule has this number without a name.
        goal_distance = 0.6

        def evaluate(self) -> dict[str, torch.Tensor]:
            base = self.agent.robot.get_links()[0].pose.p
            offset = self.cube.pose.p[:, :2] - base[:, :2]
            placed = torch.linalg.norm(offset, dim=1) < self.goal_distance
            return _cube_is(placed, self)


def _cube_is(placed: torch.Tensor, env: Any) -> dict[str, torch.Tensor]:
    """ManiSkill's info, from whether the cube is where it shall be in the plane."""
    on_table = env.cube.pose.p[:, 2] < env.cube_half_size + _ON_TABLE
    return {
        "success": placed & on_table,
        "is_cube_placed": placed,
        "is_cube_on_table": on_table,
    }
