# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""States of the six tasks, put together by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict

# First columns of tool centre, cube (peg, ball) and goal, and the size (ManiSkill
# 3.0.1). LiftPegUpright has no goal.
COLUMNS: dict[str, tuple[int, int, int | None, int]] = {
    "PushCube-v1": (18, 28, 25, 35),
    "PullCube-v1": (18, 28, 25, 35),
    "PickCube-v1": (19, 29, 26, 42),
    "StackCube-v1": (18, 25, 32, 48),
    "LiftPegUpright-v1": (18, 25, None, 32),
    "RollBall-v1": (18, 28, 25, 44),
}
CUBE_TASKS = [task for task in COLUMNS if "Cube" in task]
TASKS = sorted(COLUMNS)


def state(
    task: str,
    *,
    tcp: Sequence[float],
    cube: Sequence[float] = (0.0, 0.0, 0.02),
    goal: Sequence[float] = (0.1, 0.1, 0.2),
    grasped: bool = False,
    fingers: float = 0.04,
) -> torch.Tensor:
    """``[D]`` float32; in StackCube ``goal`` is cube B."""
    tcp_at, cube_at, goal_at, size = COLUMNS[task]
    x = torch.zeros(size)
    x[7:9] = fingers
    x[tcp_at : tcp_at + 3] = torch.tensor(tcp)
    x[tcp_at + 4] = 1.0  # pointing down: quaternion (0, 1, 0, 0)
    x[cube_at : cube_at + 3] = torch.tensor(cube)
    x[cube_at + 3] = 1.0
    if goal_at is not None:
        x[goal_at : goal_at + 3] = torch.tensor(goal)
    if task == "PickCube-v1":
        x[18] = float(grasped)
    return x


def random_states(task: str, *shape: int, seed: int = 0) -> torch.Tensor:
    """``[*shape, D]``: hand, cube and goal anywhere in the workspace."""
    generator = torch.Generator().manual_seed(seed)
    tcp_at, cube_at, goal_at, size = COLUMNS[task]
    x = torch.randn(*shape, size, generator=generator) * 0.1
    for start, height in ((tcp_at, 0.2), (cube_at, 0.02), (goal_at, 0.2)):
        if start is None:
            continue
        place = torch.rand(*shape, 3, generator=generator) * 0.2 - 0.1
        if task == "RollBall-v1":  # the arm stands at (-0.1, 1.0) and looks along -y
            place = place + torch.tensor([-0.1, 0.4, 0.0])
        place[..., 2] = torch.rand(*shape, generator=generator) * height
        x[..., start : start + 3] = place
    if task == "LiftPegUpright-v1":
        turned = torch.randn(*shape, 4, generator=generator)
        x[..., 28:32] = turned / turned.norm(dim=-1, keepdim=True)
    if task == "RollBall-v1":
        x[..., 35:38] = torch.randn(*shape, 3, generator=generator) * 0.3
    x[..., 7:9] = torch.rand(*shape, 1, generator=generator) * 0.04
    if task == "PickCube-v1":
        x[..., 18] = (torch.rand(*shape, generator=generator) < 0.5).float()
    return x


def ask(teacher, observation: torch.Tensor, episode_seed=None) -> torch.Tensor:
    """``[*B, 7]`` actions of a teacher for ``[*B, D]`` states."""
    td = TensorDict({"observation": observation}, observation.shape[:-1])
    if episode_seed is not None:
        td["episode_seed"] = torch.as_tensor(episode_seed).unsqueeze(-1)
    chunk = teacher(td)["vla_action", "chunk"]
    assert chunk.shape == (*observation.shape[:-1], 1, 7)
    assert chunk.dtype == torch.float32
    return chunk.squeeze(-2)
