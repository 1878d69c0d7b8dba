# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""A vision-language-action model that fits in the package."""

from __future__ import annotations

from torchrl_rpd.teachers.pocket.model import PocketVLA
from torchrl_rpd.teachers.pocket.teacher import (
    POCKET_INSTRUCTIONS,
    PocketVLATeacher,
)

__all__ = ["POCKET_INSTRUCTIONS", "PocketVLA", "PocketVLATeacher"]
