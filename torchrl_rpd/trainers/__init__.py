# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Hooks for TorchRL's own trainer."""

from torchrl_rpd.trainers.checkpointing import CheckpointHook
from torchrl_rpd.trainers.guard import NonFiniteError, NumericalGuard
from torchrl_rpd.trainers.hooks import (
    EvaluationHook,
    LogEpisodes,
    LogTeacher,
    ObservationNormUpdate,
)
from torchrl_rpd.trainers.jump_start import JumpStartSchedule, OwnStepsAdvantage
from torchrl_rpd.trainers.minibatches import OnPolicyMinibatches
from torchrl_rpd.trainers.ppo import make_ppo_trainer
from torchrl_rpd.trainers.schedules import (
    DistillCoeffSchedule,
    distill_coeff_at,
    return_ratio_coeff,
)
from torchrl_rpd.trainers.target_kl import TargetKLStepper

__all__ = [
    "CheckpointHook",
    "DistillCoeffSchedule",
    "EvaluationHook",
    "JumpStartSchedule",
    "LogEpisodes",
    "LogTeacher",
    "NonFiniteError",
    "NumericalGuard",
    "ObservationNormUpdate",
    "OnPolicyMinibatches",
    "OwnStepsAdvantage",
    "TargetKLStepper",
    "distill_coeff_at",
    "make_ppo_trainer",
    "return_ratio_coeff",
]
