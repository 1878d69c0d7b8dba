# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Remembers, per environment, the action chunk that a teacher is in the middle of."""

from __future__ import annotations

from typing import Any

import torch


class ChunkCache:
    """One action chunk and one position in it for every environment of a batch.

    A row is due for a new query when its chunk has been used for ``interval`` steps, at
    the start of an episode, and whenever :meth:`invalidate` was called. A chunk that
    holds NaN or an infinity (no answer came, or a broken one) is not followed: its row
    is due at the next step. Rows move on their own: episodes may end and start anew in
    any pattern.

    Args:
        interval (int): how many actions of a chunk are used, at least 2.

    Examples:
        >>> cache = ChunkCache(2)
        >>> rows = torch.tensor([0, 1])
        >>> cache.start(rows, num_envs=2).tolist()  # both are due
        [0, 1]
        >>> cache.store(rows, torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))
        >>> cache.read(rows).squeeze(-1).tolist()
        [1.0, 3.0]
        >>> cache.advance(rows[:1], num_envs=2).tolist()  # env 0 has one action left
        []
        >>> cache.read(rows[:1]).squeeze(-1).tolist()
        [2.0]
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self._chunks: torch.Tensor | None = None  # [N, interval, A]
        # Beside the chunks, and read one step later: no wait for a teacher at work.
        self._broken: torch.Tensor | None = None  # bool [N]
        # On the CPU: it decides which rows are asked about. [N]; >= interval: due
        self._position: torch.Tensor | None = None

    def invalidate(self) -> None:
        """Makes every row due."""
        if self._position is not None:
            self._position.fill_(self.interval)

    def start(self, rows: torch.Tensor, num_envs: int) -> torch.Tensor:
        """Begins new episodes in ``rows``; returns the rows that are due: all."""
        self._positions(num_envs)[rows] = self.interval
        return rows

    def advance(self, rows: torch.Tensor, num_envs: int) -> torch.Tensor:
        """Moves ``rows`` on by one step; returns those of them that are due."""
        position = self._positions(num_envs)
        position[rows] += 1
        due = position[rows] >= self.interval
        if self._broken is not None:
            due = due | self._broken.cpu()[rows]
        return rows[due]

    def store(self, rows: torch.Tensor, chunks: torch.Tensor) -> None:
        """Keeps new chunks ``[n, H, A]``, ``H`` at least ``interval``."""
        if chunks.shape[1] < self.interval:
            raise ValueError(
                f"The teacher's chunks hold {chunks.shape[1]} actions, "
                f"replan_interval={self.interval} needs at least as many."
            )
        assert self._position is not None
        chunks = chunks[:, : self.interval]
        if self._chunks is None:
            self._chunks = chunks.new_zeros(self._position.shape[0], *chunks.shape[1:])
        self._chunks = self._chunks.to(chunks.device)
        at = rows.to(chunks.device)
        self._chunks[at] = chunks.to(self._chunks.dtype)
        if self._broken is None:
            self._broken = chunks.new_zeros(self._chunks.shape[0], dtype=torch.bool)
        self._broken = self._broken.to(chunks.device)
        self._broken[at] = _broken(chunks)
        self._position[rows] = 0

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """The current action ``[n, A]`` of ``rows``."""
        assert self._chunks is not None and self._position is not None
        device = self._chunks.device
        return self._chunks[rows.to(device), self._position[rows].to(device)]

    def _positions(self, num_envs: int) -> torch.Tensor:
        if self._position is None:
            self._position = torch.full((num_envs,), self.interval)
        return self._position

    def state(self) -> dict[str, Any]:
        """The content, for a ``state_dict``."""
        if self._chunks is None or self._position is None:
            return {}
        return {"chunks": self._chunks.clone(), "position": self._position.clone()}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state` returned.

        Chunks that were followed for another number of steps are passed over.
        """
        if state and state["chunks"].shape[1] == self.interval:
            self._chunks = state["chunks"].clone()
            self._broken = _broken(self._chunks)
            self._position = state["position"].clone().cpu()


def _broken(chunks: torch.Tensor) -> torch.Tensor:
    return ~chunks.isfinite().flatten(1).all(1)
