# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""OpenVLA, loaded from its published checkpoints and run in batches."""

from __future__ import annotations

from torchrl_rpd.teachers.openvla._teacher import OpenVLATeacher
from torchrl_rpd.teachers.openvla._tiny import write_tiny_checkpoint

__all__ = ["OpenVLATeacher", "write_tiny_checkpoint"]
