# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Losses and value estimator of Refined Policy Distillation."""

from __future__ import annotations

from torchrl_rpd.objectives.distill_klpen import DistillKLPENPPOLoss
from torchrl_rpd.objectives.distill_ppo import DistillPPOLoss
from torchrl_rpd.objectives.value import FiniteHorizonGAE

__all__ = ["DistillKLPENPPOLoss", "DistillPPOLoss", "FiniteHorizonGAE"]
