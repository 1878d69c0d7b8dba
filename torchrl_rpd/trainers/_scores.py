# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""How good the student is while it learns, from the episodes of its own batches."""

from __future__ import annotations

import itertools
from collections import deque
from typing import Any

from tensordict import NestedKey, TensorDictBase


class EpisodeScores:
    """Means of the episodes that end, over at least so many of them each.

    A measurement is taken at the end of a batch: episodes of one batch are of one policy
    and never count as two.

    Args:
        key (NestedKey): the score, ``[*B, T, 1]`` under ``"next"``, read where an episode
            ends.

    Keyword Args:
        episodes (int): the least number of a measurement.
        keep (int): how many measurements are remembered.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> scores = EpisodeScores("success", episodes=3, keep=2)
        >>> after = {"done": torch.tensor([[[0], [1]], [[1], [1]]]).bool(),
        ...          "success": torch.tensor([[[1], [0]], [[1], [0]]]).bool()}
        >>> scores.add(TensorDict({"next": after}, batch_size=[2, 2]))
        >>> round(scores.latest, 3)
        0.333
    """

    def __init__(self, key: NestedKey, *, episodes: int, keep: int) -> None:
        self._key = key
        self._episodes = episodes
        self._measured: deque[float] = deque(maxlen=keep)
        self._sum = 0.0
        self._count = 0

    @property
    def latest(self) -> float | None:
        """The last measurement; None before the first one."""
        return self._measured[-1] if self._measured else None

    def add(self, batch: TensorDictBase) -> None:
        """Counts the episodes that end in ``[*B, T]`` frames."""
        after = batch.get("next")
        done = after.get("done")
        score = after.get(self._key, None)
        if score is None:
            raise KeyError(
                f"The batch holds no {self._key!r} under 'next', from which the schedule "
                "would learn how good the student is. Add torchrl.envs.RewardSum() to "
                "the environment for 'episode_reward', or name another entry with "
                "score_key=, e.g. 'success'."
            )
        ended = score[done].double()
        self._sum += ended.sum().item()
        self._count += ended.numel()
        if self._count >= self._episodes:
            self._measured.append(self._sum / self._count)
            self._sum, self._count = 0.0, 0

    def holds(self, threshold: float) -> bool:
        """Whether no kept measurement is under the one before, the last one high."""
        if len(self._measured) < (self._measured.maxlen or 0):
            return False
        rising = all(a <= b for a, b in itertools.pairwise(self._measured))
        return rising and self._measured[-1] >= threshold

    def state_dict(self) -> dict[str, Any]:
        """Measurements, and the episodes since."""
        return {
            "measured": list(self._measured),
            "sum": self._sum,
            "count": self._count,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`."""
        self._measured.clear()
        self._measured.extend(state_dict["measured"])
        self._sum = state_dict["sum"]
        self._count = state_dict["count"]
