# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Teachers: modules that propose an action for what the student sees."""

from __future__ import annotations

from torchrl_rpd.teachers.scripted import ScriptedTeacher

__all__ = ["ScriptedTeacher"]
