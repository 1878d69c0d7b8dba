# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""What the study runs: arms in groups, as overrides of examples/rpd.py."""

from __future__ import annotations

from dataclasses import dataclass

# Nothing was tuned on these: the settings were chosen with seeds 1000 and 1001.
THREE, FIVE = (0, 1, 2), (0, 1, 2, 3, 4)
CONTROLS = {"rpd": "algo=rpd", "imitation": "algo=imitation", "ppo": "algo=ppo"}
TWO = {"rpd": "algo=rpd", "imitation": "algo=imitation"}


@dataclass(frozen=True)
class Group:
    """Arms that are compared with each other.

    Args:
        title (str): of its page.
        common (str): overrides of every arm.
        arms (dict): the overrides of each arm.
        seeds (tuple of int): of every arm.
    """

    title: str
    common: str
    arms: dict[str, str]
    seeds: tuple[int, ...] = THREE


_BEST = "task=pick_cube reward=sparse preset=best frames=200000"


def _best(flaw: str, title: str, seeds: tuple[int, ...] = THREE) -> Group:
    return Group(
        f"preset=best, PickCube-v1, sparse reward: {title}",
        f"{_BEST} flaw={flaw}",
        TWO,
        seeds,
    )


def _task(task: str, reward: str, more: str) -> Group:
    return Group(
        f"{task}, {reward} reward",
        f"task={task} reward={reward} {more}",
        CONTROLS,
    )


GROUPS: dict[str, Group] = {
    "best_cube_per_episode": _best(
        "cube_per_episode", "the cube is seen off by N(0, 16 mm), drawn per episode"
    ),
    "best_goal": _best("goal", "the goal is seen 26 mm too high, always", FIVE),
    "best_jitter": _best("jitter", "a shaking hand"),
    "best_chatter": _best("chatter", "a gripper that lets go now and then"),
    "best_blind": _best("blind", "nothing is done on the left part of the table"),
    # Without a teacher: the same in all of the groups above.
    "best_ppo": Group(
        "preset=best, PickCube-v1, sparse reward: PPO alone",
        f"{_BEST} flaw=none",
        {"ppo": "algo=ppo"},
    ),
}
