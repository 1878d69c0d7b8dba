# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Parts without a simulator that take the place of a configuration's own."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase
from toy_envs import ReachEnv

# Command-line words that put them into examples/conf, in a run of seconds.
OVERRIDES = [
    "env._target_=hydra_toys.reach",
    "teacher._target_=hydra_toys.pointer",
    "env.num_envs=8",
    "env.num_workers=1",
    "frames=256",
    "trainer.steps_per_batch=16",
    "trainer.minibatch_size=32",
    "trainer.num_epochs=2",
    "trainer.progress_bar=false",
    "evaluation.interval=128",
    "evaluation.episodes=8",
    "episodes=8",
    "checkpoint.every=null",
]


class Pointer:
    """Points to the origin."""

    def __call__(self, tensordict: TensorDictBase) -> torch.Tensor:
        return (-5 * tensordict["observation"]).clamp(-1, 1)


def reach(*, num_envs: int, **_: Any) -> EnvBase:
    """The toy environment, whatever else the configuration says."""
    return ReachEnv(num_envs)


def pointer(**_: Any) -> Pointer:
    """The teacher, likewise."""
    return Pointer()
