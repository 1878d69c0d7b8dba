# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Refined Policy Distillation as TorchRL building blocks."""

from torchrl_rpd._threads import set_learner_threads

__version__ = "0.1.0"

__all__ = ["set_learner_threads"]
