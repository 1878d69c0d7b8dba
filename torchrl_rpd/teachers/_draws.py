# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""The generator of a teacher that answers at random."""

from __future__ import annotations

import torch
from torch import Tensor


class OwnDraws:
    """Methods of a teacher with a generator of its own, ``_generator``.

    :class:`~torchrl_rpd.transforms.TeacherActionTransform` saves and restores its state
    by them.
    """

    _generator: torch.Generator

    def manual_seed(self, seed: int) -> None:
        """Restarts the generator that the teacher draws from."""
        self._generator.manual_seed(seed)

    def get_rng_state(self) -> Tensor:
        """The state of that generator, uint8, for a checkpoint of the run."""
        return self._generator.get_state()

    def set_rng_state(self, state: Tensor) -> None:
        """Continues where :meth:`get_rng_state` was called."""
        self._generator.set_state(state.cpu())
