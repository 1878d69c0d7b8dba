# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Transforms that bring a teacher's actions into the data."""

from __future__ import annotations

from torchrl_rpd.transforms.jump_start import JumpStartTransform
from torchrl_rpd.transforms.teacher import TeacherActionTransform

__all__ = ["JumpStartTransform", "TeacherActionTransform"]
