# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""One stream of episode seeds per environment of a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

# ManiSkill hands its seeds to ``numpy.random.RandomState``.
_MAX_SEED = 2**32 - 1


class EpisodeSeeds:
    """The seeds of the episodes that each environment of a batch will play.

    ManiSkill draws the object poses of an *unseeded* reset from torch's global random
    number generator: such an episode cannot be replayed, and it disturbs the learner's
    random numbers. Here every reset gets an explicit seed instead.

    The stream of one environment is a function of its start and of the number of
    episodes drawn so far, so that its whole state is two integers.

    Args:
        num_envs (int): number of environments in the batch.

    Examples:
        >>> seeds = EpisodeSeeds(3)
        >>> seeds.restart(7)
        >>> int(seeds.draw(0))  # the first environment starts with the seed itself
        7
        >>> state = seeds.state_dict()
        >>> following = seeds.draw(0)
        >>> seeds.load_state_dict(state)
        >>> seeds.draw(0) == following
        True
    """

    def __init__(self, num_envs: int) -> None:
        self.start = np.zeros(num_envs, dtype=np.int64)
        self.count = np.zeros(num_envs, dtype=np.int64)
        # Without a seed the streams differ from process to process: two workers that
        # nobody has seeded must not play the same episodes.
        self.restart(int(np.random.SeedSequence().generate_state(1)[0]))

    def restart(self, seed: int) -> None:
        """Restarts every stream: environment 0 gets ``seed``.

        The others get what ManiSkill's ``reset(seed=seed)`` derives for them.
        """
        seed = int(seed)
        if not 0 <= seed <= _MAX_SEED:
            raise ValueError(f"A seed lies in [0, {_MAX_SEED}], got {seed}.")
        self.start[0] = seed
        rest = np.random.RandomState(seed).randint(2**31, size=(len(self.start) - 1,))
        self.start[1:] = rest
        self.count[:] = 0

    def draw(self, index: int) -> int:
        """The seed of the next episode of environment ``index``."""
        start, count = int(self.start[index]), int(self.count[index])
        self.count[index] += 1
        if count == 0:
            return start
        state = np.random.SeedSequence((start, count)).generate_state(1)[0]
        return int(state) & 0x7FFFFFFF

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The streams' state: two int64 tensors of shape ``[num_envs]``."""
        return {
            "start": torch.from_numpy(self.start.copy()),
            "count": torch.from_numpy(self.count.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        if state["start"].shape != self.start.shape:
            raise ValueError(
                f"The seed streams of {tuple(state['start'].shape)} environments cannot "
                f"be loaded into a batch of {self.start.shape}."
            )
        self.start[:] = state["start"].cpu().numpy()
        self.count[:] = state["count"].cpu().numpy()
