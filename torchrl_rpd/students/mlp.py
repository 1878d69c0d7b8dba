# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Students that see the state."""

from __future__ import annotations

from collections.abc import Sequence

from tensordict import NestedKey
from torch import nn
from torchrl.modules import ValueOperator

from torchrl_rpd.students._heads import normal_actor, orthogonal_mlp
from torchrl_rpd.students.actor_critic import (
    BUILDERS,
    ActorCritic,
    key_from_json,
    key_to_json,
)
from torchrl_rpd.students.normalisation import RunningObservationNorm

__all__ = ["mlp_actor_critic"]


def mlp_actor_critic(
    observation_dim: int,
    action_dim: int,
    *,
    num_cells: Sequence[int] = (256, 256),
    log_std_init: float | Sequence[float] = -0.5,
    normalize_observation: bool = True,
    observation_key: NestedKey = "observation",
) -> ActorCritic:
    """Builds an MLP student for state observations.

    Actor and critic are separate tanh networks with orthogonal weights. The action
    distribution is a diagonal normal without bounds, as in the paper's code: the
    environment clips the action, the log-probability is the unclipped action's. Its
    standard deviation does not depend on the observation.

    Args:
        observation_dim (int): ``D`` of the ``[*B, D]`` float32 observation.
        action_dim (int): ``A`` of the ``[*B, A]`` float32 action.

    Keyword Args:
        num_cells (sequence of int): widths of the hidden layers. Default: ``(256, 256)``.
        log_std_init (float or sequence of float): initial log standard deviation, in
            action units; one number, or one per action dimension (a gripper that opens
            or closes needs more than an arm to try the other). Default: ``-0.5``, the
            paper's code.
        normalize_observation (bool): if ``True`` (default), both networks see
            observations normalised by running statistics, see
            :class:`RunningObservationNorm`.
        observation_key (NestedKey): where the observation is read. Default:
            ``"observation"``.

    Returns:
        an :class:`ActorCritic`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl_rpd.students import mlp_actor_critic
        >>> student = mlp_actor_critic(42, 7)
        >>> td = student.actor(TensorDict(observation=torch.zeros(3, 42), batch_size=[3]))
        >>> td["action"].shape, td["action_log_prob"].shape
        (torch.Size([3, 7]), torch.Size([3]))
        >>> student.critic(td)["state_value"].shape
        torch.Size([3, 1])
    """
    observation_key = key_from_json(observation_key)
    norm = RunningObservationNorm(observation_dim) if normalize_observation else None

    def head(out_features: int, last_gain: float) -> list[nn.Module]:
        mlp = orthogonal_mlp(
            observation_dim, out_features, num_cells, nn.Tanh, last_gain
        )
        return [norm, mlp] if norm is not None else [mlp]

    actor = normal_actor(
        head(action_dim, 0.01), action_dim, log_std_init, observation_key
    )
    critic = ValueOperator(nn.Sequential(*head(1, 1.0)), in_keys=[observation_key])
    config = {
        "observation_dim": observation_dim,
        "action_dim": action_dim,
        "num_cells": list(num_cells),
        "log_std_init": (
            log_std_init if isinstance(log_std_init, int | float) else [*log_std_init]
        ),
        "normalize_observation": normalize_observation,
        "observation_key": key_to_json(observation_key),
    }
    return ActorCritic(actor, critic, norm, config)


BUILDERS["mlp_actor_critic"] = mlp_actor_critic
