# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Teachers that answer from elsewhere: another process, environment or machine."""

from __future__ import annotations

from torchrl_rpd.teachers.remote._errors import (
    TeacherError,
    TeacherMismatch,
    TeacherUnavailable,
)
from torchrl_rpd.teachers.remote._info import PROTOCOL, TeacherInfo
from torchrl_rpd.teachers.remote._messages import MessageError, pack, unpack
from torchrl_rpd.teachers.remote.client import RemoteTeacher
from torchrl_rpd.teachers.remote.server import TeacherServer

__all__ = [
    "PROTOCOL",
    "MessageError",
    "RemoteTeacher",
    "TeacherError",
    "TeacherInfo",
    "TeacherMismatch",
    "TeacherServer",
    "TeacherUnavailable",
    "pack",
    "unpack",
]
