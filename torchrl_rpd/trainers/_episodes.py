# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Where the episodes of a collector go on, and their restart from there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torchrl._utils import logger as torchrl_logger
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, TransformedEnv

# ManiSkillWrapper's entry for its streams of seeds.
_STREAMS = "episode_seeds"


def episode_state(env: EnvBase) -> list[dict[str, Any]]:
    """State of the environments inside the outermost transforms.

    The collector saves those transforms itself, and nothing below them.
    """
    return [dict(layer.state_dict()) for layer in _layers(env)]


def restart_episodes(collector: Collector, state: Sequence[Mapping[str, Any]]) -> None:
    """Resets every environment with the next seed of its restored stream.

    Nothing of the episodes before is left: not in the simulation (a
    :class:`~torchrl_rpd.envs.ManiSkillWrapper` that has loaded a state rebuilds it), and
    not in the collector, which begins new trajectories.

    Environments without such streams are given a new seed, drawn from torch's global
    generator.
    """
    env = collector.env
    for layer, saved in zip(_layers(env), state, strict=True):
        layer.load_state_dict(saved)
    if not has_streams(state):
        env.set_seed(int(torch.randint(2**31 - 1, ())))
    collector.reset()


def has_streams(state: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the innermost environments keep their seeds in their state."""
    base = state[-1]
    if _STREAMS in base:
        return True
    # A batched environment has an entry per worker.
    workers = [value for key, value in base.items() if key.startswith("worker")]
    return bool(workers) and all(_STREAMS in worker for worker in workers)


def warn_without_streams(env: EnvBase) -> None:
    """Says so where a resumed run may differ from an uninterrupted one."""
    if has_streams(episode_state(env)):
        return
    torchrl_logger.warning(
        "%s does not keep its episodes' seeds in its state_dict() and is given a new "
        "seed at every checkpoint: a resumed run equals an uninterrupted one as far as "
        "an episode is a function of its seed. ManiSkillEnv does keep them; inside the "
        "workers of a ParallelEnv only without transforms, which belong outside of it.",
        type(_layers(env)[-1]).__name__,
    )


def _layers(env: EnvBase) -> list[EnvBase]:
    layers: list[EnvBase] = []
    while isinstance(env, TransformedEnv):
        env = env.base_env
        layers.append(env)
    return layers or [env]
