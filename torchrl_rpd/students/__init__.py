# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Student networks: actor and critic as TensorDict modules."""

from __future__ import annotations

from torchrl_rpd.students.actor_critic import ActorCritic
from torchrl_rpd.students.cnn import NatureCNN, cnn_actor_critic
from torchrl_rpd.students.mlp import mlp_actor_critic
from torchrl_rpd.students.normalisation import RunningObservationNorm

__all__ = [
    "ActorCritic",
    "NatureCNN",
    "RunningObservationNorm",
    "cnn_actor_critic",
    "mlp_actor_critic",
]
