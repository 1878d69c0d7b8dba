# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Teachers: modules that propose an action for what the student sees."""

from __future__ import annotations

from torchrl_rpd.teachers.check import (
    TeacherCheckError,
    TeacherReport,
    check_teacher,
)
from torchrl_rpd.teachers.checkpoints import CHECKPOINTS, Checkpoint
from torchrl_rpd.teachers.lerobot import LeRobotTeacher
from torchrl_rpd.teachers.octo import OctoTeacher
from torchrl_rpd.teachers.openvla import OpenVLATeacher
from torchrl_rpd.teachers.pocket import PocketVLATeacher
from torchrl_rpd.teachers.remote import RemoteTeacher
from torchrl_rpd.teachers.scripted import ScriptedTeacher

__all__ = [
    "CHECKPOINTS",
    "Checkpoint",
    "LeRobotTeacher",
    "OctoTeacher",
    "OpenVLATeacher",
    "PocketVLATeacher",
    "RemoteTeacher",
    "ScriptedTeacher",
    "TeacherCheckError",
    "TeacherReport",
    "check_teacher",
]
