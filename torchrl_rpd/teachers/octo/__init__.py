# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Octo (https://octo-models.github.io), in PyTorch from the published checkpoints."""

from __future__ import annotations

from torchrl_rpd.teachers.octo.random_checkpoint import write_random_checkpoint
from torchrl_rpd.teachers.octo.teacher import OctoTeacher

__all__ = ["OctoTeacher", "write_random_checkpoint"]
