# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Demonstrations: recording, reading, converting."""

from torchrl_rpd.data._buffer import DemoInfo, SkippedDemo
from torchrl_rpd.data.instructions import InstructionTransform
from torchrl_rpd.data.maniskill import ManiSkillDemos
from torchrl_rpd.data.recording import Recording, flat_state, record_demos
from torchrl_rpd.data.rlds import RLDSDemos
from torchrl_rpd.data.rlds_writer import write_rlds
from torchrl_rpd.data.writer import DemoWriter

__all__ = [
    "DemoInfo",
    "DemoWriter",
    "InstructionTransform",
    "ManiSkillDemos",
    "RLDSDemos",
    "Recording",
    "SkippedDemo",
    "flat_state",
    "record_demos",
    "write_rlds",
]
