# Copyright (c) the torchrl_rpd authors.
#
# This source code is licensed under the MIT license found in the
# LICENSE file in the root directory of this source tree.
"""Octo's transformer over blocks of task, observation and readout tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pre-norm attention and MLP, as flax computes them (tanh GELU, eps 1e-6)."""

    def __init__(self, width: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.up = nn.Linear(width, mlp_dim)
        self.down = nn.Linear(mlp_dim, width)

    def forward(self, x: Tensor, mask: Tensor, rows: Tensor | None = None) -> Tensor:
        """Maps ``[B, L, D]`` to ``[B, L, D]``, or to ``[B, R, D]`` for some rows."""
        normed = self.norm1(x)
        if rows is None:
            asking = normed
        else:
            x, asking = x[:, rows], normed[:, rows]
            mask = mask[..., rows, :]
        query = self._heads(self.query(asking))
        key, value = (self._heads(t) for t in self.key_value(normed).chunk(2, -1))
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.out(read.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.up(self.norm2(x)), approximate="tanh")
        return x + self.down(hidden)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class BlockTransformer(nn.Module):
    """The stack of blocks; only the readouts leave the last one."""

    def __init__(
        self, width: int, num_layers: int, num_heads: int, mlp_dim: int
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_dim) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        """Maps tokens ``[B, L, D]`` to the outputs ``[B, R, D]`` of ``rows`` ``[R]``.

        Nothing else is read from the last block, so nothing else is computed there.
        """
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = block(x, mask, rows if i == last else None)
        return self.norm(x)


def attention_mask(prefix: int, observed: int, horizon: int) -> Tensor:
    """Who may look at whom: bool ``[L, L]``, row looks at column.

    The sequence is the task prefix, then for each time step its observation tokens and
    one readout. The prefix sees itself; observations see the prefix and observations
    up to their own time; readouts see these and readouts up to their own time.

    Examples:
        >>> attention_mask(prefix=1, observed=1, horizon=1).int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
    """
    step = torch.arange(horizon).repeat_interleave(observed + 1)
    time = torch.cat([step.new_full((prefix,), -1), step])
    readout = torch.zeros_like(time, dtype=torch.bool)
    readout[readout_rows(prefix, observed, horizon)] = True
    seen_before = time[None, :] <= time[:, None]
    return seen_before & (~readout[None, :] | readout[:, None])


def readout_rows(prefix: int, observed: int, horizon: int) -> Tensor:
    """Where the readouts stand in the sequence, int64 ``[horizon]``."""
    return prefix + observed + (observed + 1) * torch.arange(horizon)
