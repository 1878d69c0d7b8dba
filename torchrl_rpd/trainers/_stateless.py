# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Hooks that have nothing to save."""

from __future__ import annotations

from typing import Any

from torchrl.trainers import TrainerHookBase


class StatelessHook(TrainerHookBase):
    """A hook whose state follows from the trainer's frames or lives elsewhere."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore."""
