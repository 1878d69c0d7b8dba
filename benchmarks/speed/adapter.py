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
from functools import partial
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


def collector_of(env: EnvBase, policy: Any, frames: int) -> Collector:
    """TorchRL's collector, without end."""
    return Collector(
        env,
        policy,
        frames_per_batch=frames,
        total_frames=-1,
        auto_register_policy_transforms=False,
    )


def batch_by_batch(collectors: dict[str, Collector]) -> dict[str, list[float]]:
    """Seconds of a batch of each, in turns; closes them."""
    batches = {name: iter(collector) for name, collector in collectors.items()}
    seconds = in_turns({name: partial(next, it) for name, it in batches.items()})
    for collector in collectors.values():
        collector.shutdown()
    return seconds


def overhead(obs_mode: str, steps: int, limit: float) -> Row:
    """The adapter in a collector over ManiSkill in a loop."""
    env = ManiSkillEnv(TASK, num_envs=ENVS, obs_mode=obs_mode)
    loop = plain(obs_mode, env.render_backend, steps)
    ours = collector_of(env, RandomPolicy(env.action_spec), ENVS * steps)
    seconds = in_turns({"ours": partial(next, iter(ours)), "plain": loop})
    ours.shutdown()
    each = ENVS * steps
    us = {k: 1e6 * statistics.median(times) / each for k, times in seconds.items()}
    return Row(
        f"{obs_mode}: adapter in a collector / ManiSkill in a loop",
        ratios(seconds["ours"], seconds["plain"]),
        at_most=limit,
        note=f"{us['ours']:,.0f} and {us['plain']:,.0f} us per step",
    )


def fast_controller(steps: int) -> Row:
    """What ``fast_controller=True`` brings."""
    sides = {}
    for name, on in (("stock", False), ("fast", True)):
        env = ManiSkillEnv(TASK, num_envs=ENVS, fast_controller=on)
        sides[name] = collector_of(env, RandomPolicy(env.action_spec), ENVS * steps)
    seconds = batch_by_batch(sides)
    return Row(
        "state: stock / fast_controller, both in a collector",
        ratios(seconds["stock"], seconds["fast"]),
        at_least=1.7,
    )


def processes(steps: int, *, fast: bool) -> Row:
    """What a second process brings."""
    student = mlp_actor_critic(35, 7).actor
    sides = {}
    for workers in (1, 2):
        env = ManiSkillEnv(
            TASK, num_envs=ENVS // workers, num_workers=workers, fast_controller=fast
        )
        sides[str(workers)] = collector_of(env, student, ENVS * steps)
    seconds = batch_by_batch(sides)
    controller = "fast_controller" if fast else "stock controller"
    return Row(
        f"state, {controller}, student acts: one process / two workers",
        ratios(seconds["1"], seconds["2"]),
        at_least=1.5,
    )


def rows(*, device: torch.device) -> list[Row]:
    """Everything about the adapter; the simulator runs on the CPU whatever the device."""
    return [
        overhead("state", 25, 1.15),
        fast_controller(25),
        processes(25, fast=False),
        processes(50, fast=True),
        overhead("rgb", 2, 1.03),
    ]
