# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""OpenVLA and Octo fine-tuned on demonstrations, as losses on TorchRL replay buffers."""

from __future__ import annotations

from torchrl_rpd.finetune._augment import ImageAugmentation
from torchrl_rpd.finetune._base import FinetuneLoss, accumulate
from torchrl_rpd.finetune._checkpoints import FinetuneCheckpoints
from torchrl_rpd.finetune._export_octo import export_octo
from torchrl_rpd.finetune._export_openvla import export_openvla
from torchrl_rpd.finetune._lora import add_lora, merged_weight
from torchrl_rpd.finetune._octo import OctoDiffusionLoss, load_octo
from torchrl_rpd.finetune._openvla import OpenVLATokenLoss, load_openvla
from torchrl_rpd.finetune._optimiser import rate_factor, weight_decay_groups
from torchrl_rpd.finetune._statistics import action_statistics

__all__ = [
    "FinetuneCheckpoints",
    "FinetuneLoss",
    "ImageAugmentation",
    "OctoDiffusionLoss",
    "OpenVLATokenLoss",
    "accumulate",
    "action_statistics",
    "add_lora",
    "export_octo",
    "export_openvla",
    "load_octo",
    "load_openvla",
    "merged_weight",
    "rate_factor",
    "weight_decay_groups",
]
