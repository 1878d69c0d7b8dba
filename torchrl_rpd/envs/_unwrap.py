# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""From what ``gym.make`` returned to the ManiSkill environment in it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

has_mani_skill = importlib.util.find_spec("mani_skill") is not None

# gymnasium wrappers that change nothing that the adapter reads: it talks to the
# unwrapped environment and counts the steps itself.
_TRANSPARENT_WRAPPERS = ("TimeLimitWrapper", "OrderEnforcing", "PassiveEnvChecker")


def require_mani_skill() -> None:
    """Raises an error that names the extra to install when ManiSkill is missing."""
    if not has_mani_skill:
        raise ImportError(
            "ManiSkill was not found. Install it with: "
            "pip install 'torchrl_rpd[maniskill]'"
        )


def unwrap(env: Any) -> tuple[Any, int | None]:
    """Returns the ManiSkill environment in ``env`` and its time limit."""
    require_mani_skill()
    from mani_skill.envs.sapien_env import BaseEnv

    limit = None
    layer = env
    while not isinstance(layer, BaseEnv):
        name = type(layer).__name__
        if name == "ManiSkillVectorEnv":
            raise ValueError(
                "ManiSkillVectorEnv resets finished environments by itself, which loses "
                "their terminal observations. TorchRL drives the resets: pass what "
                "gym.make(...) returned, without ManiSkillVectorEnv."
            )
        if not hasattr(layer, "env"):
            raise TypeError(
                f"Expected a ManiSkill environment made by gym.make(...), got "
                f"{type(env).__name__}, which holds none. For other gym environments use "
                "torchrl.envs.GymWrapper."
            )
        if name not in _TRANSPARENT_WRAPPERS:
            raise ValueError(
                f"The gymnasium wrapper {name} would be bypassed: ManiSkillWrapper talks "
                "to the ManiSkill environment itself. Pass the environment without it "
                "and use a TorchRL transform instead."
            )
        if limit is None:
            limit = getattr(layer, "_max_episode_steps", None)
        layer = layer.env
    if limit is None and layer.spec is not None:
        limit = layer.spec.max_episode_steps
    return layer, limit


def unwrap_batch(env: Any) -> tuple[list[Any], int | None]:
    """The ManiSkill environments of a batch, and the time limit that they share.

    Args:
        env: what ``gym.make`` returned, or a sequence of such CPU environments.
    """
    if env is None:
        raise TypeError("ManiSkillWrapper needs a ManiSkill environment.")
    given = list(env) if isinstance(env, Sequence) else [env]
    if not given:
        raise ValueError("ManiSkillWrapper needs at least one environment.")
    unwrapped, limits = zip(*(unwrap(e) for e in given), strict=True)
    envs = list(unwrapped)
    if len({id(e) for e in envs}) != len(envs):
        raise ValueError("The same environment was passed twice.")
    for e in envs:
        if len(envs) > 1 and (e.num_envs != 1 or e.device.type != "cpu"):
            raise ValueError(
                "A batch is made of CPU environments with num_envs=1, or of a single "
                f"GPU environment. Got num_envs={e.num_envs} on {e.device} among "
                f"{len(envs)} environments."
            )
    kinds = {
        (type(e).__name__, e.control_mode, e.reward_mode, e.obs_mode) for e in envs
    }
    if len(kinds) > 1:
        raise ValueError(
            "All environments of a batch must have the same task, control mode, "
            f"reward mode and observation mode, got {sorted(map(str, kinds))}."
        )
    return envs, limits[0]
