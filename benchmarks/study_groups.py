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


_DENSE = "preset=cpu frames=100000"
_SPARSE = "preset=best frames=200000"
_BEST = f"task=pick_cube reward=sparse {_SPARSE}"
# The sparse arm of examples/demo.py, minutes per run.
_SHORT_SPARSE = "preset=cpu frames=80000"
_SHORT = f"task=pick_cube reward=sparse {_SHORT_SPARSE}"


def _best(flaw: str, title: str, seeds: tuple[int, ...] = THREE) -> Group:
    return Group(
        f"preset=best, PickCube-v1, sparse reward: {title}",
        f"{_BEST} flaw={flaw}",
        TWO,
        seeds,
    )


def _fifth(flaw: str, seeds: tuple[int, ...] = THREE) -> Group:
    """As _best; a random tenth of the frames is labelled, and what the teacher led."""
    return Group(
        f"preset=best, at most a fifth of the frames labelled, PickCube-v1: {flaw}",
        f"{_BEST} flaw={flaw} teacher_action.query_fraction=0.1 "
        "teacher_action.always_query_key=jump_start",
        {"rpd": "algo=rpd"},
        seeds,
    )


def _task(task: str, reward: str, settings: str, teacher: str) -> Group:
    """Settings tuned on PickCube-v1, a teacher that succeeds in about a half."""
    return Group(
        f"{task}, {reward} reward",
        f"task={task} reward={reward} {settings} {teacher}",
        CONTROLS,
    )


# Where each of them sees the cube, drawn per episode; the PickCube one is the default.
_PUSH = "flaw=cube_per_episode teacher.cube_offset_std=0.03"
_PULL = "flaw=cube_per_episode teacher.cube_offset_std=0.04"
_STACK = "flaw=cube_per_episode teacher.cube_offset_std=0.016"

# The released configuration with the student, the teacher and the simulator that
# preset=best has here, for seconds and steps beside it.
_RELEASED = (
    "preset=paper teacher=scripted student=mlp frames=200000 env.num_envs=128 "
    "env.fast_controller=true collector.no_cuda_sync=false evaluation.interval=10000 "
    "evaluation.episodes=16 evaluation.env_overrides.num_envs=16 "
    "checkpoint.every=64000 episodes=200"
)

# Teacher and student see one picture, the student a part of it.
_VLA = "reward=sparse preset=pixels frames=72000 teacher=pocket student=rgb"
# Longer episodes, and a cube that has to be grasped: all of it takes more than twice as
# long.
_VLA_PICK = (
    f"{_VLA} frames=160000 schedule.start_frames=37500 schedule.end_frames=75000 "
    "trainer.lr_scheduler.milestones=[15,20,45]"
)
_CAMERA = "env.camera=human_nudged env.teacher_camera=human_nudged"

# The teacher's success rate with flaw=goal, of benchmarks/results/demo_full.md.
_RATIO = "schedule.teacher_score=0.28 schedule.score_key=success"
_SWITCH = "schedule.switch_off_score=0.5 schedule.score_key=success"

GROUPS: dict[str, Group] = {
    "best_cube_per_episode": _best(
        "cube_per_episode", "the cube is seen off by N(0, 16 mm), drawn per episode"
    ),
    "best_goal": _best("goal", "the goal is seen 26 mm too high, always", FIVE),
    "best_jitter": _best("jitter", "a shaking hand"),
    "best_chatter": _best("chatter", "a gripper that lets go now and then"),
    "best_blind": _best("blind", "nothing is done on the left part of the table"),
    "fifth_cube_per_episode": _fifth("cube_per_episode"),
    "fifth_goal": _fifth("goal", FIVE),
    "fifth_jitter": _fifth("jitter"),
    "fifth_chatter": _fifth("chatter"),
    "fifth_blind": _fifth("blind"),
    # Without a teacher: the same in all of the groups above.
    "best_ppo": Group(
        "preset=best, PickCube-v1, sparse reward: PPO alone",
        f"{_BEST} flaw=none",
        {"ppo": "algo=ppo"},
    ),
    "released_goal": Group(
        "preset=paper, PickCube-v1, sparse reward: the goal is seen 26 mm too high",
        f"task=pick_cube reward=sparse {_RELEASED} flaw=goal",
        {"released": "algo=rpd"},
    ),
    "push_cube_dense": _task("push_cube", "dense", _DENSE, _PUSH),
    "push_cube_sparse": _task("push_cube", "sparse", _SHORT_SPARSE, _PUSH),
    "pull_cube_dense": _task("pull_cube", "dense", _DENSE, _PULL),
    "pull_cube_sparse": _task("pull_cube", "sparse", _SHORT_SPARSE, _PULL),
    "stack_cube_dense": _task("stack_cube", "dense", _DENSE, _STACK),
    "stack_cube_sparse": _task("stack_cube", "sparse", _SPARSE, _STACK),
    # The tool lies in the way and helps nobody.
    "hold_out": _task(
        "pull_cube_tool_distractor",
        "sparse",
        _SPARSE,
        "flaw=jitter teacher.jitter=0.7",
    ),
    "pick_cube_dense": Group(
        "PickCube-v1, dense reward, and PPO alone with five times the steps",
        f"task=pick_cube reward=dense {_DENSE} flaw=cube_per_episode",
        {**CONTROLS, "ppo_five_times": "algo=ppo frames=500000"},
    ),
    "vla_push_cube": Group(
        "PushCube-v1 from pictures, sparse reward, the pocket VLA as the teacher",
        f"task=push_cube {_VLA}",
        CONTROLS,
    ),
    "vla_push_cube_camera": Group(
        "PushCube-v1 from pictures of a camera that the pocket VLA was not trained on",
        f"task=push_cube {_VLA} {_CAMERA}",
        CONTROLS,
    ),
    "vla_pick_cube": Group(
        "PickCube-v1 from pictures, sparse reward, the pocket VLA as the teacher",
        f"task=pick_cube {_VLA_PICK}",
        CONTROLS,
    ),
    "losses": Group(
        "PickCube-v1, sparse reward: the distance to the teacher's action",
        f"{_SHORT} flaw=goal",
        {
            "mse": "loss.distill_type=mse",
            "l1": "loss.distill_type=l1",
            "smooth_l1": "loss.distill_type=smooth_l1",
            "cosine": "loss.distill_type=cosine",
            "bc": "loss.distill_type=bc",
        },
    ),
    "schedules": Group(
        "PickCube-v1, sparse reward: how the coefficient falls",
        f"{_SHORT} flaw=goal",
        {
            "constant_1": "schedule=constant schedule.init=1",
            "linear_to_half": "schedule=linear",
            "linear_to_zero": "schedule=linear schedule.end=0",
            "return_ratio": f"schedule=return_ratio {_RATIO}",
            "switch_off": f"schedule=constant {_SWITCH}",
            "vlajs": "algo=vlajs",
        },
    ),
}
