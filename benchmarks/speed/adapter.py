# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The adapter beside plain ManiSkill, and what its own options bring.

Random actions, resets at the time limit included, one process unless said otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.envs.utils import RandomPolicy

from benchmarks.speed._turns import Row, in_turns, ratios
from torchrl_rpd.envs import ManiSkillEnv
from torchrl_rpd.students import mlp_actor_critic

TASK, ENVS = "PushCube-v1", 16


def plain(obs_mode: str, render_backend: str, steps: int) -> Callable[[], None]:
    """ManiSkill in a loop: one environment after the other, as the adapter has them."""
    import gymnasium

    envs = [
        gymnasium.make(
            TASK,
            num_envs=1,
            obs_mode=obs_mode,
            control_mode="pd_ee_delta_pose",
            reward_mode="normalized_dense",
            sim_backend="physx_cpu",
            render_backend=render_backend,
        )
        for _ in range(ENVS)
    ]
    for seed, env in enumerate(envs):
        env.reset(seed=seed)

    def block() -> None:
        actions = torch.rand(steps, ENVS, 1, 7) * 2 - 1
        for row in actions:
            for env, action in zip(envs, row, strict=True):
                *_, terminated, truncated, _ = env.step(action)
                if bool(terminated) or bool(truncated):
                    env.reset()

    return block


def collected(env: EnvBase, steps: int, policy: Any = None) -> Callable[[], Any]:
    """As many steps through TorchRL's collector."""
    frames = env.batch_size.numel() * steps
    collector = Collector(
        env,
        RandomPolicy(env.action_spec) if policy is None else policy,
        frames_per_batch=frames,
        total_frames=-1,
        auto_register_policy_transforms=False,
    )
    batches = iter(collector)
    return lambda: next(batches)


def overhead(obs_mode: str, steps: int, limit: float) -> Row:
    """The adapter in a collector over ManiSkill in a loop."""
    env = ManiSkillEnv(TASK, num_envs=ENVS, obs_mode=obs_mode)
    loop = plain(obs_mode, env.render_backend, steps)
    seconds = in_turns({"ours": collected(env, steps), "plain": loop})
    each = ENVS * steps
    ours, theirs = (1e6 * statistics.median(seconds[k]) / each for k in seconds)
    return Row(
        f"{obs_mode}: adapter in a collector / ManiSkill in a loop",
        ratios(seconds["ours"], seconds["plain"]),
        at_most=limit,
        note=f"{ours:,.0f} and {theirs:,.0f} us per step",
    )


def options(steps: int) -> list[Row]:
    """The fast controller, and a second process."""
    rows = []
    fast, stock = (
        collected(ManiSkillEnv(TASK, num_envs=ENVS, fast_controller=on), steps)
        for on in (True, False)
    )
    seconds = in_turns({"stock": stock, "fast": fast})
    rows.append(
        Row(
            "state: stock / fast_controller, both in a collector",
            ratios(seconds["stock"], seconds["fast"]),
            at_least=1.7,
        )
    )
    student = mlp_actor_critic(35, 7)
    sides = {}
    for workers in (1, 2):
        env = ManiSkillEnv(
            TASK, num_envs=ENVS // workers, num_workers=workers, fast_controller=True
        )
        sides[str(workers)] = collected(env, steps, student.actor)
    seconds = in_turns(sides)
    rows.append(
        Row(
            "state, student acts: one process / two workers",
            ratios(seconds["1"], seconds["2"]),
            at_least=1.5,
        )
    )
    return rows


def rows(*, device: torch.device) -> list[Row]:
    """Everything about the adapter; the simulator runs on the CPU whatever the device."""
    return [overhead("state", 25, 1.15), *options(25), overhead("rgb", 2, 1.03)]
