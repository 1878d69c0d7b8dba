# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Keys and values of the language model, in memory that is allocated once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# A longer prompt than the ones before would otherwise cost a new allocation each time.
_COLUMN_STEP = 32


class StaticKVCache:
    """A key-value cache that is filled column by column and used again and again.

    transformers' attention layers call :meth:`update` on whatever cache they are given;
    this is the whole interface, in 4.57 as in 5. Positions are Python numbers, so that
    attention reads exactly the filled columns (no mask where the rows are equally long)
    and a captured CUDA graph stays valid: the memory does not move between calls, unless
    a larger batch or a longer prompt needs more.

    Args:
        num_layers (int): of the language model.
        num_heads (int): key-value heads.
        head_dim (int): width of a head.

    Examples:
        >>> import torch
        >>> cache = StaticKVCache(num_layers=1, num_heads=2, head_dim=4)
        >>> cache.start(3, 10, torch.zeros(()))
        >>> columns = torch.ones(3, 2, 5, 4)
        >>> keys, values = cache.update(columns, columns, 0)
        >>> cache.advance(5)
        >>> keys, values = cache.update(columns[:, :, :1], columns[:, :, :1], 0)
        >>> keys.shape
        torch.Size([3, 2, 6, 4])
    """

    def __init__(self, num_layers: int, num_heads: int, head_dim: int) -> None:
        self._num_layers = num_layers
        self._num_heads = num_heads
        self.head_dim = head_dim
        self._memory: Tensor | None = None
        self._rows = 0
        self._filled = 0
        self.allocations = 0

    def start(self, rows: int, columns: int, like: Tensor) -> None:
        """Begins a new batch: nothing filled, room for ``columns``.

        Args:
            rows (int): of the batch.
            columns (int): that will be filled.
            like (torch.Tensor): whose device and dtype to take.
        """
        self._rows, self._filled = rows, 0
        if self._memory is not None:
            there = self._memory.shape
            kind = (self._memory.device, self._memory.dtype) == (
                like.device,
                like.dtype,
            )
            if kind and rows <= there[2] and columns <= there[4]:
                return
            if kind:
                rows, columns = max(rows, there[2]), max(columns, there[4])
        self.release()  # before the new one: both together may not fit
        columns = -(-columns // _COLUMN_STEP) * _COLUMN_STEP
        shape = (self._num_layers, 2, rows, self._num_heads, columns, self.head_dim)
        self._memory = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.allocations += 1

    def update(
        self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds columns ``[B, heads, T, head_dim]``; returns all that are filled."""
        assert self._memory is not None
        end = self._filled + key.shape[2]
        keys, values = self._memory[layer_idx, :, : self._rows, :, :end].unbind(0)
        keys[:, :, self._filled :].copy_(key)
        values[:, :, self._filled :].copy_(value)
        # The first columns attend to themselves alone, and are contiguous as they come.
        return (key, value) if self._filled == 0 else (keys, values)

    def advance(self, columns: int) -> None:
        """Counts columns as filled, after the last layer has added its own."""
        self._filled += columns

    def rewind(self, columns: int) -> None:
        """Goes back to the first ``columns``; what follows will be written again."""
        self._filled = columns

    def release(self) -> None:
        """Gives the memory back; the next :meth:`start` allocates anew."""
        self._memory = None
